"""What a call of a module or a network does: the fused path or the reference formula, why, and in which layout."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import reference
import reference.models
from attn_kernels import functional
from attn_kernels.functional import why_not
from attn_kernels.fuse.modules import OF_REFERENCE, OURS, FusedBlock, FusedModule
from attn_kernels.ops.common.layout import is_dense, layout
from reference._common import AttentionModule, check_input
from reference.bam import check_bam
from reference.cbam import check_spatial_gate
from reference.se import check_mlp

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class Explanation:
    """What a call does; ``str()`` says it in words.

    Attributes:
        call: the module, and the shape, dtype and device of its input.
        reasons: why the kernels do not run; empty where they do.
        layout: "contiguous" or "channels_last", in which the kernels run; None where they do not.
        copied: whether the input is copied first, because it is dense in neither layout.
        otherwise: what runs in place of the kernels, where they do not.
    """

    call: str
    reasons: tuple[str, ...]
    layout: str | None
    copied: bool
    otherwise: str = ""

    @property
    def fused(self) -> bool:
        """Whether the kernels run."""
        return not self.reasons

    @property
    def path(self) -> str:
        """What runs."""
        return f"fused, {self.layout}" if self.fused else self.otherwise

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.path}", *(f"  because {reason}" for reason in self.reasons)]
        if self.copied:
            lines.append(f"  x is dense in neither layout: it is copied to {self.layout} first")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanations:
    """What a call of a network does in each of its attention modules; ``str()`` is a table.

    Attributes:
        rows: name and explanation of each call, in the order of the calls.
        not_called: the names of the attention modules that the call does not reach.
    """

    rows: tuple[tuple[str, Explanation], ...]
    not_called: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether the kernels run in every call."""
        return all(explanation.fused for _, explanation in self.rows)

    def __str__(self) -> str:
        cells = [(name, e.call, e.path, "copied first" if e.copied else "") for name, e in self.rows]
        widths = [max(map(len, column), default=0) for column in zip(*cells, strict=True)]
        lines = []
        for row, (_, explanation) in zip(cells, self.rows, strict=True):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            lines += [f"  because {reason}" for reason in explanation.reasons]
        lines += [f"{name}: not called" for name in self.not_called]
        fused = sum(explanation.fused for _, explanation in self.rows)
        return "\n".join([*lines, f"{fused} of {len(self.rows)} calls fused"])


