"""From a module to what the kernels compute in its place, or the reason why there is nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from attn_kernels.fuse import formulas
from attn_kernels.fuse.guards import Child, Guard
from attn_kernels.fuse.interpret import Interpreter, input_value
from attn_kernels.fuse.plans import Plan
from attn_kernels.fuse.terms import Refused, Term, Value


@dataclass(frozen=True)
class Recognised:
    """What a module computes, and the function that notices when it may compute something else."""

    plan: Plan
    guard: Guard


class NoFormula(Refused):
    """A forward that was understood whole, and that no kernel computes."""

    def __init__(self, term: Term):
        super().__init__("computes no formula that the kernels have")
        self.term = term


def read(module: nn.Module, layout: str = "NCHW") -> tuple[Term, Interpreter]:
    """The term that a module computes of an x of (N, C, H, W), or (N, H, W, C), and the run that found it.

    Raises:
        Refused: it is not understood, or gives no new tensor of x's shape.
    """
    run = Interpreter(module)
    x = input_value(layout)
    try:
        result = run.call_module(Child((), module), (x,), {})
    except Refused:
        raise
    except Exception as error:  # of any kind: a module that cannot be read is left as it is
        raise Refused(f"could not be read: {type(error).__name__}: {error}") from error
    if not isinstance(result, Value):
        raise Refused("returns something else than a tensor")
    run.alive(result)
    same = len(result.shape) == 4 and all(map(run.same, result.shape, x.shape))
    if not same or result.expanded or result.storage.is_input:
        raise Refused("returns no new tensor of x's shape")
    if not set(run.norms) <= set(result.term.parts()):
        raise Refused("has a norm whose result it does not use")
    return result.term, run


def recognise(module: nn.Module) -> Recognised:
    """What the kernels compute in place of ``module``.

    Raises:
        Refused: nothing; the message says why.
    """
    try:
        return _recognise(module, "NCHW")
    except Refused as refused:
        try:
            found = _recognise(module, "NHWC")
        except Refused:
            raise refused from None
        return replace(found, plan=replace(found.plan, nhwc=True))


def _recognise(module: nn.Module, layout: str) -> Recognised:
    term, run = read(module, layout)
    plan = formulas.find(term, module, run.reads)
    if plan is None or plan.channels not in (None, run.channels):
        raise NoFormula(term)
    return Recognised(replace(plan, channels=run.channels), run.reads.guard())
