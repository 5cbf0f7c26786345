"""A MODEL of a GPU in time: programs ask DRAM, L2 and their multiprocessor for what they do, event by event.

What a program does comes from :mod:`benchmarks.record`; how many run at once, how many bytes each has in flight and how
many instructions that takes from its machine code. Nothing here was measured on the kernels: a machine is the figures
below, and these are assumptions.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.cache import SECTOR, Cache
from benchmarks.machine_code import ARCHITECTURES, Architecture, MachineCode
from benchmarks.record import Place, Program, Recorded, Step
from benchmarks.sass import Line, Stretch

MB = 1024**2


@dataclass(frozen=True)
class Machine:
    """Bandwidths in KB per us (GB/s), times in us.

    DRAM is what a copy reaches on the device, not the nominal figure: 3.0 TB/s of 3.35 on an H100. L2 carries all
    traffic. A program's start, the hop from a signal to the program that waits for it, and the gap between the kernels
    of a graph are estimates; the table of sensitivity shows what they decide.
    """

    architecture: Architecture
    l2_bytes: int  # that hold data: half of the nominal, as in benchmarks.traffic
    dram: float
    l2: float
    port: float  # of a multiprocessor to L2, each way: 0.8 to 0.94 of 64 bytes per clock
    clock: float  # in GHz
    dram_latency: float = 0.75
    l2_latency: float = 0.32
    start: float = 0.4  # of a program, until its first load
    turn: float = 0.15  # from a program's end to the next one's start
    hop: float = 1.0
    signal: float = 0.15
    gap: float = 1.2  # between kernels
    kernel: float = 1.0  # of one of PyTorch's that does next to nothing
    barrier: float = 0.02  # of a program's warps, each time
    cycles: int = 2  # between the instructions of a warp
    fma: int = 1  # clocks of a warp's addition or product
    backlog: float = 3.0  # how far stores may run ahead of DRAM

    @property
    def name(self) -> str:
        return self.architecture.device


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(ARCHITECTURES["sm_90"], 25 * MB, 3000.0, 5500.0, 105.0, 1.755),
        Machine(ARCHITECTURES["sm_80"], 20 * MB, 1400.0, 3600.0, 85.0, 1.41, fma=2),
        Machine(ARCHITECTURES["sm_89"], 36 * MB, 900.0, 3800.0, 130.0, 2.52, dram_latency=0.65, l2_latency=0.25),
    )
}
PESSIMISTIC = {"hop": 1.5, "dram_latency": 0.9, "l2": 4500.0}
COPY_TILE, COPY_PROGRAMS = 16 * 1024, 8


class Simulator:
    """Runs launches one after another on a machine whose L2 is empty at first."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.now = 0.0
        self.cache = Cache(machine.l2_bytes)
        self._waited = self._resided = 0.0  # programs, for others, and in all
        self._dram = self._l2 = 0.0  # until when they are busy
        count = machine.architecture.multiprocessors
        self._reads, self._writes = [0.0] * count, [0.0] * count
        self._pipes: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(count)]
        self._queue: list[tuple[float, int, int, Iterator[float]]] = []
        self._number = 0
        self._set: dict[int, float] = {}  # when flags were set
        self._waiting: dict[int, list[_Waiting]] = {}

    @property
    def waiting(self) -> float:
        """Of the time of all places for programs, the share that their programs waited for others."""
        return self._waited / self._resided if self._resided else 0.0

    def operator(self, loaded: int, stored: int) -> None:
        """One of PyTorch's own."""
        size = (loaded + stored) / 1000
        self.now += self.machine.gap + max(self.machine.kernel, size / (0.9 * self.machine.dram))

    def launch(self, recorded: Recorded, code: MachineCode, groups: int | None = None) -> None:
        """A kernel; of ``groups`` groups of samples alone, if it goes group by group."""
        kernel = _Kernel(code, self.machine)
        order = recorded.order
        if groups is not None and 0 < groups < recorded.groups:
            order = recorded.of_first(groups)
        self._set.clear()
        self._run([self._program(kernel, recorded.programs[i], place) for i, place in order], kernel.resident)

    def copy(self, size: int) -> None:
        """Copy half as many bytes: ``size`` are moved."""

        def program(multiprocessor: int) -> Iterator[float]:
            tile = COPY_TILE / 1000
            yield self._read(multiprocessor, tile, tile)
            yield self._write(multiprocessor, tile)

        self._run([program] * -(-size // (2 * COPY_TILE)), COPY_PROGRAMS)

    def _run(self, programs: Sequence, resident: int) -> None:
        """Each multiprocessor runs so many at once, in order."""
        to_come, machine = deque(programs), self.machine
        begin = self.now + machine.gap

        def start(at: float, multiprocessor: int) -> None:
            if to_come:
                self._push(at + machine.start, multiprocessor, to_come.popleft()(multiprocessor))

        end = begin
        for _ in range(resident):
            for multiprocessor in range(machine.architecture.multiprocessors):
                start(begin, multiprocessor)
        while self._queue:
            self.now, _, multiprocessor, program = heapq.heappop(self._queue)
            again = next(program, None)
            if again is None:
                end = max(end, self.now)
                start(self.now + machine.turn, multiprocessor)
            elif isinstance(again, _Waiting):
                again.multiprocessor, again.program, again.since = multiprocessor, program, self.now
                self._wait(again)
            else:
                self._push(max(again, self.now), multiprocessor, program)
        if to_come or any(self._waiting.values()):
            raise RuntimeError("programs wait for what never comes")
        self.now = max(end, self._dram)
        self._resided += (self.now - begin) * resident * machine.architecture.multiprocessors

    def _push(self, at: float, multiprocessor: int, program: Iterator[float]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (at, self._number, multiprocessor, program))

    def _wait(self, waiting: _Waiting) -> None:
        """Let a program go on when its flags are set and that has reached it."""
        waiting.missing = {flag for flag in waiting.flags if flag not in self._set}
        for flag in waiting.missing:
            self._waiting.setdefault(flag, []).append(waiting)
        if not waiting.missing:
            self._go_on(waiting)

    def _go_on(self, waiting: _Waiting) -> None:
        last = max((self._set[flag] for flag in waiting.flags), default=0.0)
        at = max(self.now + self.machine.l2_latency, last + self.machine.hop)
        self._waited += at - waiting.since
        self._push(at, waiting.multiprocessor, waiting.program)

    def _signal(self, flag: int) -> None:
        self._set[flag] = self.now
        for waiting in self._waiting.pop(flag, ()):
            waiting.missing.discard(flag)
            if not waiting.missing:
                self._go_on(waiting)

    def _read(self, multiprocessor: int, size: float, missing: float) -> float:
        """When KB are there, of which some are missing in L2."""
        now, machine = self.now, self.machine
        latency = machine.l2_latency
        self._l2 = there = max(self._l2, now) + size / machine.l2
        if missing:
            self._dram = max(self._dram, now) + missing / machine.dram
            there, latency = max(there, self._dram), machine.dram_latency
        begun = max(self._reads[multiprocessor], now)
        self._reads[multiprocessor] = begun + size / machine.port
        return max(there, self._reads[multiprocessor]) + latency

    def _write(self, multiprocessor: int, size: float) -> float:
        """When the program may go on."""
        now, machine = self.now, self.machine
        self._dram = max(self._dram, now) + size / machine.dram
        self._l2 = max(self._l2, now) + size / machine.l2
        self._writes[multiprocessor] = max(self._writes[multiprocessor], now) + size / machine.port
        return max(now, self._writes[multiprocessor], self._dram - machine.backlog)

    def _compute(self, multiprocessor: int, stretch: Stretch, turns: float, warps: int) -> float:
        """When a stretch is done: by the pipes of all four quarters, side by side, and by what a warp takes alone."""
        machine, pipes = self.machine, self._pipes[multiprocessor]
        clock = turns / machine.clock / 1000
        done = self.now + max(stretch.instructions * machine.cycles, *stretch.clocks.values()) * clock
        for pipe, clocks in stretch.clocks.items():
            clocks *= machine.fma if pipe == "fma" else 1
            pipes[pipe] = max(pipes[pipe], self.now) + clocks * warps / 4 * clock
            done = max(done, pipes[pipe])
        return done + stretch.barriers * turns * machine.barrier

    def _program(self, kernel: _Kernel, steps: Program, place: Place):
        def program(multiprocessor: int) -> Iterator[float | _Waiting]:
            return self._go(kernel, steps, place, multiprocessor)

        return program

    def _go(self, kernel: _Kernel, steps: Program, place: Place, sm: int) -> Iterator[float | _Waiting]:
        arrivals: deque[tuple[int, float, int]] = deque()  # step, when it is there, bytes in flight
        issued, in_flight, before = 0, 0, None  # the next step that may be issued; bytes; the stretch
        for number, step in enumerate(steps):
            if step.kind in ("wait", "signal"):
                shift = _shift(step, place)
                if step.kind == "wait":
                    yield _Waiting([flag + shift for flag in step.flags])
                else:
                    yield self.now + self.machine.signal
                    for flag in step.flags:
                        self._signal(flag + shift)
                continue
            if kernel.polls(step):
                continue
            stretch = kernel.stretch(step)
            if stretch is not before and stretch is not None and not stretch.is_loop:
                yield self._compute(sm, stretch, 1, kernel.warps)
            before = stretch
            if step.kind == "store":
                if stretch is not None and stretch.is_loop and not stretch.loaded:
                    turns = step.tile_bytes / (stretch.stored * kernel.threads)
                    yield self._compute(sm, stretch, turns, kernel.warps)
                self._touch(kernel, step, place)
                yield self._write(sm, step.bytes / 1000)
                continue
            limit = kernel.threads * stretch.in_flight if stretch is not None else 0
            if not arrivals or (stretch is not None and stretch.is_async):
                # What the code asks for before it needs this.
                at = max(issued, number)
                while at < len(steps):
                    ahead = steps[at]
                    if ahead.kind in ("wait", "signal") or kernel.polls(ahead):
                        break
                    if ahead.kind == "load":
                        is_full = at != number and in_flight + ahead.tile_bytes > limit
                        if is_full or kernel.stretch(ahead) is not stretch:
                            break
                        there = self._read(sm, ahead.bytes / 1000, self._touch(kernel, ahead, place) / 1000)
                        arrivals.append((at, there, ahead.tile_bytes))
                        in_flight += ahead.tile_bytes
                    at += 1
                issued = at
            _, there, size = arrivals.popleft()
            yield there
            in_flight -= size
            if stretch is not None and stretch.is_loop:
                turns = step.tile_bytes / (stretch.loaded * kernel.threads)
                yield self._compute(sm, stretch, turns, kernel.warps)

    def _touch(self, kernel: _Kernel, step: Step, place: Place) -> int:
        """The bytes of a step that L2 has to fetch from DRAM."""
        if step.sectors is None:
            return 0
        before = self.cache.fetched
        sectors = step.sectors + _shift(step, place) // SECTOR
        loads = step.kind == "load"
        stretch = kernel.stretch(step)
        evict_first = step.evict_first and stretch is not None and step.kind in stretch.evict_first
        self.cache.touch(sectors, loads=loads, stores=not loads, evict_first=evict_first)
        return self.cache.fetched - before


class _Waiting:
    """A program that waits for flags."""

    def __init__(self, flags: Sequence[int]):
        self.flags = flags
        self.missing: set[int] = set()
        self.multiprocessor, self.since, self.program = 0, 0.0, iter(())


class _Kernel:
    """What the machine code of a launch says of the steps of its programs."""

    def __init__(self, code: MachineCode, machine: Machine):
        self.warps, self.threads = code.warps, 32 * code.warps
        self.resident = max(machine.architecture.occupancy(code.registers, code.shared, code.warps), 1)
        self._stretches = code.stretches
        self._known: dict[tuple[str, tuple[Line, ...]], Stretch | None] = {}

    def polls(self, step: Step) -> bool:
        """Whether the load belongs to a wait, whose time is that of the hop."""
        return step.source[0].file == "common/grid_sync.py"

    def stretch(self, step: Step) -> Stretch | None:
        """The code that a step belongs to: its line is there, and those of the calling functions are nearest."""
        key = step.kind, step.source
        if key not in self._known:
            candidates = [s for s in self._stretches if (s.loaded if step.kind == "load" else s.stored)]
            self._known[key] = min(candidates, key=lambda s: _distance(s, step.source), default=None)
        return self._known[key]


def _distance(stretch: Stretch, source: Sequence[Line]) -> tuple[int, ...]:
    def nearest(lines, line: Line) -> int:
        return min((abs(line.number - other.number) for other in lines if other.file == line.file), default=10_000)

    # What comes before a loop may have a copy of its first loads.
    first = nearest(stretch.accesses, source[0]), not stretch.is_loop
    return (*first, *(nearest(stretch.lines, line) for line in source[1:]))


def _shift(step: Step, place: Place) -> int:
    return sum(shift * further for shift, further in zip(step.shifts, place[1:], strict=True))
