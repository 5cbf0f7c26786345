"""The classes of fused modules and blocks: made of the class of the original, whose ``__dict__`` the instance shares.

So both are one module seen through two classes: the same Parameter, buffer, child and hook dictionaries, ``training``
and whatever else is set on either. Before each fused call the guard looks whether the module is still what it was.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

import reference
from attn_kernels import functional, modules
from attn_kernels.fuse import check
from attn_kernels.fuse.adapters import plan_for
from attn_kernels.fuse.evaluate import layer_at
from attn_kernels.fuse.guards import Guard, Path
from attn_kernels.fuse.plans import Plan
from attn_kernels.fuse.rewrite import Fusion, find
from attn_kernels.fuse.terms import Refused
from attn_kernels.ops.common.operator import PLAIN_TENSORS
from reference._common import DTYPES, hooks_on_every_module
from reference.catalogue import OPERATORS

OURS = tuple(getattr(modules, name) for name in OPERATORS)
OF_REFERENCE = {getattr(reference, cls.__name__): cls for cls in OURS}
_warned: WeakSet[nn.Module] = WeakSet()


class Fused:
    """What fused modules and blocks share."""

    _guard: Guard
    _original: type[nn.Module]

    def is_fused(self, x: object) -> bool:
        """Whether a call on ``x`` takes the fused path."""
        if not takes(x) or functional.why_not_here(x) or global_hooks():
            return False
        if self._guard.changed(self):
            self._warn()
            return False
        return True

    def is_unchanged(self) -> bool:
        """Whether everything that the formula depends on is what it was."""
        return not self._guard.changed(self)

    def why_not(self, x: object) -> list[str]:
        """Why a call on ``x`` does not take the fused path; empty where it does."""
        if type(x) not in PLAIN_TENSORS:
            return [f"x is a {type(x).__name__}, and the kernels read plain tensors"]
        if not takes(x):
            return [f"x is a tensor of {x.dtype} with {x.dim()} dimensions"]
        return functional.why_not(x) + global_hooks() + self._guard.changes(self)

    def _warn(self) -> None:
        """Say once that a module runs its own forward, and why."""
        if not torch.compiler.is_compiling() and self not in _warned:
            _warned.add(self)
            changes = "; ".join(self._guard.changes(self)) or "something that it depends on was set"
            name = self._original.__name__
            warnings.warn(f"a fused {name} runs its own forward: {changes}", RuntimeWarning, stacklevel=4)

    def __reduce_ex__(self, protocol):
        plan = getattr(self, "_plan", None)
        ties = self._fusion.exact_ties if plan is None else plan.ties
        return _rebuild, (self._original, plan is None, ties), state_of(self)

    def __prepare_scriptable__(self):
        name = self._original.__name__
        raise TypeError(f"torch.jit.script cannot read a fused {name}: call unfuse_(model) or report.restore() first")


def takes(x: object) -> bool:
    """Whether ``x`` is a plain tensor of (N, C, H, W) in a dtype of the kernels."""
    return type(x) in PLAIN_TENSORS and x.dim() == 4 and x.dtype in DTYPES


def global_hooks() -> list[str]:
    """Names hooks on every module, if there are any: they would miss the calls that a fused module leaves out."""
    return ["hooks on every module"] if hooks_on_every_module() else []


class FusedModule(Fused):
    """An attention module computed by its class's plan, or by its own forward where the plan does not apply."""

    _plan: Plan

    def forward(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and self.is_fused(args[0]):
            return self._plan.compute(self, args[0], None, None, functional)
        return super().forward(*args, **kwargs)

    def is_fused(self, x):
        return super().is_fused(x) and not self._plan.why_not(self, x) and not functional.why_not(x)

    def why_not(self, x):
        return super().why_not(x) or self._plan.why_not(self, x)

    def fused_add_relu(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """``relu(self(x) + residual)``; None where the fused path does not apply."""
        return self._plan.compute(self, x, residual, "relu", functional) if self.is_fused(x) else None


class FusedBlock(Fused):
    """A block whose attention is fused with the add and ReLU behind it, or stands on the block itself."""

    _fusion: Fusion

    def forward(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and self.is_fused(args[0]):
            return self._fusion.forward(self, args[0])
        return super().forward(*args, **kwargs)

    def is_fused(self, x):
        return super().is_fused(x) and all(is_unchanged(layer_at(self, path)) for path in self._fusion.deferred)

    def why_not(self, x):
        reasons = super().why_not(x)
        for path in () if reasons else self._fusion.deferred:
            if not is_unchanged(layer_at(self, path)):
                reasons.append(f"{'.'.join(path)} has changed, and steps of the block run before it now")
        return reasons or [reason for gate in self._fusion.inline for reason in gate.plan.why_not(self, x)]


def is_unchanged(gate: nn.Module) -> bool:
    """Whether a fused gate is what it was, or one of ours has plain layers."""
    return gate.is_unchanged() if isinstance(gate, Fused) else gate.is_plain()


class FusedReference:
    """A module of ``reference`` computed by the class of ``attn_kernels`` that is its subclass."""

    _original: type[nn.Module]

    def __reduce_ex__(self, protocol):
        return _rebuild_reference, (self._original,), state_of(self)


def state_of(module: nn.Module) -> dict:
    """What pickle would store."""
    return module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__


@functools.cache
def module_class(original: type[nn.Module], plan: Plan, guard: Guard) -> type[nn.Module]:
    """The subclass of ``original`` that computes by ``plan``: one for all modules that are alike."""
    return subclass(original, FusedModule, _plan=plan, _guard=guard)


@functools.cache
def block_class(original: type[nn.Module], fusion: Fusion) -> type[nn.Module]:
    """The subclass of ``original`` with this forward."""
    return subclass(original, FusedBlock, _fusion=fusion, _guard=fusion.guard)


@functools.cache
def reference_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass that computes a module of ``reference``."""
    cls = subclass(OF_REFERENCE[original], FusedReference)
    cls._original = original
    return cls


def subclass(original: type[nn.Module], mixin: type, **members: object) -> type[nn.Module]:
    """A class that is both ``mixin`` and ``original``, and looks like the latter."""
    looks = {"__module__": original.__module__, "__doc__": original.__doc__, "_original": original}
    try:
        return type(f"Fused{original.__name__}", (mixin, original), {**looks, **members})
    except TypeError as error:
        raise Refused(f"has a class that cannot be subclassed: {error}") from None


# What fused classes add: a module that has any of these names is left.
_NAMES = frozenset(
    ("_plan", "_guard", "_fusion", "_original", "_warn", "is_fused", "why_not", "fused_add_relu", "is_unchanged")
)


def check_names(module: nn.Module) -> None:
    """Refuse a module whose own names a fused class would hide, or whose forward is not its class's."""
    state = vars(module)
    if "forward" in state:
        raise Refused("has another forward on the instance than its class's")
    if state.get("_compiled_call_impl") is not None:
        raise Refused("was compiled by itself: compile it after fuse_")
    held = {*state, *state["_modules"], *state["_parameters"], *state["_buffers"]} & _NAMES
    held |= {name for name in _NAMES if hasattr(type(module), name)}
    if held:
        raise Refused(f"has a name that fused modules need, {sorted(held)[0]}")


def is_gate(module: nn.Module) -> bool:
    """Whether a module takes a residual and a ReLU: a fused one, or one of ours, but no subclass of a user's."""
    return isinstance(module, FusedModule | FusedReference) or type(module) in OURS


def seen_as(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """An instance of ``cls`` that shares everything with ``module``."""
    twin = object.__new__(cls)
    twin.__dict__ = module.__dict__
    return twin


def attention_in(block: nn.Module) -> dict[Path, type[nn.Module]]:
    """The attention modules inside a block that are fused, by their paths."""
    named = ((name, m) for name, m in block.named_modules() if name)
    return {tuple(name.split(".")): type(m) for name, m in named if is_gate(m)}


class _Unpickled:
    """A module that waits for its state, by which it is then recognised anew, since guards are not pickled."""

    _original: type[nn.Module]
    _is_block: bool
    _ties: bool

    def __setstate__(self, state):
        super().__setstate__(state)
        original, is_block, ties = self._original, self._is_block, self._ties
        self.__class__ = original
        try:
            self.__class__ = _block_again(self, ties) if is_block else _module_again(self, ties)
        except Refused as reason:
            warnings.warn(f"a {original.__name__} is fused no longer: it {reason}", RuntimeWarning, stacklevel=2)


def _block_again(block: nn.Module, ties: bool) -> type[nn.Module]:
    fusion = find(block, attention_in(block), ties)
    for gate in () if fusion is None else fusion.inline:
        if reason := check.verdict(block, gate.plan, fusion.guard, gate.forward):
            raise Refused(reason)
    return type(block) if fusion is None else block_class(type(block), fusion)


def _module_again(module: nn.Module, ties: bool) -> type[nn.Module]:
    found = plan_for(module)
    if reason := check.verdict(module, found.plan, found.guard):
        raise Refused(reason)
    plan = replace(found.plan, ties=found.plan.ties and ties)
    return module_class(type(module), plan, found.guard)


def _rebuild(original: type[nn.Module], is_block: bool, ties: bool) -> nn.Module:
    cls = subclass(original, _Unpickled, _is_block=is_block, _ties=ties)
    return cls.__new__(cls)


def _rebuild_reference(original: type[nn.Module]) -> nn.Module:
    cls = reference_class(original)
    return cls.__new__(cls)
