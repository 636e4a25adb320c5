"""Compute the checksum of scattered memory faster than it can be copied, with numpy alone.

Definition (docs/adr/0005-checksum.md says why this one). The bytes of all ranges, one after the other, are a stream of
little-endian 64-bit words, the last one padded with zeros. Each stretch of ``STRETCH_WORDS`` words is summed modulo
2**64. The checksum is the kind of this definition (one byte) followed by 7 bytes of the SHA-256 of the stream's length
and all the sums, 8 bytes together, below 2**63.

How the bytes are cut into ranges does not matter, nor the machine. What is noticed, but for one chance in 2**56: every
change of one word, so every flipped bit; bytes cut off or added; bytes replaced by unrelated ones (a zeroed or stale
page, a torn write); bytes that changed places, unless whole words did within one stretch of 1 KiB. It is no protection
against intent.
"""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import numpy.typing as npt

from mooncake_store.transport import libc
from mooncake_store.transport.copying import memmove_held

KIND = 2
"""Number of this definition. Values of different kinds say nothing of each other: see ``is_comparable``."""

STRETCH_WORDS = 128
SCRATCH_BYTES = 256 << 10
"""Whole stretches, and little enough to stay in a core's cache."""
LONG_RANGE_BYTES = 128 << 10
"""Ranges of at least this are summed where they are. Shorter ones are gathered first, which keeps the GIL some 50 us:
numpy lets go of it for each sum, and getting it back may take 5 ms."""

STEP_BYTES = 4 << 20
"""Bytes summed by one call."""

_WORD_BYTES = 8
_STRETCH_BYTES = STRETCH_WORDS * _WORD_BYTES
_STARTS = np.arange(0, STEP_BYTES // _WORD_BYTES, STRETCH_WORDS)
_SPACE = libc.address_space()


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.bytes = np.empty(SCRATCH_BYTES, np.uint8)
        self.address = self.bytes.ctypes.data


_scratch = _Scratch()


def checksum_of(ranges: npt.NDArray[np.uint64]) -> int:
    """Return the checksum of the concatenation of ranges, uint64 [n, 2] of (address, length), n >= 1.

    The ranges must be readable memory: nothing checks that. Threads: any, each with its own scratch buffer.
    """
    rows = ranges.tolist()
    total = sum(length for _, length in rows)
    parts = [total.to_bytes(8, "little")]
    start, filled = _scratch.address, 0
    for address, length in rows:
        if length >= LONG_RANGE_BYTES and not address % _WORD_BYTES:
            if filled:
                head = -filled % _STRETCH_BYTES
                memmove_held(start + filled, address, head)
                parts.append(_sums(start, filled + head))
                address, length, filled = address + head, length - head, 0
            while length >= _STRETCH_BYTES:
                taken = min(length - length % _STRETCH_BYTES, STEP_BYTES)
                parts.append(_sums(address, taken))
                address, length = address + taken, length - taken
        while length >= SCRATCH_BYTES - filled:
            taken = SCRATCH_BYTES - filled
            memmove_held(start + filled, address, taken)
            parts.append(_sums(start, SCRATCH_BYTES))
            address, length, filled = address + taken, length - taken, 0
        memmove_held(start + filled, address, length)
        filled += length
    if filled:
        padding = -filled % _WORD_BYTES
        _scratch.bytes[filled:filled + padding] = 0
        parts.append(_sums(start, filled + padding))
    return _digest(parts)


def checksum_of_bytes(image: bytes) -> int:
    """Return the checksum of at most ``STEP_BYTES`` bytes, at least one."""
    padding = -len(image) % _WORD_BYTES
    words = np.frombuffer(image + bytes(padding) if padding else image, "<u8")
    return _digest([len(image).to_bytes(8, "little"), _stretches(words)])


def is_comparable(checksum: int) -> bool:
    """Tell whether a checksum that came from elsewhere is of the kind computed here."""
    return checksum >> 56 == KIND


def _sums(address: int, length: int) -> bytes:
    """Sum memory stretch by stretch; return all the sums."""
    return _stretches(np.frombuffer(_SPACE[address:address + length], "<u8"))


def _stretches(words: npt.NDArray[np.uint64]) -> bytes:
    return np.add.reduceat(words, _STARTS[:-(-len(words) // STRETCH_WORDS)]).tobytes()


def _digest(parts: list[bytes]) -> int:
    return KIND << 56 | int.from_bytes(hashlib.sha256(b"".join(parts)).digest()[:7], "little")
