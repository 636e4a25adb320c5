"""Hand out aligned extents of one range, and take them back.

Pure and not thread-safe. Best fit over bins of equal free length: KV blocks come in very few sizes, so a freed extent
is normally reused as it is; neighbours coalesce on every free, so the range never stays split when it is empty.
Cost: O(log s) for s distinct free lengths.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from mooncake_store.errors import LocalProtocolError
from mooncake_store.types import Extent

ALIGNMENT_BYTES = 4096


class ExtentAllocator:
    """Allocates extents of ``[0, size_bytes)``.

    Args:
        size_bytes: length of the range; rounded down to the alignment.
        alignment_bytes: every extent starts on a multiple and occupies whole multiples.
    """

    def __init__(self, size_bytes: int, *, alignment_bytes: int = ALIGNMENT_BYTES) -> None:
        if size_bytes < 0 or alignment_bytes < 1:
            raise LocalProtocolError(f"cannot manage {size_bytes} bytes in units of {alignment_bytes}")
        self.alignment_bytes = alignment_bytes
        self.size_bytes = size_bytes - size_bytes % alignment_bytes
        self.used_bytes = 0
        self._taken: dict[int, int] = {}  # offset -> occupied length
        self._free_by_start: dict[int, int] = {}  # offset -> length
        self._free_by_end: dict[int, int] = {}  # end -> offset
        self._bins: dict[int, dict[int, None]] = {}  # length -> offsets, in the order they were freed
        self._lengths: list[int] = []  # sorted keys of _bins
        if self.size_bytes:
            self._add_free(0, self.size_bytes)

    @property
    def num_extents(self) -> int:
        """Count the extents handed out and not yet freed."""
        return len(self._taken)

    @property
    def largest_free_bytes(self) -> int:
        """Return the longest extent that could be allocated now."""
        return self._lengths[-1] if self._lengths else 0

    def occupied_bytes(self, length: int) -> int:
        """Return how much of the range an extent of ``length`` bytes takes."""
        return -(-length // self.alignment_bytes) * self.alignment_bytes

    def allocate(self, length: int) -> Extent | None:
        """Return an extent of ``length`` bytes, None when no free run is long enough.

        Raises:
            LocalProtocolError: if ``length`` is not positive.
        """
        if length <= 0:
            raise LocalProtocolError(f"cannot allocate {length} bytes")
        needed = self.occupied_bytes(length)
        position = bisect_left(self._lengths, needed)
        if position == len(self._lengths):
            return None
        found = self._lengths[position]
        offset = next(iter(self._bins[found]))
        self._remove_free(offset, found)
        if found > needed:
            self._add_free(offset + needed, found - needed)
        self._taken[offset] = needed
        self.used_bytes += needed
        return Extent(offset, length)

    def free(self, extent: Extent) -> None:
        """Take an extent back and join it with free neighbours.

        Raises:
            LocalProtocolError: if it is not one that is handed out now.
        """
        occupied = self._taken.get(extent.offset)
        if occupied is None or occupied != self.occupied_bytes(extent.length):
            raise LocalProtocolError(f"freed {extent}, which is not handed out")
        del self._taken[extent.offset]
        self.used_bytes -= occupied
        start, length = extent.offset, occupied
        before = self._free_by_end.get(start)
        if before is not None:
            before_length = self._free_by_start[before]
            self._remove_free(before, before_length)
            start, length = before, length + before_length
        after_length = self._free_by_start.get(start + length)
        if after_length is not None:
            self._remove_free(start + length, after_length)
            length += after_length
        self._add_free(start, length)

    def free_extents(self) -> list[Extent]:
        """Return the free runs by offset; for tests and inspection."""
        return [Extent(offset, length) for offset, length in sorted(self._free_by_start.items())]

    def _add_free(self, offset: int, length: int) -> None:
        self._free_by_start[offset] = length
        self._free_by_end[offset + length] = offset
        offsets = self._bins.get(length)
        if offsets is None:
            offsets = self._bins[length] = {}
            insort(self._lengths, length)
        offsets[offset] = None

    def _remove_free(self, offset: int, length: int) -> None:
        del self._free_by_start[offset]
        del self._free_by_end[offset + length]
        offsets = self._bins[length]
        del offsets[offset]
        if not offsets:
            del self._bins[length]
            del self._lengths[bisect_left(self._lengths, length)]
