"""Copy pieces from another address space, or within ours, without the GIL, with a second thread for large batches.

Two ways to copy within the process, chosen by measurement. 64 MiB between random places, time over one memcpy of 64 MiB
on an idle machine of two cores (one memcpy of that size writes around the caches there, which no shorter one does; that
alone costs the pieces half a memcpy):

=======  ===========================  ============================================
pieces   memmove each, 1 / 2 threads  process_vm_readv on ourselves, 1 / 2 threads
=======  ===========================  ============================================
1 MiB    1.9 / 1.5                    3.1 / 2.4
64 KiB   2.1 / 1.8                    3.1 / 2.1
16 KiB   2.7 / 2.5                    3.0 / 1.9
=======  ===========================  ============================================

A memmove without the GIL asks for it back after every piece, and a thread busy in Python keeps it for up to 5 ms each
time. One system call copies up to 1,024 pieces for one such wait, and is the faster one for small pieces anyway.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import MooncakeError, TransferFailed
from mooncake_store.transport import libc
from mooncake_store.transport.base import ReadBatch, ReadResult
from mooncake_store.transport.coalesce import Group, Pieces, coalesce, groups

logger = logging.getLogger(__name__)

GROUP_BYTES = 4 << 20
"""Bytes copied between two looks at the clock, by one system call where the kernel copies."""
SHARED_MIN_BYTES = 6 << 20
"""Batches of at least this are copied by two threads, where there are two cores."""
SMALL_PIECE_BYTES = 32 << 10
"""Pieces shorter than this on average are copied by the kernel."""
SLOW_BYTES_PER_S = 1 << 30
"""Memmoves slower than this lost the GIL to someone: the kernel copies the rest."""
HELD_MAX_BYTES = 64 << 10
"""A lone copy up to this (10 us) keeps the GIL, rather than queue for it."""

memmove_held = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0)
"""Does as ctypes.memmove, without releasing the GIL."""


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
            memmove_held(int(batch.local_addresses[0]), source_address + int(batch.remote_offsets[0]), length)
            return ReadResult(np.ones(1, np.bool_), length)
    pieces = coalesce(batch)
    done = np.zeros(len(pieces.lengths), np.bool_)
    error = _Copy(pieces, source_address, done, medium).run(deadline_ns)
    return ReadResult.of(batch, pieces.outcome(done), error)


def copy_from_process(pid: int, pieces: Pieces, source_address: int, done: npt.NDArray[np.bool_], *, medium: str,
                      deadline_ns: int) -> MooncakeError | OSError | None:
    """Copy pieces out of process ``pid``, note in ``done`` what arrived, and return the first failure.

    A range that faults fails alone, and the others go on; any other OSError ends the copy.
    """
    local, remote = range_pair(pieces, source_address)
    faults: list[OSError] = []

    def work(group: Group) -> None:
        if read_group(pid, group, local, remote, done):
            faults.append(OSError(errno.EFAULT, os.strerror(errno.EFAULT)))

    error = in_turns(pieces, work, medium=medium, deadline_ns=deadline_ns)
    return faults[0] if faults else error


def in_turns(pieces: Pieces, work: Callable[[Group], None], *, medium: str,
             deadline_ns: int) -> MooncakeError | OSError | None:
    """Do the work group by group, with a second thread taking turns if there is much of it.

    Returns the first failure: past the deadline, or what ``work`` raised; nothing is at work any more then. A second
    thread that gets no processor in time does nothing: whoever is free takes the next group.
    """
    todo = deque(groups(pieces.lengths, count_max=libc.IOV_MAX, bytes_max=GROUP_BYTES))
    errors: list[MooncakeError | OSError] = []
    helping = threading.Lock()

    def take_one() -> bool:
        try:
            group = todo.popleft()
        except IndexError:
            return False
        try:
            if time.monotonic_ns() >= deadline_ns:
                raise past_deadline(medium, group.start, len(pieces.lengths))
            work(group)
        except (MooncakeError, OSError) as error:
            errors.append(error)
            todo.clear()
        return not errors

    def help_out() -> None:
        is_on = True
        while is_on:
            with helping:
                is_on = take_one()

    if len(todo) > 1 and num_cores() > 1 and int(pieces.lengths.sum()) >= SHARED_MIN_BYTES:
        try:
            # not threading.Thread: its start waits for the thread to run, which takes the GIL from whoever has it
            _thread.start_new_thread(help_out, ())
        except RuntimeError as error:
            logger.debug("copying with one thread: %s", error)
    try:
        while take_one():
            pass
    finally:
        todo.clear()
        with helping:  # until its last group is copied
            pass
    return errors[0] if errors else None


@functools.lru_cache(maxsize=1)
def num_cores() -> int:
    """Return how many processors we may run on."""
    return len(os.sched_getaffinity(0))


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


class _Copy:
    """Copies pieces within the process, by memmove while that is fast, else by the kernel."""

    def __init__(self, pieces: Pieces, source_address: int, done: npt.NDArray[np.bool_], medium: str) -> None:
        self._pieces = pieces
        self._done = done
        self._medium = medium
        self._local, self._remote = range_pair(pieces, source_address)
        self._may_switch = can_copy_by_kernel()
        self._is_by_kernel = self._may_switch and int(pieces.lengths.mean()) < SMALL_PIECE_BYTES

    def run(self, deadline_ns: int) -> MooncakeError | None:
        """Copy everything and return the first failure."""
        error = in_turns(self._pieces, self._work, medium=self._medium, deadline_ns=deadline_ns)
        if isinstance(error, OSError):
            return TransferFailed(f"cannot copy within the process: {error}", where=self._medium)
        return error

    def _work(self, group: Group) -> None:
        if not self._is_by_kernel:
            self._move(group)
        elif read_group(os.getpid(), group, self._local, self._remote, self._done):
            raise TransferFailed("a target is not writable memory of this process", where=self._medium)

    def _move(self, group: Group) -> None:
        window = slice(group.start, group.stop)
        memmove, before_ns = ctypes.memmove, time.monotonic_ns()
        for (target, length), (source, _) in zip(self._local[window].tolist(), self._remote[window].tolist(),
                                                 strict=True):
            memmove(target, source, length)
        self._done[window] = True
        is_slow = group.num_bytes * 1e9 < SLOW_BYTES_PER_S * (time.monotonic_ns() - before_ns)
        if is_slow and self._may_switch and group.num_bytes >= GROUP_BYTES:
            self._is_by_kernel = True
