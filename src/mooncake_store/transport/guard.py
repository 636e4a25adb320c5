"""Keep one word per served region that a one-sided reader checks, so that a withdrawn or stale region is refused.

Shared memory and process_vm_readv involve nobody on the owner's side, so nobody there can say no. The owner therefore
keeps the region's id in a word of a page of its own while it serves the region, and clears it before the memory goes
away. A reader looks at the word *after* it copied: still the id -> the memory was the region during the whole copy.
"""

from __future__ import annotations

import ctypes
import threading

from mooncake_store.errors import CapacityExceeded
from mooncake_store.transport.memory import PAGE_BYTES, SharedMemory, map_memfd

SLOT_BYTES = 8
GUARD_SLOTS_MAX = PAGE_BYTES // SLOT_BYTES


class GuardPage:
    """One page of words; any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._page: SharedMemory | None = map_memfd(PAGE_BYTES, "mooncake-guard")
        self._slots: dict[int, int] = {}
        self._free = list(range(GUARD_SLOTS_MAX - 1, -1, -1))
        self.memfd = self._page.memfd
        self.address = self._page.address

    def hold(self, region_id: int) -> int:
        """Raise the guard of a region; return the word's offset in the page.

        Raises:
            CapacityExceeded: the page is full, or closed.
        """
        with self._lock:
            if self._page is None or not self._free:
                raise CapacityExceeded(f"this process serves {GUARD_SLOTS_MAX} regions already", hint="withdraw some")
            slot = self._free.pop()
            self._slots[region_id] = slot
            self._write(slot, region_id)
            return slot * SLOT_BYTES

    def release(self, region_id: int) -> bool:
        """Clear the guard: copies that end after this fail. False when the region has none. Idempotent."""
        with self._lock:
            slot = self._slots.pop(region_id, None)
            if slot is None:
                return False
            self._write(slot, 0)
            self._free.append(slot)
            return True

    def close(self) -> None:
        """Clear every guard and give the page back. Idempotent."""
        with self._lock:
            for slot in self._slots.values():
                self._write(slot, 0)
            self._slots.clear()
            if self._page is not None:
                self._page.close()
                self._page = None

    def _write(self, slot: int, value: int) -> None:
        # an aligned 8-byte store is atomic on every 64-bit machine
        ctypes.c_uint64.from_address(self.address + slot * SLOT_BYTES).value = value
