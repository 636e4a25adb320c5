"""Compute the crc32 of scattered memory in a few calls.

zlib.crc32 takes one buffer and lets go of the GIL for it. Called for each of 1,024 small ranges it would queue for the
GIL as often, so small ranges are gathered into a scratch buffer first, by the kernel: one queueing per 512 KiB.
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import numpy.typing as npt

from mooncake_store.transport import libc
from mooncake_store.transport.copying import can_copy_by_kernel, single_range
from mooncake_store.transport.cursor import RangeCursor

SCRATCH_BYTES = 512 << 10
LONG_RANGE_BYTES = 256 << 10
"""Ranges of at least this on average are summed where they are."""


class RangeChecksum:
    """Sums memory ranges of this process. One thread at a time."""

    def __init__(self) -> None:
        self._space = libc.address_space()
        self._scratch: npt.NDArray[np.uint8] | None = None

    def crc32(self, ranges: npt.NDArray[np.uint64]) -> int:
        """Return the crc32 of the concatenation of ranges, uint64 [n, 2] of (address, length), n >= 1.

        Raises:
            OSError: a range is not readable memory.
        """
        is_long = len(ranges) == 1 or int(ranges[:, 1].mean()) >= LONG_RANGE_BYTES
        if is_long or not can_copy_by_kernel():
            crc = 0
            for address, length in ranges.tolist():
                crc = zlib.crc32(self._space[address:address + length], crc)
            return crc
        if self._scratch is None:
            self._scratch = np.empty(SCRATCH_BYTES, np.uint8)
        local = single_range(self._scratch.ctypes.data, SCRATCH_BYTES)
        cursor, crc, pid = RangeCursor(ranges), 0, os.getpid()
        while not cursor.is_done():
            count = libc.read_process(pid, local, cursor.window())
            if count == 0:
                raise OSError("no bytes could be read")
            crc = zlib.crc32(self._scratch[:count].data, crc)
            cursor.advance(count)
        return crc
