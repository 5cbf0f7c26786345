"""Draws docs/phases.png: both phases of a channel gate's forward pass in one launch, in the kernels' own order."""

from __future__ import annotations

import heapq
import os
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from benchmarks.work_order import work_order

OUT = Path(__file__).parent / "phases.png"
TEXT, GREY, ARROW = "#1f2933", "#9aa5b1", "#d0021b"
COLORS = "#2f6fb5", "#c2571a", "#3a8f5c", "#8a4fa3", "#b58a00", "#5b6b7f"  # of the groups

GROUPS, LOOKAHEAD, RESIDENT = len(COLORS), 2, 8
PARTS, HIDDEN = 3, 1  # of a group: tasks that pool, and as many that scale; tasks of the hidden layer
SECOND = HIDDEN + PARTS
UNITS = {"pool": 3, "hidden": 1, "scale": 2}  # of time, invented
MARGIN = 0.08  # of a box


class Task(NamedTuple):
    """A program has its place on the GPU from ``start`` to ``end``, and what it waits for is done at ``ready``."""

    number: int
    phase: str
    group: int
    part: int
    awaited: tuple[int, ...]
    place: int
    start: int
    ready: int
    end: int


def simulate() -> list[Task]:
    """The programs of the launch: each starts, in the order of their numbers, as soon as there is a place."""
    order = work_order(GROUPS * (PARTS + SECOND), GROUPS, LOOKAHEAD, PARTS, SECOND, HIDDEN).T.tolist()
    phases = [("hidden" if task < HIDDEN else "scale") if second else "pool" for second, _, task in order]
    places = [(0, place) for place in range(RESIDENT)]
    tasks: list[Task] = []
    for number, (phase, (_, group, task)) in enumerate(zip(phases, order, strict=True)):
        before = {"pool": None, "hidden": "pool", "scale": "hidden"}[phase]
        awaited = tuple(i for i, (_, other, _) in enumerate(order) if other == group and phases[i] == before)
        assert all(i < number for i in awaited), f"program {number} waits for a higher number, of {awaited}"
        start, place = heapq.heappop(places)
        ready = max([start, *(tasks[i].end for i in awaited)])
        end = ready + UNITS[phase]
        heapq.heappush(places, (end, place))
        part = task - HIDDEN if phase == "scale" else task
        tasks.append(Task(number, phase, group, part, awaited, place, start, ready, end))
    return tasks


def tint(color: str) -> tuple[float, ...]:
    return tuple(1 - 0.25 * (1 - value) for value in to_rgb(color))


def look(phase: str, color: str) -> dict[str, Any]:
    """Of a box."""
    if phase == "wait":
        return {"facecolor": "white", "edgecolor": color, "linewidth": 0.8, "hatch": "/////"}
    face = {"pool": color, "hidden": TEXT, "scale": tint(color)}[phase]
    return {"facecolor": face, "edgecolor": color, "linewidth": 1.3}


def draw_box(ax: Axes, task: Task, left: float, right: float, bottom: float, fontsize: float) -> None:
    """A task, one high, with the number of its program."""
    color = TEXT if task.phase == "scale" else "white"
    size = right - left - 2 * MARGIN, 1 - 2 * MARGIN
    ax.add_patch(Rectangle((left + MARGIN, bottom + MARGIN), *size, **look(task.phase, COLORS[task.group])))
    at = (left + right) / 2, bottom + 0.5
    ax.text(*at, str(task.number), ha="center", va="center", fontsize=fontsize, color=color)


def draw_bracket(ax: Axes, left: float, right: float, y: float, up: float, text: str) -> None:
    tip = y + 0.18 * up
    ax.plot([left + 0.1, left + 0.1, right - 0.1, right - 0.1], [y, tip, tip, y], color=GREY, linewidth=1)
    va = "bottom" if up > 0 else "top"
    ax.text((left + right) / 2, tip + 0.12 * up, text, ha="center", va=va, fontsize=8, color=TEXT, linespacing=1.1)


def draw_order(ax: Axes, tasks: list[Task]) -> None:
    """The programs by their numbers, and the stretches of them."""
    title(ax, "The programs of the launch, in the order of their numbers")
    ax.set(xlim=(0, len(tasks)), ylim=(-1.15, 2.1))
    ax.axis("off")
    for task in tasks:
        draw_box(ax, task, task.number, task.number + 1, 0, 7)
    begin, end = LOOKAHEAD * PARTS, len(tasks) - LOOKAHEAD * SECOND
    draw_bracket(ax, 0, begin, 1.05, 1, f"lookahead: first\nphase of {LOOKAHEAD} groups")
    turns = f"in turns: second phase of a group, first phase of the group {LOOKAHEAD} ahead"
    draw_bracket(ax, begin, end, 1.05, 1, turns)
    draw_bracket(ax, end, len(tasks), 1.05, 1, f"rest: second phase\nof the last {LOOKAHEAD} groups")
    for group in range(GROUPS - LOOKAHEAD):
        left = begin + group * (PARTS + SECOND)
        text = f"second phase of {group},\nfirst phase of {group + LOOKAHEAD}"
        draw_bracket(ax, left, left + PARTS + SECOND, -0.05, -1, text)


