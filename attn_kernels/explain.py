"""What a call of a module does: the fused path or the reference formula, why, and in which layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import reference
import reference.models
from attn_kernels import functional
from attn_kernels.functional import why_not
from attn_kernels.fuse.modules import FusedBlock, FusedModule
from attn_kernels.modules import BAM, CBAM, SE, ChannelGate, SimAM, SpatialGate
from attn_kernels.ops._library import is_dense, layout
from reference._common import AttentionModule, check_input


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

    def __str__(self) -> str:
        lines = [f"{self.call}: {f'fused, {self.layout}' if self.fused else self.otherwise}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        if self.copied:
            lines.append(f"  x is dense in neither layout: it is copied to {self.layout} first")
        return "\n".join(lines)


def explain(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Explanation:
    """Say what ``module(x, residual)`` does here and now, without doing it.

    Args:
        module: an ``SE``, ``BAM``, ``CBAM``, ``ChannelGate``, ``SpatialGate`` or ``SimAM``, or a module or residual
            block that ``fuse_`` made, or a block of ``models`` on which SE's layers stand. Of a block, its attention is
            asked about ``x``, too, for want of its input.
        x: (N, C, H, W), float16, bfloat16, float32 or float64, in any layout.
        residual: the shape of ``x``; None for what ``fuse_`` made, which takes no other argument.

    Returns:
        Whether the kernels run, every reason why they do not, the layout, and whether ``x`` is copied.

    Raises:
        TypeError, ValueError: another module, or an ``x`` or ``residual`` that the module refuses.
    """
    check_input(x, residual, None)
    call = f"{type(module).__name__} on {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"
    reasons = tuple(_reasons(module, x, residual))
    if reasons:
        formula = "plain PyTorch" if isinstance(module, FusedModule | FusedBlock) else "the reference formula"
        return Explanation(call, reasons, None, False, formula)
    x = module._plan.nchw(x) if isinstance(module, FusedModule) else x
    name = "channels_last" if layout(x) == torch.channels_last else "contiguous"
    return Explanation(call, (), name, not is_dense(x))


def _reasons(module: nn.Module, x: Tensor, residual: Tensor | None) -> list[str]:
    """Those of ``why_not`` on what the module's forward pass gives it."""
    is_se_block = isinstance(module, reference.models._Block) and module.attention == "se"
    if isinstance(module, FusedModule | FusedBlock) or is_se_block:
        if residual is not None:
            raise TypeError(f"residual: expected None, since {type(module).__name__} takes only x, got a tensor")
        if not is_se_block:
            return module.why_not(x) or _reasons_within(module, x)
        if module.se is functional.se:
            return why_not(x, (*module.fc1.parameters(), *module.fc2.parameters()))
        return ["the module is reference's, not attn_kernels'"]
    if isinstance(module, AttentionModule) and not module.is_plain():
        return ["hooks on a layer, or another layer in its place: the layers are called as modules"]
    if isinstance(module, CBAM) and module.no_spatial:
        module = module.ChannelGate
    if isinstance(module, SE | ChannelGate):
        return why_not(x, (residual, *module.parameters()))
    if isinstance(module, SimAM):
        return why_not(x, (residual,))
    if isinstance(module, CBAM):
        gate = module.SpatialGate.spatial
        return why_not(x, (residual, *module.ChannelGate.mlp_parameters(), gate.conv.weight), gate.bn)
    if isinstance(module, SpatialGate):
        return why_not(x, (residual, module.spatial.conv.weight), module.spatial.bn)
    if isinstance(module, BAM):
        return why_not(x, (residual, *module.spatial_att.gate_s[0].parameters()))
    names = (reference.SE, reference.BAM, reference.CBAM, reference.SimAM, reference.ChannelGate, reference.SpatialGate)
    if isinstance(module, names):
        return ["the module is reference's, not attn_kernels'"]
    raise TypeError(f"module: expected a module of attn_kernels or of fuse_, got {type(module).__name__}")


def _reasons_within(module: FusedModule | FusedBlock, x: Tensor) -> list[str]:
    """What the functional form that a module enters has to say, or the modules that a block calls."""
    if isinstance(module, FusedModule):
        return why_not(module._plan.nchw(x), (), module._plan.norm(module))
    names = [".".join(path) for path in module._fusion.tails]
    return [f"{name}: {reason}" for name in names for reason in _reasons(module.get_submodule(name), x, None)]
