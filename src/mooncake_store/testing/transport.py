"""Check that a transport keeps the contract of ``mooncake_store.transport.base``; needs pytest.

Subclass in a test module, name it ``Test...`` and say how to make the transport::

    class TestTcp(TransportTests):
        make = staticmethod(TcpTransport)

Most tests use two transports in one process; those about crashes start the owner as a process of its own (spawned, so
``make`` must be picklable: a class or a ``functools.partial``).
"""

# ruff: noqa: D102 - the name of a test says what it checks
from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from mooncake_store.errors import LocalProtocolError, MooncakeError, PeerUnreachable
from mooncake_store.transport.base import (
    Attachment,
    LocalMemory,
    ReadBatch,
    ReadResult,
    RegionDescriptor,
    Transport,
)
from mooncake_store.transport.faults import FaultPlan, FaultyTransport
from mooncake_store.transport.memory import SharedMemory, host_identity, map_memfd

REGION_BYTES = 8 << 20
REGION_ID = 0x1D5EED
PATIENCE_S = 20.0


def soon(seconds: float = PATIENCE_S) -> int:
    """Return a deadline that many seconds from now."""
    return time.monotonic_ns() + int(seconds * 1e9)


def pattern(size_bytes: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return bytes that both ends can make."""
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


class Owned:
    """Memory that is served in this process, and its descriptor."""

    def __init__(self, transport: Transport, backing: str, size_bytes: int = REGION_BYTES, seed: int = 1) -> None:
        self.shared: SharedMemory | None = None
        if backing == "memfd":
            self.shared = map_memfd(size_bytes, "kit")
            self.bytes = self.shared.array()
            self.bytes[:] = pattern(size_bytes, seed)
            memory = self.shared.memory()
        else:
            self.bytes = pattern(size_bytes, seed)
            memory = LocalMemory(self.bytes.ctypes.data, size_bytes, owner=self.bytes,
                                 kind="cuda" if backing == "cuda" else "host")
        offer = transport.serve(REGION_ID + seed, memory)
        assert offer is not None, f"{transport.medium} does not serve {backing} memory"
        self.descriptor = RegionDescriptor(REGION_ID + seed, size_bytes, host_identity(), (offer,))

    def close(self) -> None:
        """Let go of the memory."""
        if self.shared is not None:
            self.shared.close()


class OwnerProcess:
    """A process that serves one region and does what it is told."""

    def __init__(self, make: Callable[[], Transport], backing: str, size_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, child = context.Pipe()
        self.process = context.Process(target=_own, args=(child, make, backing, size_bytes), daemon=True)
        self.process.start()
        child.close()
        self.descriptor = msgspec.msgpack.decode(self._receive(), type=RegionDescriptor)

    def tell(self, command: str) -> None:
        """Have a command carried out: ``withdraw`` or ``close``."""
        self._link.send_bytes(command.encode())
        assert self._receive() == b"done"

    def signal(self, number: int) -> None:
        """Send a signal to the owner."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.join(PATIENCE_S)
        self._link.close()

    def _receive(self) -> bytes:
        assert self._link.poll(60.0), "the owner process does not answer"
        return self._link.recv_bytes()


def _own(link: Connection, make: Callable[[], Transport], backing: str, size_bytes: int) -> None:
    transport = make()
    owned = Owned(transport, backing, size_bytes)
    link.send_bytes(msgspec.msgpack.encode(owned.descriptor))
    while True:
        command = link.recv_bytes()
        if command == b"withdraw":
            transport.withdraw(owned.descriptor.region_id)
        link.send_bytes(b"done")


class Target:
    """Local memory for a batch, with guard bytes between the targets."""

    GUARD_BYTES = 32
    GUARD = 0xA5

    def __init__(self, offsets: npt.NDArray[Any], lengths: npt.NDArray[Any], order: npt.NDArray[Any] | None = None,
                 guard_bytes: int = GUARD_BYTES) -> None:
        count = len(lengths)
        order = np.arange(count) if order is None else order
        strides = lengths[order].astype(np.int64) + guard_bytes
        starts = np.empty(count, np.int64)
        starts[order] = np.cumsum(strides) - strides
        self.memory = np.full(int(strides.sum()), self.GUARD, np.uint8)
        self.starts = starts
        self.batch = ReadBatch(offsets.astype(np.uint64), starts.astype(np.uint64) + np.uint64(self.memory.ctypes.data),
                               lengths.astype(np.uint64))

    def check(self, result: ReadResult, source: npt.NDArray[np.uint8]) -> None:
        """Fail unless every request is reported once, the complete ones are right, and nothing else was written."""
        count = len(self.batch.lengths)
        assert result.ok.shape == (count,) and result.ok.dtype == np.bool_
        assert result.num_bytes == int(self.batch.lengths[result.ok].sum())
        assert (result.error is None) == bool(result.ok.all())
        for index in range(count):
            start, length = int(self.starts[index]), int(self.batch.lengths[index])
            if result.ok[index]:
                offset = int(self.batch.remote_offsets[index])
                assert np.array_equal(self.memory[start:start + length], source[offset:offset + length]), index
            self.memory[start:start + length] = self.GUARD
        assert (self.memory == self.GUARD).all(), "bytes outside the targets were written"


def scattered(rng: np.random.Generator, count: int, longest: int, size_bytes: int = REGION_BYTES) -> Target:
    """Make reads of random length at random, maybe overlapping, places, into targets in another order."""
    lengths = rng.integers(1, longest + 1, count)
    offsets = (rng.random(count) * (size_bytes - lengths + 1)).astype(np.int64)
    return Target(offsets, lengths, rng.permutation(count))


class Pair:
    """Both ends of a medium in one process, and a region between them."""

    def __init__(self, owner: Transport, reader: Transport, backing: str) -> None:
        self.owner = owner
        self.reader = reader
        self.owned = Owned(owner, backing)
        self.descriptor = self.owned.descriptor
        self.bytes = self.owned.bytes
        self._attachments: list[Attachment] = []

    def attach(self, descriptor: RegionDescriptor | None = None) -> Attachment:
        """Attach the reader to the region, or to what another descriptor says."""
        attachment = self.reader.attach(descriptor or self.descriptor, deadline_ns=soon())
        self._attachments.append(attachment)
        return attachment

    def close(self) -> None:
        """Close everything."""
        for attachment in self._attachments:
            attachment.close()
        self.reader.close()
        self.owner.close()
        self.owned.close()


class TransportTests:
    """The contract of a transport, as tests.

    Attributes to override:
        make: makes a transport; called once per end.
        backings: memory it can serve: ``memfd``, ``private``, or ``cuda`` with ``testing.cuda.FakeCuda``.
        crosses_processes: whether another process can read.
        survives_owner: reads go on after the owner's death.
        checks_at_owner: a reader that lies about the region's size is refused.
    """

    make: ClassVar[Callable[[], Any]]
    backings: ClassVar[tuple[str, ...]] = ("memfd", "private")
    crosses_processes: ClassVar[bool] = True
    survives_owner: ClassVar[bool] = False
    checks_at_owner: ClassVar[bool] = True

    def new(self) -> Any:
        """Make a transport."""
        return type(self).make()

    @contextmanager
    def pair(self, backing: str = "") -> Iterator[Pair]:
        """Make an owner's and a reader's transport and a served region; all closed afterwards."""
        owner = self.new()
        pair = Pair(owner, self.new() if self.crosses_processes else owner, backing or self.backings[0])
        try:
            yield pair
        finally:
            pair.close()

    @contextmanager
    def owner_process(self, size_bytes: int = REGION_BYTES) -> Iterator[OwnerProcess]:
        """Start an owner in another process."""
        if not self.crosses_processes:
            pytest.skip("this medium stays within the process")
        owner = OwnerProcess(type(self).make, self.backings[-1], size_bytes)
        try:
            yield owner
        finally:
            owner.close()

    # ------------------------------------------------------------------------------------------------------- bytes
    def test_scattered_reads_of_many_sizes_are_equal(self) -> None:
        rng = np.random.default_rng(7)
        for backing in self.backings:
            with self.pair(backing) as pair:
                attachment = pair.attach()
                for count, longest in ((1, 1), (1, REGION_BYTES), (2, 4096), (37, 5), (300, 20_000), (3, 2_500_000)):
                    target = scattered(rng, count, longest)
                    result = attachment.read(target.batch, deadline_ns=soon())
                    assert result.error is None, result.error
                    target.check(result, pair.bytes)
                attachment.close()

    def test_4096_blocks_of_16_kib_in_one_batch(self) -> None:
        rng = np.random.default_rng(8)
        with self.pair() as pair:
            offsets = rng.integers(0, REGION_BYTES // 16384, 4096) * 16384
            target = Target(offsets, np.full(4096, 16384), rng.permutation(4096), guard_bytes=0)
            result = pair.attach().read(target.batch, deadline_ns=soon())
            assert result.ok.all() and result.num_bytes == 4096 * 16384
            expected = np.lib.stride_tricks.sliding_window_view(pair.bytes, 16384)[offsets]
            assert np.array_equal(target.memory.reshape(4096, 16384)[target.starts // 16384], expected)

    def test_neighbours_in_any_order_are_equal(self) -> None:
        with self.pair() as pair:
            attachment = pair.attach()
            for order in (np.arange(2048), np.arange(2048)[::-1], np.random.default_rng(3).permutation(2048)):
                offsets, lengths = order * 3000, np.full(2048, 3000)
                target = Target(offsets, lengths, np.argsort(order), guard_bytes=0)
                result = attachment.read(target.batch, deadline_ns=soon())
                assert result.ok.all()
                assert np.array_equal(target.memory, pair.bytes[:2048 * 3000])

    def test_a_word_is_seen_as_it_is_now(self) -> None:
        with self.pair() as pair:
            attachment = pair.attach()
            target = Target(np.array([4096]), np.array([8]))
            for value in range(50):
                pair.bytes[4096:4104] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)
                target.check(attachment.read(target.batch, deadline_ns=soon()), pair.bytes)

    def test_threads_with_an_attachment_each_do_not_disturb_each_other(self) -> None:
        failures: list[BaseException] = []
        with self.pair() as pair:
            def work(seed: int) -> None:
                try:
                    attachment = pair.attach()
                    for _ in range(5):
                        target = scattered(np.random.default_rng(seed), 100, 30_000)
                        target.check(attachment.read(target.batch, deadline_ns=soon()), pair.bytes)
                    attachment.close()
                except (AssertionError, MooncakeError) as error:
                    failures.append(error)

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE_S)
        assert not failures

    # ---------------------------------------------------------------------------------------------------- refusals
    def test_reads_outside_the_region_are_our_bug(self) -> None:
        with self.pair() as pair:
            attachment = pair.attach()
            for offset, length in ((REGION_BYTES, 1), (REGION_BYTES - 1, 2), (0, REGION_BYTES + 1), (2**64 - 1, 2),
                                   (0, 2**64 - 1), (5, 0)):
                for extra in (0, 3):
                    target = Target(np.array([0] * extra + [0]), np.array([1] * extra + [1]))
                    target.batch.remote_offsets[-1], target.batch.lengths[-1] = offset, length
                    with pytest.raises(LocalProtocolError):
                        attachment.read(target.batch, deadline_ns=soon())
                    assert (target.memory[-33:] == Target.GUARD).all()

    def test_an_owner_refuses_reads_beyond_its_memory(self) -> None:
        if not self.checks_at_owner:
            pytest.skip("nobody on the owner's side could refuse")
        with self.pair() as pair:
            lie = msgspec.structs.replace(pair.descriptor, size_bytes=REGION_BYTES * 2)
            target = Target(np.array([REGION_BYTES - 10]), np.array([20]))
            try:
                result = pair.attach(lie).read(target.batch, deadline_ns=soon())
            except MooncakeError:
                return
            assert not result.ok.any() and result.error is not None

    def test_a_withdrawn_region_fails(self) -> None:
        for backing in self.backings:
            with self.pair(backing) as pair:
                attachment = pair.attach()
                target = scattered(np.random.default_rng(2), 20, 100)
                assert attachment.read(target.batch, deadline_ns=soon()).ok.all()
                pair.owner.withdraw(pair.descriptor.region_id)
                pair.owner.withdraw(pair.descriptor.region_id)
                result = attachment.read(target.batch, deadline_ns=soon())
                assert not result.ok.any() and isinstance(result.error, PeerUnreachable)
                with pytest.raises(PeerUnreachable):
                    pair.attach()

    def test_a_stale_region_id_is_refused(self) -> None:
        with self.pair() as pair:
            stale = msgspec.structs.replace(pair.descriptor, region_id=pair.descriptor.region_id + 99)
            with pytest.raises(PeerUnreachable):
                pair.attach(stale)

    def test_reading_after_close_fails(self) -> None:
        with self.pair() as pair:
            attachment = pair.attach()
            attachment.close()
            attachment.close()
            target = Target(np.array([0]), np.array([8]))
            result = attachment.read(target.batch, deadline_ns=soon())
            assert not result.ok.any()
            target.check(result, pair.bytes)

    # ---------------------------------------------------------------------------------------------------- failures
    def test_a_past_deadline_reads_nothing(self) -> None:
        with self.pair() as pair:
            attachment = pair.attach()
            target = scattered(np.random.default_rng(4), 50, 1000)
            result = attachment.read(target.batch, deadline_ns=time.monotonic_ns() - 1)
            assert not result.ok.any() and result.error is not None
            assert (target.memory == Target.GUARD).all()
            target.check(attachment.read(target.batch, deadline_ns=soon()), pair.bytes)

    def test_partial_failures_are_reported_once_per_request(self) -> None:
        plan = FaultPlan(seed=11, drop=0.2, truncate=0.2, corrupt=0.1, detects_corruption=True, reset=0.3)
        with self.pair() as pair:
            faulty = FaultyTransport(pair.reader, plan)  # type: ignore[arg-type]  # no probe is called
            attachment = faulty.attach(pair.descriptor, deadline_ns=soon())
            for seed in range(20):
                target = scattered(np.random.default_rng(seed), 60, 3000)
                target.check(attachment.read(target.batch, deadline_ns=soon()), pair.bytes)
            assert min(faulty.injected[fault] for fault in ("drop", "truncate", "corrupt", "reset")) > 0
            attachment.close()

    def test_an_owner_in_another_process(self) -> None:
        with self.owner_process() as owner:
            reader = self.new()
            attachment = reader.attach(owner.descriptor, deadline_ns=soon())
            source = pattern(REGION_BYTES, 1)
            target = scattered(np.random.default_rng(5), 200, 100_000)
            result = attachment.read(target.batch, deadline_ns=soon())
            assert result.error is None
            target.check(result, source)
            owner.signal(signal.SIGSTOP)  # deadline: an owner that hangs
            started = time.monotonic()
            target.check(attachment.read(target.batch, deadline_ns=soon(0.3)), source)
            assert time.monotonic() - started < 3.0
            owner.signal(signal.SIGCONT)
            target.check(attachment.read(target.batch, deadline_ns=soon()), source)
            owner.tell("withdraw")
            assert not attachment.read(target.batch, deadline_ns=soon()).ok.any()
            attachment.close()
            reader.close()

    def test_an_owner_killed_in_the_middle_of_a_read(self) -> None:
        size_bytes = 64 << 20
        with self.owner_process(size_bytes) as owner:
            reader = self.new()
            attachment = reader.attach(owner.descriptor, deadline_ns=soon())
            source = pattern(size_bytes, 1)
            rng = np.random.default_rng(6)
            offsets = rng.permutation(size_bytes // 65536) * 65536
            target = Target(offsets, np.full(len(offsets), 65536), rng.permutation(len(offsets)))
            assert attachment.read(target.batch, deadline_ns=soon()).error is None
            threading.Timer(0.005, owner.signal, (signal.SIGKILL,)).start()
            started = time.monotonic()
            while time.monotonic() - started < PATIENCE_S:
                result = attachment.read(target.batch, deadline_ns=soon(PATIENCE_S))
                if result.error is not None or not owner.process.is_alive():
                    break
            assert time.monotonic() - started < PATIENCE_S / 2, "the read waited for its deadline"
            target.check(result, source)
            after = attachment.read(target.batch, deadline_ns=soon())
            assert bool(after.ok.all()) == self.survives_owner
            target.check(after, source)
            if not self.survives_owner:
                with pytest.raises(PeerUnreachable):
                    reader.attach(owner.descriptor, deadline_ns=soon())
            attachment.close()
            reader.close()

    # ----------------------------------------------------------------------------------------------------- leftovers
    def test_nothing_is_left_after_close(self) -> None:
        def cycle() -> None:
            with self.pair() as pair:
                for _ in range(3):
                    attachment = pair.attach()
                    target = scattered(np.random.default_rng(9), 64, 80_000)
                    target.check(attachment.read(target.batch, deadline_ns=soon()), pair.bytes)
                    attachment.close()

        cycle()
        gc.collect()
        before = _holdings()
        for _ in range(4):
            cycle()
        gc.collect()
        assert _holdings() == before


def _holdings() -> tuple[int, int, int]:
    """Count descriptors, threads and mappings of memfds."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), maps.count("/memfd:")


__all__ = ["Owned", "OwnerProcess", "Pair", "Target", "TransportTests", "pattern", "scattered", "soon"]
