"""A rehearsal without a GPU: the same code on tiny shapes in the interpreter, with times that nothing measured.

``python -m benchmarks.rehearsal hang`` stands in for a step that goes wrong.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

SHAPE = (2, 16, 8, 8)
GPU = "rehearsal, nothing measured"  # in place of a GPU's name, and so in the name of the file of rows

# torch and what imports it are imported inside functions: a step that goes wrong needs none of it.


class Event:
    """Each is recorded a millisecond after the one before."""

    count = itertools.count()

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self, stream: object = None) -> None:
        self.milliseconds = next(self.count)

    def elapsed_time(self, other: Event) -> int:
        return other.milliseconds - self.milliseconds


@contextmanager
def pretended_gpu(quick: bool = False) -> Iterator[list[str]]:
    """Answer on the CPU what timing asks of a GPU: a replay does nothing, an interval takes a millisecond.

    torch.compile compiles for nobody; its modes are listed.

    Args:
        quick: with as few calls and layers as there can be.
    """
    import torch

    from benchmarks import speed_of_light, timing, train

    captured: list[object] = []

    class Graph:
        def replay(self) -> None:
            assert captured == [self]

        def reset(self) -> None:
            captured.clear()

    @contextmanager
    def graph(graph: Graph, stream: object) -> Iterator[None]:
        yield
        captured.append(graph)

    real, modes = torch.compile, []

    def compile_eagerly(module, mode: str = "default", dynamic: bool | None = None):
        modes.append(mode)
        return real(module, backend="eager", dynamic=dynamic)

    answers = {
        "CUDAGraph": Graph,
        "graph": graph,
        "Event": Event,
        "Stream": SimpleNamespace,
        "synchronize": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=0),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
    }
    changes = [(torch.cuda, name, answer) for name, answer in answers.items()]
    changes += [(timing, name, value) for name, value in {"WARM_UP": 0, "HOST_ROUNDS": 1, "MIN_SETS": 2}.items()]
    changes += [(torch, "compile", compile_eagerly)]
    if quick:
        changes += [(timing, "STEPS", 1), (timing, "WARM_STEPS", 0), (train, "DEPTH", 18)]
        changes += [(timing, "input_sets", lambda size: 1)]
    changes += [(speed_of_light, "BLOCK", 64), (speed_of_light, "copy_times", speed_of_light.copy_times.__wrapped__)]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield modes


def tiny(cells: Sequence) -> list:
    """The cells with shapes that the interpreter computes in a second; each once."""
    found = {}
    for cell in cells:
        c = cell.shape[1]
        shape = (2, c, 32, 32) if c == 3 else SHAPE
        small = cell._replace(shape=shape)
        found.setdefault((small.place, small.modes), small)
    return list(found.values())


def hang() -> None:
    """As where a kernel never ends: no signal but SIGKILL helps, and a process of its own stays behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("launching what never ends", flush=True)
    if os.fork() == 0:
        os.setsid()
    while True:
        time.sleep(1)


def die() -> None:
    print("launching what kills its process", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fill() -> None:
    """Print without end."""
    while True:
        print("all work and no play " * 40, flush=True)


FAULTS: dict[str, Callable[[], None]] = {"hang": hang, "die": die, "fill": fill}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
