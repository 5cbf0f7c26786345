"""Bytes touched and kernels launched, counted without a GPU; and bytes of DRAM behind a model of L2.

Triton kernels are counted exactly: every lane of a load, a store or an atomic that its mask lets through, as the
interpreter runs them; L2 sees them side by side, as many as a GPU has room for. An aten operator counts as one launch
that reads each operand and writes each result once, which is what eager PyTorch does at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cache import SECTOR_BITS, Cache
from benchmarks.interpreter import skip_repeated_work
from benchmarks.programs import RESIDENT_WARPS, Access, Event, following, in_turns

ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_"}  # other operators in place read what they change
CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass
class Launch:
    """One kernel launch, the bytes that it loads and stores, and those that its loads fetch from DRAM."""

    name: str
    triton: bool
    loaded: int = 0
    stored: int = 0
    fetched: int = 0


@dataclass
class Traffic:
    """All launches that a :func:`meter` has seen, in order, and their totals in bytes."""

    cache: Cache | None = None
    per_launch: list[Launch] = field(default_factory=list)

    def begin(self, launch: Launch) -> None:
        """What is counted from now on is this launch's."""
        self.per_launch.append(launch)
        if self.cache is not None:
            self.cache.launch()

    @property
    def triton_launches(self) -> list[str]:
        """The names of the Triton kernels launched."""
        return [launch.name for launch in self.per_launch if launch.triton]

    @property
    def aten_launches(self) -> list[str]:
        """The names of the aten operators that launch a kernel."""
        return [launch.name for launch in self.per_launch if not launch.triton]

    @property
    def launches(self) -> int:
        return len(self.per_launch)

    @property
    def loaded(self) -> int:
        return sum(launch.loaded for launch in self.per_launch)

    @property
    def stored(self) -> int:
        return sum(launch.stored for launch in self.per_launch)

    @property
    def touched(self) -> int:
        return self.loaded + self.stored

    @property
    def dram(self) -> int:
        """Bytes that the cache has fetched and written back."""
        return self.cache.fetched + self.cache.written_back


@contextmanager
def meter(cache: Cache | None = None, multiprocessors: int = 1) -> Iterator[Traffic]:
    """Count what is launched inside the block, in this thread (on the CPU backward runs in it too).

    Args:
        cache: the L2 that everything passes through, written back at the end of the block. Every tensor made inside
            the block then lives until its end, for memory that is used again would depend on the allocator.
        multiprocessors: those of the GPU, which run the programs of a launch side by side.

    Raises:
        RuntimeError: Triton does not interpret its kernels, whose launches would go uncounted.
    """
    import triton  # here, for Triton itself has to be imported after TRITON_INTERPRET is set
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("meter() counts in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported")
    skip_repeated_work()
    traffic = Traffic(cache)
    aten = AtenMeter(traffic)
    programs: list[list[Event]] = []

    def heard(event: Event) -> None:
        if isinstance(event, Access):
            launch, size = traffic.per_launch[-1], event.addresses.size * event.size
            launch.loaded += size if event.loads else 0
            launch.stored += size if event.stores else 0
        if cache is not None:
            programs[-1].append(event)

    call, begin_program = GridExecutor.__call__, InterpreterBuilder.set_grid_idx

    def count_launch(executor, *args, num_warps=4, **kwargs):
        launch = Launch(executor.fn.__name__, triton=True)
        traffic.begin(launch)
        programs.clear()
        # The interpreter copies arguments by aten operators that no GPU would run.
        with aten.paused():
            call(executor, *args, num_warps=num_warps, **kwargs)
        if cache is not None:
            with _fetched(launch, cache):
                for access in in_turns(programs, max(multiprocessors * RESIDENT_WARPS // num_warps, 1)):
                    access.touch(cache)

    def count_program(builder, *index):
        programs.append([])
        begin_program(builder, *index)

    with (
        patch.object(GridExecutor, "__call__", count_launch),
        patch.object(InterpreterBuilder, "set_grid_idx", count_program),
        following(heard),
        aten,
    ):
        yield traffic
    if cache is not None:
        cache.flush()


@contextmanager
def _fetched(launch: Launch, cache: Cache) -> Iterator[None]:
    before = cache.fetched
    yield
    launch.fetched += cache.fetched - before


class AtenMeter(TorchDispatchMode):
    """Counts the aten operators that launch a kernel on a GPU, those inside other libraries' operators too."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic, self.is_paused = traffic, False
        self.alive: list[object] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        if func.namespace != "aten":
            # Straight to the operator's own kernel, with the mode on again: it is off in here.
            with self:
                return func.redispatch(CPU_KERNEL, *args, **kwargs)
        result = func(*args, **kwargs)
        cache = self.traffic.cache
        if cache is not None:
            self.alive.append(result)
        read, written = _operands(func, args, kwargs, result)
        if any(t.numel() for t in written):
            launch = Launch(func._schema.name.removeprefix("aten::"), triton=False)
            launch.loaded, launch.stored = sum(map(_bytes, read)), sum(map(_bytes, written))
            self.traffic.begin(launch)
            if cache is not None:
                with _fetched(launch, cache):
                    cache.stream([_sectors(t) for t in read], [_sectors(t) for t in written])
        return result


def _operands(func: OpOverload, args: tuple, kwargs: dict, result: object) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors whose elements an aten operator reads, and those that it writes: none of a view or an allocation."""
    name = func._schema.name.removeprefix("aten::")
    if name in ALLOCATIONS or torch.Tag.inplace_view in func.tags:
        return [], []
    takes_shape_only = name.endswith("_like") or name.startswith("new_")
    read, written, storages = [], [], set()
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = _tensors(value)
        storages.update(t.untyped_storage()._cdata for t in tensors)
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        if is_changed:
            written += tensors
        if not takes_shape_only and not (is_changed and (argument.is_out or name in OVERWRITES)):
            read += tensors
    # What shares an operand's memory is a view of it, or was counted as changed.
    written += [t for t in _tensors(result) if t.untyped_storage()._cdata not in storages]
    return read, written


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(t: Tensor) -> int:
    """The bytes of memory behind a tensor; an expanded dimension is one element long."""
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride != 0 or size == 0]
    return t.element_size() * math.prod(sizes)


def _sectors(t: Tensor) -> np.ndarray:
    """The sectors of memory behind a tensor, in the order of addresses."""
    if not t.numel():
        return np.zeros(0, np.int64)
    offsets = np.zeros(1, np.int64)
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        # Dimensions from the innermost: what is consecutive stays a range of bytes.
        step = stride * t.element_size()
        if size > 1 and step:
            offsets = np.add.outer(np.arange(size) * step, offsets).ravel()
    return np.unique((t.data_ptr() + offsets) >> SECTOR_BITS)
