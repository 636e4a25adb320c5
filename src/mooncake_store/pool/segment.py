"""Lend memory to the pool: a memfd segment with an index, written in two phases, read under pins.

Architecture::

    Segment   lock + memory; what runs under the lock is a few dictionary operations, never a copy
      └─ BlockIndex (index.py, pure)      where each block is, who uses it, who leaves first

Threading model: every method may be called from any thread. ``store`` reserves under the lock, copies outside it, then
commits; an exception in between revokes, so a half-written block can never be found.

Memory model: the mapping lives until ``close`` and, beyond that, until the last pin or writer is gone.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mooncake_store.image import gather
from mooncake_store.metrics import Metrics
from mooncake_store.pool.index import BlockIndex, Reserved, StoredBlock
from mooncake_store.transport.base import LocalMemory
from mooncake_store.transport.checksum import checksum_of
from mooncake_store.transport.copying import single_range
from mooncake_store.types import BlockKey

logger = logging.getLogger(__name__)


class SegmentMemory(Protocol):
    """What a segment needs to know of its memory; ``transport.memory.SharedMemory`` has it."""

    @property
    def address(self) -> int:
        """First byte in this process."""
        ...

    @property
    def size_bytes(self) -> int:
        """Length."""
        ...

    def memory(self) -> LocalMemory:
        """Describe it for ``Media.serve``."""
        ...

    def close(self) -> None:
        """Let it go."""
        ...


class StoreResult(NamedTuple):
    """What became of one block offered to the segment.

    Attributes:
        result: ``stored`` (now), ``duplicate`` (was here), ``busy``, ``full``, ``too_large`` or ``closed``.
        block: the new block, pinned once for the caller, only when ``stored``.
        evicted: keys that left to make room.
    """

    result: str
    block: StoredBlock | None
    evicted: tuple[BlockKey, ...]


class Segment:
    """One process's share of the pool.

    Args:
        memory: mapped memory; owned from here on. None lends nothing: every block is ``too_large``.
        metrics: where blocks, bytes and evictions are counted.
    """

    def __init__(self, memory: SegmentMemory | None, *, metrics: Metrics) -> None:
        self._memory = memory
        self._base = memory.address if memory is not None else 0
        self._index = BlockIndex(memory.size_bytes if memory is not None else 0)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._metrics = metrics
        if memory is not None:
            metrics.set("mooncake_segment_size_bytes", self._index.size_bytes)

    @property
    def size_bytes(self) -> int:
        """Return the usable size."""
        return self._index.size_bytes

    @property
    def memory(self) -> LocalMemory | None:
        """Describe the memory for ``Media.serve``; None when nothing is lent."""
        return self._memory.memory() if self._memory is not None else None

    def __contains__(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._index

    def held(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Tell for each key whether its block is here; touches nothing."""
        with self._lock:
            return [key in self._index for key in keys]

    def lengths(self, keys: Sequence[BlockKey]) -> list[int | None]:
        """Return the size in bytes of each block, None where it is not here; touches nothing."""
        with self._lock:
            return self._index.lengths(keys)

    def keys(self) -> list[BlockKey]:
        """Return the keys of every block here."""
        with self._lock:
            return self._index.keys()

    def address_of(self, block: StoredBlock) -> int:
        """Return where a reserved or pinned block's image starts."""
        return self._base + block.extent.offset

    def store(self, key: BlockKey, runs: Sequence[tuple[int, int]]) -> StoreResult:
        """Copy one block in, evicting unpinned blocks as needed.

        Args:
            key: its name.
            runs: (address, length) of its pieces, in image order; at least one byte in total.
        """
        reserved = self.reserve(key, sum(length for _, length in runs))
        block = reserved.block
        if block is None:
            result = "duplicate" if reserved.result == "stored" else reserved.result
            return StoreResult(result, None, reserved.evicted)
        is_written = False
        try:
            address = self.address_of(block)
            gather(runs, address)
            checksum = checksum_of(single_range(address, block.extent.length))
            is_written = True
        finally:
            if not is_written:
                self.revoke(block)
        self.commit(block, checksum)
        return StoreResult("stored", block, reserved.evicted)

    def reserve(self, key: BlockKey, length: int) -> Reserved:
        """Find room for a block that the caller will write at ``address_of`` and then commit or revoke."""
        with self._lock:
            reserved = self._index.reserve(key, length)
        if reserved.evicted:
            self._metrics.add("mooncake_segment_evictions_total", len(reserved.evicted))
        return reserved

    def commit(self, block: StoredBlock, checksum: int) -> None:
        """Make a reserved block findable; it stays pinned for the caller until ``unpin``."""
        with self._lock:
            self._index.commit(block, checksum)

    def revoke(self, block: StoredBlock) -> None:
        """Give a reserved block up."""
        with self._lock:
            self._index.revoke(block)
            self._idle.notify_all()

    def pin(self, keys: Sequence[BlockKey]) -> list[StoredBlock | None]:
        """Hold blocks in place; None where a block is not here. Each handle must be unpinned once."""
        with self._lock:
            return self._index.pin(keys) if not self._index.is_closed else [None] * len(keys)

    def unpin(self, blocks: Sequence[StoredBlock]) -> None:
        """Let blocks go; of those now unused the last leaves first."""
        with self._lock:
            self._index.unpin(blocks)
            if self._index.is_closed:
                self._idle.notify_all()

    def bytes_of(self, block: StoredBlock) -> bytes:
        """Return a copy of a pinned block's image."""
        return ctypes.string_at(self._base + block.extent.offset, block.extent.length)

    def verify(self, key: BlockKey) -> bool | None:
        """Compare a block's bytes with its checksum and drop it when they differ; None when it is not here."""
        (block,) = self.pin((key,))
        if block is None:
            return None
        is_intact = False
        try:
            is_intact = checksum_of(single_range(self.address_of(block), block.extent.length)) == block.checksum
            if not is_intact:
                logger.error("dropped block %s: its bytes no longer have its checksum", key.hex())
                with self._lock:
                    self._index.drop(key, block)
                self._metrics.add("mooncake_segment_dropped_total")
        finally:
            self.unpin((block,))
        return is_intact

    def drop(self, key: BlockKey) -> bool:
        """Forget a block now; its bytes stay until nobody uses them. False when it is not here."""
        with self._lock:
            return self._index.drop(key)

    def report(self) -> None:
        """Set the segment's gauges; without memory they are another's, who counts in the same place."""
        if self._memory is None:
            return
        with self._lock:
            used, blocks = self._index.used_bytes, self._index.num_blocks
        self._metrics.set("mooncake_segment_used_bytes", used)
        self._metrics.set("mooncake_segment_blocks", blocks)

    def check(self) -> None:
        """Raise LocalProtocolError if the books do not balance; for tests and debugging."""
        with self._lock:
            self._index.check()

    def num_in_use(self) -> tuple[int, int]:
        """Return how many blocks are pinned and how many are being written."""
        with self._lock:
            return self._index.num_pinned, self._index.num_reserved

    def close(self, *, timeout_s: float = 2.0) -> bool:
        """Accept nothing more and unmap once nobody uses the memory. Idempotent.

        Returns False when somebody still did after ``timeout_s``: the memory then stays mapped until the process ends,
        for unmapping it under a copy would be a crash.
        """
        with self._lock:
            self._index.is_closed = True
            is_idle = self._idle.wait_for(lambda: not (self._index.num_pinned or self._index.num_reserved), timeout_s)
            memory, self._memory = self._memory, None
        if memory is None:
            return is_idle
        if not is_idle:
            _KEPT.append(memory)
            logger.warning("segment closed while blocks were in use; its memory stays mapped")
            return False
        memory.close()
        return True


_KEPT: list[SegmentMemory] = []  # memory somebody still copied from or to when its segment was closed
