"""Processes with a limit each, their output in a log as it comes; none of what they started outlives them.

A process that is not done at its limit gets SIGINT, to end in order. One that does not answer, because a GPU kernel
that never ends keeps Python waiting, gets SIGABRT, at which it prints where it hangs, and SIGKILL with everything that
it started. Needs nothing but Python.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# How a step ended: it says the first four itself by its exit status.
OK, FAILED, SKIPPED, UNFINISHED = "ok", "failed", "skipped", "unfinished"
STOPPED, HUNG, DIED = "stopped at its limit", "hung", "died"
EXIT_STATUS = {0: OK, 1: FAILED, 2: SKIPPED, 3: UNFINISHED}

GRACE = 5.0  # seconds from SIGINT to SIGABRT
LAST_WORDS = 2.0  # seconds from there to SIGKILL
POLL = 0.05
HEARTBEAT = 30.0  # seconds after which a line says what still runs
LOGGED = 2**19  # bytes of a step's output that are kept: a step in an endless loop must not fill the disk
LINE = 2000  # characters of one line of it
MARK = "ATTN_KERNELS_STEP"  # in the environment of a step and so of everything that it starts


@dataclass(frozen=True)
class Step:
    """A process of a sequence.

    Args:
        limit: seconds that it may take.
        environment: variables beside this process's.
        meaning: of its exit statuses; of any other it is that the process died.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    meaning: Mapping[int, str] = field(default_factory=lambda: EXIT_STATUS)


class Ended(NamedTuple):
    """How a step ended, after how many seconds, and the last line that it printed."""

    step: Step
    status: str
    seconds: float
    last: str


class Log:
    """Lines with the seconds since the start, in a file and on the terminal. A full disk does not stop anything."""

    def __init__(self, path: Path, start: float):
        self._path, self._start, self._lock, self._broken = path, start, threading.Lock(), False

    def say(self, name: str, line: str) -> None:
        text = f"{time.monotonic() - self._start:7.1f} s  {name}: {line[:LINE]}\n"
        with self._lock:
            with suppress(OSError, ValueError):  # a terminal that went away
                sys.stdout.write(text)
                sys.stdout.flush()
            if not append(self._path, text) and not self._broken:
                self._broken = True
                print(f"{self._path} cannot be written: the log goes on here only.", file=sys.stderr, flush=True)


def append(path: Path, text: str) -> bool:
    """Whether ``text`` could be written behind what is in the file."""
    try:
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:
        return False
    return True


def run_all(steps: Sequence[Step], log: Log, ended: Callable[[Ended], None] = lambda end: None) -> list[Ended]:
    """Run steps side by side until all have ended; ``ended`` hears of each at once."""
    with _heeding_interrupts():
        running = [_Process(step, log) for step in steps]
    found, heartbeat = [], time.monotonic() + HEARTBEAT
    try:
        while running:
            time.sleep(POLL)
            for process in [process for process in running if process.has_ended()]:
                running.remove(process)
                found.append(process.end())
                ended(found[-1])
            if running and time.monotonic() > heartbeat:
                heartbeat += HEARTBEAT
                log.say("all", f"{', '.join(process.step.name for process in running)} still running")
    finally:
        _stop(running)
    return found


@contextmanager
def _heeding_interrupts() -> Iterator[None]:
    """Processes started here heed SIGINT even if this one ignores it, as a shell's jobs in the background do."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, lambda *_: None)  # a new program inherits an ignored signal, but no handler
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(running: Sequence[_Process]) -> None:
    """End what still runs, for this process is being stopped itself: in order where that takes no longer than a moment.

    A cell that SIGKILL ends is taken for one that hangs.
    """
    for process in running:
        process.interrupt()
    end = time.monotonic() + LAST_WORDS
    while time.monotonic() < end and not all(process.is_over() for process in running):
        time.sleep(POLL)
    for process in running:
        process.kill()


class _Process:
    def __init__(self, step: Step, log: Log):
        self.step, self._log, self._mark = step, log, uuid.uuid4().hex
        self._start, self._interrupted, self._hung, self._killed = time.monotonic(), None, False, False
        self._last = ""  # line before anything was done to it
        python = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        # torch.compile moves Triton's cache to a folder of its own, unless it is told where the cache is.
        python["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
        environment = {**os.environ, **python, **step.environment, MARK: self._mark}
        log.say(step.name, f"starts, at most {step.limit:.0f} s: {' '.join(step.command)}")
        try:
            self._popen = subprocess.Popen(
                step.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, env=environment, text=True, encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError as error:
            self._popen, self._last = None, str(error)
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        kept = 0
        for line in iter(lambda: self._popen.stdout.readline(2**16), ""):
            if self._interrupted is None:
                self._last = line.strip()[:LINE] or self._last
            before, kept = kept, kept + len(line)
            if kept <= LOGGED:
                self._log.say(self.step.name, line.rstrip())
            elif before <= LOGGED:
                self._log.say(self.step.name, f"prints more than {LOGGED >> 10} KB: the rest is left out")

    def has_ended(self) -> bool:
        """Whether it has; past its limit it is interrupted, and killed if that does not help."""
        if self.is_over():
            return True
        now = time.monotonic()
        if self._interrupted is None:
            if now > self._start + self.step.limit:
                self._log.say(self.step.name, "is past its limit: SIGINT")
                self.interrupt()
            return False
        since = now - self._interrupted
        if since > GRACE and not self._hung:
            self._hung = True
            self._log.say(self.step.name, "does not answer: SIGABRT, SIGKILL")
            _signal(os.kill, self._popen.pid, signal.SIGABRT)
        elif since > GRACE + LAST_WORDS and not self._killed:
            self.kill()
        # A process that not even the kernel can end, for a driver does not let it go, is not waited for.
        return since > 2 * GRACE + LAST_WORDS

    def is_over(self) -> bool:
        return self._popen is None or self._popen.poll() is not None

    def interrupt(self) -> None:
        self._interrupted = time.monotonic()
        if self._popen is not None:
            _signal(os.killpg, self._popen.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it and everything that it started, in whatever session."""
        self._killed = True
        if self._popen is None:
            return
        _signal(os.killpg, self._popen.pid, signal.SIGKILL)
        for pid in marked(self._mark):
            _signal(os.kill, pid, signal.SIGKILL)

    def end(self) -> Ended:
        if self._popen is None:
            status = SKIPPED
        else:
            code = self._popen.poll()
            self.kill()  # what it left behind
            self._reader.join(timeout=2)
            status = self.step.meaning.get(code, DIED)
            if self._interrupted is not None:
                status = HUNG if self._hung else STOPPED
            elif status == DIED:
                self._last = f"exit status {code}: {self._last}"
        seconds = time.monotonic() - self._start
        self._log.say(self.step.name, f"{status} after {seconds:.1f} s")
        return Ended(self.step, status, seconds, self._last)


def _signal(send: Callable[[int, int], None], pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        send(pid, number)


def marked(mark: str) -> list[int]:
    """The processes whose environment carries a step's mark, this one never; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError, ValueError):
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def tool(name: str) -> str | None:
    """Where one of CUDA's programs is; None where it is not."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
