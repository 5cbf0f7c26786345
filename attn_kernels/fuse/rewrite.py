"""From the steps of a block to its forward with attention fused: the source of a function, and what it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_kernels import functional
from attn_kernels.fuse.blocks import Attention, BlockInterpreter, size_symbols
from attn_kernels.fuse.evaluate import layer_at
from attn_kernels.fuse.frame import Method, is_in
from attn_kernels.fuse.guards import Child, Guard, Path, is_constant
from attn_kernels.fuse.interpret import TRAINING
from attn_kernels.fuse.plans import Plan
from attn_kernels.fuse.terms import Refused, Size, Value
from attn_kernels.ops.common.operator import PLAIN_TENSORS

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Method("relu"), Method("relu_")}
_ADDS = {"add", torch.add, Method("add"), Method("add_"), "iadd"}
_IN_PLACE_ADDS = {Method("add_"), "iadd"}
# Layers whose result is new memory, and those that write to nothing else.
_FRESH = (nn.Conv2d, nn.BatchNorm2d)
_HARMLESS = (*_FRESH, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.Sequential)


class Inline(NamedTuple):
    """Attention whose layers stand on a block."""

    plan: Plan
    epilogue: bool
    """Whether the add and ReLU behind it are fused with it."""
    forward: Callable[[nn.Module, Tensor], Tensor]
    """The steps that the plan stands for."""


class Fusion(NamedTuple):
    """A block's forward in which attention is fused."""

    forward: Callable[[nn.Module, Tensor], Tensor]
    guard: Guard
    epilogues: tuple[Path, ...]
    """The attention modules that are one call with the add and ReLU behind them."""
    inline: tuple[Inline, ...]
    deferred: tuple[Path, ...]
    """Those of them that run later than they did: a block with one that has changed runs as it was written."""
    exact_ties: bool
    source: str


def find(block: nn.Module, attention: dict[Path, type[nn.Module]], exact_ties: bool = True) -> Fusion | None:
    """The forward of ``block`` with its attention fused; None where there is nothing to fuse beyond the modules.

    Args:
        attention: the paths of the attention modules inside, and the classes that they are of once they are fused.
        exact_ties: that of ``fuse_``.

    Raises:
        Refused: its forward is not understood, or something stands between attention, add and ReLU.
    """
    try:
        run = BlockInterpreter(block, attention)
        result = run.call_module(run.root, (run.input,), {})
        if not isinstance(result, Value):
            raise Refused("returns something else than a tensor")
        run.alive(result)
        return _Writer(run, result, exact_ties).fusion()
    except Refused:
        raise
    except Exception as error:  # of any kind: a block that cannot be read is left as it is
        raise Refused(f"could not be read: {type(error).__name__}: {error}") from error


class _Epilogue(NamedTuple):
    """Attention, and the steps of its add and ReLU."""

    attention: Attention
    residual: Value
    add: int
    relu: int
    inplace: bool
    passed: tuple[int, ...]
    deferred: bool
    """Whether attention is moved behind other steps."""


