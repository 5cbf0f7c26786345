"""What each program of a launch does, at full size, from a few programs run in Triton's interpreter and no data at all.

Modules run on meta tensors. The interpreter runs programs on addresses alone: loads give zeros, stores do nothing,
whoever waits finds what it waits for. A program is of a group of samples, a block of channels and a part of a plane;
the programs of others do the same further on in memory, by the distance between neighbours. The first blocks and parts,
which may do more, and the last, which may be cut short, are run as well.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.cache import SECTOR_BITS
from benchmarks.meter import AtenMeter, Launch, Traffic
from benchmarks.programs import Access, Event, Signal, following, without_data
from benchmarks.sass import Line

# The interpreter is imported inside functions: Triton has to be imported after TRITON_INTERPRET is set.


# Phases of a launch of tasks: those that groups of samples go through; the hidden layer of the last group, which
# may do more; the weights' gradients.
FIRST, HIDDEN, GATES, SECOND, LAST_HIDDEN, WEIGHTS = range(6)


class Step(NamedTuple):
    """An event of a program."""

    kind: str  # load, store, signal, wait
    source: tuple[Line, ...]  # where in the kernel, the innermost function first
    bytes: int = 0  # of the lanes that the mask lets through
    tile_bytes: int = 0  # of all lanes
    shifts: tuple[int, int, int] = (0, 0, 0)  # bytes further on, for each group, block and part
    sectors: NDArray[np.int64] | None = None  # of a tensor that has pixels; others are taken to be in L2
    flags: tuple[int, ...] = ()
    evict_first: bool = False


class Place(NamedTuple):
    """Of a program in a launch: its phase, and by how many groups, blocks and parts it is further on than the first."""

    phase: int
    group: int
    block: int = 0
    part: int = 0


Program = tuple[Step, ...]
FEW = 40  # programs that are all run
KERNELS = str(Path(find_spec("attn_kernels").origin).parent / "ops") + os.sep  # which is not imported yet


@dataclass
class Recorded:
    """A launch of a Triton kernel: what some programs do, and of all in order which of these each is like."""

    name: str
    groups: int  # 0 where every program goes through all samples
    programs: list[Program] = field(default_factory=list)
    order: list[tuple[int, Place]] = field(default_factory=list)  # and how much further on
    groups_of: dict[int, int] = field(default_factory=dict)  # of a program, its group; 0 where it is not here

    def of_first(self, groups: int) -> list[tuple[int, Place]]:
        """Of the order what so many groups do, without what waits for all: the weights, and who tells them to begin."""
        return [
            (i, place)
            for i, place in self.order
            if self.groups_of.get(i, 0) + place.group < groups and place.phase < LAST_HIDDEN
        ]


@contextmanager
def recording(multiprocessors: int, shape: Sequence[int]) -> Iterator[list[Recorded | Launch]]:
    """Collect what modules launch on meta tensors of this shape inside the block, PyTorch's operators too."""
    from triton.runtime.interpreter import GridExecutor

    from attn_kernels._recording import launching_without_data

    traffic = Traffic()
    aten, memory, call = AtenMeter(traffic), _Memory(shape), GridExecutor.__call__

    def record(executor, *args, **kwargs):
        with aten.paused():
            arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            traffic.per_launch.append(_Recorder(executor, call, memory, arguments).record(shape[0]))

    with launching_without_data(multiprocessors), patch.object(GridExecutor, "__call__", record), aten:
        yield traffic.per_launch


