"""What is timed: the modules, the feature maps that networks give them, and the bytes that they have to move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from reference import catalogue
from reference.catalogue import FAMILIES, OPERATORS

DTYPES = {name: catalogue.DTYPES[name] for name in ("bf16", "fp32")}
MODES = ("forward", "backward", "both")

# Channels, side, and the gate's hidden channels where they are not the module's default.
RESNET_50 = ((256, 56, None), (512, 28, None), (1024, 14, None), (2048, 7, None))
EFFICIENTNET_B0 = (
    (32, 112, 8), (96, 56, 4), (144, 56, 6), (144, 28, 6), (240, 28, 10), (240, 14, 10), (480, 14, 20), (672, 14, 28),
    (672, 7, 28), (1152, 7, 48),
)  # fmt: skip
MOBILENET_V3_LARGE = ((72, 28, 24), (120, 28, 32), (480, 14, 120), (672, 14, 168), (672, 7, 168), (960, 7, 240))


class Kernel(NamedTuple):
    """A module, where it is applied, with the end of a residual block behind it or without."""

    module: str
    stages: Iterable[tuple[int, int, int | None]] = RESNET_50
    options: dict[str, str] = {}  # noqa: RUF012
    epilogue: bool = False  # relu(module(x) + residual); the ReLU's bits are not counted

    def floors(self, bytes_of_x: int) -> dict[str, int]:
        """The bytes that each mode moves at least, with x kept on the chip."""
        forward, backward = (count + self.epilogue for count in OPERATORS[self.module].floors)
        counts = forward, backward, forward + backward
        return {mode: count * bytes_of_x for mode, count in zip(MODES, counts, strict=True)}

    def build(self, kit, channels: int, side: int | None = None) -> nn.Module:
        """From ``reference``, or from ``attn_kernels`` or ``benchmarks.users``, which have the same constructors."""
        hidden = self.hidden(channels, side)
        options = self.options if hidden is None else {**self.options, "hidden_channels": hidden}
        return OPERATORS[self.module].build(kit, channels, **options)

    def hidden(self, channels: int, side: int | None) -> int | None:
        """The gate's hidden channels in the stage of this size; None for the module's default."""
        return {(c, s): hidden for c, s, hidden in self.stages}.get((channels, side))


KERNELS = {
    "se": Kernel("SE"),
    "se_add_relu": Kernel("SE", epilogue=True),
    **{family: Kernel(name) for family, name in FAMILIES.items()},
    "se_efficientnet_b0": Kernel("SE", EFFICIENTNET_B0, {"mlp_activation": "silu"}),
    "se_mobilenet_v3": Kernel("SE", MOBILENET_V3_LARGE, {"gate": "hardsigmoid"}),
}


def bytes_of(shape: Iterable[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
