"""Time on a GPU: of the device alone by CUDA-graph replay, of the host alone by enqueueing, and of whole steps.

Device work is timed over sets of inputs that together do not fit L2, and whose results have memory of their own.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

L2_MULTIPLE = 4  # by when a set's turn comes again, this many times L2 has gone through it
MIN_SETS = 16  # in a graph, so that the gap before its first kernel does not count,
MIN_SETS_BYTES = 2**30  # unless they are larger than this: then they take long enough
MAX_SETS = 256
REPLAYS = 20
WARM_UP = 0.1  # seconds, in which an idle GPU's clock rises
HOST_CALLS, HOST_ROUNDS = 10, 20  # few enough calls at a time for the queue of launches (1,024 deep) not to fill
STEPS, WARM_STEPS = 30, 5

Call = Callable[[], object]
Prepare = Callable[[int], Sequence[Call]]  # so many calls, each to be made once, each on its own inputs if it can be


class Quantiles(NamedTuple):
    """What is below 20%, half and 80% of the samples, in any unit."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(samples, dtype=torch.float64).quantile(levels).tolist())

    @classmethod
    def exactly(cls, value: float) -> Quantiles:
        """Of what does not vary."""
        return cls(value, value, value)

    def times(self, factor: float) -> Quantiles:
        return Quantiles(*(factor * q for q in self))

    def under(self, amount: float) -> Quantiles:
        """Of ``amount / sample``."""
        return Quantiles(*(amount / q for q in reversed(self)))

    def above(self, other: Quantiles) -> Quantiles:
        """Of ``sample - sample of other``, at the widest."""
        return Quantiles(self.p20 - other.p80, self.p50 - other.p50, self.p80 - other.p20)


def input_sets(bytes_a_set: int) -> int:
    """How many sets of inputs of this size it takes for none to be found in L2."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    least = max(2, min(MIN_SETS, MIN_SETS_BYTES // bytes_a_set))
    return min(MAX_SETS, max(least, math.ceil(L2_MULTIPLE * l2 / bytes_a_set)))


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def own_stream() -> Iterator[None]:
    """Run on a stream that graphs can be captured on; nothing changes without a GPU.

    Backward runs on the stream of its forward: what is captured backward has to have run forward in here.
    """
    if not torch.cuda.is_available():
        yield
        return
    _stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream()):
        yield
    torch.cuda.current_stream().wait_stream(_stream())


def device_times(prepare: Prepare, count: int, replays: int = REPLAYS) -> Quantiles:
    """Device seconds of one of ``count`` calls, which differ only in their inputs.

    All calls are captured into one graph, so that neither Python nor the launcher is timed.
    """
    with own_stream():
        for call in prepare(count):  # compiles, tunes, and grows the allocator's pool
            call()
        calls = prepare(count)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_stream()):
            results = [call() for call in calls]  # kept, or the next call would write to the same memory, in L2
        # A captured backward has given back what its forward saved. It lies there until something else is allocated:
        # nothing is before the last replay.
        end = time.perf_counter() + WARM_UP
        while time.perf_counter() < end:
            graph.replay()
            torch.cuda.synchronize()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
        for start, stop in events:
            start.record()
            graph.replay()
            stop.record()
        torch.cuda.synchronize()
        samples = [start.elapsed_time(stop) / 1e3 / count for start, stop in events]
        graph.reset()
        del results
    return Quantiles.of(samples)


def device_time(calls: Sequence[Call]) -> float:
    """Median device seconds of one of the calls, which differ only in their inputs and can be made repeatedly."""
    return device_times(lambda _: calls, len(calls)).p50


def host_times(prepare: Prepare, count: int) -> Quantiles:
    """Host seconds until a call returns, with the device idle at first and never waited for."""
    count, samples = min(count, HOST_CALLS), []
    with own_stream():
        for _ in range(HOST_ROUNDS):
            calls = prepare(count)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for call in calls:
                call()
            samples.append((time.perf_counter() - start) / count)
        torch.cuda.synchronize()
    return Quantiles.of(samples)


def step_times(step: Call) -> Quantiles:
    """Seconds from one step of a loop to the next, on the device: the host's are in it where it does not keep up."""
    for _ in range(WARM_STEPS):  # the first compiles
        step()
    torch.cuda.synchronize()
    end = time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        step()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return Quantiles.of([a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)])


def peak_memory(call: Call, before: int | None = None) -> int:
    """The most bytes held at a time during a call beyond ``before``, by default what is held when it begins."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if before is None else before
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release() -> None:
    """Give back all memory that nothing refers to.

    Raises:
        RuntimeError: the GPU can no longer be used by this process, after an illegal access for example.
    """
    if "torch._dynamo" in sys.modules:  # whose import takes seconds
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
