"""Measurements as rows of a CSV file a GPU, each with the device, the versions, the commit and the command behind it.

Rows are appended as they are measured: a run that is cut short keeps what it has, and the next one goes on from there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import provenance
from benchmarks.timing import Quantiles

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("attn_kernels", "reference", "benchmarks")
FAILED = "failed"  # the metric of a cell that could not be measured; its note says why
WRONG = "WRONG"  # how the note of a row begins whose result is wrong


class Row(NamedTuple):
    """One metric of one cell. A failed one has no quantiles; a note says why, or what is to be known of the result."""

    kernel: str
    provider: str
    mode: str
    metric: str
    unit: str
    shape: str
    layout: str
    dtype: str
    p20: float | None
    p50: float | None
    p80: float | None
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    timestamp: str
    command: str
    note: str = ""

    @property
    def cell(self) -> tuple[str, ...]:
        """What was measured, on what."""
        return *self.place, self.mode, self.gpu, self.torch, self.triton, self.commit

    @property
    def is_right(self) -> bool:
        """Whether it was measured, on a result that is right."""
        return self.metric != FAILED and not self.note.startswith(WRONG)

    @property
    def place(self) -> tuple[str, str, str, str, str]:
        return self.kernel, self.provider, self.shape, self.layout, self.dtype

    @property
    def environment(self) -> Environment:
        return Environment(self.gpu, self.driver, self.torch, self.triton, self.commit, self.command)


class Measurement(NamedTuple):
    """What a row says beside where it comes from."""

    metric: str
    unit: str
    value: Quantiles


class Environment(NamedTuple):
    """Where a row comes from."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    command: str

    @classmethod
    def current(cls, commit: str | None = None) -> Environment:
        return cls(
            torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
            output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown",
            **provenance.versions(),
            commit=commit or source_commit(),
            command=provenance.command(),
        )

    def __str__(self) -> str:
        versions = f"driver {self.driver}, torch {self.torch}, Triton {self.triton}, commit {self.commit}"
        return f"{self.gpu}, {versions}: {self.command}"

    @property
    def file_name(self) -> str:
        """Of this GPU's results."""
        return re.sub(r"[^a-z0-9]+", "_", self.gpu.lower()).strip("_") + ".csv"


def source_commit() -> str:
    """The commit of the sources; with their digest where they differ from it or there is no repository to ask."""
    head = output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    patterns = [f"{folder}/*.py" for folder in SOURCES]
    if head and not output("git", "-C", str(ROOT), "status", "--porcelain", "--", *patterns):
        return head
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return f"{head or 'unknown'}+{digest.hexdigest()[:8]}"


class Results:
    """A CSV file of rows that grows, and what other files already have.

    Args:
        path: appended to; made when the first row comes.
        environment: of the rows to come.
        recorded: further files whose cells count as measured.
        variant: what rows give behind the provider's name, of the fused ones only.
    """

    def __init__(self, path: Path, environment: Environment, recorded: Iterable[Path] = (), variant: str = ""):
        self.path, self.environment, self._variant = path, environment, variant
        self.rows = [row for file in dict.fromkeys((*recorded, path)) for row in read(file)]
        self._cells = {row.cell for row in self.rows}
        self._notes: dict[tuple[str, ...], str] = {}
        self._running = path.with_name(f"{path.name}.running")

    def mark(self, place: Sequence[str], note: str) -> None:
        """Give the rows to come of a cell a note; behind the one that they have."""
        notes = self._notes.get(tuple(place)), " ".join(note.split())[:300]
        self._notes[tuple(place)] = "; ".join(filter(None, notes))

    @contextmanager
    def running(self, place: Sequence[str], modes: Sequence[str]) -> Iterator[None]:
        """Leave word, inside the block, of what is measured: where the process dies in it, ``settle`` reads that."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._running.write_text(json.dumps([self._as_written(place), modes]))
        try:
            yield
        finally:
            with suppress(OSError):
                self._running.unlink()

    def settle(self) -> list[Row]:
        """Record what killed the process that measured it as failed, so that it is not measured again."""
        try:
            place, modes = json.loads(self._running.read_text())
            self._running.unlink()
        except (OSError, ValueError):
            return []
        others = Results(self.path, self.environment)  # under whatever name its process gave it
        note = "the process that measured it hung or died"
        rows = [row for mode in modes if not others.has(place, [mode]) for row in others.fail(place, mode, note)]
        self.rows += rows
        self._cells.update(row.cell for row in rows)
        return rows

    def has(self, place: Sequence[str], modes: Iterable[str]) -> bool:
        """Whether all modes of a cell were measured, or failed, on this GPU with these versions at this commit."""
        e = self.environment
        place = self._as_written(place)
        return all((*place, mode, e.gpu, e.torch, e.triton, e.commit) in self._cells for mode in modes)

    def find(self, place: Sequence[str], mode: str, metric: str) -> Quantiles | None:
        """The latest measurement on this GPU with these versions at this commit."""
        e = self.environment
        place = self._as_written(place)
        for row in reversed(self.rows):
            if row.cell == (*place, mode, e.gpu, e.torch, e.triton, e.commit) and row.metric == metric:
                return Quantiles(row.p20, row.p50, row.p80)
        return None

    def append(self, place: Sequence[str], mode: str, measurements: Iterable[Measurement]) -> list[Row]:
        """Write a mode's rows, all at once: a mode that is in the file is complete."""
        return self._write([self._row(place, mode, m.metric, m.unit, m.value) for m in measurements])

    def fail(self, place: Sequence[str], mode: str, note: str) -> list[Row]:
        return self._write([self._row(place, mode, FAILED, "", (None, None, None), " ".join(note.split())[:300])])

    def _as_written(self, place: Sequence[str]) -> tuple[str, ...]:
        kernel, provider, *rest = place
        return kernel, provider + (self._variant if provider.startswith("fused") else ""), *rest

    def _row(self, place, mode, metric, unit, value, note="") -> Row:
        kernel, provider, shape, layout, dtype = self._as_written(place)
        note = note or self._notes.get(tuple(place), "")
        *where, command = self.environment
        timestamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Row(
            kernel, provider, mode, metric, unit, shape, layout, dtype, *value, *where, timestamp, command, note
        )  # fmt: skip

    def _write(self, rows: list[Row]) -> list[Row]:
        """Append to the file; where that fails, for a disk is full, to stderr, which a log may keep."""
        text = io.StringIO()
        lines = [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows]
        csv.writer(text, lineterminator="\n").writerows(lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", newline="", encoding="utf-8") as file:
                file.seek(0)
                before = file.read()
                header = "" if before else ",".join(Row._fields) + "\n"
                cut_short = "\n" if before and not before.endswith("\n") else ""
                file.write(header + cut_short + text.getvalue())
        except OSError as error:
            print(f"{error}: {text.getvalue().rstrip()}", file=sys.stderr, flush=True)
        self.rows += rows
        self._cells.update(row.cell for row in rows)
        return rows


def read(path: Path) -> list[Row]:
    """The rows of a file; none of one that does not exist or holds something else. A line cut short is left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0] != list(Row._fields):
        return []
    return [_parse(line) for line in lines[1:] if len(line) == len(Row._fields)]


def _parse(line: list[str]) -> Row:
    row = Row(*line)
    return row._replace(**{q: float(v) if (v := getattr(row, q)) else None for q in Quantiles._fields})


def output(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
