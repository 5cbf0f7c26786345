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
from torch import Tensor, nn

from attn_kernels import functional
from attn_kernels.fuse import formulas, layers
from attn_kernels.fuse import operations as ops
from attn_kernels.fuse.evaluate import layer_at
from attn_kernels.fuse.guards import Child, Guard, Path, Reads, is_constant
from attn_kernels.fuse.interpret import TRAINING, Bound, Interpreter, Method
from attn_kernels.fuse.plans import Plan
from attn_kernels.fuse.terms import Refused, Size, Term, Value, X
from attn_kernels.ops._library import PLAIN_TENSORS

# What is called as it is where its result is not understood: it writes nothing but, by its name, its first argument.
VERBATIM_METHODS = frozenset(
    "add add_ mul mul_ sub sub_ div div_ relu relu_ sigmoid sigmoid_ tanh contiguous clone detach float half bfloat16 "
    "double type_as view reshape flatten permute transpose mean sum unsqueeze squeeze clamp clamp_ softmax".split()
)
VERBATIM_FUNCTIONS = {
    *(torch.add, torch.mul, torch.sub, torch.cat, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.flatten),
    *(F.relu, F.relu_, F.relu6, F.silu, F.gelu, F.leaky_relu, F.elu, F.hardswish, F.hardsigmoid, F.mish, F.softmax),
    *(F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate, F.pad),
    *(F.dropout, F.dropout2d),
}
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Method("relu"), Method("relu_")}
_ADDS = {"add", torch.add, Method("add"), Method("add_"), "iadd"}
_IN_PLACE_ADDS = {Method("add_"), "iadd"}
_PRODUCTS = {"mul", torch.mul, Method("mul")}
# Layers whose result is new memory; those that write to nothing else; those that keep (N, C, H, W).
_FRESH = (nn.Conv2d, nn.BatchNorm2d)
_HARMLESS = (*_FRESH, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.Sequential)
_KEEP_RANK = (*_FRESH, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Dropout)


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
    result: Value | None = None

    def operands(self) -> list[Value]:
        return _values((*self.args, *self.kwargs.values()))


def _values(items: tuple | list) -> list[Value]:
    found = []
    for item in items:
        if isinstance(item, Value):
            found.append(item)
        elif isinstance(item, tuple | list):
            found += _values(item)
    return found


class Attention(NamedTuple):
    """Attention among the steps of a block."""

    x: Value
    first: int
    last: int
    child: Path | None = None
    """The path of an attention module; None where the layers stand on the block."""
    plan: Plan | None = None


class Fusion(NamedTuple):
    """A block's forward in which attention is fused."""

    forward: Callable[[nn.Module, Tensor], Tensor]
    guard: Guard
    tails: tuple[Path, ...]
    """The attention modules that are one call with the add and ReLU behind them."""
    plans: tuple[tuple[Plan, bool], ...]
    """Of attention whose layers stand on the block; and whether its add and ReLU are fused, too."""
    source: str


