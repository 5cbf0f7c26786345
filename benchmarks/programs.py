"""What the programs of a launch do to memory, as Triton's interpreter runs them, and in what order a GPU would.

The interpreter runs one program after another; a GPU runs as many side by side as are resident, so that what L2 still
holds is another matter. A program is therefore written down as a list of what it does, and played back in turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.cache import Cache

# Warps that a multiprocessor runs at once where it is not known better: those of 128 registers per thread, for which
# the kernels are made.
RESIDENT_WARPS = 16


class Access(NamedTuple):
    """A load, a store or an atomic: the addresses of its elements, and bytes each."""

    addresses: NDArray[np.int64]
    size: int
    loads: bool
    stores: bool
    lanes: int = 0  # those that a mask turns off, too
    evict_first: bool = False  # from L2, before others

    def touch(self, cache: Cache) -> None:
        """Let it pass through the L2."""
        cache.touch_addresses(self.addresses, loads=self.loads, stores=self.stores, evict_first=self.evict_first)


class Signal(NamedTuple):
    """A program sets flags, by their addresses."""

    flags: frozenset[int]


class Wait(NamedTuple):
    """A program goes on when all of these flags are set."""

    flags: frozenset[int]


Event = Access | Signal | Wait


@contextmanager
def following(heard: Callable[[Event], None]) -> Iterator[None]:
    """``heard`` is given whatever interpreted programs do to memory inside the block, as they do it.

    An atomic is an access, and before it a wait if it acquires, behind it a signal if it releases.
    """
    from triton.runtime import interpreter  # here, for Triton has to be imported after TRITON_INTERPRET is set

    def access(
        pointers: int,
        mask: int | None,
        loads: bool = False,
        stores: bool = False,
        eviction: int | None = None,
        sem: int | None = None,
    ):
        def wrap(method: Callable) -> Callable:
            def told(builder, *args, **kwargs):
                handle = args[pointers]
                # The mask of a block pointer is a bare array, whose ``data`` is its buffer.
                active = True if mask is None else np.asarray(args[mask].data, bool)
                addresses = handle.data[np.broadcast_to(active, handle.data.shape)]
                size = max(1, handle.get_element_ty().primitive_bitwidth // 8)
                order = "" if sem is None else args[sem].name.lower()
                if "acquire" in order:
                    heard(Wait(frozenset(addresses.tolist())))
                first = eviction is not None and getattr(args[eviction], "name", "") == "EVICT_FIRST"
                heard(Access(addresses, size, loads, stores, handle.data.size, first))
                result = method(builder, *args, **kwargs)
                if "release" in order:
                    heard(Signal(frozenset(addresses.tolist())))
                return result

            return told

        return wrap

    builder = interpreter.InterpreterBuilder
    with ExitStack() as stack:
        for name, wrap in (
            ("create_masked_load", access(pointers=0, mask=1, eviction=4, loads=True)),
            ("create_masked_store", access(pointers=0, mask=2, eviction=4, stores=True)),
            ("create_atomic_rmw", access(pointers=1, mask=3, loads=True, stores=True, sem=4)),
            ("create_atomic_cas", access(pointers=0, mask=None, loads=True, stores=True, sem=3)),
        ):
            original = getattr(builder, name)
            stack.callback(setattr, builder, name, original)
            setattr(builder, name, wrap(original))
        yield


@contextmanager
def without_data(flag: int) -> Iterator[None]:
    """Interpreted programs touch no memory inside the block: they load zeros, and find ``flag`` in every flag."""
    from triton.runtime import interpreter

    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load = builder.create_masked_load

    def load_nothing(self, pointers, mask, *args, **kwargs):
        return load(self, pointers, handle_of(np.zeros_like(mask.data), mask.dtype), *args, **kwargs)

    def store_nothing(*args, **kwargs):
        pass

    def find_flag(self, operation, pointers, value, *args, **kwargs):
        return handle_of(np.full(pointers.data.shape, flag, value.data.dtype), value.dtype.scalar)

    with (
        patch.object(builder, "create_masked_load", load_nothing),
        patch.object(builder, "create_masked_store", store_nothing),
        patch.object(builder, "create_atomic_rmw", find_flag),
    ):
        yield


def in_turns(programs: Sequence[Sequence[Event]], resident: int) -> Iterator[Access]:
    """The accesses of programs of which ``resident`` run at a time, each doing one thing in its turn.

    The next one starts where one ends. Who waits lets others go on.

    Raises:
        RuntimeError: all that run wait.
    """
    to_come, running, are_set = deque(map(iter, programs)), deque(), set()
    stuck = 0  # that have waited in vain, one after another
    while to_come or running:
        while to_come and len(running) < resident:
            running.append((to_come.popleft(), None))
        program, event = running.popleft()
        event = event or next(program, None)
        if event is None:
            stuck = 0
            continue
        if isinstance(event, Wait) and not event.flags <= are_set:
            running.append((program, event))
            stuck += 1
            if stuck > len(running):
                raise RuntimeError(f"{len(running)} programs run, and all of them wait")
            continue
        stuck = 0
        running.append((program, None))
        if isinstance(event, Signal):
            are_set |= event.flags
        elif isinstance(event, Access):
            yield event