def draw_places(ax: Axes, tasks: list[Task]) -> None:
    """Which program runs where and when, and which others those of the first group wait for."""
    title(ax, f"The same programs in time: {RESIDENT} run at once, and one that waits keeps its place")
    ax.set(xlim=(0, max(task.end for task in tasks)), ylim=(RESIDENT, 0), ylabel="place on the GPU")
    ax.set(yticks=[place + 0.5 for place in range(RESIDENT)], yticklabels=range(RESIDENT))
    for task in tasks:
        if task.ready > task.start:
            wait = (task.start + MARGIN, task.place + MARGIN), task.ready - task.start - MARGIN, 1 - 2 * MARGIN
            ax.add_patch(Rectangle(*wait, **look("wait", COLORS[task.group])))
        draw_box(ax, task, task.ready, task.end, task.place, 9)
    for phase in "hidden", "scale":
        for task in (t for t in tasks if t.phase == phase and t.group == 0):
            for awaited in (tasks[i] for i in task.awaited):
                edge = awaited.place + (1 - MARGIN if awaited.place < task.place else MARGIN)
                draw_arrow(ax, task.ready - 0.17, task.place + 0.5, edge)


def draw_arrow(ax: Axes, x: float, start: float, end: float) -> None:
    ax.plot(x, start, "o", color=ARROW, markersize=4, zorder=4)
    style = {"arrowstyle": "-|>", "color": ARROW, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    ax.annotate("", (x, end), (x, start), arrowprops=style, zorder=4)


def draw_cache(ax: Axes, tasks: list[Task]) -> None:
    """The groups that are between their two reads: a part of one from when a task begins to pool it."""
    title(ax, "What L2 has to hold: the groups whose x the first phase has read, and the second not yet again")
    scaled = {(task.group, task.part): task for task in tasks if task.phase == "scale"}
    spans = [(t.group, t.start, scaled[t.group, t.part].end) for t in tasks if t.phase == "pool"]
    end = max(task.end for task in tasks)
    held = [
        [sum(g == group and begin <= time < last for g, begin, last in spans) / PARTS for time in range(end)]
        for group in range(GROUPS)
    ]
    bottom = [0.0] * end
    for color, shares in zip(COLORS, held, strict=True):
        top = [b + s for b, s in zip(bottom, shares, strict=True)]
        ax.stairs(top, range(end + 1), baseline=bottom, fill=True, facecolor=color, alpha=0.75)
        bottom = top
    ax.stairs(bottom, range(end + 1), color=TEXT, linewidth=1.5)
    ax.axhline(GROUPS, color=TEXT, linestyle=(0, (4, 3)), linewidth=1)
    at = end - 0.1, GROUPS - 0.2
    ax.text(*at, "all of x, as between two launches", ha="right", va="top", fontsize=8.5, color=TEXT)
    ax.set(xlim=(0, end), ylim=(0, GROUPS + 0.4), yticks=range(0, GROUPS + 1, 2), ylabel="groups")
    ax.set(xticks=range(end + 1), xlabel="time, in invented units")


def title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=10, color=TEXT)


def draw_legend(ax: Axes) -> None:
    labels = {
        "pool": "first phase: pool",
        "hidden": "second phase: hidden layer",
        "scale": "second phase: scale",
        "wait": "waiting",
    }
    phases = [Patch(label=label, **look(phase, GREY)) for phase, label in labels.items()]
    arrow = Line2D([], [], color=ARROW, marker="o", markersize=4, linewidth=1.3, label="waits for (examples)")
    groups = [Patch(facecolor=color, label=f"group {i}") for i, color in enumerate(COLORS)]
    style = {"frameon": False, "fontsize": 8.5, "handlelength": 1.6, "labelcolor": TEXT, "borderaxespad": 0}
    ax.axis("off")
    ax.add_artist(ax.legend(handles=groups, ncols=len(groups), loc="upper center", **style))
    ax.legend(handles=[*phases, arrow], ncols=len(phases) + 1, loc="lower center", **style)


def main() -> None:
    plt.rcParams["hatch.linewidth"] = 0.6
    figure, axes = plt.subplots(4, 1, figsize=(9.6, 7.7), layout="constrained", height_ratios=(2.3, 0.75, 4.5, 2))
    order, legend, places, cache = axes
    tasks = simulate()
    draw_order(order, tasks)
    draw_legend(legend)
    draw_places(places, tasks)
    draw_cache(cache, tasks)
    places.sharex(cache)
    places.tick_params(labelbottom=False)
    for ax in places, cache:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, colors=TEXT)
        ax.xaxis.label.set(fontsize=8.5, color=TEXT)
        ax.yaxis.label.set(fontsize=8.5, color=TEXT)
    figure.savefig(OUT, dpi=150)
    print(f"drawn: {OUT}")


if __name__ == "__main__":
    main()
