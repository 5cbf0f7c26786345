"""Bytes touched and kernels launched, counted without a GPU; and bytes of DRAM behind a model of L2.

Triton kernels are counted exactly: every lane of a load, a store or an atomic that its mask lets through, as the
interpreter runs them. An aten operator counts as one launch that reads each operand and writes each result once, which
is what eager PyTorch does at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cache import SECTOR_BITS, Cache
from benchmarks.interpreter import skip_repeated_work

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
def meter(cache: Cache | None = None) -> Iterator[Traffic]:
    """Count what is launched inside the block, in this thread (on the CPU backward runs in it too).

    Args:
        cache: the L2 that everything passes through, written back at the end of the block. Every tensor made inside
            the block then lives until its end, for memory that is used again would depend on the allocator.

    Raises:
        RuntimeError: Triton does not interpret its kernels, whose launches would go uncounted.
    """
    import triton  # here, for Triton itself has to be imported after TRITON_INTERPRET is set
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("meter() counts in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported")
    skip_repeated_work()
    traffic = Traffic(cache)
    aten = _AtenMeter(traffic)
    builder = interpreter.InterpreterBuilder
    with ExitStack() as stack:
        for owner, name, wrap in (
            (interpreter.GridExecutor, "__call__", _count_launches(traffic, aten)),
            (builder, "create_masked_load", _count_lanes(traffic, pointers=0, mask=1, loads=True)),
            (builder, "create_masked_store", _count_lanes(traffic, pointers=0, mask=2, stores=True)),
            (builder, "create_atomic_rmw", _count_lanes(traffic, pointers=1, mask=3, loads=True, stores=True)),
            (builder, "create_atomic_cas", _count_lanes(traffic, pointers=0, mask=None, loads=True, stores=True)),
        ):
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, wrap(original))
        stack.enter_context(aten)
        yield traffic
    if cache is not None:
        cache.flush()


def _count_launches(traffic: Traffic, aten: _AtenMeter) -> Callable[[Callable], Callable]:
    def wrap(call):
        def counted(executor, *args, **kwargs):
            traffic.begin(Launch(executor.fn.__name__, triton=True))
            # The interpreter copies arguments by aten operators that no GPU would run.
            with aten.paused():
                return call(executor, *args, **kwargs)

        return counted

    return wrap


def _count_lanes(
    traffic: Traffic, *, pointers: int, mask: int | None, loads: bool = False, stores: bool = False
) -> Callable[[Callable], Callable]:
    """Wrap a method of the interpreter's builder, given the positions of its pointers and mask."""

    def wrap(access):
        def counted(builder, *args, **kwargs):
            handle = args[pointers]
            # The mask of a block pointer is a bare array, whose ``data`` is its buffer.
            active = True if mask is None else np.asarray(args[mask].data, bool)
            addresses = handle.data[np.broadcast_to(active, handle.data.shape)]
            size = addresses.size * max(1, handle.get_element_ty().primitive_bitwidth // 8)
            launch = traffic.per_launch[-1]
            launch.loaded += size if loads else 0
            launch.stored += size if stores else 0
            if traffic.cache is not None:
                with _fetched(launch, traffic.cache):
                    traffic.cache.touch_addresses(addresses, loads=loads, stores=stores)
            return access(builder, *args, **kwargs)

        return counted

    return wrap


@contextmanager
def _fetched(launch: Launch, cache: Cache) -> Iterator[None]:
    before = cache.fetched
    yield
    launch.fetched += cache.fetched - before


class _AtenMeter(TorchDispatchMode):
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
