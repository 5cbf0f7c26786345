"""The classes of fused modules: made of the class of the original, whose ``__dict__`` the fused instance shares.

So both are one module seen through two classes: the same Parameter, buffer, child and hook dictionaries, ``training``
and whatever else is set on either.
"""

from __future__ import annotations

import functools

from torch import nn

from attn_kernels import functional
from attn_kernels.ops._library import PLAIN_TENSORS
from attn_kernels.plans import Plan
from reference._common import DTYPES


class FusedModule:
    """An attention module computed by its class's plan, or by its own forward where the plan does not apply."""

    _plan: Plan
    _original: type[nn.Module]

    def forward(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and self.is_fused(args[0]):
            return self._plan.compute(self, args[0], None, None, functional)
        return super().forward(*args, **kwargs)

    def is_fused(self, x: object) -> bool:
        """Whether a call on ``x`` takes the fused path."""
        return not self.why_not(x)

    def why_not(self, x: object) -> list[str]:
        """Why a call on ``x`` does not take the fused path; empty where it does."""
        return why_not(self, self._plan, x) + global_hooks()

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._original, self._plan), state_of(self)


def why_not(module: nn.Module, plan: Plan, x: object) -> list[str]:
    """Why the plan does not stand for the module on ``x``, or no kernels compute it; empty where they do."""
    if type(x) not in PLAIN_TENSORS:
        return [f"x is a {type(x).__name__}, and the kernels read plain tensors"]
    if x.dim() != 4 or x.dtype not in DTYPES:
        return [f"x is a tensor of {x.dtype} with {x.dim()} dimensions"]
    return functional.why_not(x) + plan.why_not(module, x)


def global_hooks() -> list[str]:
    """That there are hooks on every module, if so: they would miss the calls that a fused one bypasses."""
    known = nn.modules.module  # its function is private: a PyTorch without it cannot be asked
    return ["hooks on every module"] if hasattr(known, "_has_any_global_hook") and known._has_any_global_hook() else []


def state_of(module: nn.Module) -> dict:
    """What pickle would store."""
    return module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__


@functools.cache
def fused_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The subclass of ``original`` that computes by ``plan``."""
    return subclass(original, FusedModule, _plan=plan)


def subclass(original: type[nn.Module], mixin: type, **members: object) -> type[nn.Module]:
    """A class that is both ``mixin`` and ``original``, and looks like the latter."""
    looks = {"__module__": original.__module__, "__doc__": original.__doc__, "_original": original}
    return type(f"Fused{original.__name__}", (mixin, original), {**looks, **members})


def seen_as(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """An instance of ``cls`` that shares everything with ``module``."""
    twin = cls.__new__(cls)
    twin.__dict__ = module.__dict__
    return twin


def _rebuild(original: type[nn.Module], plan: Plan) -> nn.Module:
    cls = fused_class(original, plan)
    return cls.__new__(cls)
