"""Copy a block between its pieces in an engine's memory and its image.

A block's *image* is its pieces one after the other, in the order given. Nothing here keeps state; every copy runs
without the GIL. Callers guarantee that the addresses stay mapped for the length of the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


def merge_adjacent(addresses: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (address, length) of the pieces with neighbours in memory joined and empty ones left out."""
    runs: list[tuple[int, int]] = []
    for address, length in zip(addresses, lengths, strict=True):
        if length == 0:
            continue
        if runs and runs[-1][0] + runs[-1][1] == address:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((address, length))
    return runs


def gather(runs: Sequence[tuple[int, int]], target_address: int) -> None:
    """Copy pieces into a contiguous image at ``target_address``."""
    copy = ctypes.memmove
    for address, length in runs:
        copy(target_address, address, length)
        target_address += length


def scatter(source_address: int, runs: Sequence[tuple[int, int]]) -> None:
    """Copy a contiguous image at ``source_address`` out into pieces."""
    copy = ctypes.memmove
    for address, length in runs:
        copy(address, source_address, length)
        source_address += length
