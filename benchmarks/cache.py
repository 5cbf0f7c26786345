"""A model of a GPU's L2: which of the bytes that kernels touch go to DRAM.

LRU over 32-byte sectors, the unit that DRAM is read in. A load of a sector that is not there fetches it; a store needs
no fetch and leaves the sector dirty, to be written back when it is evicted. Sectors whose last use asked for it (PTX:
``evict_first``) are evicted before all others. The sectors that each launch loads and
stores are counted once as well: that is what it would move if nothing it needs twice ever left the chip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SECTOR_BITS = 5
SECTOR = 1 << SECTOR_BITS
PAGE_BITS = 15  # sectors of an address range that get their places in the tables together
CHUNK = 1024  # sectors of the largest operand that an operator streams before it turns to the next operand


class Cache:
    """An LRU of ``capacity`` bytes, empty at first.

    Counts the bytes fetched from DRAM, those written back to it, and those of sectors distinct within their launch.
    """

    def __init__(self, capacity: int):
        self.capacity = max(capacity // SECTOR, 1)
        self.fetched = self.written_back = self.distinct = 0
        self._launch = 1
        self._pages: dict[int, int] = {}
        self._last_use = np.zeros(0, np.int64)  # 0 for a sector that is not in the cache
        self._dirty = np.zeros(0, bool)
        self._launch_of = {"load": np.zeros(0, np.int32), "store": np.zeros(0, np.int32)}  # the latest
        self._resident = self._now = 0
        # Uses in order, a batch each; one that was followed by a later use of its sector is stale.
        self._first: deque[tuple[int, NDArray[np.int64]]] = deque()  # of sectors to be evicted before all others
        self._others: deque[tuple[int, NDArray[np.int64]]] = deque()

    def launch(self) -> None:
        """A launch begins."""
        self._launch += 1

    def touch(self, sectors: NDArray[np.integer], *, loads: bool, stores: bool, evict_first: bool = False) -> None:
        """Use sectors (addresses divided by 32, each once), in this order; they are looked up before any is evicted."""
        places = self._places(sectors)
        for access, happens in (("load", loads), ("store", stores)):
            if happens:
                latest = self._launch_of[access]
                self.distinct += int(np.count_nonzero(latest[places] != self._launch)) * SECTOR
                latest[places] = self._launch
        for i in range(0, len(places), self.capacity):
            self._use(places[i : i + self.capacity], loads, stores, evict_first)

    def touch_addresses(self, addresses: NDArray[np.integer], **how: bool) -> None:
        """Use the sectors of the elements at these addresses, in the order of addresses."""
        self.touch(np.unique(addresses >> SECTOR_BITS), **how)

    def stream(self, read: Sequence[NDArray[np.integer]], written: Sequence[NDArray[np.integer]]) -> None:
        """Go through the sectors of several tensors in step, as an elementwise operator does."""
        largest = max((len(sectors) for sectors in (*read, *written)), default=0)
        steps = max(-(-largest // min(CHUNK, self.capacity)), 1)
        for pieces in zip(*(np.array_split(sectors, steps) for sectors in (*read, *written)), strict=True):
            for i, piece in enumerate(pieces):
                self.touch(piece, loads=i < len(read), stores=i >= len(read))

    def flush(self) -> None:
        """Write everything dirty back and forget the rest."""
        self._evict(self._resident)

    def _use(self, places: NDArray[np.int64], loads: bool, stores: bool, evict_first: bool) -> None:
        missing = len(places) - int(np.count_nonzero(self._last_use[places]))
        self._now += 1
        self._last_use[places] = self._now
        (self._first if evict_first else self._others).append((self._now, places))
        self._resident += missing
        if stores:
            self._dirty[places] = True
        if loads:
            self.fetched += missing * SECTOR
        if self._resident > self.capacity:
            self._evict(self._resident - self.capacity)

    def _evict(self, count: int) -> None:
        self._resident -= count
        while count:
            uses = self._first or self._others
            time, places = uses.popleft()
            current = places[self._last_use[places] == time]
            victims, kept = current[:count], current[count:]
            self._last_use[victims] = 0
            self.written_back += int(np.count_nonzero(self._dirty[victims])) * SECTOR
            self._dirty[victims] = False
            count -= len(victims)
            if len(kept):
                uses.appendleft((time, kept))

    def _places(self, sectors: NDArray[np.integer]) -> NDArray[np.int64]:
        """Where the tables keep these sectors."""
        sectors = sectors.astype(np.int64, copy=False)
        page_of = sectors >> PAGE_BITS
        if len(page_of) and page_of.min() == page_of.max():  # as a rule
            pages, page_of = page_of[:1], np.zeros(1, np.int64)
        else:
            pages, page_of = np.unique(page_of, return_inverse=True)
        for page in pages.tolist():
            self._pages.setdefault(page, len(self._pages))
        if (size := len(self._pages) << PAGE_BITS) > len(self._dirty):
            more = max(size, 2 * len(self._dirty)) - len(self._dirty)
            self._last_use = np.pad(self._last_use, (0, more))
            self._dirty = np.pad(self._dirty, (0, more))
            self._launch_of = {access: np.pad(latest, (0, more)) for access, latest in self._launch_of.items()}
        starts = np.array([self._pages[page] << PAGE_BITS for page in pages.tolist()], np.int64)
        return starts[page_of] + (sectors & ((1 << PAGE_BITS) - 1))
