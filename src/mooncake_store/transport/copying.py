"""Copy pieces between two ranges of this process's address space, without the GIL."""

from __future__ import annotations

import ctypes
import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import TransferFailed
from mooncake_store.transport.base import ReadBatch, ReadResult
from mooncake_store.transport.coalesce import coalesce, groups

BURST_BYTES = 16 << 20
"""Bytes copied between two looks at the clock (1 to 3 ms)."""


class Progress(NamedTuple):
    """Which pieces are complete, bool [m], and why the first incomplete one is not."""

    done: npt.NDArray[np.bool_]
    error: TransferFailed | None


def past_deadline(medium: str, done: int, total: int) -> TransferFailed:
    """Describe a read that ran out of time."""
    return TransferFailed(f"deadline passed with {done} of {total} pieces read", where=medium,
                          hint="raise pull_timeout_s, or ask for less at a time")


def copy_batch(batch: ReadBatch, source_address: int, *, medium: str, deadline_ns: int) -> ReadResult:
    """Copy every request of a checked batch out of the region mapped at ``source_address``."""
    if time.monotonic_ns() >= deadline_ns:
        return ReadResult.failed(batch, past_deadline(medium, 0, len(batch.lengths)))
    if len(batch.lengths) == 1 and batch.lengths[0] <= BURST_BYTES:
        ctypes.memmove(int(batch.local_addresses[0]), source_address + int(batch.remote_offsets[0]),
                       int(batch.lengths[0]))
        return ReadResult(np.ones(1, np.bool_), int(batch.lengths[0]))
    pieces = coalesce(batch)
    total = len(pieces.lengths)
    sources = (pieces.remote_offsets + np.uint64(source_address)).tolist()
    targets, lengths = pieces.local_addresses.tolist(), pieces.lengths.tolist()
    done = np.zeros(total, np.bool_)
    memmove = ctypes.memmove
    for group in groups(pieces.lengths, count_max=total, bytes_max=BURST_BYTES):
        if group.start and time.monotonic_ns() >= deadline_ns:
            error = past_deadline(medium, group.start, total)
            return ReadResult.of(batch, pieces.outcome(done), error)
        window = slice(group.start, group.stop)
        for target, source, length in zip(targets[window], sources[window], lengths[window], strict=True):
            memmove(target, source, length)
        done[window] = True
    return ReadResult.of(batch, pieces.outcome(done), None)
