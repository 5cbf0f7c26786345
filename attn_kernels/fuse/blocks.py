"""A block's forward as a list of steps, its attention and the add and ReLU behind it as one of them.

The block is interpreted like an attention module, but its children are called as they are, whatever they do: only the
path between them must be understood. Where an attention module's output, or the product with a gate whose layers stand
on the block, is added to something and goes through a ReLU, and nothing else uses what is in between, that is one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attn_kernels.fuse import formulas, layers
from attn_kernels.fuse.builtin import BUILTINS
from attn_kernels.fuse.frame import Bound, Method, is_in
from attn_kernels.fuse.guards import Child, Path, Reads, is_constant
from attn_kernels.fuse.interpret import Interpreter
from attn_kernels.fuse.plans import Plan
from attn_kernels.fuse.registry import METHODS
from attn_kernels.fuse.terms import Refused, Size, Storage, Term, Value, X

# Where their results are not understood, these are called as they are: they write to nothing, but for those whose name
# says that they write to their first argument.
_METHODS = """
    add add_ mul mul_ sub sub_ div div_ relu relu_ sigmoid sigmoid_ tanh clamp clamp_ softmax mean sum clone detach
    float half bfloat16 double type_as contiguous view reshape flatten permute transpose unsqueeze squeeze
"""
VERBATIM_METHODS = frozenset(_METHODS.split())
VERBATIM_FUNCTIONS = {
    *(torch.add, torch.mul, torch.sub, torch.cat, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.flatten),
    *(F.relu, F.relu_, F.relu6, F.silu, F.gelu, F.leaky_relu, F.elu, F.hardswish, F.hardsigmoid, F.mish, F.softmax),
    *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, F.pad),
    *(F.dropout, F.dropout2d),
}
_PRODUCTS = {"mul", torch.mul, Method("mul")}
# Layers that keep (N, C, H, W).
_KEEP_RANK = (
    *(nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.Dropout),
    *(nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish),
)


@dataclass
class Step:
    """One call of a block's forward: of a module, a function, a method or an operator."""

    target: object
    args: tuple
    kwargs: dict = field(default_factory=dict)
    reads: Reads = field(default_factory=Reads)
    """What the symbolic value of the result depends on, where the step is replaced."""
    passes: bool = False
    """Whether it is a module that returns its argument, a dropout of nothing say."""
    fresh: bool = False
    """Whether it is a module that returns new memory."""
    result: Value | None = None

    def operands(self) -> list[Value]:
        return tensors_in((*self.args, *self.kwargs.values()))


def tensors_in(items: tuple | list) -> list[Value]:
    found = []
    for item in items:
        if isinstance(item, Value):
            found.append(item)
        elif isinstance(item, tuple | list):
            found += tensors_in(item)
    return found


class Attention(NamedTuple):
    """Attention among the steps of a block."""

    x: Value
    first: int
    last: int
    child: Path | None = None
    """The path of an attention module; None where the layers stand on the block."""
    plan: Plan | None = None