def explain(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Explanation | Explanations:
    """Say what ``module(x, residual)`` would do here and now, without calling it.

    Args:
        module: an ``SE``, ``BAM``, ``CBAM``, ``ChannelGate``, ``SpatialGate`` or ``SimAM``, or a module or residual
            block that ``fuse_`` made, or a block of ``models`` on which SE's layers stand. The attention of a
            block is asked about a tensor like ``x``, since its own input is not known. A network that has such modules
            may be given too. A copy of it then runs on tensors without data: nothing is computed, and the network does
            not change.
        x: (N, C, H, W), float16, bfloat16, float32 or float64, in any layout; a network's only input, whatever it is.
        residual: the shape of ``x``; None for what ``fuse_`` made and for networks, which take no other argument.

    Returns:
        Whether the kernels run, every reason why they do not, the layout, and whether ``x`` is copied; of a network, a
        table of that for each call of its attention modules.

    Raises:
        TypeError, ValueError: a module without attention, an ``x`` or ``residual`` that the module refuses, or a
            network that cannot be run without data.
    """
    if not _is_explained(module):
        return _explain_network(module, x, residual)
    check_input(x, residual, None)
    if isinstance(module, AttentionModule):
        _check(module, x)
    call = _call(module, x)
    reasons = tuple(_reasons(module, x, residual))
    if reasons:
        formula = "plain PyTorch" if isinstance(module, FusedModule | FusedBlock) else "the reference formula"
        return Explanation(call, reasons, None, False, formula)
    x = module._plan.nchw(x) if isinstance(module, FusedModule) else x
    name = "channels_last" if layout(x) == torch.channels_last else "contiguous"
    return Explanation(call, (), name, not is_dense(x))


def _is_explained(module: nn.Module) -> bool:
    """Whether the module itself decides whether the kernels run."""
    return isinstance(module, (FusedModule, FusedBlock, *OF_REFERENCE)) or _is_se_block(module)


def _is_se_block(module: nn.Module) -> bool:
    return isinstance(module, reference.models._Block) and module.attention == "se"


def _explain_network(network: nn.Module, x: Tensor, residual: Tensor | None) -> Explanations:
    """Run a copy of the network that has no data, and ask its attention modules about what they are called with."""
    found = dict(_attention_in(network)) if isinstance(network, nn.Module) else {}
    if not found:
        expected = "a module of attn_kernels or of fuse_, or a network that has some"
        raise TypeError(f"module: expected {expected}, got {type(network).__name__}")
    if residual is not None:
        raise TypeError("residual: expected None for a network, got a tensor")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # imported here, since they are private

    mode, twins = FakeTensorMode(allow_non_fake_inputs=True), {}
    twin = _without_data(network, mode, twins)
    rows = []
    for name, module in found.items():

        def record(_, args, kwargs, name=name, module=module):
            # At the call, since by now the network may have turned autocast on or gradients off.
            rows.append((name, _explain_call(module, args, kwargs)))

        twins[module].register_forward_pre_hook(record, with_kwargs=True)
    with warnings.catch_warnings(), mode:
        warnings.simplefilter("ignore")  # a module of fuse_ warns of what is one of the reasons here
        try:
            twin(x if isinstance(x, FakeTensor) else mode.from_tensor(x))
        except Exception as error:
            raise ValueError(
                f"module: {type(network).__name__} cannot be run on a tensor without data of shape {tuple(x.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
    called = {name for name, _ in rows}
    return Explanations(tuple(rows), tuple(name for name in found if name not in called))


def _without_data(module: nn.Module, mode: FakeTensorMode, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module like ``module``, with children of its own, whose tensors have no data and whose changes stay its own."""
    if module in twins:
        return twins[module]
    if isinstance(module, torch.jit.ScriptModule):  # whose state is not in Python
        return module
    twin = twins[module] = object.__new__(type(module))
    twin.__dict__ = {name: _copied(value, mode) for name, value in vars(module).items()}
    children = module._modules.items()
    twin.__dict__["_modules"] = {n: None if m is None else _without_data(m, mode, twins) for n, m in children}
    return twin


def _copied(value: object, mode: FakeTensorMode) -> object:
    """A tensor without data for a tensor, a copy of a container with such tensors, and any other value itself."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, mode.from_tensor(v) if isinstance(v, Tensor) else v) for key, v in value.items())
        return copied
    return copy.copy(value) if isinstance(value, list | set) else value


def _attention_in(
    network: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> list[tuple[str, nn.Module]]:
    """The names and modules that :func:`explain` takes, each once, without those inside another."""
    seen, found = set() if seen is None else seen, []
    for name, child in network.named_children():
        name = f"{path}{name}"
        if child in seen:
            continue
        seen.add(child)
        found += [(name, child)] if _is_explained(child) else _attention_in(child, f"{name}.", seen)
    return found


def _explain_call(module: nn.Module, args: tuple, kwargs: dict) -> Explanation:
    """Explain a call, given the arguments that the network passed."""
    if isinstance(module, AttentionModule):
        call = dict(zip(("x", "residual", "activation"), args, strict=False)) | kwargs
        return explain(module, call["x"], call.get("residual"))
    if len(args) == 1 and not kwargs:
        return explain(module, args[0])
    x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    return Explanation(
        _call(module, x), ("it is called with more than x, or by keyword",), None, False, "plain PyTorch"
    )


def _call(module: nn.Module, x: Tensor | None) -> str:
    """The module, and the shape, dtype and device of its input."""
    where = "" if x is None else f" on {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"
    return f"{type(module).__name__}{where}"


def _reasons(module: nn.Module, x: Tensor, residual: Tensor | None) -> list[str]:
    """What ``why_not`` says of the tensors that the module's forward pass would give it."""
    is_attention = isinstance(module, AttentionModule)
    if residual is not None and not is_attention:
        raise TypeError(f"residual: expected None, since {type(module).__name__} takes only x, got a tensor")
    if isinstance(module, FusedModule | FusedBlock):
        return module.why_not(x) or _reasons_within(module, x)
    if is_attention and not module.is_plain():
        return ["hooks on a layer, or another layer in its place: the layers are called as modules"]
    if not (isinstance(module, OURS) if is_attention else module.se is functional.se):
        return ["the module is reference's, not attn_kernels'"]
    others, norm, width = _reads(module)
    return why_not(x, (residual, *others), norm, width)


def _mlp(module: nn.Module) -> tuple[Tensor | None, ...]:
    """The parameters of the channel gate's two layers, if there is one."""
    if isinstance(module, reference.CBAM):
        module = module.ChannelGate
    if isinstance(module, reference.ChannelGate):
        return module.mlp_parameters()
    if isinstance(module, reference.SE) or _is_se_block(module):
        return module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias
    return ()


def _spatial(module: nn.Module) -> tuple[Tensor, nn.Module] | tuple[()]:
    """The convolution's weight and the norm of the spatial gate, if there is one."""
    if isinstance(module, reference.CBAM) and not module.no_spatial:
        module = module.SpatialGate
    if isinstance(module, reference.SpatialGate):
        return module.spatial.conv.weight, module.spatial.bn
    return ()


def _check(module: AttentionModule, x: Tensor) -> None:
    """Raise what the functional form raises for the module's layers."""
    if not module.is_plain():
        return
    if mlp := _mlp(module):
        check_mlp(x, *mlp)
    if spatial := _spatial(module):
        check_spatial_gate(x, *spatial)
    if isinstance(module, reference.BAM):
        check_bam(x, module.channel_att.gate_c, module.spatial_att.gate_s)


def _reads(module: nn.Module) -> tuple[Sequence[Tensor | None], object, int]:
    """What the kernels read beside x and the residual, the norm, and the width of a map, as ``why_not`` takes them."""
    if isinstance(module, reference.BAM):
        reduce = module.spatial_att.gate_s[0]
        return (reduce.weight, reduce.bias), None, reduce.out_channels
    weight, norm = _spatial(module) or (None, None)
    return (*_mlp(module), weight), norm, 0


def _reasons_within(module: FusedModule | FusedBlock, x: Tensor) -> list[str]:
    """Why the functional form that a module enters, or the modules that a block calls, do not take the kernels."""
    if isinstance(module, FusedModule):
        return why_not(module._plan.nchw(x), (), module._plan.norm(module))
    reasons = []
    for path in module._fusion.epilogues:
        gate = module.get_submodule(".".join(path))
        reasons += [f"{'.'.join(path)}: {reason}" for reason in _reasons(gate, _as_taken(gate, x), None)]
    return reasons


def _as_taken(gate: nn.Module, x: Tensor) -> Tensor:
    """A view of one element of the block's input x, with as many channels and pixels as the gate takes."""
    if not isinstance(gate, FusedModule) or gate._plan.nhwc:
        return x
    plan, (n, c, h, w) = gate._plan, x.shape
    plane = plan.plane if isinstance(plan.plane, tuple) else (h, w)
    return x[:1, :1, :1, :1].expand(n, plan.channels or c, *plane)
