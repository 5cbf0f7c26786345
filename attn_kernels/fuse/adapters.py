"""Plans of modules whose source cannot be read, or that no formula matches: by the name of their class.

``register_adapter`` adds one. What an adapter says is checked on random numbers, and the guard looks at all options,
layers and forwards of the module, since nobody has read which of them its own forward depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import FunctionType

from torch import nn

from attn_kernels.fuse.guards import Child, Guard, Reads
from attn_kernels.fuse.plans import Plan
from attn_kernels.fuse.recognise import Recognised, recognise
from attn_kernels.fuse.terms import Refused

Unsupported = Refused
Adapter = Callable[[nn.Module], "Plan | None"]
ADAPTERS: dict[str, Adapter] = {}


def register_adapter(name: str, adapter: Adapter | None = None):
    """Teach :func:`fuse_` modules whose class is called ``name``; also a decorator.

    Args:
        name: ``type(module).__name__``; an adapter registered earlier for it is replaced.
        adapter: returns the :class:`~attn_kernels.fuse.plans.Plan` of a module, or None for one of another kind, which
            is then read like any other. It may raise :class:`Unsupported` with the reason why no kernel covers a
            module. ``fuse_`` runs each module beside its plan on random numbers before it replaces it: outputs,
            gradients and buffers, in training and in evaluation.

    Raises:
        TypeError: an argument of another type.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a class, got {name!r}")
    if adapter is None:
        return lambda function: register_adapter(name, function)
    if not callable(adapter):
        raise TypeError(f"adapter: expected a function of a module, got {type(adapter).__name__}")
    ADAPTERS[name] = adapter
    return adapter


def plan_for(module: nn.Module) -> Recognised:
    """What the kernels compute in place of ``module``, by its adapter or its source.

    Raises:
        Refused: nothing; the message says why.
    """
    adapter = ADAPTERS.get(type(module).__name__)
    plan = None if adapter is None else adapter(module)
    if plan is None:
        return recognise(module)
    return Recognised(replace(plan, channels=plan.width(module)), everything(module))


def everything(module: nn.Module) -> Guard:
    """A guard of all that a module holds, but its parameters' and buffers' values."""
    reads = Reads()
    for name, m in module.named_modules():
        child = Child(tuple(name.split(".")) if name else (), m)
        reads.kind(child)
        reads.children(child)
        reads.class_attribute(type(m), "forward", type(m).forward)
        if type(type(m).forward) is FunctionType:
            reads.code(type(m).forward)
        for key, value in vars(m).items():
            if key != "training" and not key.startswith("_"):
                _note(reads, child, key, value)
        for key in m._parameters:
            reads.parameter(child, key)
        for key in m._modules:
            reads.child(child, key)
    return reads.guard()


def _note(reads: Reads, child: Child, name: str, value: object) -> None:
    try:
        reads.constant(child, name)
    except Refused:
        if callable(value):
            reads.function(child, name)
