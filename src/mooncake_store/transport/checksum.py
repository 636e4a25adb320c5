"""Compute the checksum of scattered memory at the speed of reading it, with numpy alone.

Definition (docs/adr/0005-checksum.md says why this one). The bytes of all ranges, one after the other, are a stream of
little-endian 64-bit words, the last one padded with zeros. The stream is laid out in rows of ``ROW_WORDS`` words, 511
rows make a segment. Each segment is summed by column, modulo 2**64. The checksum is the kind of this definition (one
byte) followed by 7 bytes of the SHA-256 of the stream's length and all the column sums, 8 bytes together, below 2**63.

How the bytes are cut into ranges does not matter, nor the machine. What is noticed, but for one chance in 2**56: every
change of one word, so every flipped bit; bytes cut off or added; bytes replaced by unrelated ones (a zeroed or stale
page, a torn write); bytes that changed places, unless they moved by a multiple of 3,992 bytes within one segment of
2,039,912, which nothing aligned to a page does. It is no protection against intent.
"""

from __future__ import annotations

import hashlib
import threading
from itertools import groupby

import numpy as np
import numpy.typing as npt

from mooncake_store.transport import libc
from mooncake_store.transport.copying import memmove_held

KIND = 1
"""Number of this definition. Values of different kinds say nothing of each other: see ``is_comparable``."""
CHECKSUM_BYTES = 8

ROW_WORDS = 499
"""A prime, so that no distance between aligned places is a whole number of rows."""
SEGMENT_ROWS = 511
"""As many as keep a distance of 512 rows, which is aligned to a page, out of a segment."""
SEGMENT_WORDS = ROW_WORDS * SEGMENT_ROWS
SCRATCH_BYTES = 256 * 8 * ROW_WORDS
"""Whole rows, so that they are summed by one call."""
LONG_RANGE_BYTES = 128 << 10
"""Ranges of at least this are summed where they are. Shorter ones are gathered first, which keeps the GIL some 200 us:
numpy lets go of it for each sum, and getting it back may take 5 ms."""

_WORD_BYTES = 8
_SPACE = libc.address_space()
_local = threading.local()


def checksum_of(ranges: npt.NDArray[np.uint64]) -> int:
    """Return the checksum of the concatenation of ranges, uint64 [n, 2] of (address, length), n >= 1.

    The ranges must be readable memory: nothing checks that. Threads: any, each with its own scratch buffer.
    """
    if len(ranges) == 1:
        ((address, length),) = ranges.tolist()
        if not (address | length) % _WORD_BYTES:
            sums = _ColumnSums(length)
            sums.add(np.frombuffer(_SPACE[address:address + length], "<u8"))
            return sums.checksum()
    lengths = ranges[:, 1]
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    sums = _ColumnSums(total)
    is_word = ((ranges[:, 0] | lengths | (ends - lengths)) & np.uint64(_WORD_BYTES - 1)) == 0
    is_direct = is_word & (lengths >= LONG_RANGE_BYTES)
    if not is_direct.any():
        _add_gathered(sums, ranges)
        return sums.checksum()
    rows = zip(is_direct.tolist(), ranges, strict=True)
    for is_long, group in groupby(rows, key=lambda row: row[0]):
        members = np.array([row for _, row in group])
        if is_long:
            for address, length in members.tolist():
                sums.add(np.frombuffer(_SPACE[address:address + length], "<u8"))
        else:
            _add_gathered(sums, members)
    return sums.checksum()


def is_comparable(checksum: int) -> bool:
    """Tell whether a checksum that came from elsewhere is of the kind computed here."""
    return checksum >> 56 == KIND


class _ColumnSums:
    """Sums a stream of ``total_bytes`` as its words come in, in order."""

    def __init__(self, total_bytes: int) -> None:
        num_words = -(-total_bytes // _WORD_BYTES)
        self._total_bytes = total_bytes
        self._width = min(ROW_WORDS, num_words)
        self._sums = np.zeros((-(-num_words // SEGMENT_WORDS), ROW_WORDS), "<u8")
        self._num_added = 0

    def add(self, words: npt.NDArray[np.uint64]) -> None:
        """Add the next words: whole segments and whole rows in one call each."""
        while len(words):
            row, column = divmod(self._num_added, ROW_WORDS)
            segment, row = divmod(row, SEGMENT_ROWS)
            num_rows = 1 if column else len(words) // ROW_WORDS
            if num_rows <= 1:
                taken = min(ROW_WORDS - column, len(words))
                self._sums[segment, column:column + taken] += words[:taken]
            elif row == 0 and num_rows >= SEGMENT_ROWS:
                count = num_rows // SEGMENT_ROWS
                taken = count * SEGMENT_WORDS
                np.add.reduce(words[:taken].reshape(count, SEGMENT_ROWS, ROW_WORDS), axis=1,
                              out=self._sums[segment:segment + count])
            else:
                num_rows = min(num_rows, SEGMENT_ROWS - row)
                taken = num_rows * ROW_WORDS
                self._sums[segment] += np.add.reduce(words[:taken].reshape(num_rows, ROW_WORDS), axis=0)
            self._num_added += taken
            words = words[taken:]

    def checksum(self) -> int:
        """Return the checksum, once everything was added."""
        digest = hashlib.sha256(self._total_bytes.to_bytes(8, "little"), usedforsecurity=False)
        digest.update(self._sums[:, :self._width].data if self._width < ROW_WORDS else self._sums.data)
        return KIND << 56 | int.from_bytes(digest.digest()[:7], "little")


def _add_gathered(sums: _ColumnSums, ranges: npt.NDArray[np.uint64]) -> None:
    """Copy ranges into the scratch buffer, a buffer full at a time, and add them from there."""
    scratch: npt.NDArray[np.uint8] | None = getattr(_local, "scratch", None)
    if scratch is None:
        scratch = _local.scratch = np.empty(SCRATCH_BYTES, np.uint8)
    start, filled = scratch.ctypes.data, 0
    for address, length in ranges.tolist():
        while length >= SCRATCH_BYTES - filled:
            count = SCRATCH_BYTES - filled
            memmove_held(start + filled, address, count)
            sums.add(scratch.view("<u8"))
            address, length, filled = address + count, length - count, 0
        memmove_held(start + filled, address, length)
        filled += length
    if filled:
        end = -(-filled // _WORD_BYTES) * _WORD_BYTES
        scratch[filled:end] = 0
        sums.add(scratch[:end].view("<u8"))
