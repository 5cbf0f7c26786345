"""``fuse_``: fused attention in a model that is there already, in place and undone at will."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

import reference
import reference.models
from attn_kernels import functional, modules
from attn_kernels._adapters import Unsupported, find_plan, register_adapter
from attn_kernels._fused import FusedModule, fused_class, seen_as, subclass
from attn_kernels._probe import verify, verify_forward
from attn_kernels._tail import OURS, FusedBlock, Tail, block_class, find_tail
from attn_kernels.plans import Plan, changes
from reference._common import DTYPES

__all__ = ["FuseReport", "Row", "Unsupported", "fuse_", "register_adapter"]

Filter = Callable[[nn.Module, str], bool]

_KINDS = {"SE": "SE", "BAM": "BAM", "CBAM": "CBAM", "SimAM": "SimAM"}
_KINDS |= {"ChannelGate": "CBAM, channel gate", "SpatialGate": "CBAM, spatial gate"}
_OF_REFERENCE = {getattr(reference, name): getattr(modules, name) for name in _KINDS}
TAIL = "add + ReLU"


class Row(NamedTuple):
    """What became of one attention module."""

    name: str
    """Its qualified name in the model."""
    cls: str
    """The name of its class."""
    kind: str
    """What it computes, by its name at least."""
    fused: bool
    tail: str = ""
    """"add + ReLU" where the end of the residual block is fused with it."""
    reason: str = ""
    """Why it, or its tail, was left as it was."""


class FuseReport:
    """What :func:`fuse_` did, and the way back; as a context manager it goes back at the end.

    Attributes:
        rows: a :class:`Row` for each attention module, in the model's order.
    """

    def __init__(self, rows: list[Row], swaps: list[tuple[dict, str, nn.Module, nn.Module]]):
        self.rows = rows
        self._swaps = swaps

    @property
    def fused(self) -> int:
        """How many modules are computed by fused operators now."""
        return sum(row.fused for row in self.rows)

    @property
    def left(self) -> int:
        """How many known modules were left as they were."""
        return len(self.rows) - self.fused

    def restore(self) -> None:
        """Put the original objects back where the fused ones still are; a second time does nothing."""
        while self._swaps:
            children, name, original, fused = self._swaps.pop()
            if children.get(name) is fused:
                children[name] = original
                original.__dict__.pop("_stale", None)

    def __enter__(self) -> FuseReport:
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def __str__(self) -> str:
        heads = "module", "class", "kind", "fused", "reason"
        lines = [
            (r.name, r.cls, f"{r.kind} + {r.tail}" if r.tail else r.kind, "yes" if r.fused else "left", r.reason)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (heads, *lines)]
        return "\n".join([*table, f"{self.fused} fused, {self.left} left"])

    __repr__ = __str__


def fuse_(model: nn.Module, filter_fn: Filter | None = None) -> FuseReport:
    """Replace every attention module inside ``model``, in place, by a fused one that shares all its state.

    Known are ``reference``'s modules and, by the names of their classes, those of Jongchan/attention-module (BAM and
    CBAM), ZjjConan/SimAM, moskomule/senet.pytorch, Cadene/pretrained-models.pytorch, timm, torchvision, mmpretrain,
    mmdetection and HF RegNet, and what :func:`register_adapter` adds. Each is run beside its formula, on random
    numbers, before it is replaced. Where a residual block ends in ``relu(attention(x) + shortcut)``, that is fused too.

    A fused module is an instance of a subclass of the original's class and shares its ``__dict__``: parameters,
    buffers, children, hooks and state_dict are the same objects. It runs the original's forward where the fused path
    does not apply: on the CPU, in export and ``torch.func``, with hooks on its layers, or other layers or tensor
    subclasses (quantized, distributed) in their place. Three results differ: the gradient of a maximum goes to the
    first of equal values, where ``amax`` shares it out; SimAM on a map of one pixel is no NaN; under autocast the
    output has x's dtype and gates are computed in float32. ``torch.jit.script`` cannot read fused modules.

    Args:
        model: on any device, the meta device included; it may not be an attention module itself.
        filter_fn: called with each known module and its qualified name; those for which it returns False are left.

    Returns:
        A report of each module, whose ``restore()`` undoes the replacement.

    Raises:
        TypeError: ``model`` is no module, or ``filter_fn`` is not callable.
        ValueError: ``model`` is an attention module: there is nothing to replace it in.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function of a module and its name, got {type(filter_fn).__name__}")
    fuser = _Fuser(filter_fn)
    if fuser.replace(model, "") is not None:
        raise ValueError(
            f"model: expected a module that holds attention modules, got one itself, {type(model).__name__}; "
            "wrap it: fuse_(nn.Sequential(module))"
        )
    fuser.visit(model, "")
    return FuseReport(fuser.rows, fuser.swaps)


