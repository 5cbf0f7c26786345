"""Every module that has kernels, once: from here instruments, tests and documents draw their lists.

It is in ``reference`` since it must not import Triton, which some commands configure first.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import torch
from torch import nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
POOLS = ("avg", "max", "lp", "lse")


class Budget(NamedTuple):
    """How often a training step may move x's bytes: forward, backward, and DRAM bytes of both, behind L2.

    Attributes:
        walks_channels_last: the same three in channels_last where no program holds a plane, if they differ.
        infers_as_compiled: in inference it makes as many passes over x as torch.compile.
    """

    forward: float
    backward: float
    dram: float
    walks_channels_last: tuple[float, float, float] | None = None
    infers_as_compiled: bool = False


class Operator(NamedTuple):
    """A module of ``reference`` and ``attn_kernels``.

    Attributes:
        name: of the module.
        function: the name of its functional form.
        floors: how often forward and backward have to move x's bytes at least, with x kept on the chip.
        budget: of the kernels' traffic; None for modules that are a part of another.
        epilogue_budget: with the end of a residual block behind it, where that is counted too.
        ends_blocks: networks have it at the end of a residual block.
        has_channels: its constructor takes the number of channels first.
        small: further arguments for a few channels.
        draw: random options, given the number of channels.
    """

    name: str
    function: str
    floors: tuple[int, int] | None = None
    budget: Budget | None = None
    epilogue_budget: Budget | None = None
    ends_blocks: bool = False
    has_channels: bool = True
    small: dict[str, object] = {}  # noqa: RUF012
    draw: Callable[[Random, int], dict[str, object]] = lambda r, channels: {}

    def build(self, kit: object, channels: int, **options: object) -> nn.Module:
        """From ``reference``, or from ``attn_kernels`` or ``benchmarks.users``, which have the same constructors."""
        return getattr(kit, self.name)(*((channels,) if self.has_channels else ()), **options)


def _reduction(r: Random, channels: int) -> int:
    return r.choice((1, 2, 4, 16)) if channels <= 256 else 16


def _gate(r: Random, channels: int) -> dict[str, object]:
    return {"reduction_ratio": _reduction(r, channels), "pool_types": tuple(r.sample(POOLS, r.randint(1, 4)))}


def _se(r: Random, channels: int) -> dict[str, object]:
    return {
        "hidden_channels": r.choice((1, 3, max(1, channels // _reduction(r, channels)))),
        "bias": r.random() < 0.7,
        "mlp_activation": r.choice(("relu", "silu", "gelu", "leaky_relu", "hardswish")),
        "gate": r.choice(("sigmoid", "hardsigmoid")),
    }


def _cbam(r: Random, channels: int) -> dict[str, object]:
    return {**_gate(r, channels), "no_spatial": r.random() < 0.1}


def _bam(r: Random, channels: int) -> dict[str, object]:
    reduction = r.choice((1, 2, 5)) if channels <= 80 else r.choice((4, 16))
    return {"reduction_ratio": reduction, "dilation_val": r.choice((1, 2, 4))}


def _simam(r: Random, channels: int) -> dict[str, object]:
    return {"e_lambda": r.choice((1e-4, 1e-2))}


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "SE",
            "se",
            (2, 3),
            Budget(3, 4, 5.3),
            Budget(4, 5.1, 7.4),
            ends_blocks=True,
            small={"reduction": 4},
            draw=_se,
        ),
        Operator("ChannelGate", "channel_gate", (2, 3), small={"reduction_ratio": 4, "pool_types": POOLS}, draw=_gate),
        Operator("SpatialGate", "spatial_gate", has_channels=False),
        # Its gates, pools and scale each read x, as torch.compile's kernels do; L2 holds a part of it between them.
        Operator(
            "CBAM",
            "cbam",
            (3, 5),
            Budget(4, 6, 8.3, infers_as_compiled=True),
            ends_blocks=True,
            small={"reduction_ratio": 4},
            draw=_cbam,
        ),
        # 0.8 and 1.25 of it are the branches' maps of C/16 channels; 0.3, at 7x7, parts of the reducing weight's
        # gradient.
        Operator("BAM", "bam", (3, 5), Budget(3.8, 6.6, 8.5), small={"reduction_ratio": 4}, draw=_bam),
        # Planes that no program holds are read twice. L2, which all programs share that run side by side, still has
        # three quarters of them at 24x24, and at 28x28, whose slice is of fewer bytes, all.
        Operator(
            "SimAM",
            "simam",
            (2, 3),
            Budget(2, 3, 5.2, walks_channels_last=(3, 5, 5.8)),
            ends_blocks=True,
            draw=_simam,
        ),
    )
}
# Those that are no part of another: they are counted, timed, and tried on a GPU one after another.
WHOLE = {name: operator for name, operator in OPERATORS.items() if operator.budget}
FAMILIES = {operator.function: name for name, operator in WHOLE.items()}