class BlockInterpreter(Interpreter):
    """Interprets a block's forward and records its steps."""

    def __init__(self, block: nn.Module, attention: dict[Path, type[nn.Module]]):
        super().__init__(block)
        self.attention = attention
        self.steps: list[Step] = []
        self.found: list[Attention] = []
        self._recording = True
        self.input = self.record(Step("x", ()), Value(Term("map", 0), _symbols(0)))

    # ---- recording

    def record(self, step: Step, result):
        """Append a step; its result is marked as made by it, whatever tensor it is otherwise."""
        at = len(self.steps)
        self.steps.append(step)
        if isinstance(result, Value):
            result = _copy(result, at, None)
            step.result = result
        elif isinstance(result, tuple):
            result = type(result)(_copy(v, at, i) if isinstance(v, Value) else v for i, v in enumerate(result))
        return result

    def opaque(self, is_map: bool) -> Value:
        """A tensor of which nothing is known, but that it has 4 dimensions if it is a map."""
        at = len(self.steps)
        return Value(Term("map" if is_map else "output", at), _symbols(at))

    def is_map(self, v: Value) -> bool:
        """Whether it is known of what v is made that it has 4 dimensions."""
        return all(part.op != "output" for part in v.term.parts())

    def write(self, v: Value) -> None:
        v.storage.overwritten = True

    def tensor_attribute(self, v: Value, name: str):
        if name in ("shape", "ndim") or (name in ("size", "dim", "ndimension")):
            if self._recording and not self.is_map(v):
                raise Refused("asks for the shape of what a child returns")
            if self._recording:
                self._note_maps(v)
        elif self._recording and name not in ops.METHODS and name in VERBATIM_METHODS:
            return Bound(Method(name), v)
        return super().tensor_attribute(v, name)

    def _note_maps(self, v: Value) -> None:
        """That v has 4 dimensions follows from the layers that made it."""
        for part in v.term.parts():
            if part.op == "map" and part.args[0] > 0:
                step = self.steps[part.args[0]]
                if isinstance(step.target, Child) and step.target.path not in self.attention:
                    self.reads.kind(step.target)

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
        verbatim = isinstance(inner, Method) or _in(inner, VERBATIM_FUNCTIONS)
        if self._recording and verbatim and not isinstance(function, Child):
            self.alive(*args, *kwargs.values())
            owner = (function.owner,) if isinstance(function, Bound) else ()
            return self.call_operation(inner, (*owner, *args), kwargs)
        return super().call(function, args, kwargs)

    def call_operation(self, function: object, args: tuple, kwargs: dict):
        if not self._recording or not _values((*args, *kwargs.values())) or _in(function, ops.BUILTINS.values()):
            return super().call_operation(function, args, kwargs)
        if isinstance(function, Method) and function.name in ("size", "dim", "ndimension"):
            return super().call_operation(function, args, kwargs)
        name = function.name if isinstance(function, Method) else getattr(function, "__name__", "")
        writes = name.endswith("_") or kwargs.get("inplace", False) is True
        try:
            result = super().call_operation(function, args, kwargs)
        except (Refused, KeyError):
            known = name in VERBATIM_METHODS if isinstance(function, Method) else _in(function, VERBATIM_FUNCTIONS)
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
        reads, self.reads, self._recording, norms = self.reads, step.reads, False, list(self.norms)
        try:
            result = super().call_module(child, args, kwargs)
        except Refused:
            self.norms = norms
        finally:
            self.reads, self._recording = reads, True
        first = args[0] if args and isinstance(args[0], Value) else None
        is_leaf = layers.find(type(child.module)) is not None
        if isinstance(result, Value) and result is first:
            step.passes = True
        elif not isinstance(result, Value) or not (is_leaf or result.shape[1:] != first.shape[1:]):
            keeps = type(child.module) in _KEEP_RANK and first is not None and self.is_map(first)
            result = self.opaque(keeps)
        return self.record(step, result)

    # ---- attention whose layers stand on the block

    def _product(self, result):
        """The result of a step, once it was looked at as ``x * gate``."""
        step = self.steps[-1]
        if isinstance(result, Value) and _in(step.target, _PRODUCTS):
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
        plan = formulas.find(_renamed(result.term.replace(x.term, X), names), self.root.module)
        if plan is None:
            return None
        channels = x.shape[1].factor if not x.shape[1].symbols else self._channels.get(x.shape[1].symbols[0])
        if plan.channels not in (None, channels):
            return None
        return Attention(x, min(inside), last, None, replace(plan, channels=channels))

    def _slice(self, last: int, x: int) -> set[int] | None:
        """The steps that lead from step ``x`` to ``last``; None unless they follow each other with no other between."""
        found, todo = set(), [last]
        while todo:
            at = todo.pop()
            if at != x and at not in found:
                if at < x:
                    return None
                found.add(at)
                todo += [v.step for v in self.steps[at].operands()]
                todo += [int(s[1:]) for s in _size_symbols(self.steps[at].args) if int(s[1:]) > x]
        return found if found == set(range(min(found), last + 1)) else None


def _copy(v: Value, step: int, item: int | None) -> Value:
    copy = Value(v.term, v.shape, v.storage, v.natural)
    copy.step, copy.item = step, item
    return copy


def _symbols(at: int) -> list[Size]:
    return [Size(1, (f"{letter}{at}",)) for letter in "NCHW"]


def _in(function: object, known) -> bool:
    try:
        return function in known
    except TypeError:
        return False


def _is_passable(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_passable, value))
    return isinstance(value, Value | Size) or is_constant(value)


def _size_symbols(items: object) -> list[str]:
    if isinstance(items, Size):
        return list(items.symbols)
    return [s for item in items for s in _size_symbols(item)] if isinstance(items, tuple | list) else []


