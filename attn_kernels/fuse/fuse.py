"""``fuse_``: fused attention in a model that is there already, in place and undone at will."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

import reference
import reference.models
from attn_kernels import functional
from attn_kernels.fuse import check, formulas
from attn_kernels.fuse.adapters import ADAPTERS, plan_for
from attn_kernels.fuse.guards import Guard, Path
from attn_kernels.fuse.modules import (
    OF_REFERENCE,
    OURS,
    Fused,
    FusedModule,
    FusedReference,
    block_class,
    check_names,
    is_gate,
    module_class,
    reference_class,
    seen_as,
    subclass,
)
from attn_kernels.fuse.plans import Plan
from attn_kernels.fuse.recognise import NoFormula
from attn_kernels.fuse.report import FuseReport, Row, Swap
from attn_kernels.fuse.rewrite import find
from attn_kernels.fuse.terms import Refused
from attn_kernels.ops.common.operator import PLAIN_TENSORS
from reference._common import DTYPES

Filter = Callable[[nn.Module, str], bool]

EPILOGUE = "add + ReLU"
_KINDS = {"ChannelGate": "CBAM, channel gate", "SpatialGate": "CBAM, spatial gate"}
# Names that people give to attention of channels or pixels; not those of transformers.
_NAMES = re.compile(
    r"^(SE|Se|se)(?![a-z])|SqueezeE|Squeeze_?(And_?)?Excit|^[sc]+se(?![a-z])|^SCSE|^scSE|^ESE|EffectiveSE|CBAM|Cbam|^BAM|Bam|SimAM|simam"
    r"|(E|Ce|Ec)ca(Module|Layer|Block)?$|ECA|(Channel|Spatial|Coord)\w*(Att|Gate|SE)|GlobalContext$|GatherExcite|GCBlock",
)
_NOT_FOUND = (
    "Nothing to fuse was found: looked for SE, ECA, CBAM, BAM and SimAM, in modules and in blocks, by what each forward"
    " computes. register_adapter teaches fuse_ a module whose source it cannot read."
)


def fuse_(model: nn.Module, filter_fn: Filter | None = None, *, exact_ties: bool = True) -> FuseReport:
    """Replace the attention inside ``model``, in place, by fused modules that share all of its state.

    Attention is recognised by what it computes: ``fuse_`` reads the source of each module's forward and compares the
    formula with those of the kernels, whatever the names of classes and layers. What it does not understand whole, it
    leaves, with the reason in the report. Each module that it would replace is run beside the formula first, on random
    numbers: outputs, gradients and buffers, in training and in evaluation. Where a residual block ends in
    ``relu(attention(x) + shortcut)``, that is one call, too, and so is a gate whose layers stand on the block itself.

    A fused module is an instance of a subclass of the original's class and shares its ``__dict__``: parameters,
    buffers, children, hooks and state_dict are the same objects. Before each call it looks whether anything that the
    formula depends on has changed: options, hooks on its layers, other layers or functions in their place. Then, on the
    CPU, in export, under fx and ``torch.func``, and on tensor subclasses, it runs the original's forward. What differs
    from the original: ``type(module)`` and with it ``repr``; under autocast the output has x's dtype and gates are
    computed in float32; parameters may have another float dtype than x; of an x that is dense in neither layout the
    output is dense; the lp pool's gradient on a plane of zeros is 0, not NaN.

    Args:
        model: on any device, the meta device included; it may not be an attention module itself.
        filter_fn: called with each module that would be fused and its qualified name; those for which it returns False
            are left.
        exact_ties: of equal maxima the kernels give the gradient to the first, as ``max_pool2d`` and ``max`` do, where
            ``amax`` shares it out. A module that pools by ``amax`` therefore runs its own forward where a gradient is
            asked for; with False it is fused there, too.

    Returns:
        A report of each module, whose ``restore()`` undoes the replacement; so does :func:`unfuse_`.

    Raises:
        TypeError: ``model`` is no module, ``filter_fn`` is not callable, or ``exact_ties`` is no bool.
        ValueError: ``model`` is an attention module: there is nothing to replace it in.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function of a module and its name, got {type(filter_fn).__name__}")
    if not isinstance(exact_ties, bool):
        raise TypeError(f"exact_ties: expected a bool, got {type(exact_ties).__name__}")
    fuser = _Fuser(filter_fn, exact_ties)
    if fuser.is_attention(model):
        raise ValueError(
            f"model: expected a module that holds attention modules, got one itself, {type(model).__name__}; "
            "wrap it: fuse_(nn.Sequential(module))"
        )
    fuser.visit(model, "")
    for parent, name, _, fused in fuser.swaps:  # nothing has been changed before
        parent._modules[name] = fused
    return FuseReport(fuser.rows, fuser.swaps, _notes(model, fuser.rows))