class BlockInterpreter(Interpreter):
    """Interprets a block's forward and records its steps."""

    def __init__(self, block: nn.Module, attention: dict[Path, type[nn.Module]]):
        super().__init__(block)
        self.attention = attention
        self.steps: list[Step] = []
        self.found: list[Attention] = []
        self._recording = True
        self.input = self.record(Step("x", ()), Value(Term("map", 0), _symbols(0), Storage(fresh=False)))

    # ---- recording

    def record(self, step: Step, result):
        """Append a step, and note that its result was made by it."""
        at = len(self.steps)
        self.steps.append(step)
        if isinstance(result, Value):
            result = _copy(result, at, None)
            step.result = result
        elif isinstance(result, tuple):
            result = type(result)(_copy(v, at, i) if isinstance(v, Value) else v for i, v in enumerate(result))
        return result

    def opaque(self, is_map: bool) -> Value:
        """A tensor of which nothing else is known than whether it is a map, with 4 dimensions."""
        at = len(self.steps)
        return Value(Term("map" if is_map else "output", at), _symbols(at), Storage(fresh=False))

    def is_map(self, v: Value) -> bool:
        """Whether v is known to have 4 dimensions, by the layers that made it."""
        return all(part.op != "output" for part in v.term.parts())

    def write(self, v: Value) -> None:
        v.storage.overwritten = True

    def tensor_attribute(self, v: Value, name: str):
        if name in ("shape", "ndim", "size", "dim", "ndimension"):
            if self._recording and not self.is_map(v):
                raise Refused("asks for the shape of what a child returns")
            if self._recording:
                self._note_maps(v)
        elif self._recording and name not in METHODS and name in VERBATIM_METHODS:
            return Bound(Method(name), v)
        return super().tensor_attribute(v, name)

    def _note_maps(self, v: Value) -> None:
        """Note that v has 4 dimensions, and its sizes, which follow from the layers that made it."""
        seen, todo = set(), [v.step]
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            step = self.steps[at]
            if isinstance(step.target, Child) and step.target.path not in self.attention:
                self.reads.kind(step.target)
                if step.result is not None and step.result.term.op not in ("map", "output"):
                    self.reads.update(step.reads)
            todo += [operand.step for operand in step.operands()]

    # ---- steps

    def binary(self, op: str | None, a: object, b: object):
        return self._operator(op, a, b, super().binary)

    def augmented(self, op: str | None, a: object, b: object):
        if not isinstance(a, Value):
            return self.binary(op, a, b)
        return self._operator(f"i{op}", a, b, lambda _, p, q: super(BlockInterpreter, self).augmented(op, p, q))

    def _operator(self, name: str | None, a: object, b: object, compute: Callable):
        if not self._recording or not (isinstance(a, Value) or isinstance(b, Value)):
            return compute(name, a, b)
        self.alive(a, b)
        try:
            result = compute(name, a, b)
        except Refused:
            if name is None or name.removeprefix("i") not in ("add", "sub", "mul", "div"):
                raise
            result = self.opaque(all(isinstance(v, Value) and self.is_map(v) for v in (a, b)))
            if name.startswith("i"):
                self.write(a)
        return self._product(self.record(Step(name, (a, b)), result))

    def index(self, v: Value, indices: list) -> Value:
        result = super().index(v, indices)
        return self.record(Step("index", (v, tuple(indices))), result) if self._recording else result

    def call(self, function: object, args: tuple, kwargs: dict):
        inner = function.function if isinstance(function, Bound) else function
        verbatim = isinstance(inner, Method) or is_in(inner, VERBATIM_FUNCTIONS)
        if self._recording and verbatim and not isinstance(function, Child):
            self.alive(*args, *kwargs.values())
            owner = (function.owner,) if isinstance(function, Bound) else ()
            return self.call_operation(inner, (*owner, *args), kwargs)
        return super().call(function, args, kwargs)

    def call_operation(self, function: object, args: tuple, kwargs: dict):
        if not self._recording or not tensors_in((*args, *kwargs.values())) or is_in(function, BUILTINS.values()):
            return super().call_operation(function, args, kwargs)
        if isinstance(function, Method) and function.name in ("size", "dim", "ndimension"):
            return super().call_operation(function, args, kwargs)
        name = function.name if isinstance(function, Method) else getattr(function, "__name__", "")
        writes = name.endswith("_") or kwargs.get("inplace", False) is True
        try:
            result = super().call_operation(function, args, kwargs)
        except (Refused, KeyError):
            known = name in VERBATIM_METHODS if isinstance(function, Method) else is_in(function, VERBATIM_FUNCTIONS)
            if not known or any(type(a) is bool for a in args):  # a bool may be an inplace
                raise
            result = self.opaque(False)
            if writes:
                self.write(args[0])
        return self._product(self.record(Step(function, args, kwargs), result))

    def call_module(self, child: Child, args: tuple, kwargs: dict):
        if child.path == () or not self._recording:
            return super().call_module(child, args, kwargs)
        if not all(_is_passable(a) for a in (*args, *kwargs.values())):
            raise Refused(f"passes something else than tensors and constants to {child.name}")
        self.alive(*args, *kwargs.values())
        step = Step(child, args, kwargs)
        if child.path in self.attention:
            result = self.record(step, self.opaque(len(args) == 1 and isinstance(args[0], Value)))
            if len(args) == 1 and not kwargs and isinstance(args[0], Value):
                at = len(self.steps) - 1
                self.found.append(Attention(args[0], at, at, child.path))
            return result
        result = None
        reads, self.reads, self._recording, norms = self.reads, step.reads, False, dict(self.norms)
        try:
            result = super().call_module(child, args, kwargs)
        except Refused:
            self.norms = norms
        finally:
            self.reads, self._recording = reads, True
        first = args[0] if args and isinstance(args[0], Value) else None
        step.fresh = isinstance(result, Value) and result.storage.fresh
        is_leaf = layers.find(type(child.module)) is not None
        if isinstance(result, Value) and result is first:
            step.passes = True
        elif not isinstance(result, Value) or not (is_leaf or first is None or result.shape[1:] != first.shape[1:]):
            keeps = type(child.module) in _KEEP_RANK and first is not None and self.is_map(first)
            result = self.opaque(keeps)
        return self.record(step, result)

    # ---- attention whose layers stand on the block

    def _product(self, result):
        """The result of a step, after a look at whether it is ``x * gate``."""
        step = self.steps[-1]
        if isinstance(result, Value) and is_in(step.target, _PRODUCTS):
            candidates = [v for v in step.args if isinstance(v, Value) and v.step is not None]
            inner = [a.x for v in candidates for a in self.found if a.last == v.step and a.child is None]
            for x in (*inner, *candidates):
                attention = self._inline(x, result)
                if attention is not None:
                    self.found = [a for a in self.found if not attention.first <= a.last <= attention.last]
                    self.found.append(attention)
                    break
        return result

    def _inline(self, x: Value, result: Value) -> Attention | None:
        """The attention whose input is ``x`` and whose last step is the last one."""
        symbols = [s for dim in x.shape for s in dim.symbols]
        if len(x.shape) != 4 or x.expanded or [s[0] for s in symbols if s[0] != "C"] != ["N", "H", "W"]:
            return None
        last = len(self.steps) - 1
        inside = self._slice(last, x.step)
        if inside is None:
            return None
        names = dict(zip(symbols, (s[0] for s in symbols), strict=True))
        term = _renamed(result.term.replace(x.term, X), names)
        plan = formulas.find(term, self.root.module, self.reads)
        if plan is None:
            return None
        channels = x.shape[1].factor if not x.shape[1].symbols else self._channels.get(x.shape[1].symbols[0])
        if plan.channels not in (None, channels):
            return None
        return Attention(x, min(inside), last, None, replace(plan, channels=channels))

    def _slice(self, last: int, x: int) -> set[int] | None:
        """The steps that lead from step ``x`` to ``last``; None if there are others between them."""
        found, todo = set(), [last]
        while todo:
            at = todo.pop()
            if at != x and at not in found:
                if at < x:
                    return None
                found.add(at)
                todo += [v.step for v in self.steps[at].operands()]
                todo += [int(s[1:]) for s in size_symbols(self.steps[at].args) if int(s[1:]) > x]
        return found if found == set(range(min(found), last + 1)) else None


def _copy(v: Value, step: int, item: int | None) -> Value:
    copy = Value(v.term, v.shape, v.storage, v.natural)
    copy.step, copy.item = step, item
    return copy


def _symbols(at: int) -> list[Size]:
    return [Size(1, (f"{letter}{at}",)) for letter in "NCHW"]


def _is_passable(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_passable, value))
    return isinstance(value, Value | Size) or is_constant(value)


def size_symbols(items: object) -> list[str]:
    if isinstance(items, Size):
        return list(items.symbols)
    return [s for item in items for s in size_symbols(item)] if isinstance(items, tuple | list) else []


def _renamed(term: Term, names: dict[str, str]) -> Term:
    """The term with other names for the sizes."""
    for part in term.parts():
        if part.op == "size":
            factor, symbols = part.args
            renamed = tuple(sorted(names.get(s, s) for s in symbols))
            if renamed != symbols:
                term = term.replace(part, Term("size", factor, renamed))
    return term