class _Fuser:
    """One run over a model."""

    def __init__(self, filter_fn: Filter | None):
        self.filter_fn = filter_fn
        self.rows: list[Row] = []
        self.swaps: list[tuple[dict, str, nn.Module, nn.Module]] = []
        self.outcomes: dict[nn.Module, tuple[nn.Module | None, Row]] = {}
        self.blocks: dict[nn.Module, nn.Module] = {}
        self.verdicts: dict[object, tuple[Plan | None, str]] = {}
        self.tails: dict[object, str] = {}

    def visit(self, parent: nn.Module, prefix: str) -> None:
        """Replace what is below ``parent``, and the blocks whose tails are fused."""
        for name, child in list(parent._modules.items()):
            if child is None or isinstance(child, torch.jit.ScriptModule):
                continue
            found = self.replace(child, prefix + name)
            if found is not None:
                twin, row = found
                self.rows.append(row._replace(name=prefix + name))
            else:
                if child not in self.blocks:
                    self.blocks[child] = child
                    self.visit(child, f"{prefix}{name}.")
                    self.blocks[child] = self.fuse_tail(child, prefix + name)
                twin = self.blocks[child]
            if twin is not None and twin is not child:
                self.swaps.append((parent._modules, name, child, twin))
                parent._modules[name] = twin

    def replace(self, module: nn.Module, name: str) -> tuple[nn.Module | None, Row] | None:
        """The fused twin of ``module``, or None where it is left, and its row; None where it is no attention module."""
        if module not in self.outcomes:
            outcome = self._replace(module, name)
            if outcome is None:
                return None
            self.outcomes[module] = outcome
        return self.outcomes[module]

    def _replace(self, module: nn.Module, name: str) -> tuple[nn.Module | None, Row] | None:
        cls = type(module)
        row = Row(name, cls.__name__, cls.__name__, False)
        if isinstance(module, (FusedModule, _FusedSEBlock, *OURS)) or _is_fused_inline(module):
            return None, row._replace(reason="already fused")
        try:
            plan = None
            if cls in _OF_REFERENCE:
                row, fused = row._replace(kind=_KINDS[cls.__name__]), _OF_REFERENCE[cls]
            elif _takes_se(module, functional.se):
                return None, row._replace(kind="SE", reason="already fused")
            elif _takes_se(module, reference.se):
                row, fused = row._replace(kind="SE", tail=TAIL), _se_block_class(cls)
            else:
                plan = find_plan(module)
                if plan is None:
                    return None
                row = row._replace(kind=plan.kind)
            if self.filter_fn is not None and not self.filter_fn(module, name):
                raise Unsupported("filter_fn")
            if "forward" in module.__dict__:
                raise Unsupported("its forward was replaced on the instance")
            if plan is not None:
                fused = fused_class(cls, self.verified(module, plan))
        except Unsupported as reason:
            return None, row._replace(tail="", reason=str(reason))
        return seen_as(module, fused), row._replace(fused=True)

    def verified(self, module: nn.Module, plan: Plan) -> Plan:
        """The plan, once the module was seen to keep to it.

        Raises:
            Unsupported: it does not, or something stands in the way of the fused path.
        """
        for reason in changes(module, plan.bypassed):
            raise Unsupported(reason)
        for t in plan.tensors(module):
            if t is not None and (type(t) not in (torch.Tensor, nn.Parameter) or t.dtype not in DTYPES):
                raise Unsupported(f"a parameter is a {type(t).__name__} of {t.dtype}")
        key = plan, _configuration(module)
        if key not in self.verdicts:
            self.verdicts[key] = verify(module, plan)
        found, reason = self.verdicts[key]
        if found is None:
            raise Unsupported(reason)
        return found

    def fuse_tail(self, block: nn.Module, name: str) -> nn.Module:
        """The twin of a block with its tail fused, or the block itself; the rows of its children say so."""
        children = block._modules.items()
        names = {f"{name}.{child}" for child, m in children if isinstance(m, (FusedModule, *OURS))}
        names &= {row.name for row in self.rows if row.fused}
        containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
        if not (names or _has_pool(block)) or isinstance(block, FusedBlock | containers):
            return block
        if isinstance(block, reference.models._Block):  # which hands its tail to the module
            self._note(names, tail=TAIL if block.attention == "cbam" else "")
            return block
        try:
            if "forward" in block.__dict__:
                raise Unsupported("its block's forward was replaced on the instance")
            tail = find_tail(block)
            if tail is not None and (reason := self.speaks_against(block, tail)):
                raise Unsupported(reason)
            if tail is not None and tail.plans:  # the layers stand on the block: it is the attention module, too
                if self.filter_fn is not None and not self.filter_fn(block, name):
                    self.rows.append(Row(name, type(block).__name__, "SE", False, reason="filter_fn"))
                    return block
                self.rows.append(Row(name, type(block).__name__, "SE", True, TAIL))
        except Unsupported as reason:
            self._note(names, reason=f"tail not fused: {reason}")
            return block
        if tail is None:
            return block
        self._note({f"{name}.{gate}" for gate in tail.gates}, tail=TAIL)
        return seen_as(block, block_class(type(block), tail))

    def speaks_against(self, block: nn.Module, tail: Tail) -> str:
        """Why the block's forward, as it was traced, is not what it computes; nothing as a rule."""
        key = tail.layers, _configuration(block)
        if key not in self.tails:
            self.tails[key] = verify_forward(block, tail.forward)
        return self.tails[key]

    def _note(self, names: set[str], **changes: str) -> None:
        self.rows = [row._replace(**changes) if row.name in names else row for row in self.rows]