class _Writer:
    """Writes the function of a block's steps."""

    def __init__(self, run: BlockInterpreter, result: Value, exact_ties: bool):
        self.exact_ties = exact_ties
        self.run, self.result, self.steps = run, result, run.steps
        self.names: dict[str, object] = {}
        self.users: dict[int, list[int]] = {at: [] for at in range(len(self.steps))}
        for at, step in enumerate(self.steps):
            used = {v.step for v in step.operands()}
            used |= {int(s[1:]) for s in size_symbols((*step.args, *step.kwargs.values()))}
            for v in used:
                self.users[v].append(at)
        self.users[result.step].append(len(self.steps))

    def fusion(self) -> Fusion | None:
        run = self.run
        epilogues = {}
        for attention in run.found:
            epilogue = self.epilogue(attention)
            if epilogue is not None and all(epilogue.relu != other.relu for other in epilogues.values()):
                epilogues[attention.last] = epilogue
        inline = [a for a in run.found if a.child is None and (a.last in epilogues or self.is_closed(a))]
        if not epilogues and not inline:
            return None
        for attention in run.found:
            if attention.last in epilogues or attention in inline:
                self.note(attention, epilogues.get(attention.last))
        lines = self.lines(epilogues, [a for a in inline if a.last not in epilogues])
        source = "\n    ".join(["def forward(m, v0):", "c = m._modules", *lines, f"return {_name(self.result)}"]) + "\n"
        found = tuple(t.attention.child for t in epilogues.values() if t.attention.child is not None)
        of_block = tuple(Inline(self.plan(a), a.last in epilogues, self.compiled(self.steps_of(a))) for a in inline)
        children = [t for t in epilogues.values() if t.attention.child is not None]
        deferred = tuple(t.attention.child for t in children if t.deferred)
        return Fusion(self.compiled(source), run.reads.guard(), found, of_block, deferred, self.exact_ties, source)

    def compiled(self, source: str) -> Callable[[nn.Module, Tensor], Tensor]:
        return _compiled(source, type(self.run.root.module).__name__, tuple(self.names.items()))

    def steps_of(self, a: Attention) -> str:
        """The source of the steps that attention is made of, as a function of its input."""
        steps = range(a.first, a.last + 1)
        args = [(*self.steps[at].args, *self.steps[at].kwargs.values()) for at in steps]
        owners = sorted({int(s[1:]) for arg in args for s in size_symbols(arg)} - {a.x.step, *steps})
        sizes = [f"v{owner} = x" for owner in owners]  # they are asked for their shapes, which are x's
        x = "x" if a.x.item is None else f"{{{a.x.item}: x}}"
        head = "def forward(m, x):", "c = m._modules", f"v{a.x.step} = {x}"
        return "\n    ".join([*head, *sizes, *map(self.line, steps), f"return v{a.last}"]) + "\n"

    def plan(self, a: Attention) -> Plan:
        return replace(a.plan, ties=a.plan.ties and self.exact_ties)

    def is_closed(self, a: Attention) -> bool:
        """Whether nothing outside uses what attention computes between its input and its output."""
        return all(user <= a.last for at in range(a.first, a.last) for user in self.users[at])

    def note(self, attention: Attention, epilogue: _Epilogue | None) -> None:
        """Add to the reads what the replaced steps depend on."""
        reads, root = self.run.reads, self.run.root.module
        replaced = range(attention.first, attention.last + 1) if attention.child is None else ()
        for at in (*replaced, *(epilogue.passed if epilogue else ())):
            reads.update(self.steps[at].reads)
        if attention.child is not None:
            owner = Child(attention.child, layer_at(root, attention.child))
            cls = self.run.attention[attention.child]
            reads.kind(owner, cls)
            for name in ("forward", "attend"):
                if hasattr(cls, name):
                    reads.class_attribute(cls, name, getattr(cls, name))
        if epilogue is not None and isinstance(self.steps[epilogue.relu].target, Child):
            reads.update(self.steps[epilogue.relu].reads)

    # ---- the add and ReLU behind attention

    def epilogue(self, attention: Attention) -> _Epilogue | None:
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
        return _Epilogue(attention, residual, add, relu, inplace, tuple(passed), bool(between))

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
        """What is added to the result of a step, and whether the sum takes that result's place in memory."""
        step = self.steps[add]
        if not is_in(step.target, _ADDS) or len(step.args) != 2 or step.kwargs:
            return None, False
        inplace = step.target in _IN_PLACE_ADDS
        first, second = step.args
        if not isinstance(first, Value) or not isinstance(second, Value):
            return None, False
        other = second if first.step == at else first
        # A sum in place of the other summand changes a tensor that may be in use elsewhere.
        if other.step == at or (inplace and first.step != at):
            return None, False
        return other, inplace

    def is_relu(self, at: int) -> bool:
        step = self.steps[at]
        if step.result is None or step.result.term.op != "relu":
            return False
        if isinstance(step.target, Child):
            return type(step.target.module) is nn.ReLU and len(step.args) == 1 and not step.kwargs
        options = {**dict(zip(("inplace",), step.args[1:], strict=False)), **step.kwargs}
        return is_in(step.target, _RELUS) and set(options) <= {"inplace"}

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
        maker = self.steps[x.step]
        is_fresh = maker.fresh or (isinstance(maker.target, Child) and type(maker.target.module) in _FRESH)
        if is_fresh and self.is_private(attention):
            self.run.reads.kind(maker.target)
            if maker.fresh:
                self.run.reads.update(maker.reads)
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

    def lines(self, epilogues: dict[int, _Epilogue], inline: list[Attention]) -> list[str]:
        skipped: set[int] = set()
        for epilogue in epilogues.values():
            a = epilogue.attention
            skipped |= {*range(a.first, a.last + 1), *epilogue.passed, epilogue.add, epilogue.relu}
        by_relu = {t.relu: t for t in epilogues.values()}
        by_last = {a.last: a for a in inline}
        for a in inline:
            skipped |= set(range(a.first, a.last + 1))
        lines: list[str] = []
        for at in range(1, len(self.steps)):
            if at in by_relu:
                lines += self.fused_epilogue(by_relu[at])
            elif at in by_last:
                a = by_last[at]
                plan, x = self.named(self.plan(a)), _name(a.x)
                lines += [f"if fits({plan}, m, {x}):", f"    v{at} = {plan}.compute(m, {x}, None, None, functional)"]
                lines += ["else:", *("    " + self.line(i) for i in range(a.first, a.last + 1))]
            elif at not in skipped:
                lines.append(self.line(at))
        return lines

    def named(self, value: object) -> str:
        """The name by which the source speaks of a function or plan."""
        for name, known in self.names.items():
            if known is value:
                return name
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def fused_epilogue(self, epilogue: _Epilogue) -> list[str]:
        a, y = epilogue.attention, f"v{epilogue.relu}"
        x, residual = _name(a.x), _name(epilogue.residual)
        if a.child is not None:
            return [f"{y} = add_relu({_child(a.child)}, {x}, {residual}, {epilogue.inplace})"]
        plan = self.named(self.plan(a))
        steps = [*range(a.first, a.last + 1), *epilogue.passed, epilogue.add, epilogue.relu]
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
            # Both names are of one tensor; the one on the left was written to.
            return f"v{at} = {args[0]}; v{at} {signs[target[1:]]}= {args[1]}"
        return f"v{at} = {self.named(target)}({', '.join(args + kwargs)})"

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
        return f"float({str(value)!r})" if type(value) is float else repr(value)  # repr(inf) is a name


def _name(v: Value) -> str:
    return f"v{v.step}" if v.item is None else f"v{v.step}[{v.item}]"


def _child(path: Path) -> str:
    return "c" + "._modules".join(f"[{name!r}]" for name in path)


def _index(item: object) -> str:
    return "None" if item is None else "..." if item is Ellipsis else ":"


def _is_harmless(child: Child) -> bool:
    """Whether a module writes to nothing but its own memory."""
    return all(type(m) in _HARMLESS for m in child.module.modules())


@functools.cache
def _compiled(source: str, name: str, names: tuple[tuple[str, object], ...]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The same function for the same source, so that blocks that are alike are of one class."""
    namespace = {**dict(names), "functional": functional, "add_relu": add_relu, "alike": alike, "fits": fits}
    exec(compile(source, f"<{name} with its attention fused>", "exec"), namespace)
    return namespace["forward"]


# ---- what the function calls


def fits(plan: Plan, module: nn.Module, x: object) -> bool:
    """Whether the plan of layers on a block gives what they give for ``x``."""
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
