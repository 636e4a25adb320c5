"""Keep which block is in which extent of our segment, who uses it, and make room.

Pure and not thread-safe: :class:`~mooncake_store.pool.segment.Segment` adds the lock and the memory.

Life of a block::

    reserve ──► RESERVED ──commit──► STORED ◄──pin/unpin──► STORED, pinned
                   │ revoke             │ evicted                │ dropped while pinned
                   ▼                    ▼                        ▼
                  gone                 gone               DROPPED: unfindable, gone at the last unpin

Only a STORED block can be found; only an unpinned STORED block can be evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from mooncake_store.errors import LocalProtocolError
from mooncake_store.pool.allocator import ExtentAllocator
from mooncake_store.pool.eviction import EvictionOrder
from mooncake_store.types import BlockKey, Extent

ReserveResult = Literal["reserved", "stored", "busy", "full", "too_large", "closed"]


class StoredBlock:
    """One block of the segment; a handle that stays valid while the holder has it pinned or reserved.

    ``key``, ``extent`` never change; ``checksum`` is set by commit. The counters belong to the index.
    """

    __slots__ = ("checksum", "extent", "is_findable", "key", "num_pins")

    def __init__(self, key: BlockKey, extent: Extent) -> None:
        self.key = key
        self.extent = extent
        self.checksum = 0
        self.num_pins = 0
        self.is_findable = False


class Reserved(NamedTuple):
    """Answer of ``reserve``.

    Attributes:
        result: ``reserved``; ``stored`` (have it already); ``busy`` (another writer is at it); ``full`` (everything
            that remains is in use); ``too_large`` (longer than the whole segment); ``closed``.
        block: the handle to fill, only when reserved.
        evicted: keys that had to go to make room; withdraw them from the directory, also when full.
    """

    result: ReserveResult
    block: StoredBlock | None
    evicted: tuple[BlockKey, ...]


class BlockIndex:
    """Index of one segment of ``size_bytes``."""

    def __init__(self, size_bytes: int) -> None:
        self._allocator = ExtentAllocator(size_bytes)
        self._order = EvictionOrder()
        self._stored: dict[BlockKey, StoredBlock] = {}
        self._reserved: dict[BlockKey, StoredBlock] = {}
        self._dropped: set[StoredBlock] = set()
        self.num_pinned = 0
        self.is_closed = False

    @property
    def size_bytes(self) -> int:
        """Return the usable size of the segment."""
        return self._allocator.size_bytes

    @property
    def used_bytes(self) -> int:
        """Return the bytes taken by stored, reserved and dropped-but-pinned blocks."""
        return self._allocator.used_bytes

    @property
    def num_blocks(self) -> int:
        """Count the blocks that can be found."""
        return len(self._stored)

    @property
    def num_reserved(self) -> int:
        """Count the blocks being written."""
        return len(self._reserved)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._stored

    def lengths(self, keys: Sequence[BlockKey]) -> list[int | None]:
        """Return the size in bytes of each block, None where it cannot be found."""
        blocks = [self._stored.get(key) for key in keys]
        return [block.extent.length if block is not None else None for block in blocks]

    def keys(self) -> list[BlockKey]:
        """Return the keys of every block that can be found."""
        return list(self._stored)

    def reserve(self, key: BlockKey, length: int) -> Reserved:
        """Find room for a block, evicting unpinned ones as needed; the block cannot be found until committed."""
        if self.is_closed:
            return Reserved("closed", None, ())
        if key in self._stored:
            self.touch((key,))
            return Reserved("stored", None, ())
        if key in self._reserved:
            return Reserved("busy", None, ())
        if self._allocator.occupied_bytes(length) > self._allocator.size_bytes:
            return Reserved("too_large", None, ())
        evicted: list[BlockKey] = []
        extent = self._allocator.allocate(length)
        while extent is None:
            victim = self._order.next_victim()
            if victim is None:
                return Reserved("full", None, tuple(evicted))
            self._order.hold(victim)
            self._allocator.free(self._stored.pop(victim).extent)
            evicted.append(victim)
            extent = self._allocator.allocate(length)
        block = StoredBlock(key, extent)
        self._reserved[key] = block
        return Reserved("reserved", block, tuple(evicted))

    def commit(self, block: StoredBlock, checksum: int) -> None:
        """Make a reserved block findable, pinned once by the writer (who must ``unpin`` it).

        Raises:
            LocalProtocolError: if it is not reserved (revoked or committed before).
        """
        if self._reserved.get(block.key) is not block:
            raise LocalProtocolError("committed a block that is not reserved")
        del self._reserved[block.key]
        block.checksum = checksum
        block.is_findable = True
        block.num_pins = 1
        self.num_pinned += 1
        self._stored[block.key] = block

    def revoke(self, block: StoredBlock) -> None:
        """Give up a reserved block and free its extent.

        Raises:
            LocalProtocolError: if it is not reserved.
        """
        if self._reserved.get(block.key) is not block:
            raise LocalProtocolError("revoked a block that is not reserved")
        del self._reserved[block.key]
        self._allocator.free(block.extent)

    def pin(self, keys: Sequence[BlockKey]) -> list[StoredBlock | None]:
        """Hold blocks where they are; None for one that is not here. Every handle returned must be unpinned once."""
        found: list[StoredBlock | None] = []
        for key in keys:
            block = self._stored.get(key)
            if block is not None:
                if block.num_pins == 0:
                    self._order.hold(key)
                    self.num_pinned += 1
                block.num_pins += 1
            found.append(block)
        return found

    def unpin(self, blocks: Sequence[StoredBlock]) -> None:
        """Undo one pin of each block; those now unused become the most recently used, the last of them leaving first.

        Raises:
            LocalProtocolError: if a block is not pinned.
        """
        evictable: list[BlockKey] = []
        for block in blocks:
            if block.num_pins <= 0:
                raise LocalProtocolError("unpinned a block that is not pinned")
            block.num_pins -= 1
            if block.num_pins == 0:
                self.num_pinned -= 1
                if block.is_findable:
                    evictable.append(block.key)
                else:
                    self._dropped.discard(block)
                    self._allocator.free(block.extent)
        self._order.offer(evictable)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Mark blocks as just used; those unknown or in use are left as they are."""
        self._order.offer([key for key in keys if key in self._order])

    def drop(self, key: BlockKey, block: StoredBlock | None = None) -> bool:
        """Make a block unfindable now and free it once unpinned; False when it (or this ``block``) is not here."""
        stored = self._stored.get(key)
        if stored is None or (block is not None and stored is not block):
            return False
        del self._stored[key]
        stored.is_findable = False
        if stored.num_pins == 0:
            self._order.hold(key)
            self._allocator.free(stored.extent)
        else:
            self._dropped.add(stored)
        return True

    def check(self) -> None:
        """Raise LocalProtocolError if the books do not balance; for tests and debugging."""
        alive = [*self._stored.values(), *self._reserved.values(), *self._dropped]
        if len(alive) != self._allocator.num_extents:
            raise LocalProtocolError(f"{len(alive)} blocks but {self._allocator.num_extents} extents")
        occupied = sum(self._allocator.occupied_bytes(block.extent.length) for block in alive)
        if occupied != self._allocator.used_bytes:
            raise LocalProtocolError(f"blocks occupy {occupied} bytes, the allocator says {self._allocator.used_bytes}")
        free = [block for block in self._stored.values() if block.num_pins == 0]
        if len(free) != len(self._order) or any(block.key not in self._order for block in free):
            raise LocalProtocolError(f"{len(free)} unpinned blocks but {len(self._order)} evictable ones")