def _renamed(term: Term, names: dict[str, str]) -> Term:
    """The term with other names for the sizes."""
    for part in term.parts():
        if part.op == "size":
            factor, symbols = part.args
            renamed = tuple(sorted(names.get(s, s) for s in symbols))
            if renamed != symbols:
                term = term.replace(part, Term("size", factor, renamed))
    return term


# ---- from steps to a function


def find(block: nn.Module, attention: dict[Path, type[nn.Module]]) -> Fusion | None:
    """The forward of ``block`` with its attention fused; None where there is nothing to fuse beyond the modules.

    Args:
        attention: the paths of the attention modules inside, and the classes that they are of once they are fused.

    Raises:
        Refused: its forward is not understood, or something stands between attention, add and ReLU.
    """
    run = BlockInterpreter(block, attention)
    try:
        result = run.call_module(run.root, (run.input,), {})
    except RecursionError:
        raise Refused("calls functions too deep") from None
    if not isinstance(result, Value):
        raise Refused("returns something else than a tensor")
    run.alive(result)
    return _Writer(run, result).fusion()


class _Tail(NamedTuple):
    """Attention, and the steps of its add and ReLU."""

    attention: Attention
    residual: Value
    add: int
    relu: int
    inplace: bool
    passed: tuple[int, ...]


