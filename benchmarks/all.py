"""One call on a GPU that is at hand only briefly: every answer that matters, the most telling first, nothing lost.

A sequence of processes, each with a limit of its own, so that a kernel that never ends, or a process that dies, costs
its step and no more:

1. The machine's versions, driver and clocks; beside that all kernels are compiled in parallel, and each family of
   modules has its first contact with the GPU. A family that hangs, dies or is wrong there tries again in plain
   launches (ATTN_KERNELS_SINGLE_LAUNCH=0), and is measured so from then on if that is better.
2. The tests that need a GPU.
3. Time of single modules: a copy, fused, the code that people run, that under torch.compile.
4. Training steps of whole networks.
5. Bytes of DRAM and L2, by Nsight Compute.
6. What 3 and 4 had no time for; before that, with --deep, compute-sanitizer, fuzzing and many repeats.

The folder holds log.txt, steps.jsonl (how each step ended), smoke.jsonl (first contact), the GPU's CSV (3, 4), ncu.csv
(5) and summary.md, which is written anew after every step. The same command again goes on where it stopped; other
sources want another folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks import summary
from benchmarks.process import DIED, FAILED, HUNG, OK, SKIPPED, Ended, Log, Step, append, run_all, tool

# Nothing here imports torch: it would take seconds, and what it does in one process must not be shared by all.

# As in reference.catalogue, which imports torch.
FAMILIES = ("se", "cbam", "bam", "simam")
# The family whose kernels each kernel of speed and network of train launches, the most telling first.
KERNELS = {"se": "se", "se_add_relu": "se", "cbam": "cbam", "bam": "bam", "simam": "simam"}
NETWORKS = {
    "se_resnet50": "se", "timm/efficientnet_b0": "se", "cbam_resnet50": "cbam", "simam_resnet50": "simam",
    "bam_resnet50": "bam",
}  # fmt: skip
PLAIN_LAUNCHES = {"ATTN_KERNELS_SINGLE_LAUNCH": "0"}
IN_PLAIN_LAUNCHES = " in plain launches"

# Seconds of a step in a call of MINUTES; in a longer or shorter one they are longer or shorter.
MINUTES = 9.0
FIRST_CONTACT, TESTS, SPEED, TRAIN, BYTES = 75, 60, 32, 30, 25
TRAIN_PLAIN = 42  # of a network that measures the plain form of its kind, too
REPEATS, SANITIZER, FUZZ = 60, 60, 120
# The files with tests of the mark ``device``: each worker collects what it is given, which takes longer than to run it.
DEVICE_TESTS = (
    *("ops", "device", "dispatch", "pytorch", "compile", "semantics", "batch_norm_relu", "precompile"),
    *("nonfinite", "saved_tensors"),
)
LEAST = 10  # seconds, below which a step is not started
TO_END_STEP = 5  # of its limit, for the last cell may take longer than expected
TO_END = 8  # seconds at the end of the call

WRITES = {"environment", "smoke", "fuzz", "speed", "train", "ncu"}  # the commands that take --out,
REHEARSES = {"environment", "smoke", "fuzz", "speed", "train", "once"}  # --rehearse,
MEASURES = {"speed", "train"}  # and --minutes

DONE = {OK, FAILED, HUNG, DIED}  # how a step ended that is not done again,
MEASURED = {OK, FAILED}  # and one that goes on with the next cell where it was killed in one
ALWAYS = {"environment", "precompile"}  # another machine may have the second call
NO_TIME = "no time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m benchmarks all --minutes 9 --out first"
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the whole call's (default: %(default)g)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of everything that is found")
    parser.add_argument("--deep", action="store_true", help="and sanitizers, fuzzing, many repeats: for a second call")
    parser.add_argument("--commit", help="what the rows give as the commit (default: what git says)")
    parser.add_argument(
        "--rehearse", nargs="*", metavar="STEP=FAULT",
        help="without a GPU: the same in the interpreter, on tiny shapes, with made-up times; a step can be made to "
        "hang, die or fill the disk",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Go through the sequence.

    Returns:
        0 if all was right and done, 1 if anything was not, 2 if this machine cannot measure, 3 if something is left.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    call = Call.of(arguments)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no step outlives this process
    try:
        for stage in stages(call):
            call.go(stage)
            if call.journal.status("environment") == SKIPPED:
                print(call.journal.ended["environment"]["last"].replace("environment", "all"), file=sys.stderr)
                return 2
    finally:
        signal.signal(signal.SIGTERM, before)
        call.summarise()
    print(call.summary(), flush=True)
    statuses = {call.journal.status(name) for name in call.planned}
    return 1 if statuses & {FAILED, HUNG, DIED} else 0 if statuses <= {OK, SKIPPED} else 3


class Journal:
    """How each step ended, by name, in steps.jsonl; what cannot be written is kept in memory."""

    def __init__(self, path: Path):
        self._path = path
        self.ended = {line["step"]: line for line in summary.json_lines(path) if "step" in line}

    def record(self, step: str, status: str, seconds: float = 0.0, last: str = "", killed_in: str = "") -> None:
        line = {"step": step, "status": status, "seconds": round(seconds, 1), "last": last, "killed_in": killed_in}
        self.ended[step] = line
        append(self._path, json.dumps(line) + "\n")

    def status(self, step: str) -> str | None:
        return self.ended.get(step, {}).get("status")


@dataclass
class Call:
    """What the steps of one call share."""

    out: Path
    journal: Journal
    log: Log
    start: float
    minutes: float
    commit: tuple[str, ...]
    rehearse: bool
    faults: dict[str, str]
    deep: bool
    planned: dict[str, None]

    @classmethod
    def of(cls, a: argparse.Namespace) -> Call:
        start = time.monotonic()
        faults = dict(fault.rsplit("=", 1) for fault in a.rehearse or ())
        journal, log = Journal(a.out / "steps.jsonl"), Log(a.out / "log.txt", start)
        commit = ("--commit", a.commit) if a.commit else ()
        return cls(a.out, journal, log, start, a.minutes, commit, a.rehearse is not None, faults, a.deep, {})

    def left(self) -> float:
        """Seconds."""
        return self.start + 60 * self.minutes - TO_END - time.monotonic()

    def stretched(self, seconds: float) -> float:
        """What are so many seconds in a call of MINUTES."""
        return seconds * self.minutes / MINUTES

    def step(self, name: str, command: str, *options: str, limit: float, family: str | None = None) -> Step:
        """A command of this package; with a family, in plain launches where it is measured so."""
        limit = min(limit, self.left())
        arguments = ["-m", "benchmarks", command, *options]
        if command in MEASURES:
            arguments += ["--minutes", f"{max(limit - TO_END_STEP, 0) / 60:.2f}", *self.commit]
        if command in WRITES:
            arguments += ["--out", str(self.out)]
        if command in REHEARSES and self.rehearse:
            arguments += ["--rehearse"]
        step = Step(name, (sys.executable, *arguments), limit)
        return self.as_measured(step, family) if family else step

    def as_measured(self, step: Step, *families: str) -> Step:
        """The step in plain launches if any of its families is measured so."""
        return plain(step) if any(map(self.in_plain_launches, families)) else step

    def in_plain_launches(self, family: str) -> bool:
        """Whether a family is measured so: it hung or died otherwise, or was wrong otherwise and is right so."""
        first = self.journal.status(f"smoke {family}")
        if first in (HUNG, DIED):
            return True
        if first == FAILED and self.journal.status(f"smoke {family}{IN_PLAIN_LAUNCHES}") == OK:
            return True
        killed_in = [step.get("killed_in", "").split() for step in self.journal.ended.values()]
        families = KERNELS | NETWORKS
        return any(words and words[0].startswith("fused") and families.get(words[1]) == family for words in killed_in)

    def go(self, stage: Sequence[Step]) -> None:
        """Run the steps of a stage that are not done yet, side by side, if there is time."""
        steps = []
        for step in stage:
            if step.name in self.faults:
                step = replace(step, command=(sys.executable, "-m", "benchmarks.rehearsal", self.faults[step.name]))
            done = MEASURED if step.name.split()[0] in MEASURES else DONE
            if self.journal.status(step.name) in done and not (step.name in ALWAYS and step.name not in self.planned):
                continue
            self.planned[step.name] = None
            if step.limit < LEAST:
                if self.journal.status(step.name) is None:
                    self.journal.record(step.name, NO_TIME)
                continue
            steps.append(step)
        self.summarise([step.name for step in steps])
        if steps:
            run_all(steps, self.log, self.ended)

    def ended(self, end: Ended) -> None:
        killed_in = summary.running(self.out) if end.status in (HUNG, DIED) else ""
        self.journal.record(end.step.name, end.status, end.seconds, end.last, killed_in)
        self.summarise()

    def summary(self, running: Sequence[str] = ()) -> str:
        return summary.text(self.out, self.rehearse, time.monotonic() - self.start, running)

    def summarise(self, running: Sequence[str] = ()) -> None:
        """Write summary.md anew, at once; where that fails, for the disk is full, measuring goes on."""
        new = self.out / "summary.md.new"
        try:
            new.write_text(self.summary(running), encoding="utf-8")
            os.replace(new, self.out / "summary.md")
        except OSError as error:
            print(f"summary.md cannot be written: {error}", file=sys.stderr, flush=True)


def plain(step: Step) -> Step:
    """The same in plain launches, of which no program waits for another."""
    return replace(step, name=step.name + IN_PLAIN_LAUNCHES, environment={**step.environment, **PLAIN_LAUNCHES})


def stages(call: Call) -> Iterator[list[Step]]:
    """What runs side by side, in order; each stage is planned when those before it have ended."""
    jobs = str(max(1, (os.cpu_count() or 2) - 2))
    few = ("--steps", "smoke", "--kernels", "simam") if call.rehearse else ("--kernels", *KERNELS)
    yield [
        call.step("environment", "environment", *call.commit, limit=call.stretched(FIRST_CONTACT)),
        call.step("precompile", "precompile", "--jobs", jobs, *few, limit=call.stretched(FIRST_CONTACT)),
        *(smoke(call, family) for family in FAMILIES),
    ]
    again = [family for family in FAMILIES if call.journal.status(f"smoke {family}") in (HUNG, DIED, FAILED)]
    yield [plain(smoke(call, family)) for family in again]
    yield [tests(call)]
    for kernel in KERNELS:
        yield [speed(call, kernel, call.stretched(SPEED))]
    for network in NETWORKS:
        limit = TRAIN_PLAIN if network in ("se_resnet50", "timm/efficientnet_b0") else TRAIN
        yield [train(call, network, call.stretched(limit))]
    for family in FAMILIES if tool("ncu") else FAMILIES[:1]:  # one says that it is missing
        yield [call.step(f"bytes {family}", "ncu", family, limit=call.stretched(BYTES), family=family)]
    if call.deep:
        yield from deep(call)
    # A third of the time that is left for each of what is not finished yet.
    for kernel in KERNELS:
        yield [speed(call, kernel, call.left() / 3)]
    for compiled in (False, True):
        for network in NETWORKS:
            yield [train(call, network, call.left() / 3, compiled)]


def smoke(call: Call, family: str) -> Step:
    repeats = ("--repeats", "2") if call.rehearse else ()
    return call.step(f"smoke {family}", "smoke", family, *repeats, limit=call.stretched(FIRST_CONTACT))


def tests(call: Call) -> Step:
    """The tests that need a GPU, side by side where xdist is installed."""
    # Verbose: a step that is killed has said what failed until then.
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "-rfE", "--tb=line", "--maxfail=25", "-m", "device"]
    options += ["--continue-on-collection-errors", *(f"tests/test_{name}.py" for name in DEVICE_TESTS)]
    if find_spec("xdist"):
        options += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 1))), "--dist", "worksteal"]
    if call.rehearse:
        options += ["-k", "narrowest"]
    command, meaning = (sys.executable, "-m", "pytest", *options), {0: OK, 1: FAILED, 2: FAILED, 5: SKIPPED}
    if not find_spec("pytest"):
        command, meaning = (sys.executable, "-c", "raise SystemExit('pytest is not installed')"), {1: SKIPPED}
    step = Step("tests", command, min(call.stretched(TESTS), call.left()), meaning=meaning)
    return call.as_measured(step, *FAMILIES)


def speed(call: Call, kernel: str, limit: float) -> Step:
    options = ["--kernels", kernel, "--providers", "copy", "fused", "eager", "compile", "--dtypes", "bf16"]
    options += ["--batches", "32", "256"]
    return call.step(f"speed {kernel}", "speed", *options, limit=limit, family=KERNELS[kernel])


def train(call: Call, network: str, limit: float, compiled: bool = False) -> Step:
    providers = ["fused", "eager", *(["compile", "fused_compile"] if compiled else [])]
    options = ["--networks", network, "--dtypes", "bf16", "--modes", "train", "--providers", *providers]
    name = f"train {network}{' compiled' if compiled else ''}"
    return call.step(name, "train", *options, limit=limit, family=NETWORKS[network])


def deep(call: Call) -> Iterator[list[Step]]:
    """What a second call adds: many repeats, memory checkers, random cases."""
    many = ("--repeats", "2", "--replays", "2") if call.rehearse else ("--repeats", "1000", "--replays", "100")
    yield [
        call.step(
            f"repeats {family}", "smoke", family, *many, "--streams", limit=call.stretched(REPEATS), family=family
        )
        for family in FAMILIES
    ]
    sanitizer = tool("compute-sanitizer") or "compute-sanitizer"  # which then cannot be started: the step is skipped
    for name in ("memcheck", "racecheck"):
        limit = call.stretched(SANITIZER)
        steps = [call.step(f"{name} {family}", "once", family, limit=limit, family=family) for family in FAMILIES]
        checked = (sanitizer, "--tool", name, "--error-exitcode", "1")
        yield [replace(step, command=(*checked, *step.command)) for step in steps]
    limit = min(call.stretched(FUZZ), call.left())
    seconds = str(max(1, int(limit - TO_END_STEP)))
    seeds = [str(10**6 * i) for i in range(4)]
    steps = [call.step(f"fuzz {seed}", "fuzz", "--seed", seed, "--seconds", seconds, limit=limit) for seed in seeds]
    yield [call.as_measured(step, *FAMILIES) for step in steps]