class _Memory:
    """Addresses for meta tensors, the same for a tensor in every launch. Nothing is ever written there."""

    def __init__(self, shape: Sequence[int]):
        self._pixels = prod((shape[0], *shape[2:]))
        self._real: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}

    def real(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._real:
            # Kept together, so that no other storage gets the same name.
            self._real[storage._cdata] = value, torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
        place = value.storage_offset(), value.size(), value.stride()
        return torch.empty(0, dtype=value.dtype).set_(self._real[storage._cdata][1], *place)

    def has_pixels(self, t: Tensor) -> bool:
        """Whether it is like x, maps (some with a little behind them), or the bits of the ReLU."""
        return t.dim() != 2 and t.numel() * 8 >= self._pixels and t.numel() * 8 % self._pixels <= 32


class _Recorder:
    """Runs some of a launch's programs."""

    def __init__(self, executor, call: Callable, memory: _Memory, arguments: dict[str, object]):
        self._executor, self._call = executor, call
        self._arguments = tree_map_only(Tensor, memory.real, arguments)
        tensors = [t for t in tree_leaves(self._arguments) if isinstance(t, Tensor) and t.numel()]
        self._ranges = sorted((t.data_ptr(), memory.has_pixels(t)) for t in tensors)
        self._starts = [start for start, _ in self._ranges]
        grid = executor.grid(arguments) if callable(executor.grid) else executor.grid
        self._grid = (*grid, 1, 1)[:3]
        self._count = prod(grid)
        self._seen: dict[int, list[tuple[Event, tuple[Line, ...]]]] = {}
        self._work: tuple[int, ...] | None = None  # the arguments of ordered_task behind the program's number

    def record(self, samples: int) -> Recorded:
        self._run([0])
        if self._work is not None:
            return self._record_tasks(*self._work)
        # Programs of a sample; or of a block of channels, and of a part of all samples.
        blocks, parts, _ = self._grid
        if parts == 1 and blocks % samples == 0:
            parts = blocks // samples
            return self._record_places(
                samples, [Place(0, *divmod(pid, parts)) for pid in range(blocks)], {0: (parts, 1)}
            )
        places = [Place(FIRST, 0, pid % blocks, pid // blocks) for pid in range(self._count)]
        return self._record_places(0, places, {FIRST: (blocks, parts)})

    def _record_tasks(self, groups: int, lookahead: int, first: int, second: int, ahead: int) -> Recorded:
        """Of a launch whose programs do tasks of groups of samples."""
        from triton.runtime.interpreter import GridExecutor

        from benchmarks.work_order import work_order

        tasks = min(groups * (first + second), self._count)
        with patch.object(GridExecutor, "__call__", self._call):
            order = work_order(tasks, groups, lookahead, first, second, ahead)
        parts = int(self._arguments["S"])
        blocks = first // parts
        hidden = ahead - blocks if second == ahead else ahead  # a launch that ends with the gates
        sizes = {
            FIRST: (blocks, parts),
            HIDDEN: (1, hidden),
            GATES: (1, ahead - hidden),
            SECOND: (blocks, parts),
            LAST_HIDDEN: (1, 1),
            WEIGHTS: (1, 1),
        }
        places = []
        for is_second, group, task in order.T.tolist():
            if not is_second:
                places.append(Place(FIRST, group, *divmod(task, parts)))
            elif task >= ahead:
                places.append(Place(SECOND, group, *divmod(task - ahead, parts)))
            elif task >= hidden:
                places.append(Place(GATES, group, 0, task - hidden))
            elif (group, task) == (groups - 1, hidden - 1):
                places.append(Place(LAST_HIDDEN, 0))
            else:
                places.append(Place(HIDDEN, group, 0, task))
        # All alike, and they touch nothing that has pixels.
        places += [Place(WEIGHTS, 0)] * (self._count - tasks)
        return self._record_places(groups, places, sizes)

    def _record_places(self, groups: int, places: list[Place], sizes: dict[int, tuple[int, int]]) -> Recorded:
        """Of programs by their places in phases of so many blocks and parts."""
        launch, pids, made = Recorded(self._executor.fn.__name__, groups), {}, {}
        for pid, place in enumerate(places):
            pids.setdefault(place, pid)
        for place in places:
            blocks, parts = sizes[place.phase]
            like = place
            if len(places) > FEW:
                # The last group may have fewer samples.
                group = place.group if place.group == groups - 1 else 0
                like = Place(place.phase, group, _like(place.block, blocks), _like(place.part, parts))
            if like not in made:
                made[like] = len(launch.programs)
                launch.groups_of[made[like]] = like.group
                # The next of its kind, where there is one.
                next_ones = (
                    like._replace(group=like.group + 1),
                    like._replace(block=2 if like.block == 1 and blocks > 3 else -1),
                    like._replace(part=2 if like.part == 1 and parts > 3 else -1),
                )
                launch.programs.append(self._program(pids[like], [pids.get(place) for place in next_ones]))
            further = Place(place.phase, *(a - b for a, b in zip(place[1:], like[1:], strict=True)))
            launch.order.append((made[like], further))
        return launch

    def _run(self, pids: Iterable[int]) -> None:
        """Run those of these programs that have not been run."""
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        from attn_kernels.ops.common import grid_sync

        pids = [pid for pid in pids if pid not in self._seen]
        if not pids:
            return
        events: list = []

        def begin(builder, number, *_):
            nonlocal events
            events = self._seen[pids[number]] = []
            rest, x = divmod(pids[number], self._grid[0])
            builder.grid_idx = x, rest % self._grid[1], rest // self._grid[1]

        def tell_dimension(builder, *_):
            builder.grid_dim = self._grid

        executor = GridExecutor(self._executor.fn, self._executor.arg_names, (len(pids),), [])
        with ExitStack() as stack:
            stack.enter_context(patch.object(InterpreterBuilder, "set_grid_idx", begin))
            stack.enter_context(patch.object(InterpreterBuilder, "set_grid_dim", tell_dimension))
            stack.enter_context(patch.object(GridExecutor, "_restore_args_dev", lambda *_: None))
            stack.enter_context(np.errstate(all="ignore"))
            stack.enter_context(without_data(self._arguments.get("epoch", 0)))
            stack.enter_context(following(lambda event: events.append((event, self._source()))))
            stack.enter_context(patch.object(grid_sync, "ordered_task", self._told(grid_sync.ordered_task)))
            self._call(executor, **self._arguments)

    def _told(self, ordered_task: Callable) -> Callable:
        def told(pid, *args):
            self._work = tuple(int(a.handle.data.item()) if hasattr(a, "handle") else int(a) for a in args)
            return ordered_task(pid, *args)

        return told

    def _source(self) -> tuple[Line, ...]:
        """The lines that are being interpreted."""
        lines, frame = [], sys._getframe(1)
        while frame.f_code is not self._call.__code__:
            if frame.f_code.co_filename.startswith(KERNELS):
                lines.append(Line.of(frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        return tuple(lines)

    def _program(self, pid: int, next_ones: Sequence[int | None]) -> Program:
        """That of this number; the next ones by group, block and part tell how much further on they are in memory."""
        self._run([pid, *(other for other in next_ones if other is not None)])
        events = self._seen[pid]
        others = [self._seen.get(other, events) for other in next_ones]
        return tuple(
            self._step(event, source, [other[i][0] if i < len(other) else event for other in others])
            for i, (event, source) in enumerate(events)
        )

    def _step(self, event: Event, source: tuple[Line, ...], others: Sequence[Event]) -> Step:
        begin = _first(event)
        shifts = tuple(_first(other) - begin if _first(other) and type(other) is type(event) else 0 for other in others)
        if not isinstance(event, Access):
            kind = "signal" if isinstance(event, Signal) else "wait"
            return Step(kind, source, shifts=shifts, flags=tuple(sorted(event.flags)))
        has_pixels = begin and self._ranges[bisect_right(self._starts, begin) - 1][1]
        sectors = np.unique(event.addresses.astype(np.int64) >> SECTOR_BITS) if has_pixels else None
        sizes = event.addresses.size * event.size, event.lanes * event.size
        kind = "load" if event.loads else "store"
        return Step(kind, source, *sizes, shifts, sectors, evict_first=event.evict_first)


def _like(number: int, count: int) -> int:
    """The block or part that this one is like: the first and the last may do what others do not."""
    return number if number in (0, count - 1) else 1


def _first(event: Event) -> int:
    """Its first address, 0 where every lane is masked."""
    if isinstance(event, Access):
        return int(event.addresses.flat[0]) if event.addresses.size else 0
    return min(event.flags, default=0)
