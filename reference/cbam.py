"""CBAM (Woo, Park, Lee, Kweon: "CBAM: Convolutional Block Attention Module", ECCV 2018, equations 1 to 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference._common import (
    AttentionModule,
    accumulation_dtype,
    check_batch_statistics,
    check_choice,
    check_device,
    check_input,
    check_parameter,
    check_positive,
    epilogue,
    is_plain_layer,
    is_untouched,
    like_parameters,
    without_autocast,
)
from reference.se import check_mlp, mlp


def _avg(x: Tensor) -> Tensor:
    return x.mean((2, 3), dtype=accumulation_dtype(x))


def _max(x: Tensor) -> Tensor:
    # The gradient goes to the first maximum in row-major order.
    return x.flatten(2).max(dim=2).values.to(accumulation_dtype(x))


def _lp(x: Tensor) -> Tensor:
    # sqrt(sum x^2), whose gradient vector_norm defines as 0 on a plane of zeros.
    return torch.linalg.vector_norm(x, dim=(2, 3), dtype=accumulation_dtype(x))


def _lse(x: Tensor) -> Tensor:
    return torch.logsumexp(x.to(accumulation_dtype(x)), dim=(2, 3))


POOLS = {"avg": _avg, "max": _max, "lp": _lp, "lse": _lse}


def _channel_pools(x: Tensor) -> Tensor:
    """(N, 2, H, W): the maximum and the mean over the channels."""
    dtype = accumulation_dtype(x)
    # The gradient of the maximum goes to the lowest channel that attains it.
    maximum = x.max(dim=1, keepdim=True).values.to(dtype)
    return torch.cat((maximum, x.mean(dim=1, keepdim=True, dtype=dtype)), dim=1)


def check_pool_types(pool_types: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless ``pool_types`` holds one or more distinct names of pools."""
    if isinstance(pool_types, str) or not isinstance(pool_types, Sequence):
        raise TypeError(f"pool_types: expected a sequence of names, got {pool_types!r}")
    for pool in pool_types:
        check_choice("pool_types", pool, POOLS)
    if not pool_types or len(set(pool_types)) != len(pool_types):
        raise ValueError(f"pool_types: expected one or more distinct names, got {pool_types!r}")


def check_channel_gate(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, pool_types=("avg", "max"), residual=None, activation=None
):
    """Raise what :func:`channel_gate` raises for these arguments."""
    check_input(x, residual, activation)
    check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_pool_types(pool_types)


def check_spatial_gate(x, conv_weight, norm, *, residual=None, activation=None):
    """Raise what :func:`spatial_gate` raises for these arguments."""
    check_input(x, residual, activation)
    kernel = conv_weight.shape[-1] if isinstance(conv_weight, Tensor) and conv_weight.dim() == 4 else 7
    check_parameter("conv_weight", conv_weight, (1, 2, kernel, kernel), x)
    if kernel % 2 == 0:
        raise ValueError(f"conv_weight: expected an odd kernel size, got {kernel}")
    if not callable(norm):
        raise TypeError(f"norm: expected a module or a function of a tensor, got {type(norm).__name__}")
    if isinstance(norm, nn.BatchNorm2d):
        if norm.num_features != 1:
            raise ValueError(f"norm: expected BatchNorm2d of 1 channel, got {norm.num_features}")
        for state in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if state is not None:
                check_device("norm", state, x)
    check_batch_statistics(norm, x, x.shape[0] * x.shape[2] * x.shape[3])


def check_cbam(
    x,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    conv_weight,
    norm,
    *,
    pool_types=("avg", "max"),
    residual=None,
    activation=None,
):
    """Raise what :func:`cbam` raises for these arguments."""
    check_channel_gate(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, pool_types=pool_types, residual=residual, activation=activation
    )
    check_spatial_gate(x, conv_weight, norm)


