"""What is timed: the modules, the feature maps that networks give them, and the bytes that they have to move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("forward", "backward", "both")

# Channels, side, and the gate's hidden channels where they are not the module's default.
RESNET_50 = ((256, 56, None), (512, 28, None), (1024, 14, None), (2048, 7, None))
EFFICIENTNET_B0 = (
    (32, 112, 8), (96, 56, 4), (144, 56, 6), (144, 28, 6), (240, 28, 10), (240, 14, 10), (480, 14, 20), (672, 14, 28),
    (672, 7, 28), (1152, 7, 48),
)  # fmt: skip
MOBILENET_V3_LARGE = ((72, 28, 24), (120, 28, 32), (480, 14, 120), (672, 14, 168), (672, 7, 168), (960, 7, 240))


class Kernel(NamedTuple):
    """A module, where it is applied, and how often it has to move x's bytes at least, with x kept on the chip."""

    module: str
    forward: int
    backward: int
    stages: Iterable[tuple[int, int, int | None]] = RESNET_50
    options: dict[str, str] = {}  # noqa: RUF012
    epilogue: bool = False  # relu(module(x) + residual), the end of a residual block; its mask of a bit is not counted

    def floors(self, bytes_of_x: int) -> dict[str, int]:
        """The bytes that each mode moves at least."""
        counts = self.forward, self.backward, self.forward + self.backward
        return {mode: count * bytes_of_x for mode, count in zip(MODES, counts, strict=True)}

    def build(self, kit, channels: int, side: int | None = None) -> nn.Module:
        """From ``reference``, or from ``attn_kernels`` or ``benchmarks.users``, which have the same constructors."""
        hidden = self.hidden(channels, side)
        options = self.options if hidden is None else {**self.options, "hidden_channels": hidden}
        return getattr(kit, self.module)(channels, **options)

    def hidden(self, channels: int, side: int | None) -> int | None:
        """The gate's hidden channels in the stage of this size; None for the module's default."""
        return {(c, s): hidden for c, s, hidden in self.stages}.get((channels, side))


KERNELS = {
    "se": Kernel("SE", 2, 3),
    "se_add_relu": Kernel("SE", 3, 4, epilogue=True),
    "cbam": Kernel("CBAM", 3, 5),
    "simam": Kernel("SimAM", 2, 3),
    "bam": Kernel("BAM", 3, 5),
    "se_efficientnet_b0": Kernel("SE", 2, 3, EFFICIENTNET_B0, {"mlp_activation": "silu"}),
    "se_mobilenet_v3": Kernel("SE", 2, 3, MOBILENET_V3_LARGE, {"gate": "hardsigmoid"}),
}


def bytes_of(shape: Iterable[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
