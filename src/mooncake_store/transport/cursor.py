"""Step through a list of memory ranges as a socket takes or gives bytes. Pure: numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW_RANGES = 512
"""Ranges offered to one system call: more would be copied into the kernel each time and rarely used."""


class RangeCursor:
    """A position in the concatenation of memory ranges.

    Args:
        ranges: uint64 [n, 2] of (address, length), n >= 1; kept, not changed.
    """

    def __init__(self, ranges: npt.NDArray[np.uint64]) -> None:
        self._ranges = ranges
        self._ends = np.cumsum(ranges[:, 1])
        self.position = 0
        self.total = int(self._ends[-1])

    def is_done(self) -> bool:
        """Tell whether every byte has been passed."""
        return self.position >= self.total

    def window(self) -> npt.NDArray[Any]:
        """Return the next ranges, the first one cut to what is left of it; uint64 [k, 2], 1 <= k <= WINDOW_RANGES."""
        if self.position == 0:
            return self._ranges[:WINDOW_RANGES]
        index = int(np.searchsorted(self._ends, np.uint64(self.position), side="right"))
        view = self._ranges[index:index + WINDOW_RANGES].copy()
        left = np.uint64(int(self._ends[index]) - self.position)
        view[0, 0] += view[0, 1] - left
        view[0, 1] = left
        return view

    def advance(self, num_bytes: int) -> None:
        """Move on by what the system call said it moved."""
        self.position += num_bytes
