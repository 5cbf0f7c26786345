"""Which cell to measure next, and when to stop: the most telling first, none that is not expected to end in time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from benchmarks import timing
from benchmarks.rows import Measurement, Results, Row

RECENT = 5  # cells, of which the slowest is what the next of their kind is expected to take


class Cell(NamedTuple):
    """What is measured at once: a provider's computation of a kernel or network on one kind of input, in some modes."""

    suite: str
    kernel: str
    provider: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    modes: tuple[str, ...]
    rank: int  # 0 for the most telling
    fused: str | None = None  # the kernel that has to be right for this

    @property
    def place(self) -> tuple[str, str, str, str, str]:
        """As a row gives it."""
        return self.kernel, self.provider, "x".join(map(str, self.shape)), self.layout, self.dtype

    def __str__(self) -> str:
        return " ".join(self.place)


Measure = Callable[[Cell, Results], Iterator[tuple[str, list[Measurement]]]]


class Costs:
    """The seconds that cells are expected to take: ``priors`` at first, then what the latest of their kind took."""

    def __init__(self, priors: dict[tuple[str, str], float]):
        self._priors, self._seen = priors, {}

    def estimate(self, cell: Cell) -> float:
        kind = cell.suite, cell.provider
        return max(self._seen[kind]) if kind in self._seen else self._priors[kind]

    def observe(self, cell: Cell, seconds: float) -> None:
        self._seen.setdefault((cell.suite, cell.provider), deque(maxlen=RECENT)).append(seconds)


class Outcome(NamedTuple):
    """How many cells were measured, failed, were there already, and are left."""

    measured: int = 0
    failed: int = 0
    known: int = 0
    left: int = 0

    def __str__(self) -> str:
        return (
            f"{self.measured} cells measured, {self.failed} failed, {self.known} measured before at this commit, "
            f"{self.left} left{': run the same again for them' if self.left else ''}."
        )


def execute(
    cells: Iterable[Cell],
    measure: dict[str, Measure],
    results: Results,
    costs: Costs,
    deadline: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Measure cells in the order of their rank, each mode's rows written as they come, until the deadline.

    A cell that is expected to end too late gives way to the next that is not. One that raises is recorded as failed.

    Raises:
        RuntimeError: the GPU can no longer be used; what was measured is in the file.
    """
    cells = sorted(cells, key=lambda cell: cell.rank)
    pending = [cell for cell in cells if not results.has(cell.place, cell.modes)]
    measured = failed = 0
    known = len(cells) - len(pending)
    with _display() as (say, progress):
        say(HEADINGS)
        while True:
            left = deadline - clock()
            cell = next((cell for cell in pending if costs.estimate(cell) <= left), None)
            if cell is None:
                return Outcome(measured, failed, known, len(pending))
            ahead = sum(map(costs.estimate, pending))
            progress(str(cell), measured + failed, len(pending), min(left, ahead))
            start = clock()
            message = attempt(cell, measure[cell.suite], results, say)
            timing.release()
            costs.observe(cell, clock() - start)
            pending.remove(cell)
            measured, failed = measured + (message is None), failed + (message is not None)


def attempt(cell: Cell, measure: Measure, results: Results, say: Callable[[str], None]) -> str | None:
    """Measure one cell; where that fails, record what was not measured as failed and return why."""
    missing = list(cell.modes)
    try:
        with timing.own_stream(), results.running(cell.place, cell.modes):
            for mode, measurements in measure(cell, results):
                say(_line(results.append(cell.place, mode, measurements)))
                missing.remove(mode)
    except Exception as error:  # whatever goes wrong in one cell says nothing about the next
        message = f"{type(error).__name__}: {error}"
        for mode in missing:
            say(_line(results.fail(cell.place, mode, message)))
        return message
    return None


WIDTHS = (18, 20, 16, 13, 5, 9)
HEADINGS = "".join(
    f"{name:<{width}} "
    for name, width in zip(("kernel", "provider", "shape", "layout", "dtype", "mode"), WIDTHS, strict=True)
)


def _line(rows: Sequence[Row]) -> str:
    first = rows[0]
    place = (*first.place, first.mode)
    cells = "".join(f"{name:<{width}} " for name, width in zip(place, WIDTHS, strict=True))
    return (
        cells
        + ", ".join(
            f"{row.metric} {row.note}" if row.p50 is None else f"{row.metric} {row.p50:.4g} {row.unit}" for row in rows
        )
        + (f" [{first.note}]" if first.note and first.p50 is not None else "")
    )


@contextmanager
def _display() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int, float], None]]]:
    """A way to say a line, and one to show what is being done and how much is left, without rich only the former."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        yield lambda line: print(line, flush=True), lambda *_: None
        return
    console = Console(highlight=False, markup=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, left="")

        def progress(what: str, done: int, left: int, seconds: float) -> None:
            time_left = f"about {seconds / 60:.0f} min left"
            bar.update(task, description=what, completed=done, total=done + left, left=time_left)

        yield lambda line: console.print(line, soft_wrap=True), progress
