"""BatchNorm2d as kernels compute it: which modules they can stand for, their buffers and options."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attn_kernels.ops.common.operator import PLAIN
from attn_kernels.ops.common.tiling import next_power_of_2
from reference._common import is_plain_layer, is_untouched, uses_batch_statistics


class Norm(NamedTuple):
    """A norm's parameters and buffers, (C,) or None each, but batches, which is () and int64, or None."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None


class NormOptions(NamedTuple):
    """Whether the batch's statistics normalise, whether they update the buffers, momentum, and eps."""

    batch_statistics: bool
    update: bool
    momentum: float | None
    eps: float


class NormUse(NamedTuple):
    """A kernel's constexpr NORM: of the options, those that make another kernel; partial sums that it loads at once."""

    batch_statistics: bool
    update: bool
    cumulative: bool
    block_q: int


def norm_use(options: NormOptions, programs: int) -> NormUse:
    """For a kernel that adds up what so many programs have left."""
    momentum = options.momentum
    return NormUse(options.batch_statistics, options.update, momentum is None, next_power_of_2(programs))


def _is_batch_norm(norm: object) -> bool:
    """A plain BatchNorm2d, or timm's BatchNormAct2d that adds nothing to one."""
    if isinstance(norm, nn.BatchNorm2d) and type(norm).__name__ == "BatchNormAct2d":
        is_timms = type(norm).__module__.startswith("timm.")
        parts_are_plain = all(is_plain_layer(layer, nn.Identity) for layer in (norm.drop, norm.act))
        return is_timms and parts_are_plain and is_untouched(norm)
    return is_plain_layer(norm, nn.BatchNorm2d)


def is_fusable(norm: object) -> bool:
    """Whether kernels can stand for this norm: a plain BatchNorm2d with its usual buffers."""
    return (
        _is_batch_norm(norm)
        and (norm.running_mean is None) == (norm.running_var is None)
        and (norm.momentum is not None or norm.num_batches_tracked is not None or norm.running_mean is None)
    )


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer's parameters and buffers are tensors whose memory kernels may read."""
    return PLAIN.issuperset(map(type, (*layer._parameters.values(), *layer._buffers.values())))


def has_usual_state(norm: nn.BatchNorm2d) -> bool:
    """Whether the norm's states are plain, with one element per channel, which in the buffers is one of its own."""
    shape = (norm.num_features,)
    for t in norm._parameters.values():
        if t is not None and (type(t) not in PLAIN or t.shape != shape):
            return False
    for name, t in norm._buffers.items():
        if t is None:
            continue
        if name == "num_batches_tracked":
            mean = norm.running_mean
            if type(t) not in PLAIN or t.dim() != 0 or (mean is not None and t.device != mean.device):
                return False
        elif type(t) not in PLAIN or t.shape != shape or (t.stride(0) == 0 and shape != (1,)):
            return False
    return True


def buffers(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def options(norm: nn.BatchNorm2d) -> NormOptions:
    update = norm.training and norm.track_running_stats and norm.running_mean is not None
    return NormOptions(uses_batch_statistics(norm), update, norm.momentum, norm.eps)


def mark_updated(*buffers: Tensor | None) -> None:
    """Tell autograd that a kernel has written to these buffers."""
    torch.autograd.graph.increment_version([b for b in buffers if b is not None])
