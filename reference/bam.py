"""BAM (Park, Woo, Lee, Kweon: "BAM: Bottleneck Attention Module", BMVC 2018), as its authors' code computes it.

The paper adds the two branches (equation 2); the published code, whose checkpoints people have, multiplies them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference._common import (
    AttentionModule,
    accumulation_dtype,
    check_batch_statistics,
    check_device,
    check_input,
    check_parameter,
    check_positive,
    epilogue,
    is_plain_layer,
    like_parameters,
    states,
)

# The layers of the two branches.
_LAYERS = (nn.Flatten, nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU)


def check_bam(x, gate_c, gate_s, *, residual=None, activation=None):
    """Raise what :func:`bam` raises for these arguments."""
    check_input(x, residual, activation)
    n, c, h, w = x.shape
    _check_branch("gate_c", gate_c, nn.Linear, x, c)
    _check_branch("gate_s", gate_s, nn.Conv2d, x, 1)
    reduce = gate_s[0]
    plain = isinstance(reduce, nn.Conv2d) and reduce.kernel_size == reduce.stride == (1, 1)
    if not plain or reduce.padding != (0, 0) or reduce.groups != 1:
        raise ValueError(f"gate_s: expected a plain 1x1 convolution first, got {reduce}")
    check_parameter("gate_s[0].weight", reduce.weight, (reduce.out_channels, c, 1, 1), x)
    check_parameter("gate_s[0].bias", reduce.bias, (reduce.out_channels,), x, optional=True)
    for layer in gate_c:
        check_batch_statistics(layer, x, n)
    for layer in gate_s:
        check_batch_statistics(layer, x, n * h * w)


def _check_branch(name: str, gate: nn.Sequential, kind: type[nn.Linear | nn.Conv2d], x: Tensor, out: int) -> None:
    """Raise unless ``gate`` is a chain of layers of a kind, from x's channels to ``out``, on x's device."""
    if not isinstance(gate, nn.Sequential):
        raise TypeError(f"{name}: expected an nn.Sequential, got {type(gate).__name__}")
    layers = [layer for layer in gate if isinstance(layer, kind | nn.BatchNorm1d | nn.BatchNorm2d)]
    if not any(isinstance(layer, kind) for layer in layers):
        raise ValueError(f"{name}: expected {kind.__name__} layers, got {gate}")
    width = x.shape[1]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            takes, gives = layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d):
            takes, gives = layer.in_channels, layer.out_channels
        else:
            takes = gives = layer.num_features
        if layer is layers[0] and takes != width:
            raise ValueError(f"x: expected {takes} channels, as {name} takes, got shape {tuple(x.shape)}")
        if takes != width:
            raise ValueError(f"{name}: expected a layer that takes {width} channels, got {layer}")
        width = gives
        for state in states(layer):
            if state.device != x.device:
                check_device(f"{name}, {layer}", state, x)
    if width != out:
        raise ValueError(f"{name}: expected {out} channels out, got {width}")


def check_logits(x: Tensor, channel: Tensor, spatial: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that the branches have returned, (N, C) and (N, 1, H, W); a smaller spatial map is broadcast.

    Raises:
        ValueError: logits of another shape.
    """
    n, c, h, w = x.shape
    if channel.shape != (n, c):
        raise ValueError(f"gate_c: expected to return (N, C), {(n, c)}, got {tuple(channel.shape)}")
    shape = (n, 1, h, w)
    if spatial.dim() == 4 and all(size in (1, wanted) for size, wanted in zip(spatial.shape, shape, strict=True)):
        spatial = spatial.expand(shape)
    else:
        raise ValueError(f"gate_s: expected to return (N, 1, H, W), {(n, 1, h, w)}, got {tuple(spatial.shape)}")
    return channel, spatial


def channel_logits(mean: Tensor, gate_c: nn.Sequential) -> Tensor:
    """(N, C) channel logits of the (N, C) channel means, in the dtype of the parameters."""
    return gate_c(like_parameters(mean, gate_c))