class _Writer:
    """Writes the function of a block's steps."""

    def __init__(self, run: BlockInterpreter, result: Value):
        self.run, self.result, self.steps = run, result, run.steps
        self.users: dict[int, list[int]] = {at: [] for at in range(len(self.steps))}
        for at, step in enumerate(self.steps):
            used = {v.step for v in step.operands()}
            used |= {int(s[1:]) for s in _size_symbols((*step.args, *step.kwargs.values()))}
            for v in used:
                self.users[v].append(at)
        self.users[result.step].append(len(self.steps))

    def fusion(self) -> Fusion | None:
        run = self.run
        tails = {}
        for attention in run.found:
            tail = self.tail(attention)
            if tail is not None:
                tails[attention.last] = tail
        inline = [a for a in run.found if a.child is None and (a.last in tails or self.is_closed(a))]
        if not tails and not inline:
            return None
        for attention in run.found:
            if attention.last in tails or attention in inline:
                self.note(attention, tails.get(attention.last))
        plans: dict[str, object] = {}
        lines = self.lines(tails, [a for a in inline if a.last not in tails], plans)
        source = "\n    ".join(["def forward(m, v0):", "c = m._modules", *lines, f"return {_name(self.result)}"]) + "\n"
        functions = {f"f{i}": f for i, f in enumerate(self.functions)}
        names = {**functions, **plans, "torch": torch, "F": F, "functional": functional}
        names |= {"add_relu": add_relu, "alike": alike}
        exec(compile(source, f"<{type(run.root.module).__name__} with its attention fused>", "exec"), names)
        found = tuple(t.attention.child for t in tails.values() if t.attention.child is not None)
        of_block = tuple((a.plan, a.last in tails) for a in inline)
        return Fusion(names["forward"], run.reads.guard(), found, of_block, source)

    def is_closed(self, a: Attention) -> bool:
        """Whether nothing else uses what is between an attention's input and its output."""
        return all(user <= a.last for at in range(a.first, a.last) for user in self.users[at])

    def note(self, attention: Attention, tail: _Tail | None) -> None:
        """Add to the reads what the replaced steps depend on."""
        reads, root = self.run.reads, self.run.root.module
        replaced = range(attention.first, attention.last + 1) if attention.child is None else ()
        for at in (*replaced, *(tail.passed if tail else ())):
            reads.update(self.steps[at].reads)
        if attention.child is not None:
            owner = Child(attention.child, layer_at(root, attention.child))
            reads.kind(owner, self.run.attention[attention.child])
        if tail is not None and isinstance(self.steps[tail.relu].target, Child):
            reads.update(self.steps[tail.relu].reads)

    # ---- the add and ReLU behind attention

    def tail(self, attention: Attention) -> _Tail | None:
        if not self.is_closed(attention):
            return None
        at, passed = attention.last, []
        while len(self.users[at]) == 1 and (user := self.users[at][0]) < len(self.steps):
            step = self.steps[user]
            if not step.passes:
                break
            at = user
            passed.append(at)
        add = self.only_user(at)
        if add is None:
            return None
        if (reason := self.drops(add)) is not None:
            raise Refused(reason)
        residual, inplace = self.added_to(at, add)
        relu = None if residual is None else self.only_user(add)
        if relu is None or relu != add + 1 or not self.is_relu(relu):
            return None
        between = [i for i in range(attention.last + 1, add) if i not in passed]
        if between and not self.commutes(attention, between):
            raise Refused("runs something between its attention and the sum that may change either")
        return _Tail(attention, residual, add, relu, inplace, tuple(passed))

    def only_user(self, at: int) -> int | None:
        users = self.users[at]
        return users[0] if len(users) == 1 and users[0] < len(self.steps) else None

    def drops(self, at: int) -> str | None:
        """Why a step between attention and a sum is in the way, if it is a module that drops at random."""
        target = self.steps[at].target
        if not isinstance(target, Child):
            return None
        p = getattr(target.module, "drop_prob", getattr(target.module, "p", None))
        return f"drops by {target.name} with probability {p:.2g}" if isinstance(p, float) and p > 0 else None

    def added_to(self, at: int, add: int) -> tuple[Value | None, bool]:
        """What is added to the result of a step, and whether in its place."""
        step = self.steps[add]
        if not _in(step.target, _ADDS) or len(step.args) != 2 or step.kwargs:
            return None, False
        inplace = step.target in _IN_PLACE_ADDS
        first, second = step.args
        if not isinstance(first, Value) or not isinstance(second, Value):
            return None, False
        other = second if first.step == at else first
        # In place of the other one, a tensor changes that may be seen elsewhere.
        if other.step == at or (inplace and first.step != at):
            return None, False
        return other, inplace

    def is_relu(self, at: int) -> bool:
        step = self.steps[at]
        if isinstance(step.target, Child):
            return type(step.target.module) is nn.ReLU and len(step.args) == 1 and not step.kwargs
        options = {**dict(zip(("inplace",), step.args[1:], strict=False)), **step.kwargs}
        return _in(step.target, _RELUS) and set(options) <= {"inplace"}

    def commutes(self, attention: Attention, between: list[int]) -> bool:
        """Whether attention may run after these steps: none writes to its input or shares its layers."""
        root, x = self.run.root.module, attention.x
        modules = [self.steps[at].target.module for at in between if isinstance(self.steps[at].target, Child)]
        theirs = {m for module in modules for m in module.modules()}
        if attention.child is not None:
            ours = set(layer_at(root, attention.child).modules())
        else:
            targets = [self.steps[at].target for at in range(attention.first, attention.last + 1)]
            ours = {m for t in targets if isinstance(t, Child) for m in t.module.modules()}
        if ours & theirs or any(x.step == v.step for at in between for v in self.steps[at].operands()):
            return False
        maker = self.steps[x.step].target
        if isinstance(maker, Child) and type(maker.module) in _FRESH and self.is_private(attention):
            self.run.reads.kind(maker)
            return True
        if all(isinstance(self.steps[at].target, Child) and _is_harmless(self.steps[at].target) for at in between):
            for at in between:
                for name, module in self.steps[at].target.module.named_modules():
                    path = (*self.steps[at].target.path, *(name.split(".") if name else ()))
                    self.run.reads.kind(Child(path, module))
            return True
        return False

    def is_private(self, attention: Attention) -> bool:
        """Whether nothing but attention uses its input."""
        return all(attention.first <= user <= attention.last for user in self.users[attention.x.step])

    # ---- source

    def lines(self, tails: dict[int, _Tail], inline: list[Attention], plans: dict[str, object]) -> list[str]:
        self.functions: list[object] = []
        skipped: set[int] = set()
        for tail in tails.values():
            a = tail.attention
            skipped |= {*range(a.first, a.last + 1), *tail.passed, tail.add, tail.relu}
        by_relu = {t.relu: t for t in tails.values()}
        by_last = {a.last: a for a in inline}
        for a in inline:
            skipped |= set(range(a.first, a.last + 1))
        lines: list[str] = []
        for at in range(1, len(self.steps)):
            if at in by_relu:
                lines += self.fused_tail(by_relu[at], plans)
            elif at in by_last:
                a = by_last[at]
                plan = _named(plans, a.plan)
                x = _name(a.x)
                lines += [f"if fits({plan}, m, {x}):", f"    v{at} = {plan}.compute(m, {x}, None, None, functional)"]
                lines += ["else:", *("    " + self.line(i) for i in range(a.first, a.last + 1))]
            elif at not in skipped:
                lines.append(self.line(at))
        plans["fits"] = fits
        return lines

    def fused_tail(self, tail: _Tail, plans: dict[str, object]) -> list[str]:
        a, y = tail.attention, f"v{tail.relu}"
        x, residual = _name(a.x), _name(tail.residual)
        if a.child is not None:
            return [f"{y} = add_relu({_child(a.child)}, {x}, {residual}, {tail.inplace})"]
        plan = _named(plans, a.plan)
        steps = [*range(a.first, a.last + 1), *tail.passed, tail.add, tail.relu]
        return [
            f"if fits({plan}, m, {x}) and alike({x}, {residual}):",
            f"    {y} = {plan}.compute(m, {x}, {residual}, 'relu', functional)",
            "else:",
            *("    " + self.line(at) for at in steps),
        ]

    def line(self, at: int) -> str:
        step = self.steps[at]
        if step.target == "index":
            return f"v{at} = {_name(step.args[0])}[{', '.join(map(_index, step.args[1]))}]"
        args = [self.expression(a) for a in step.args]
        kwargs = [f"{name}={self.expression(a)}" for name, a in step.kwargs.items()]
        target = step.target
        if isinstance(target, Child):
            return f"v{at} = {_child(target.path)}({', '.join(args + kwargs)})"
        if isinstance(target, Method):
            return f"v{at} = {args[0]}.{target.name}({', '.join(args[1:] + kwargs)})"
        if isinstance(target, str):
            signs = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}
            if target in signs:
                return f"v{at} = {args[0]} {signs[target]} {args[1]}"
            # The name on the left is the one that has been written to: both are the same tensor.
            return f"v{at} = {args[0]}; v{at} {signs[target[1:]]}= {args[1]}"
        self.functions.append(target)
        return f"v{at} = f{len(self.functions) - 1}({', '.join(args + kwargs)})"

    def expression(self, value: object) -> str:
        if isinstance(value, Value):
            return _name(value)
        if isinstance(value, Size):
            sizes = [f"v{s[1:]}.shape[{'NCHW'.index(s[0])}]" for s in value.symbols]
            return " * ".join([*sizes, *([str(value.factor)] if value.factor != 1 or not sizes else [])])
        if value is TRAINING:
            return "m.training"
        if isinstance(value, tuple | list):
            items = ", ".join(map(self.expression, value))
            return f"[{items}]" if isinstance(value, list) else f"({items},)" if value else "()"
        if not is_constant(value):
            raise Refused(f"passes a {type(value).__name__} to a function")
        return repr(value)