def _takes_se(block: nn.Module, se: Callable) -> bool:
    """Whether it is a block of ``reference.models`` that computes SE by this function."""
    return isinstance(block, reference.models._Block) and block.attention == "se" and block.se is se


def _is_fused_inline(block: nn.Module) -> bool:
    return isinstance(block, FusedBlock) and bool(block._tail.plans)


def _configuration(module: nn.Module) -> tuple[type, str, str]:
    """What tells a module from another of its class, its parameters' values aside."""
    options = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | list | tuple)}
    return type(module), repr(module), repr({k: v for k, v in options.items() if k != "training"})


def _has_pool(block: nn.Module) -> bool:
    """Whether SE's layers may stand on the block itself."""
    kinds = [type(m) for m in block._modules.values()]
    return kinds.count(nn.Linear) == 2 and (nn.AvgPool2d in kinds or nn.AdaptiveAvgPool2d in kinds)


class _FusedSEBlock:
    """A block of ``reference.models`` on which SE's layers stand, by the fused function."""

    _original: type[nn.Module]
    se = property(lambda self: functional.se)

    def __reduce_ex__(self, protocol):
        return _rebuild_se_block, (self._original,), self.__dict__


def _se_block_class(original: type[nn.Module]) -> type[nn.Module]:
    return subclass(original, _FusedSEBlock)


def _rebuild_se_block(original: type[nn.Module]) -> nn.Module:
    cls = _se_block_class(original)
    return cls.__new__(cls)
