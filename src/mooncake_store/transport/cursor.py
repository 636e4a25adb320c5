"""Step through a list of memory ranges as a socket takes or gives bytes. Pure: numpy only."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

WINDOW_RANGES = 512
"""Ranges offered to one system call: more would be copied into the kernel each time and rarely used."""
_RANGE_BYTES = 16


class RangeCursor:
    """A position in the concatenation of memory ranges.

    Args:
        ranges: uint64 [n, 2] of (address, length), C-contiguous, n >= 1, no length 0. The cursor's own: it cuts the
            range it stands in, so that what is left is always a list that a system call takes.

    Attributes:
        position: bytes passed.
        total: bytes of all ranges.
        stop: how many ranges may be passed; all at first.
    """

    def __init__(self, ranges: npt.NDArray[np.uint64]) -> None:
        self._ranges = ranges
        self._ends: list[int] = np.cumsum(ranges[:, 1]).tolist()
        self._address: int = ranges.ctypes.data
        self._index = 0
        self.position = 0
        self.total = self._ends[-1]
        self.stop = len(ranges)

    def is_done(self) -> bool:
        """Tell whether every range that may be has been passed."""
        return self._index >= self.stop

    def window(self) -> npt.NDArray[np.uint64]:
        """Return the next ranges, the first one cut to what is left of it; uint64 [k, 2], k <= WINDOW_RANGES."""
        return self._ranges[self._index:min(self._index + WINDOW_RANGES, self.stop)]

    def vector(self) -> tuple[int, int]:
        """Return where ``window`` lies in memory, and how many ranges it has."""
        return self._address + _RANGE_BYTES * self._index, min(WINDOW_RANGES, self.stop - self._index)

    def advance(self, num_bytes: int) -> bool:
        """Move on by what the system call said it moved; return whether that was all of the window."""
        offered = min(self._index + WINDOW_RANGES, self.stop)
        self.position += num_bytes
        self._index = index = bisect_right(self._ends, self.position, self._index)
        if index >= offered:
            return True
        row, left = self._ranges[index], self._ends[index] - self.position
        row[0] += row[1] - np.uint64(left)
        row[1] = left
        return False