def spatial_logits(reduced: Tensor, gate_s: nn.Sequential) -> Tensor:
    """(N, 1, H, W) spatial logits of the (N, h, H, W) reduced map, whose dtype the maps in between keep."""
    t = reduced
    for layer in gate_s[1:]:
        t = spatial_layer(t, layer)
    return t


def spatial_layer(t: Tensor, layer: nn.Module) -> Tensor:
    """One layer of the spatial branch on the map ``t``, in whose dtype the result is."""
    state = next(layer.parameters(), None)
    # BatchNorm takes a 16-bit map with parameters in float32.
    mixes = isinstance(layer, nn.BatchNorm2d) and t.element_size() == 2
    if state is None or state.dtype == t.dtype or (mixes and state.dtype == torch.float32):
        return layer(t)
    if is_plain_layer(layer, nn.Conv2d):
        return convolve(t, layer)
    return layer(t.to(state.dtype)).to(t.dtype)


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution in ``x``'s dtype, whatever its parameters'."""
    return convolve_by(x, conv, *(t if t is None else t.to(x.dtype) for t in (conv.weight, conv.bias)))


def convolve_by(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution by other parameters than its own."""
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def bam(
    x: Tensor,
    gate_c: nn.Sequential,
    gate_s: nn.Sequential,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Scale each element by one plus the sigmoid of a channel logit times a spatial logit.

    ``act(x * (1 + sigmoid(gate_c(mean_hw(x)) * gate_s(x))) + residual)``

    Args:
        x: (N, C, H, W), float16, bfloat16, float32 or float64, contiguous or channels_last.
        gate_c: Linear and BatchNorm1d layers, (N, C) to (N, C), in any float dtype.
        gate_s: convolutions and BatchNorm2d layers, (N, C, H, W) to (N, 1, H, W), a reducing 1x1 convolution first.
        residual: added after the gate; the shape of ``x``.
        activation: None or "relu", applied last.

    Returns:
        (N, C, H, W) in ``x``'s dtype and memory format.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device, one value per channel for a training
            BatchNorm, or a branch that returns another shape.
    """
    check_bam(x, gate_c, gate_s, residual=residual, activation=activation)
    channel = channel_logits(x.mean((2, 3), dtype=accumulation_dtype(x)), gate_c)
    if is_plain_layer(gate_s, nn.Sequential):
        spatial = spatial_logits(spatial_layer(x, gate_s[0]), gate_s)
    else:
        spatial = gate_s(like_parameters(x, gate_s))
    channel, spatial = check_logits(x, channel, spatial)
    attention = 1 + torch.sigmoid(channel[:, :, None, None].to(x.dtype) * spatial.to(x.dtype))
    return epilogue(x * attention, residual, activation)


class ChannelGate(nn.Module):
    """BAM's channel branch, keys ``gate_c.gate_c_fc_0.*``, ``gate_c.gate_c_bn_1.*``, ``gate_c.gate_c_fc_final.*``.

    Args:
        gate_channel: C of the input.
        reduction_ratio: the hidden layers have max(1, C // reduction_ratio) channels.
        num_layers: number of hidden layers.
    """

    def __init__(self, gate_channel: int, reduction_ratio: int = 16, num_layers: int = 1):
        super().__init__()
        hidden = max(1, gate_channel // reduction_ratio)
        widths = [gate_channel] + [hidden] * num_layers
        self.gate_c = nn.Sequential()
        self.gate_c.add_module("flatten", nn.Flatten())
        for i in range(num_layers):
            self.gate_c.add_module(f"gate_c_fc_{i}", nn.Linear(widths[i], widths[i + 1]))
            self.gate_c.add_module(f"gate_c_bn_{i + 1}", nn.BatchNorm1d(widths[i + 1]))
            self.gate_c.add_module(f"gate_c_relu_{i + 1}", nn.ReLU())
        self.gate_c.add_module("gate_c_fc_final", nn.Linear(widths[-1], gate_channel))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, C, H, W), expanded."""
        mean = x.mean((2, 3), dtype=accumulation_dtype(x))
        return channel_logits(mean, self.gate_c)[:, :, None, None].expand_as(x)


class SpatialGate(nn.Module):
    """BAM's spatial branch, keys ``gate_s.gate_s_{conv,bn}_{reduce0,di_0,di_1}.*``, ``gate_s.gate_s_conv_final.*``.

    Args:
        gate_channel: C of the input.
        reduction_ratio: the inner maps have max(1, C // reduction_ratio) channels.
        dilation_conv_num: number of dilated 3x3 convolutions.
        dilation_val: their dilation.
    """

    def __init__(self, gate_channel: int, reduction_ratio: int = 16, dilation_conv_num: int = 2, dilation_val: int = 4):
        super().__init__()
        hidden = max(1, gate_channel // reduction_ratio)
        self.gate_s = nn.Sequential()
        self.gate_s.add_module("gate_s_conv_reduce0", nn.Conv2d(gate_channel, hidden, kernel_size=1))
        self.gate_s.add_module("gate_s_bn_reduce0", nn.BatchNorm2d(hidden))
        self.gate_s.add_module("gate_s_relu_reduce0", nn.ReLU())
        for i in range(dilation_conv_num):
            conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=dilation_val, dilation=dilation_val)
            self.gate_s.add_module(f"gate_s_conv_di_{i}", conv)
            self.gate_s.add_module(f"gate_s_bn_di_{i}", nn.BatchNorm2d(hidden))
            self.gate_s.add_module(f"gate_s_relu_di_{i}", nn.ReLU())
        self.gate_s.add_module("gate_s_conv_final", nn.Conv2d(hidden, 1, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, C, H, W), expanded."""
        return self.gate_s(like_parameters(x, self.gate_s)).expand_as(x)


class BAM(AttentionModule):
    """Bottleneck Attention Module: keys ``channel_att.gate_c.*`` and ``spatial_att.gate_s.*``.

    Args:
        gate_channel: C of the input.
        reduction_ratio: both branches work on max(1, C // reduction_ratio) channels.
        num_layers: number of hidden layers of the channel branch.
        dilation_conv_num, dilation_val: number and dilation of the spatial branch's 3x3 convolutions.

    Raises:
        ValueError: a size below 1.
    """

    _function = staticmethod(bam)

    def __init__(
        self,
        gate_channel: int,
        reduction_ratio: int = 16,
        num_layers: int = 1,
        dilation_conv_num: int = 2,
        dilation_val: int = 4,
    ):
        super().__init__()
        check_positive("gate_channel", gate_channel)
        check_positive("reduction_ratio", reduction_ratio)
        check_positive("num_layers", num_layers)
        check_positive("dilation_conv_num", dilation_conv_num)
        check_positive("dilation_val", dilation_val)
        self.channel_att = ChannelGate(gate_channel, reduction_ratio, num_layers)
        self.spatial_att = SpatialGate(gate_channel, reduction_ratio, dilation_conv_num, dilation_val)

    def is_plain(self):
        channel, spatial = self.channel_att, self.spatial_att
        gates = channel.gate_c, spatial.gate_s
        if not (is_plain_layer(channel, ChannelGate) and is_plain_layer(spatial, SpatialGate)):
            return False
        if not all(is_plain_layer(gate, nn.Sequential) for gate in gates):
            return False
        return all(type(layer) in _LAYERS and is_plain_layer(layer, type(layer)) for gate in gates for layer in gate)

    def attend(self, x, residual, activation):
        if not self.is_plain():
            check_input(x, residual, activation)
            channel, spatial = self.channel_att(x), self.spatial_att(x)
            attention = 1 + torch.sigmoid(channel.to(x.dtype) * spatial.to(x.dtype))
            return epilogue(x * attention, residual, activation)
        return self._function(
            x, self.channel_att.gate_c, self.spatial_att.gate_s, residual=residual, activation=activation
        )