def _named(names: dict[str, object], value: object) -> str:
    name = f"plan{len(names)}"
    names[name] = value
    return name


def _name(v: Value) -> str:
    return f"v{v.step}" if v.item is None else f"v{v.step}[{v.item}]"


def _child(path: Path) -> str:
    return "c" + "._modules".join(f"[{name!r}]" for name in path)


def _index(item: object) -> str:
    return "None" if item is None else "..." if item is Ellipsis else ":"


def _is_harmless(child: Child) -> bool:
    """Whether a module writes to nothing but its own memory."""
    return all(type(m) in _HARMLESS for m in child.module.modules())


# ---- what the function calls


def fits(plan: Plan, module: nn.Module, x: object) -> bool:
    """Whether the plan of layers on a block stands for them on ``x``."""
    if type(x) not in PLAIN_TENSORS or x.dim() != 4 or not x.is_floating_point():
        return False
    return not functional.why_not(x) and not plan.why_not(module, x)


def add_relu(gate: nn.Module, x: Tensor, residual: Tensor, inplace: bool) -> Tensor:
    """``relu(gate(x) + residual)`` by a fused module."""
    if alike(x, residual):
        if not hasattr(gate, "fused_add_relu"):  # a module of attn_kernels
            return gate.forward(x, residual, "relu")
        fused = gate.fused_add_relu(x, residual)
        if fused is not None:
            return fused
    y = gate(x)
    if inplace:
        y += residual
    else:
        y = y + residual
    return torch.relu(y)


def alike(x: object, residual: object) -> bool:
    """Whether the residual may enter a kernel beside x: no other shape that would broadcast, no dtype that promotes."""
    plain = PLAIN_TENSORS.issuperset((type(x), type(residual)))
    return plain and residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
