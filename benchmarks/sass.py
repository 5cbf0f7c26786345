"""SASS, the instructions that run: their accesses to memory, and the stretches of code that a program goes through.

A stretch is an innermost loop with accesses to global memory, or the code between two of those. How many bytes it has
in flight is read from the instructions: those of loads that are issued before one that needs what the first has loaded,
or with ``cp.async`` those of the groups that are not waited for. Which of a kernel's loads these are is told by the
lines of source that the compiler notes beside them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The pipe of a quarter of a multiprocessor that an instruction goes to, and the clocks that a warp's takes there; of
# others "alu" and 2. The pipes work side by side, behind a scheduler that issues an instruction per clock (CUDA
# programming guide, "Throughput of Native Arithmetic Instructions", 9.0; shared memory: 128 bytes per clock). IMAD goes
# to half of the lanes for additions. What the tensor cores take is an estimate.
PIPES = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"), ("fma", 1)),
    **dict.fromkeys(("IMAD", "IDP"), ("imad", 2)),
    **dict.fromkeys(("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO", "BREV"), ("transcendental", 8)),
    **dict.fromkeys(("SHFL", "LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL", "ATOM", "ATOMG"), ("memory", 4)),
    **dict.fromkeys(("LDSM", "STSM"), ("memory", 16)),
    **dict.fromkeys(("HMMA", "HGMMA"), ("tensor", 4)),
    **dict.fromkeys(
        ("BRA", "EXIT", "BSSY", "BSYNC", "BAR", "DEPBAR", "LDGDEPBAR", "S2R", "LDC", "R2UR"), ("control", 1)
    ),
}


class Sass(NamedTuple):
    """What the instructions that run confirm."""

    bits: Counter[tuple[str, int]]  # accesses to global memory by kind and width
    local: int  # accesses to local memory
    fp64: int


class Line(NamedTuple):
    """A line of source, whose file is named with its folder."""

    file: str
    number: int

    @classmethod
    def of(cls, path: str, number: int) -> Line:
        return cls("/".join(path.rsplit("/", 2)[-2:]), number)


@dataclass(frozen=True)
class Stretch:
    """A loop, of which this is one turn, or the code between loops; bytes per thread, clocks per warp."""

    is_loop: bool
    lines: frozenset[Line]
    accesses: frozenset[Line]  # the lines of what accesses global memory
    loaded: int
    stored: int
    in_flight: int
    is_async: bool  # so that a turn asks for what later ones need
    evict_first: frozenset[str]  # of loads and stores those which ask L2 for it
    instructions: int
    clocks: Counter[str]  # of each pipe
    barriers: int


class _Instruction(NamedTuple):
    opcode: str
    operands: str
    line: Line | None

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Of an access, per thread."""
        bits, modifiers = 32, self.opcode.split(".")[1:]
        for modifier in modifiers:
            if modifier in ("64", "128", "256"):
                bits = int(modifier)
            elif modifier in ("U8", "S8"):
                bits = 8
            elif modifier in ("U16", "S16"):
                bits = 16
        return bits // 8

    @property
    def loads(self) -> bool:
        """Whether registers are loaded from global memory."""
        return self.name == "LDG"

    @property
    def is_access(self) -> bool:
        return self.name in ("LDG", "LDGSTS", "STG")

    @property
    def pipe(self) -> tuple[str, int]:
        name, clocks = PIPES.get(self.name, ("control", 1) if self.name.startswith("U") else ("alu", 2))
        return name, clocks * max(self.bytes // 4, 1) if self.name in ("LDS", "STS") else clocks

    @property
    def registers(self) -> list[int]:
        return [int(number) for number in re.findall(r"(?<!U)\bR(\d+)", self.operands)]

    @property
    def loaded(self) -> set[int]:
        """The registers that a load writes."""
        first = self.registers[:1]
        return {first[0] + i for i in range(max(self.bytes // 4, 1))} if first else set()

    @property
    def read(self) -> set[int]:
        """The registers that are read, of wide operands the first."""
        writes = re.match(r"R\d", self.operands) and self.name not in ("STG", "STS")
        return {*(self.registers[1:] if writes else self.registers)}


_INSTRUCTION = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
_LINE = re.compile(r'^\s*//## File "(.*)", line (\d+)')


def parse_sass(sass: str) -> Sass:
    """The widths of accesses to global memory, and what there should be none of."""
    found = [item for item in _parse(sass) if isinstance(item, _Instruction)]
    return Sass(
        Counter(("store" if i.name == "STG" else "load", 8 * i.bytes) for i in found if i.is_access),
        local=sum(i.opcode.startswith(("LDL", "STL")) for i in found),
        fp64=sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*\.F64|MUFU.*64", i.opcode)) for i in found),
    )


def stretches(sass: str) -> list[Stretch]:
    """The stretches of a kernel's code, disassembled with the lines of its source, in the order of addresses."""
    items = list(_parse(sass))
    labels = {item: at for at, item in enumerate(items) if isinstance(item, str)}
    found: list[Stretch] = []
    begin = 0
    for first, last in _innermost(items, labels):
        if first >= begin:
            found += _stretch(items[begin:first], is_loop=False)
            found += _stretch(items[first:last], is_loop=True)
            begin = last
    return found + list(_stretch(items[begin:], is_loop=False))


def _parse(sass: str) -> Iterator[_Instruction | str]:
    """Instructions, and labels as text."""
    line = None
    for text in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", text):
            yield label[1]
        elif source := _LINE.match(text):
            line = Line.of(source[1], int(source[2]))
        elif (instruction := _INSTRUCTION.match(text)) and instruction[1] != "NOP":
            yield _Instruction(instruction[1], instruction[2], line)


def _innermost(items: Sequence[_Instruction | str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Where loops begin and end that access global memory, and hold no loop that does."""
    loops = []
    for at, item in enumerate(items):
        target = re.search(r"\.L_\w+", item.operands) if isinstance(item, _Instruction) and item.name == "BRA" else None
        if target and labels.get(target[0], at) < at:
            loops.append((labels[target[0]], at + 1))
    loops = [(a, b) for a, b in loops if any(isinstance(i, _Instruction) and i.is_access for i in items[a:b])]
    return sorted(
        (a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
    )  # fmt: skip


def _stretch(items: Sequence[_Instruction | str], is_loop: bool) -> Iterator[Stretch]:
    code = [item for item in items if isinstance(item, _Instruction)]
    if code:
        accesses = [i for i in code if i.is_access]
        yield Stretch(
            is_loop,
            frozenset(i.line for i in code if i.line),
            frozenset(i.line for i in accesses if i.line),
            loaded=sum(i.bytes for i in accesses if i.name != "STG"),
            stored=sum(i.bytes for i in accesses if i.name == "STG"),
            in_flight=_in_flight(code, is_loop),
            is_async=any(i.name == "LDGSTS" for i in code),
            evict_first=frozenset(
                "store" if i.name == "STG" else "load" for i in accesses if "EF" in i.opcode.split(".")
            ),
            instructions=len(code),
            clocks=_clocks(code),
            barriers=sum(i.name == "BAR" for i in code),
        )


def _clocks(code: Sequence[_Instruction]) -> Counter[str]:
    """How long a warp keeps each pipe busy, and the scheduler."""
    clocks = Counter(scheduler=len(code))
    for name, count in (i.pipe for i in code):
        clocks[name] += count
    return clocks


def _in_flight(code: Sequence[_Instruction], is_loop: bool) -> int:
    """Bytes a thread: the most that is loaded to registers and not yet needed, and that cp.async does not wait for."""
    pending: list[tuple[set[int], int]] = []
    most = 0
    for i in (*code, *code) if is_loop else code:  # what the end of a turn loads for the next
        needed = [n for n, (registers, _) in enumerate(pending) if registers & i.read]
        if needed:
            del pending[: needed[-1] + 1]  # what was asked for earlier is there too
        if i.loads:
            pending.append((i.loaded, i.bytes))
            most = max(most, sum(size for _, size in pending))
    async_bytes = sum(i.bytes for i in code if i.name == "LDGSTS")
    if async_bytes:
        groups = sum(i.name == "LDGDEPBAR" for i in code) or 1
        outstanding = [
            int(i.operands.rpartition("0x")[2], 16) for i in code if i.opcode == "DEPBAR.LE" and "SB0" in i.operands
        ]
        # One turn is issued behind the wait, which leaves the groups of the turns before it outstanding.
        most += async_bytes * (max(outstanding, default=0) // groups + 1) if is_loop else async_bytes
    return most
