"""Copy pieces between two ranges of this process's address space, without the GIL.

Two ways, chosen by measurement (64 MiB, time over one memcpy of 64 MiB):

==============================  ==============  ================================
pieces                          memmove each    process_vm_readv on ourselves
==============================  ==============  ================================
1 MiB                           1.7             2.2
16 KiB                          2.8             2.4
16 KiB, a thread busy in Python 60 to 600       6
==============================  ==============  ================================

A memmove without the GIL asks for it back after every piece, and a thread busy in Python keeps it for up to 5 ms each
time. One system call copies up to 1,024 pieces for one such wait, and is the faster one for small pieces anyway.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import TransferFailed
from mooncake_store.transport import libc
from mooncake_store.transport.base import ReadBatch, ReadResult
from mooncake_store.transport.coalesce import Group, Pieces, coalesce, groups

CALL_MAX_BYTES = 32 << 20
"""Bytes of one system call, so that the deadline is looked at every 10 to 20 ms."""
BURST_BYTES = 4 << 20
"""Bytes of memmoves between two looks at the clock."""
SMALL_PIECE_BYTES = 32 << 10
"""Pieces shorter than this on average are copied by the kernel."""
SLOW_BYTES_PER_S = 1 << 30
"""A burst slower than this lost the GIL to someone: the kernel copies the rest."""
HELD_MAX_BYTES = 64 << 10
"""A lone copy up to this (10 us) keeps the GIL, rather than queue for it."""

# ctypes.memmove without releasing the GIL
_memmove_held = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)


def past_deadline(medium: str, done: int, total: int) -> TransferFailed:
    """Describe a read that ran out of time."""
    return TransferFailed(f"deadline passed with {done} of {total} pieces read", where=medium,
                          hint="raise pull_timeout_s, or ask for less at a time")


def copy_batch(batch: ReadBatch, source_address: int, *, medium: str, deadline_ns: int) -> ReadResult:
    """Copy every request of a checked batch out of the region mapped at ``source_address``."""
    if time.monotonic_ns() >= deadline_ns:
        return ReadResult.failed(batch, past_deadline(medium, 0, len(batch.lengths)))
    if len(batch.lengths) == 1:
        length = int(batch.lengths[0])
        if length <= HELD_MAX_BYTES:
            _memmove_held(int(batch.local_addresses[0]), source_address + int(batch.remote_offsets[0]), length)
            return ReadResult(np.ones(1, np.bool_), length)
    pieces = coalesce(batch)
    total = len(pieces.lengths)
    done = np.zeros(total, np.bool_)
    start = 0
    if not can_copy_by_kernel() or int(pieces.lengths.mean()) >= SMALL_PIECE_BYTES:
        start = _copy_by_memmove(pieces, source_address, done, deadline_ns)
    error: TransferFailed | None = None
    if start < total:
        rest = pieces._replace(remote_offsets=pieces.remote_offsets[start:], lengths=pieces.lengths[start:],
                               local_addresses=pieces.local_addresses[start:])
        error = _copy_by_kernel(rest, source_address, done[start:], medium, deadline_ns)
    return ReadResult.of(batch, pieces.outcome(done), error)


@functools.lru_cache(maxsize=1)
def can_copy_by_kernel() -> bool:
    """Tell whether process_vm_readv works on ourselves; a container's seccomp filter may forbid it."""
    source, target = ctypes.c_uint64(0x6D6F6F6E), ctypes.c_uint64(0)
    try:
        libc.read_process(os.getpid(), single_range(ctypes.addressof(target), 8),
                          single_range(ctypes.addressof(source), 8))
    except OSError:
        return False
    return target.value == source.value


def single_range(address: int, length: int) -> npt.NDArray[np.uint64]:
    """Return a list of one memory range, uint64 [1, 2]."""
    return np.array([[address, length]], np.uint64)


def range_pair(pieces: Pieces, source_address: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the targets and the sources of pieces as memory ranges, uint64 [m, 2] each."""
    total = len(pieces.lengths)
    local, remote = np.empty((total, 2), np.uint64), np.empty((total, 2), np.uint64)
    local[:, 0], local[:, 1] = pieces.local_addresses, pieces.lengths
    remote[:, 0], remote[:, 1] = pieces.remote_offsets + np.uint64(source_address), pieces.lengths
    return local, remote


def read_group(pid: int, group: Group, local: npt.NDArray[Any], remote: npt.NDArray[Any],
               done: npt.NDArray[np.bool_]) -> bool:
    """Copy one group from process ``pid``, leaving out ranges that fault; return whether any did.

    Raises:
        OSError: anything but a fault of some range.
    """
    faulted = False
    start = group.start
    while start < group.stop:
        window = slice(start, group.stop)
        try:
            copied = libc.read_process(pid, local[window], remote[window])
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            copied = 0
        if start == group.start and copied == group.num_bytes:
            done[window] = True
            return False
        # It stopped early: the ranges before the stop are complete. The one it stopped in goes first next time, and
        # is left out when it is the one at the front.
        num_done = int(np.searchsorted(np.cumsum(local[window, 1]), np.uint64(copied), side="right"))
        done[start:start + num_done] = True
        if num_done == 0:
            faulted = True
        start += max(num_done, 1)
    return faulted


def _copy_by_memmove(pieces: Pieces, source_address: int, done: npt.NDArray[np.bool_], deadline_ns: int) -> int:
    """Copy piece by piece; return how many were copied before the deadline, or before the GIL became scarce."""
    sources = (pieces.remote_offsets + np.uint64(source_address)).tolist()
    targets, lengths = pieces.local_addresses.tolist(), pieces.lengths.tolist()
    memmove, may_switch = ctypes.memmove, can_copy_by_kernel()
    before_ns = time.monotonic_ns()
    for group in groups(pieces.lengths, count_max=len(lengths), bytes_max=BURST_BYTES):
        window = slice(group.start, group.stop)
        for target, source, length in zip(targets[window], sources[window], lengths[window], strict=True):
            memmove(target, source, length)
        done[window] = True
        now_ns = time.monotonic_ns()
        is_slow = group.num_bytes * 1e9 < SLOW_BYTES_PER_S * (now_ns - before_ns)
        if now_ns >= deadline_ns or (is_slow and may_switch and group.num_bytes >= BURST_BYTES):
            return group.stop
        before_ns = now_ns
    return len(lengths)


def _copy_by_kernel(pieces: Pieces, source_address: int, done: npt.NDArray[np.bool_], medium: str,
                    deadline_ns: int) -> TransferFailed | None:
    local, remote = range_pair(pieces, source_address)
    total = len(pieces.lengths)
    pid = os.getpid()
    for group in groups(pieces.lengths, count_max=libc.IOV_MAX, bytes_max=CALL_MAX_BYTES):
        if time.monotonic_ns() >= deadline_ns:
            return past_deadline(medium, group.start, total)
        try:
            faulted = read_group(pid, group, local, remote, done)
        except OSError as error:
            return TransferFailed(f"cannot copy within the process: {error}", where=medium)
        if faulted:
            return TransferFailed("a target is not writable memory of this process", where=medium)
    return None
