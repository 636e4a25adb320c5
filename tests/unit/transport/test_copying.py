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
from mooncake_store.transport.coalesce import Pieces

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
    if way == "switch":  # every group is called slow: the rest goes through the kernel
        monkeypatch.setattr(copying, "SLOW_BYTES_PER_S", 1 << 60)
        monkeypatch.setattr(copying, "GROUP_BYTES", 1 << 20)
    target = scattered(length)
    result = copy(target)
    assert result.error is None
    assert bool(calls) == (way != "memmove")
    target.check(result, SOURCE)


@pytest.mark.parametrize("length", [4000, 1 << 20])
def test_a_deadline_in_the_middle_reports_what_was_copied(monkeypatch, length):
    monkeypatch.setattr(copying, "GROUP_BYTES", 1 << 20)
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


def pieces_of(num_groups):
    """Return pieces that make that many groups, enough for two threads."""
    lengths = np.full(num_groups, copying.GROUP_BYTES, np.uint64)
    nothing = np.arange(num_groups)
    return Pieces(lengths * nothing.astype(np.uint64), lengths, lengths, nothing, nothing)


def run_in_turns(work, num_groups, deadline_ns=None):
    return copying.in_turns(pieces_of(num_groups), work, medium="test", deadline_ns=deadline_ns or soon())


def test_two_threads_take_every_group_once_and_neither_waits_for_the_other_to_start(monkeypatch):
    monkeypatch.setattr(copying, "num_cores", lambda: 2)
    both, taken = threading.Barrier(2, timeout=10), []

    def work(group):
        if not taken or threading.get_ident() not in {thread for thread, _ in taken}:
            taken.append((threading.get_ident(), group.start))
            both.wait()  # only passes when two threads are at work
        else:
            taken.append((threading.get_ident(), group.start))

    assert run_in_turns(work, 20) is None
    assert sorted(start for _, start in taken) == list(range(20)) and len({thread for thread, _ in taken}) == 2


def test_the_caller_returns_only_when_the_second_thread_has_finished_its_group(monkeypatch):
    monkeypatch.setattr(copying, "num_cores", lambda: 2)
    caller, helper_began, finished = threading.get_ident(), threading.Event(), []

    def work(group):
        if threading.get_ident() == caller:
            assert helper_began.wait(10)
            raise TransferFailed("the caller's own group fails")
        helper_began.set()
        time.sleep(0.2)
        finished.append(group)

    error = run_in_turns(work, 20)
    assert error.message == "the caller's own group fails" and len(finished) == 1


def test_a_failure_of_the_second_thread_ends_the_copy_and_is_reported(monkeypatch):
    monkeypatch.setattr(copying, "num_cores", lambda: 2)
    caller, failed, done = threading.get_ident(), threading.Event(), []

    def work(group):
        if threading.get_ident() != caller:
            failed.set()
            raise OSError("no such page")
        assert failed.wait(10)
        time.sleep(0.05)
        done.append(group)

    assert str(run_in_turns(work, 1000)) == "no such page" and len(done) <= 2


@pytest.mark.parametrize("reason", ["one core", "no thread", "little to do"])
def test_one_thread_does_it_alone(monkeypatch, reason):
    def refuse(*args):
        assert reason == "no thread", "a second thread was started"
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copying._thread, "start_new_thread", refuse)
    monkeypatch.setattr(copying, "num_cores", lambda: 1 if reason == "one core" else 2)
    taken = []
    assert run_in_turns(taken.append, 1 if reason == "little to do" else 9) is None
    assert len(taken) == (1 if reason == "little to do" else 9)


def test_a_second_thread_changes_nothing_but_the_time(monkeypatch):
    monkeypatch.setattr(copying, "num_cores", lambda: 2)
    monkeypatch.setattr(copying, "GROUP_BYTES", 256 << 10)
    for length in (4000, 64 << 10, 1 << 20):
        target = scattered(length)
        result = copy(target)
        assert result.error is None
        target.check(result, SOURCE)
