"""Merge reads that are neighbours at both ends, before any medium sees them.

Pure: numpy only. A KV block is contiguous more often than a page table admits, and one long copy is up to twice as fast
per byte as many short ones on every medium.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_store.transport.base import ReadBatch

PIECE_MAX_BYTES = 32 << 20
"""No piece is longer, so that a deadline can be looked at in between (about 3 ms of copying)."""


class Pieces(NamedTuple):
    """Copies that do the work of a batch.

    Shapes: ``remote_offsets``, ``local_addresses``, ``lengths`` are uint64 [m]; ``first`` and ``last`` are int64 [n]:
    request i of the batch is covered by the pieces first[i] to last[i].
    """

    remote_offsets: npt.NDArray[np.uint64]
    local_addresses: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]

    def outcome(self, done: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which requests are complete, bool [n], given which pieces are, bool [m]."""
        if done.all():
            return np.ones(len(self.first), np.bool_)
        missing = np.concatenate(([0], np.cumsum(~done)))
        complete: npt.NDArray[np.bool_] = missing[self.last + 1] == missing[self.first]
        return complete


class Group(NamedTuple):
    """Pieces ``start`` to ``stop`` (exclusive), together ``num_bytes`` long."""

    start: int
    stop: int
    num_bytes: int


def coalesce(batch: ReadBatch, *, piece_max_bytes: int = PIECE_MAX_BYTES) -> Pieces:
    """Merge requests that follow each other both in the region and in local memory; cut what is then too long.

    The order of requests does not matter: they are looked at in order of remote offset. Requests of zero length are not
    allowed (``ReadBatch.check``).
    """
    count = len(batch.lengths)
    remote, local, lengths = batch.remote_offsets, batch.local_addresses, batch.lengths
    if count == 1 and lengths[0] <= piece_max_bytes:
        none = np.zeros(1, np.int64)
        return Pieces(remote, local, lengths, none, none)
    order = None
    if bool((remote[1:] < remote[:-1]).any()):
        order = np.argsort(remote, kind="stable")
        remote, local, lengths = remote[order], local[order], lengths[order]
    follows = (remote[1:] == remote[:-1] + lengths[:-1]) & (local[1:] == local[:-1] + lengths[:-1])
    if follows.any():
        starts = np.flatnonzero(np.concatenate(([True], ~follows)))
        first = np.cumsum(np.concatenate(([0], ~follows)))
        within = np.cumsum(lengths) - lengths
        within -= np.repeat(within[starts], np.diff(np.append(starts, count)))
        merged = np.add.reduceat(lengths, starts)
        remote, local = remote[starts], local[starts]
    else:
        first, within, merged = np.arange(count), np.zeros(count, np.uint64), lengths
    last = first
    if bool((merged > piece_max_bytes).any()):
        remote, local, merged, first, last = _cut(remote, local, merged, first, within, lengths, piece_max_bytes)
    if order is not None:
        back = np.empty(count, np.int64)
        back[order] = np.arange(count)
        first, last = first[back], last[back]
    return Pieces(remote, local, merged, first, last)


def _cut(remote: npt.NDArray[np.uint64], local: npt.NDArray[np.uint64], merged: npt.NDArray[np.uint64],
         first: npt.NDArray[np.int64], within: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64],
         limit: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64],
                              npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    step = np.uint64(limit)
    parts = ((merged + step - np.uint64(1)) // step).astype(np.int64)
    begin = np.cumsum(parts) - parts
    skip = (np.arange(int(parts.sum())) - np.repeat(begin, parts)).astype(np.uint64) * step
    whole = np.repeat(merged, parts)
    cut_first = begin[first] + (within // step).astype(np.int64)
    cut_last = begin[first] + ((within + lengths - np.uint64(1)) // step).astype(np.int64)
    return (np.repeat(remote, parts) + skip, np.repeat(local, parts) + skip, np.minimum(step, whole - skip),
            cut_first, cut_last)


def groups(lengths: npt.NDArray[np.uint64], *, count_max: int, bytes_max: int) -> Iterator[Group]:
    """Divide pieces, in order, into groups of at most ``count_max`` pieces and about ``bytes_max`` bytes.

    A group has at least one piece and ends at the piece that reaches ``bytes_max``.
    """
    ends = np.cumsum(lengths)
    total, start, taken = len(lengths), 0, 0
    while start < total:
        stop = int(np.searchsorted(ends, np.uint64(taken + bytes_max), side="left")) + 1
        stop = min(stop, start + count_max, total)
        reached = int(ends[stop - 1])
        yield Group(start, stop, reached - taken)
        start, taken = stop, reached
