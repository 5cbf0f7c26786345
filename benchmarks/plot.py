"""Plots of what speed and train have measured: speed-up, share of a copy's bandwidth, and attention tax, a PNG each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.rows import RESULTS, Row, read
from benchmarks.shapes import DTYPES, KERNELS, MODES
from benchmarks.train import MODES as STEPS
from benchmarks.train import NETWORKS, PEERS, PROVIDERS, SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPILES = ("compile", "compile_max_autotune")
BEST = "best torch.compile"
COLORS = {
    "fused": "#0b7a4b",
    "fused_compile": "#7cc6a4",
    BEST: "#d1761f",
    "compile": "#d1761f",
    "eager": "#8a8f98",
}
NAMES = {"compile": "torch.compile", "fused_compile": "fused, torch.compile"}
EAGER = "eager and torch.compile: timm's SE and CBAM, the published BAM and SimAM"
MARKERS = {"channels_last": "o", "contiguous": "s"}
NOT_MEASURED = "not measured"


class Point(NamedTuple):
    """A value of one provider on one kind of input."""

    kernel: str
    provider: str
    shape: str
    layout: str
    dtype: str
    value: float


class Measured:
    """The latest rows of one GPU at one commit."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = sorted((row for row in rows if row.is_right), key=lambda row: row.timestamp)
        self._latest = {(row.place, row.mode, row.metric): row for row in self.rows}

    def caption(self) -> str:
        """The machine, the versions, the commit and the commands."""
        last = self.rows[-1]
        versions = {f"driver {row.driver}, torch {row.torch}, Triton {row.triton}" for row in self.rows}
        commands = "; ".join(dict.fromkeys(row.command for row in self.rows))
        return f"{last.gpu}; {'; '.join(sorted(versions))}; commit {last.commit}\n{commands}"

    def points(self, mode: str, metric: str) -> list[Point]:
        """All of one metric; the better mode of torch.compile as ``BEST``."""
        points = []
        for (place, row_mode, row_metric), row in self._latest.items():
            if (row_mode, row_metric) == (mode, metric) and row.kernel in KERNELS:
                points.append(Point(*place, row.p50))
        better = min if metric == "time" else max
        groups: dict[tuple[str, str, str, str], list[Point]] = {}
        for point in points:
            if point.provider in COMPILES:
                groups.setdefault((point.kernel, *point[2:5]), []).append(point)
        best = (better(group, key=lambda point: point.value) for group in groups.values())
        return points + [point._replace(provider=BEST) for point in best]

    def speedups(self, mode: str) -> list[Point]:
        """How many times as fast as the better mode of torch.compile each fused module is."""
        times = {point[:5]: point.value for point in self.points(mode, "time")}
        return [
            Point(*place, times[best] / seconds)
            for place, seconds in times.items()
            if place[1] == "fused" and (best := (place[0], BEST, *place[2:])) in times
        ]

    def taxes(self, mode: str, dtype: str) -> dict[tuple[str, str], Row]:
        """By network and provider."""
        return {
            (row.kernel, row.provider): row
            for (_, row_mode, metric), row in self._latest.items()
            if (row_mode, metric, row.dtype) == (mode, "attention_tax", dtype)
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks plot benchmarks/results/nvidia_h200.csv"
    parser.add_argument("files", nargs="*", type=Path, metavar="CSV", help="(default: all in benchmarks/results)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="of the PNGs (default: the same)")
    parser.add_argument("--mode", choices=MODES, default="both", help="of the single modules (default: %(default)s)")
    parser.add_argument("--commit", help="(default: that of the latest row)")


def run(arguments: argparse.Namespace) -> int:
    files = arguments.files or sorted(RESULTS.glob("*.csv"))
    rows = [row for file in files for row in read(file) if arguments.commit in (None, row.commit)]
    gpus: dict[str, list[Row]] = {}
    for row in rows:
        if row.is_right:
            gpus.setdefault(row.gpu, []).append(row)
    if not gpus:
        where = ", ".join(map(str, arguments.files)) or RESULTS
        print(f"python -m benchmarks plot: no measurements in {where}: run speed, train or all first.", file=sys.stderr)
        return 2
    try:
        import matplotlib
    except ImportError:
        print("python -m benchmarks plot needs Matplotlib, which is not installed.", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for gpu_rows in gpus.values():
        commit = max(gpu_rows, key=lambda row: row.timestamp).commit
        measured = Measured(row for row in gpu_rows if row.commit == commit)
        for name, figure in figures(measured, arguments.mode).items():
            path = arguments.out / f"{file_stem(measured)}_{name}.png"
            figure.savefig(path, dpi=150)
            print(path)
    return 0


def file_stem(measured: Measured) -> str:
    return measured.rows[-1].environment.file_name.removesuffix(".csv")


def figures(measured: Measured, mode: str) -> dict[str, Figure]:
    """The plots that there are measurements for."""
    found = {}
    passes = "forward + backward" if mode == "both" else mode
    if speedups := measured.speedups(mode):
        found["speedup"] = grid(
            speedups,
            measured,
            f"Speed-up of the fused modules over the better torch.compile mode, {passes}",
            "times",
            1,
        )
    shares = [p for p in measured.points(mode, "copy_share") if p.provider in ("fused", BEST, "eager")]
    if shares:
        found["bandwidth"] = grid(
            shares,
            measured,
            f"Bandwidth on the fewest bytes that the module can move, {passes}",
            "% of what a copy of as many bytes has",
            100,
        )
    if any(row.metric == "attention_tax" for row in measured.rows):
        found["tax"] = tax(measured)
    return found


def grid(points: Sequence[Point], measured: Measured, title: str, unit: str, line: float) -> Figure:
    """A panel for each kernel and dtype, a line for each shape, a dot for each provider and layout."""
    from matplotlib.figure import Figure

    kernels = [kernel for kernel in KERNELS if any(p.kernel == kernel for p in points)]
    dtypes = [dtype for dtype in DTYPES if any(p.dtype == dtype for p in points)]
    shapes = {
        kernel: sorted({p.shape for p in points if p.kernel == kernel}, key=_order, reverse=True) for kernel in kernels
    }
    rows = max(map(len, shapes.values()))
    figure = Figure((4.2 * len(kernels) + 0.4, len(dtypes) * (0.24 * rows + 0.9) + 1.5), layout="constrained")
    axes = figure.subplots(len(dtypes), len(kernels), squeeze=False, sharex=True)
    providers = [p for p in COLORS if any(point.provider == p for point in points)]
    for i, dtype in enumerate(dtypes):
        for j, kernel in enumerate(kernels):
            ax = axes[i, j]
            ax.set_title(f"{kernel}, {dtype}", fontsize=10)
            here = [p for p in points if (p.kernel, p.dtype) == (kernel, dtype)]
            _dots(ax, here, shapes[kernel])
            ax.axvline(line, color="black", linewidth=0.8)
            if i == len(dtypes) - 1:
                ax.set_xlabel(unit)
    axes[0, 0].set_xlim(0, 1.06 * max(line, *(p.value for p in points)))  # shared by all
    layouts = [layout for layout in MARKERS if any(p.layout == layout for p in points)]
    _frame(figure, title, providers, layouts, measured)
    return figure


def _dots(ax: Axes, points: Sequence[Point], shapes: Sequence[str]) -> None:
    ax.set_yticks(range(len(shapes)), shapes, fontsize=8)
    ax.set_ylim(-0.7, len(shapes) - 0.3)
    ax.grid(axis="both", linewidth=0.3)
    ax.set_axisbelow(True)
    for layout, marker in MARKERS.items():
        shift = 0.17 if layout == "channels_last" else -0.17
        for provider, color in COLORS.items():
            found = [p for p in points if (p.provider, p.layout) == (provider, layout)]
            ax.plot([p.value for p in found], [shapes.index(p.shape) + shift for p in found], marker, color=color, ms=4)
    for y, shape in enumerate(shapes):
        if not any(p.shape == shape for p in points):
            ax.text(0.02, y, NOT_MEASURED, fontsize=7, va="center", color="gray", transform=ax.get_yaxis_transform())


def _order(shape: str) -> tuple[int, ...]:
    batch, channels, height, width = map(int, shape.split("x"))
    return -height * width, channels, batch


def tax(measured: Measured) -> Figure:
    """A panel for training and inference in each setting, bars for each network."""
    from matplotlib.figure import Figure

    panels = [(mode, dtype) for dtype in SETTINGS for mode in STEPS if measured.taxes(mode, dtype)]
    figure = Figure((1.2 + 4.6 * len(panels), 4.8), layout="constrained")
    width = 0.8 / len(PROVIDERS)
    for ax, (mode, dtype) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        taxes = measured.taxes(mode, dtype)
        shape = next(iter(taxes.values())).shape
        ax.set_title(f"{mode}, {dtype} {SETTINGS[dtype][0]}, {shape}", fontsize=10)
        networks = [name for name in NETWORKS if name not in PEERS or any(name == found for found, _ in taxes)]
        ax.set_xticks(range(len(networks)), [name.replace("_", "\n", 1) for name in networks], fontsize=8)
        ax.set_ylabel("ms per step above the network without attention")
        ax.set_xlim(-0.6, len(networks) - 0.4)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.grid(axis="y", linewidth=0.3)
        ax.set_axisbelow(True)
        for i, provider in enumerate(PROVIDERS):
            for j, network in enumerate(networks):
                x = j + (i - (len(PROVIDERS) - 1) / 2) * width
                if (row := taxes.get((network, provider))) is None:
                    ax.text(x, 0, f" {NOT_MEASURED}", rotation=90, fontsize=7, ha="center", va="bottom", color="gray")
                    continue
                spread = [[row.p50 - row.p20], [row.p80 - row.p50]]
                ax.bar(x, row.p50, width * 0.92, yerr=spread, color=COLORS[provider], error_kw={"linewidth": 0.8})
    title = "Attention tax: the time that attention adds to a step of the network computed in the same way"
    _frame(figure, title, list(PROVIDERS), [], measured)
    return figure


def _frame(figure: Figure, title: str, providers: Sequence[str], layouts: Sequence[str], measured: Measured) -> None:
    """The title, what colors and markers mean, and where the measurements are from."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS[provider], label=NAMES.get(provider, provider)) for provider in providers]
    handles += [Line2D([], [], marker=MARKERS[m], color="black", linestyle="", ms=5, label=m) for m in layouts]
    style = {"frameon": False, "fontsize": 9, "title_fontsize": 12}
    figure.legend(handles=handles, title=title, loc="outside upper center", ncols=len(handles), **style)
    figure.supxlabel(f"{EAGER}\n{measured.caption()}", fontsize=7, color="#555555")