def unfuse_(model: nn.Module) -> nn.Module:
    """Put the original classes back wherever ``fuse_`` has replaced one, without its report; returns ``model``.

    The objects are new, their state is the same. A copy or an unpickled model is undone like the one that was fused.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    originals: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Fused | FusedReference | _FusedSEBlock):
                if child not in originals:
                    originals[child] = seen_as(child, child._original)
                parent._modules[name] = originals[child]
    return model


def _notes(model: nn.Module, rows: list[Row]) -> list[str]:
    if not rows:
        return [_NOT_FOUND]
    notes = []
    if any(not row.fused and row.reason not in ("already fused", "filter_fn") for row in rows):
        notes.append("What is left runs as before; register_adapter teaches fuse_ a module that it cannot read.")
    devices = {t.device.type for t in model.parameters()}
    if devices and any(row.fused for row in rows) and not devices & {"meta", *functional.devices()}:
        notes.append(f"The model is on {', '.join(sorted(devices))}, where plain PyTorch runs, fused or not.")
    return notes


class _Outcome(NamedTuple):
    """What becomes of one module: its twin, or none, and its row."""

    twin: nn.Module | None
    row: Row
    settled: bool = False
    """Whether a user or a check has spoken against it: it is not looked at as a block then."""


class _Fuser:
    """One run over a model, which it does not change."""

    def __init__(self, filter_fn: Filter | None, exact_ties: bool):
        self.filter_fn = filter_fn
        self.exact_ties = exact_ties
        self.rows: list[Row] = []
        self.swaps: list[Swap] = []
        self.outcomes: dict[nn.Module, _Outcome | None] = {}
        self.blocks: dict[nn.Module, tuple[nn.Module, dict[Path, type[nn.Module]]]] = {}

    def is_attention(self, module: nn.Module) -> bool:
        """Whether a module as a whole is attention that ``fuse_`` can replace, or has replaced already."""
        outcome = None if _is_container(module) else self.outcome(module, "")
        return outcome is not None and (outcome.twin is not None or outcome.row.reason == "already fused")

    def visit(self, parent: nn.Module, prefix: str) -> dict[Path, type[nn.Module]]:
        """Find what is to be replaced below ``parent``; the attention modules there that are or will be fused."""
        attention: dict[Path, type[nn.Module]] = {}
        for name, child in parent._modules.items():
            if child is None or isinstance(child, torch.jit.ScriptModule):
                continue
            outcome = None if _is_container(child) else self.outcome(child, prefix + name)
            twin = None if outcome is None else outcome.twin
            if outcome is not None and (twin is not None or isinstance(child, (Fused, *OURS))):
                self.rows.append(outcome.row._replace(name=prefix + name))
                if is_gate(twin or child):
                    attention[(name,)] = type(twin or child)
            else:
                twin = self.descend(child, prefix + name, outcome)
                inner = self.blocks[child][1]
                attention |= {(name, *path): cls for path, cls in inner.items()}
            if twin is not None and twin is not child:
                self.swaps.append((parent, name, child, twin))
        return attention

    def descend(self, child: nn.Module, name: str, outcome: _Outcome | None) -> nn.Module:
        """Of a module that is no known attention, a twin if it can be fused as a block, or else the module itself."""
        if child not in self.blocks:
            self.blocks[child] = child, {}
            at = len(self.rows)
            inner = self.visit(child, f"{name}.")
            settled = outcome is not None and outcome.settled
            self.blocks[child] = child if settled else self.fuse_block(child, name, inner, outcome is not None), inner
            below = self.rows[at:]
            if any(row.fused and row.name == name for row in below):  # with what computes its gate, if it does
                self.rows[at:] = [row for row in below if row.fused]
            elif outcome is not None and not any(row.fused for row in below):
                own = [row for row in below if row.name == name]
                self.rows[at:] = own or [outcome.row._replace(name=name)]
        return self.blocks[child][0]

    # ---- attention modules

    def outcome(self, module: nn.Module, name: str) -> _Outcome | None:
        """What becomes of a module that is attention; None for one that does not look like attention."""
        if module not in self.outcomes:
            self.outcomes[module] = self._outcome(module, name)
        return self.outcomes[module]

    def _outcome(self, module: nn.Module, name: str) -> _Outcome | None:
        cls = type(module)
        row = Row(name, cls.__name__, cls.__name__, False)
        if isinstance(module, (Fused, *OURS)):
            fused_block = isinstance(module, Fused) and not isinstance(module, FusedModule)
            if fused_block and not module._fusion.inline:
                return None
            return _Outcome(None, row._replace(reason="already fused"))
        is_known = cls in OF_REFERENCE or cls.__name__ in ADAPTERS
        try:
            if cls in OF_REFERENCE:
                row = row._replace(kind=_KINDS.get(cls.__name__, cls.__name__))
                fused = self._accepted(module, name) and reference_class(cls)
            elif _takes_se(module, functional.se):
                return _Outcome(None, row._replace(kind="SE", reason="already fused"))
            elif _takes_se(module, reference.se):
                row, is_known = row._replace(kind="SE", epilogue=EPILOGUE), True
                fused = self._accepted(module, name) and _se_block_class(cls)
            else:
                found = plan_for(module)
                row, is_known = row._replace(kind=found.plan.kind), True
                self._accepted(module, name)
                fused = module_class(cls, self.checked_plan(module, found.plan, found.guard), found.guard)
        except Refused as reason:
            if not is_known and not _looks_like_attention(module, reason):
                return None
            return _Outcome(None, row._replace(epilogue="", reason=str(reason)), is_known)
        return _Outcome(seen_as(module, fused), row._replace(fused=True))

    def _accepted(self, module: nn.Module, name: str) -> bool:
        if self.filter_fn is not None and not self.filter_fn(module, name):
            raise Refused("filter_fn")
        check_names(module)
        return True

    def checked_plan(self, module: nn.Module, plan: Plan, guard: Guard) -> Plan:
        """The plan of a module, which was run beside it and agrees.

        Raises:
            Refused: it does not, or has parameters that kernels cannot read.
        """
        for t in plan.tensors(module):
            if t is not None and (type(t) not in PLAIN_TENSORS or t.dtype not in DTYPES):
                raise Refused(f"has a parameter that is a {type(t).__name__} of {t.dtype}")
        reason = check.verdict(module, plan, guard)
        if reason:
            raise Refused(reason)
        return plan if self.exact_ties else replace(plan, ties=False)

    # ---- blocks

    def fuse_block(
        self, block: nn.Module, name: str, attention: dict[Path, type[nn.Module]], is_known: bool
    ) -> nn.Module:
        """The twin of a block with its attention fused, or the block itself; its rows say so."""
        names = {".".join((name, *path)) for path in attention}
        names &= {row.name for row in self.rows if row.fused}
        if _is_container(block) or isinstance(block, Fused):
            return block
        has_gate = _may_have_a_gate(block)
        if not (names or is_known or has_gate):
            return block
        if isinstance(block, reference.models._Block):  # which hands its epilogue to the module
            self._note(names, epilogue=EPILOGUE if block.attention == "cbam" else "")
            return block
        try:
            check_names(block)
            fusion = find(block, attention, self.exact_ties)
            twin = None if fusion is None else seen_as(block, block_class(type(block), fusion))
        except Refused as reason:
            own = {f"{name}.{path[0]}" for path in attention if len(path) == 1}
            self._note(names & own, reason=f"epilogue not fused: its block {reason}")
            if has_gate and not attention and not is_known and _pools_and_gates(block):
                cls = type(block).__name__
                self.rows.append(Row(name, cls, cls, False, reason=str(reason)))
            return block
        if fusion is None:
            return block
        cls = type(block).__name__
        for gate in fusion.inline:
            row = Row(name, cls, gate.plan.kind, False)
            refused = self.filter_fn is not None and not self.filter_fn(block, name)
            reason = "filter_fn" if refused else check.verdict(block, gate.plan, fusion.guard, gate.forward)
            if reason:
                self.rows.append(row._replace(reason=reason))
                return block
            self.rows.append(row._replace(fused=True, epilogue=EPILOGUE if gate.epilogue else ""))
        self._note({".".join((name, *path)) for path in fusion.epilogues}, epilogue=EPILOGUE)
        return twin

    def _note(self, names: set[str], **changes: str) -> None:
        self.rows = [row._replace(**changes) if row.name in names else row for row in self.rows]


def _is_container(module: nn.Module) -> bool:
    """Whether a module is a container of PyTorch's own: it may hold attention, and is none itself."""
    return type(module).__module__.split(".")[0] == "torch"


