"""Copies within the process: both ways are equal, switch when the GIL is scarce, and stop at the deadline."""

import mmap
import threading
import time

import numpy as np
import pytest

from mooncake_store.errors import TransferFailed
from mooncake_store.testing.transport import Target, pattern, soon
from mooncake_store.transport import copying
from mooncake_store.transport.base import ReadBatch

SIZE = 8 << 20
SOURCE = pattern(SIZE, 3)


def scattered(length):
    count = SIZE // length
    rng = np.random.default_rng(4)
    return Target(rng.permutation(count) * length, np.full(count, length), rng.permutation(count), guard_bytes=8)


def copy(target, deadline_ns=None):
    return copying.copy_batch(target.batch, SOURCE.ctypes.data, medium="test", deadline_ns=deadline_ns or soon())


@pytest.mark.parametrize("length", [3000, 16 << 10, 100_000, 1 << 20])
@pytest.mark.parametrize("way", ["kernel", "memmove", "switch"])
def test_every_way_copies_the_same_bytes(monkeypatch, length, way):
    calls = []
    real = copying.read_group
    monkeypatch.setattr(copying, "read_group", lambda *args: calls.append(1) or real(*args))
    if way == "memmove":
        monkeypatch.setattr(copying, "can_copy_by_kernel", lambda: False)
    if way == "kernel":
        monkeypatch.setattr(copying, "SMALL_PIECE_BYTES", 1 << 30)
    if way == "switch":  # every burst is called slow: the rest goes through the kernel
        monkeypatch.setattr(copying, "SLOW_BYTES_PER_S", 1 << 60)
    target = scattered(length)
    result = copy(target)
    assert result.error is None
    assert bool(calls) == (way != "memmove")
    target.check(result, SOURCE)


@pytest.mark.parametrize("length", [4000, 1 << 20])
def test_a_deadline_in_the_middle_reports_what_was_copied(monkeypatch, length):
    monkeypatch.setattr(copying, "CALL_MAX_BYTES", 1 << 20)
    ticks = iter(range(1, 1000))
    monkeypatch.setattr(copying.time, "monotonic_ns", lambda: next(ticks))
    target = scattered(length)
    result = copying.copy_batch(target.batch, SOURCE.ctypes.data, medium="test", deadline_ns=3)
    assert 0 < int(result.ok.sum()) < len(result.ok)
    assert isinstance(result.error, TransferFailed) and "deadline" in result.error.message
    target.check(result, SOURCE)


def test_a_read_only_target_fails_instead_of_killing_the_process():
    area = mmap.mmap(-1, 1 << 16, prot=mmap.PROT_READ)
    address = np.frombuffer(area, np.uint8).ctypes.data
    lengths = np.full(4, 4096, np.uint64)
    starts = np.arange(4, dtype=np.uint64) * np.uint64(8192)
    batch = ReadBatch(starts, starts + np.uint64(address), lengths)
    result = copying.copy_batch(batch, SOURCE.ctypes.data, medium="test", deadline_ns=soon())
    assert not result.ok.any() and "not writable" in result.error.message


def test_a_thread_busy_in_python_does_not_stall_many_small_copies():
    target = scattered(2048)  # 4,096 pieces: queueing 5 ms for the GIL after each would take 20 s
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        started = time.monotonic()
        result = copy(target)
        elapsed = time.monotonic() - started
    finally:
        stop.set()
        thread.join()
    assert result.error is None and elapsed < 5.0
    target.check(result, SOURCE)
