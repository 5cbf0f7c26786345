"""Draws docs/dataflow.png: which launches a call makes, and what each reads and writes of full size."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).parent / "dataflow.png"
KERNEL, PYTORCH, TENSOR, WRITTEN = "#2f6fb5", "#9aa5b1", "#1f2933", "#c2571a"


class Step(NamedTuple):
    """A launch or, where ``pytorch``, layers on small tensors that PyTorch runs, but for ``launches`` of our own."""

    does: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    """Read a second time, as a rule from L2."""
    pytorch: bool = False
    launches: int = 0


ROWS: dict[str, tuple[tuple[Step, ...], tuple[Step, ...]]] = {
    "SE, ChannelGate": (
        (Step("pools, MLP,\ngate, scale", ("x",), ("y",), ("x",)),),
        (Step("gate's and MLP's\ngradient, dx,\nweights", ("dy", "x"), ("dx",), ("dy",)),),
    ),
    "CBAM": (
        (
            Step("channel gates", ("x",)),
            Step("max and mean\nover channels", ("x",)),
            Step("7x7 conv,\nBatchNorm's\nstatistics"),
            Step("BatchNorm,\ngate, scale", ("x",), ("y",)),
        ),
        (
            Step("channel gates\nagain"),
            Step("spatial gate's\ngradient", ("dy", "x")),
            Step("BatchNorm,\nconv"),
            Step("conv's weight"),
            Step("channel gate's\ngradient, dx,\nweights", ("dy", "x"), ("dx",), ("dy",)),
        ),
    ),
    "BAM": (
        (
            Step("means,\n1x1 reduce", ("x",)),
            Step("both branches,\nC/16 channels", pytorch=True, launches=6),
            Step("gate, scale", ("x",), ("y",)),
        ),
        (
            Step("logits'\ngradients", ("dy", "x")),
            Step("both branches", pytorch=True, launches=6),
            Step("dx, reduce's\nweight", ("dy", "x"), ("dx",)),
        ),
    ),
    "SimAM": (
        (Step("mean, variance,\nenergy, scale", ("x",), ("y",)),),
        (Step("sums, dx", ("dy", "x"), ("dx",)),),
    ),
    "channel_attention": (
        (Step("pools", ("x",)), Step("your gate,\n(N, C) values", pytorch=True), Step("scale", ("x",), ("y",))),
        (Step("gate's\ngradient", ("dy", "x")), Step("your gate", pytorch=True), Step("dx", ("dy",), ("dx",))),
    ),
}
WIDTH, PITCH = 1.5, 1.8  # of a step
COLUMNS = 4, 5  # of forward and backward


def draw_steps(ax: Axes, steps: tuple[Step, ...], title: str, columns: int) -> None:
    """One row of steps, with what they read above and what they write below."""
    ax.set(xlim=(-0.1, columns * PITCH), ylim=(-1.0, 2.2))
    ax.axis("off")
    launches = sum(s.launches if s.pytorch else 1 for s in steps)
    moved = sum(len(s.reads) + len(s.writes) for s in steps)
    ax.set_title(
        f"{title}: {launches} launch{'es' * (launches > 1)}, {moved}|x|", loc="left", fontsize=10, color=TENSOR
    )
    for i, step in enumerate(steps):
        left, color = i * PITCH, PYTORCH if step.pytorch else KERNEL
        box = FancyBboxPatch((left, 0), WIDTH, 1, boxstyle="round,pad=0,rounding_size=0.12", color=color, linewidth=0)
        ax.add_patch(box)
        ax.text(left + WIDTH / 2, 0.5, step.does, ha="center", va="center", color="white", fontsize=7.5)
        if i:
            ax.annotate("", (left, 0.5), (left - PITCH + WIDTH, 0.5), arrowprops={"arrowstyle": "->", "color": PYTORCH})
        tokens = [(name, False) for name in step.reads] + [(name, True) for name in step.again]
        for j, (name, again) in enumerate(tokens):
            _arrow(ax, left + WIDTH * (j + 1) / (len(tokens) + 1), name, KERNEL, read=True, again=again)
        for j, name in enumerate(step.writes):
            _arrow(ax, left + WIDTH * (j + 1) / (len(step.writes) + 1), name, WRITTEN, read=False)


def _arrow(ax: Axes, at: float, name: str, color: str, *, read: bool, again: bool = False) -> None:
    start, end, text = (1.6, 1.02, 1.68) if read else (-0.02, -0.6, -0.7)
    style = {
        "arrowstyle": "-|>",
        "color": color,
        "linestyle": (0, (2, 2)) if again else "-",
        "shrinkA": 0,
        "shrinkB": 0,
    }
    ax.annotate("", (at, end), (at, start), arrowprops=style)
    ax.text(at, text, name, ha="center", va="bottom" if read else "top", fontsize=9, color=color, style="italic")


def main() -> None:
    figure, axes = plt.subplots(
        len(ROWS), 2, figsize=(12, 1.75 * len(ROWS)), layout="constrained", width_ratios=COLUMNS
    )
    for (name, passes), row in zip(ROWS.items(), axes, strict=True):
        for ax, steps, direction, columns in zip(row, passes, ("forward", "backward"), COLUMNS, strict=True):
            draw_steps(ax, steps, f"{name}, {direction}", columns)
    figure.supxlabel(
        "Blue box: one launch. Grey box: what PyTorch runs on small tensors, its launches not counted (but BAM's 6 of "
        "ours). Arrows: tensors of x's size, read (blue), read\nagain, from L2 as a rule (dashed, not counted), "
        "written (orange). A residual is one more read of the last box of forward. |x|: bytes of x.",
        fontsize=8.5,
        color=TENSOR,
    )
    figure.savefig(OUT, dpi=120)
    print(f"drawn: {OUT}")


if __name__ == "__main__":
    main()
