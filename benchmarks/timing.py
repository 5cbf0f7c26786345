"""Device time without the host's: CUDA-graph replays over sets of inputs that together do not fit L2."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

L2_MULTIPLE = 4  # by when a set's turn comes again, this many times L2 has gone through it
MAX_SETS = 256


def input_sets(bytes_a_set: int) -> int:
    """How many sets of inputs of this size it takes for none to be found in L2."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(MAX_SETS, max(2, math.ceil(L2_MULTIPLE * l2 / bytes_a_set)))


def device_time(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Median device seconds of one of the calls, which differ only in their inputs.

    All calls are captured into one graph, so that neither Python nor the launcher is timed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and grows the allocator's pool
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()

    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3 / len(calls)
