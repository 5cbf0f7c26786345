"""Kernels compiled into Triton's cache, in parallel.

The compilations run in processes, since most of Triton's compiler holds the interpreter's lock. ``multiprocessing``
does not start them: it would either run the caller's script again or fork a process that uses CUDA. This module, run as
a program, is such a process.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple

import triton

from attn_kernels._recording import Specialization, compiling_for, target


class Outcome(NamedTuple):
    """What came of a kernel: whether the cache did not have it, CPU seconds, and the compiler's complaint."""

    compiled: bool
    cpu_seconds: float
    error: str = ""


def compile_all(
    kernels: Sequence[Specialization], capability: int, jobs: int | None = None
) -> Iterator[tuple[Specialization, Outcome]]:
    """Compile, and yield each kernel when it is done.

    As long as the cache has the kernels, this process takes them from there, in milliseconds. Other processes start at
    the first one that it lacks, since they take seconds to start.
    """
    todo = list(kernels)
    while todo:
        outcome = compile_kernel(todo[-1], capability)
        yield todo.pop(), outcome
        if outcome.compiled or outcome.error:
            break
    if todo:
        yield from _in_processes(todo, capability, min(jobs or _cpus(), len(todo)))


def compile_kernel(kernel: Specialization, capability: int) -> Outcome:
    """Compile one kernel in this process."""
    start, complaint = _cpu_seconds(), ""
    with compiling_for(capability), compilations() as compiled:
        try:
            triton.compile(kernel.source(), target=target(capability), options=dict(kernel.options))
        except Exception as error:  # of any kind that the compiler raises: other kernels are still to come
            complaint = f"{type(error).__name__}: {str(error)[-300:]}"
    return Outcome(kernel.kernel in compiled, _cpu_seconds() - start, complaint)


def _cpu_seconds() -> float:
    """CPU time of this process and of the programs that it has called, such as ptxas."""
    return sum(os.times()[:4])


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the kernels that this process compiles inside the block, as they come, without those from the cache.

    All threads count: on a GPU autograd launches backward's kernels in a thread of its own.
    """
    found: list[str] = []
    before = triton.knobs.compilation.listener

    def listen(*, src, cache_hit, **others) -> None:
        if not cache_hit:
            found.append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **others)

    triton.knobs.compilation.listener = listen
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


def _in_processes(
    kernels: Sequence[Specialization], capability: int, jobs: int
) -> Iterator[tuple[Specialization, Outcome]]:
    own, workers = threading.local(), []

    def start() -> None:
        own.worker = _Worker(capability)
        workers.append(own.worker)

    def one(kernel: Specialization) -> tuple[Specialization, Outcome]:
        return kernel, own.worker.compile(kernel)

    with ThreadPoolExecutor(jobs, initializer=start) as threads:
        futures = [threads.submit(one, kernel) for kernel in kernels]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.stop()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that compiles one kernel after another. Where it has ended, the next kernel starts a new one."""

    def __init__(self, capability: int):
        self._capability, self._stopped = capability, False
        self._process: subprocess.Popen | None = None

    def compile(self, kernel: Specialization) -> Outcome:
        if self._stopped:
            return Outcome(False, 0, "stopped")
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        try:
            self._process.stdin.write(base64.b64encode(pickle.dumps(kernel)).decode() + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            return Outcome(False, 0, f"its process ended: {self._process.wait()}")
        return Outcome(*json.loads(answer))

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen:
        changes = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
        environment = os.environ | changes | {"TRITON_CACHE_DIR": triton.knobs.cache.dir}
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._capability)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # an interrupt reaches this process alone, which then stops its workers
        )


def _work(capability: int) -> None:
    """Read a kernel per line, compile it, write a line that says what came of it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints must not be read as an answer
    for line in sys.stdin:
        outcome = compile_kernel(pickle.loads(base64.b64decode(line)), capability)
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    _work(int(sys.argv[1]))