def channel_gate(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    pool_types: Sequence[str] = ("avg", "max"),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Scale each channel by a gate computed from several poolings of its plane (equation 2).

    ``act(x * sigmoid(sum over pools of fc2(relu(fc1(pool(x))))) + residual)``

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last.
        fc1_weight, fc1_bias: (h, C) or (h, C, 1, 1), and (h,) or None, any float dtype; one MLP serves every pool.
        fc2_weight, fc2_bias: (C, h) or (C, h, 1, 1), and (C,) or None, any float dtype; its bias counts once a pool.
        pool_types: any of "avg", "max", "lp" (sqrt of the sum of squares) and "lse" (log of the sum of exponentials).
        residual: added after the gate; the shape of ``x``.
        activation: None or "relu", applied last.

    Returns:
        (N, C, H, W) in ``x``'s dtype and memory format. Pools and gate are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or an unknown name.
    """
    check_channel_gate(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, pool_types=pool_types, residual=residual, activation=activation
    )
    logits = sum(mlp(POOLS[pool](x), fc1_weight, fc1_bias, fc2_weight, fc2_bias, "relu") for pool in pool_types)
    scale = torch.sigmoid(logits).to(x.dtype)[:, :, None, None]
    return epilogue(x * scale, residual, activation)


def spatial_gate(
    x: Tensor,
    conv_weight: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Scale each pixel by a gate computed from the maximum and the mean over its channels (equation 3).

    ``act(x * sigmoid(norm(conv([max_c(x), mean_c(x)]))) + residual)``

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last.
        conv_weight: (1, 2, k, k) with k odd, any float dtype; the maximum comes first; no bias, size kept.
        norm: of the (N, 1, H, W) map, as a rule ``nn.BatchNorm2d(1, momentum=0.01)``.
        residual: added after the gate; the shape of ``x``.
        activation: None or "relu", applied last.

    Returns:
        (N, C, H, W) in ``x``'s dtype and memory format. The map is computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, or one value per channel for a training
            BatchNorm.
    """
    check_spatial_gate(x, conv_weight, norm, residual=residual, activation=activation)
    pools = _channel_pools(x)
    with without_autocast(x):
        z = F.conv2d(pools, conv_weight.to(pools.dtype), padding=conv_weight.shape[-1] // 2)
        if isinstance(norm, nn.Module):
            z = like_parameters(z, norm)
        scale = torch.sigmoid(norm(z)).to(x.dtype)
    return epilogue(x * scale, residual, activation)


def cbam(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    conv_weight: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    pool_types: Sequence[str] = ("avg", "max"),
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The channel gate, then the spatial gate (equation 1): ``act(spatial_gate(channel_gate(x)) + residual)``.

    Args and errors: those of :func:`channel_gate` and :func:`spatial_gate`.

    Returns:
        (N, C, H, W) in ``x``'s dtype and memory format.
    """
    check_cbam(
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        conv_weight,
        norm,
        pool_types=pool_types,
        residual=residual,
        activation=activation,
    )
    x = channel_gate(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, pool_types=pool_types)
    return spatial_gate(x, conv_weight, norm, residual=residual, activation=activation)


class ChannelGate(AttentionModule):
    """CBAM's channel gate. Keys ``mlp.1.weight (h, C)``, ``mlp.1.bias``, ``mlp.3.weight (C, h)``, ``mlp.3.bias``.

    Args:
        gate_channels: C of the input.
        reduction_ratio: h = max(1, C // reduction_ratio).
        pool_types: any of "avg", "max", "lp" and "lse".

    Raises:
        TypeError, ValueError: a size below 1 or an unknown pool.
    """

    _function = staticmethod(channel_gate)

    def __init__(self, gate_channels: int, reduction_ratio: int = 16, pool_types: Sequence[str] = ("avg", "max")):
        super().__init__()
        check_positive("gate_channels", gate_channels)
        check_positive("reduction_ratio", reduction_ratio)
        check_pool_types(pool_types)
        hidden = max(1, gate_channels // reduction_ratio)
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(gate_channels, hidden), nn.ReLU(), nn.Linear(hidden, gate_channels)
        )
        self.pool_types = tuple(pool_types)

    def mlp_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``fc1_weight, fc1_bias, fc2_weight, fc2_bias`` of the functional forms."""
        _, fc1, _, fc2 = self.mlp
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias

    def is_plain(self):
        layers = tuple(self.mlp)
        kinds = nn.Flatten, nn.Linear, nn.ReLU, nn.Linear
        return is_plain_layer(self.mlp, nn.Sequential) and len(layers) == 4 and all(map(is_plain_layer, layers, kinds))

    def attend(self, x, residual, activation):
        if not self.is_plain():
            check_input(x, residual, activation)
            with without_autocast(x):
                logits = sum(self.mlp(like_parameters(POOLS[pool](x), self.mlp)) for pool in self.pool_types)
                scale = torch.sigmoid(logits).to(x.dtype)[:, :, None, None]
            return epilogue(x * scale, residual, activation)
        return self._function(
            x, *self.mlp_parameters(), pool_types=self.pool_types, residual=residual, activation=activation
        )

    def extra_repr(self) -> str:
        return f"pool_types={self.pool_types}"


class _ConvNorm(nn.Module):
    """Holds the spatial gate's convolution and BatchNorm under the published keys."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)


class SpatialGate(AttentionModule):
    """CBAM's spatial gate. Keys ``spatial.conv.weight (1, 2, 7, 7)``, ``spatial.bn.*``."""

    _function = staticmethod(spatial_gate)

    def __init__(self):
        super().__init__()
        self.spatial = _ConvNorm()

    def is_plain(self):
        return is_plain_layer(self.spatial.conv, nn.Conv2d)

    def attend(self, x, residual, activation):
        conv, bn = self.spatial.conv, self.spatial.bn
        if not self.is_plain():
            check_input(x, residual, activation)
            with without_autocast(x):
                z = conv(like_parameters(_channel_pools(x), conv))
                scale = torch.sigmoid(bn(like_parameters(z, bn))).to(x.dtype)
            return epilogue(x * scale, residual, activation)
        return self._function(x, conv.weight, bn, residual=residual, activation=activation)


def _is_plain_gate(gate: nn.Module, kind: type[ChannelGate | SpatialGate]) -> bool:
    """Whether a gate may be computed without a call of it: one of ours, untouched, and so are its layers."""
    is_ours = isinstance(gate, kind) and (type(gate).forward, type(gate).attend) == (kind.forward, kind.attend)
    return is_ours and is_untouched(gate) and gate.is_plain()


class CBAM(AttentionModule):
    """Convolutional Block Attention Module: keys ``ChannelGate.mlp.*`` and ``SpatialGate.spatial.*``.

    Args:
        gate_channels: C of the input.
        reduction_ratio: of the channel gate's MLP.
        pool_types: of the channel gate: any of "avg", "max", "lp" and "lse".
        no_spatial: leave the spatial gate out.

    Raises:
        TypeError, ValueError: a size below 1 or an unknown pool.
    """

    _function = staticmethod(cbam)
    _channel_gate = ChannelGate
    _spatial_gate = SpatialGate

    def __init__(
        self,
        gate_channels: int,
        reduction_ratio: int = 16,
        pool_types: Sequence[str] = ("avg", "max"),
        no_spatial: bool = False,
    ):
        super().__init__()
        self.ChannelGate = self._channel_gate(gate_channels, reduction_ratio, pool_types)
        self.no_spatial = no_spatial
        if not no_spatial:
            self.SpatialGate = self._spatial_gate()

    def is_plain(self):
        gates = ((self.ChannelGate, ChannelGate),)
        if not self.no_spatial:
            gates += ((self.SpatialGate, SpatialGate),)
        return all(_is_plain_gate(gate, kind) for gate, kind in gates)

    def attend(self, x, residual, activation):
        channel = self.ChannelGate
        if self.no_spatial:
            return channel(x, residual, activation)
        if not self.is_plain():
            return self.SpatialGate(channel(x), residual, activation)
        spatial = self.SpatialGate.spatial
        return self._function(
            x,
            *self.ChannelGate.mlp_parameters(),
            spatial.conv.weight,
            spatial.bn,
            pool_types=self.ChannelGate.pool_types,
            residual=residual,
            activation=activation,
        )