def _looks_like_attention(module: nn.Module, reason: Refused) -> bool:
    """Whether people would call a module attention, by its name or by what it computes."""
    if _NAMES.search(type(module).__name__):
        return True
    return isinstance(reason, NoFormula) and formulas.looks_like_attention(reason.term)


def _may_have_a_gate(block: nn.Module) -> bool:
    """Whether the layers of a gate, or modules that compute one, may stand on a block."""
    kinds = {type(m) for m in block._modules.values()}
    pools = {nn.AdaptiveAvgPool2d, nn.AvgPool2d} & kinds
    gates = {nn.Sigmoid, nn.Hardsigmoid} & kinds
    return bool(pools and gates) or _pools_and_gates(block) or any(_NAMES.search(kind.__name__) for kind in kinds)


def _pools_and_gates(block: nn.Module) -> bool:
    """Whether a block's own forward names a pool, by which it computes means, and a sigmoid."""
    code = getattr(type(block).forward, "__code__", None)
    names = code.co_names if code is not None else ()
    return any("pool" in n or n == "mean" for n in names) and any("sigmoid" in n for n in names)


def _takes_se(block: nn.Module, se: Callable) -> bool:
    """Whether it is a block of ``reference.models`` that computes SE by this function."""
    return isinstance(block, reference.models._Block) and block.attention == "se" and block.se is se


class _FusedSEBlock:
    """A block of ``reference.models`` on which SE's layers stand, computed by the fused function."""

    _original: type[nn.Module]
    se = property(lambda self: functional.se)

    def __reduce_ex__(self, protocol):
        return _rebuild_se_block, (self._original,), self.__dict__


def _se_block_class(original: type[nn.Module]) -> type[nn.Module]:
    return subclass(original, _FusedSEBlock)


def _rebuild_se_block(original: type[nn.Module]) -> nn.Module:
    cls = _se_block_class(original)
    return cls.__new__(cls)
