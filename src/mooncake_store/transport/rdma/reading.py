"""Carry out one read over one connection: post chains, wait for completions, and on a failure leave nothing under way.

A chain goes straight into its target where that is registered memory of ours, else through the bounce buffer.
"""

from __future__ import annotations

import logging
import math
import mmap
import select
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import MooncakeError, PeerUnreachable, TransferFailed
from mooncake_store.transport.base import ReadBatch, RegionGone
from mooncake_store.transport.coalesce import Pieces
from mooncake_store.transport.copying import copy_batch, past_deadline
from mooncake_store.transport.rdma.backend import Completion, Device, QueueSet, Reads, Registration, Status
from mooncake_store.transport.rdma.chains import BOUNCED, End, Ledger, LocalRanges, Start, divide
from mooncake_store.transport.rdma.link import Link

logger = logging.getLogger(__name__)

SPIN_NS = 30_000
"""Poll this long before asking the kernel for an event: a small read is back by then."""
DRAIN_MAX_S = 1.0
"""Wait this long for flushed requests; destroying the queue pairs stops the rest."""
NUM_SLOTS = 4


class Targets(NamedTuple):
    """Registered memory of ours that reads may write into: where, and the registrations on each device."""

    ranges: LocalRanges
    registrations: Sequence[tuple[Registration, ...]]


class Bounce:
    """A registered buffer in slots, for targets that are not registered memory.

    Args:
        devices: to register it on.
        slot_bytes: size of one of the NUM_SLOTS slots.

    Raises:
        TransferFailed: it cannot be registered.
    """

    def __init__(self, devices: Sequence[Device], slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        # Mapped, not allocated: whole pages are registered, and closing gives them back at once.
        self._memory = np.frombuffer(mmap.mmap(-1, slot_bytes * NUM_SLOTS), np.uint8)
        self.registrations: list[Registration] = []
        try:
            for device in devices:
                self.registrations.append(device.register(self._memory.ctypes.data, self._memory.nbytes,
                                                          is_target=True))
        except MooncakeError:
            self.close()
            raise

    def address(self, slot: int) -> int:
        """Return where a slot begins."""
        return int(self._memory.ctypes.data) + slot * self.slot_bytes

    def close(self) -> None:
        """Deregister and let go of the memory, also where a failed read's traceback still refers to us. Idempotent."""
        for registration in self.registrations:
            registration.close()
        self.registrations.clear()
        self._memory = np.empty(0, np.uint8)


class Lane(NamedTuple):
    """One rail of a connection: our queue pairs, and the region as the owner's port knows it."""

    device_position: int
    queue_set: QueueSet
    address: int
    rkey: int


class Connection:
    """Connected queue pairs on some rails, and the link that set them up. Used by one thread at a time."""

    def __init__(self, link: Link, lanes: Sequence[Lane]) -> None:
        self.link = link
        self.lanes = lanes
        # first every rail's first queue pair, so that a short read already uses every rail
        self.queues = [(lane, i) for i in range(max(len(lane.queue_set.queues) for lane in lanes)) for lane in lanes
                       if i < len(lane.queue_set.queues)]
        self.read_bytes = [0] * len(lanes)
        self.num_chains = 0
        self._by_fd = {lane.queue_set.fd: lane for lane in lanes}
        self._poller = select.poll()
        for fd in (link.fileno(), *self._by_fd):
            self._poller.register(fd, select.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a completion or the end of the link; return False when the link ended."""
        is_linked = True
        for fd, _ in self._poller.poll(math.ceil(timeout_s * 1e3)):
            lane = self._by_fd.get(fd)
            if lane is None:
                is_linked = False
            else:
                lane.queue_set.take_event()
        return is_linked

    def close(self) -> None:
        """Destroy our queue pairs and hang up. Idempotent."""
        for lane in self.lanes:
            lane.queue_set.close()
        self.link.close()


class Reading:
    """One read; use once.

    Attributes:
        done: which pieces are complete.
        error: the first failure; then the connection must be closed.

    Args:
        connection: to read over.
        pieces: what to read; none longer than half a slot of the bounce buffer.
        targets: registered memory of ours.
        positions: per piece, where ``targets.ranges`` has it.
        bounce: for the other pieces; None when there are none.
        deadline_ns: CLOCK_MONOTONIC.
    """

    def __init__(self, connection: Connection, pieces: Pieces, targets: Targets, positions: npt.NDArray[np.int64], *,
                 bounce: Bounce | None, deadline_ns: int) -> None:
        self.done = np.zeros(len(pieces.lengths), np.bool_)
        self.error: MooncakeError | None = None
        self._connection = connection
        self._pieces = pieces
        self._targets = targets
        self._bounce = bounce
        self._deadline_ns = deadline_ns
        bounced_max_bytes = bounce.slot_bytes // 2 if bounce is not None else 0
        chains = divide(pieces.lengths, positions, num_queues=len(connection.queues),
                        bounced_max_bytes=bounced_max_bytes)
        self._ledger = Ledger(chains, num_queues=len(connection.queues), num_slots=NUM_SLOTS,
                              first_number=connection.num_chains)
        connection.num_chains += len(chains)

    def run(self) -> None:
        """Read everything, or stop at the first failure or the deadline with nothing under way any more."""
        try:
            self._drive()
        except MooncakeError as error:
            self._fail(error)
        if self.error is not None:
            self._drain()

    def _drive(self) -> None:
        while not self._ledger.is_finished and self.error is None:
            if time.monotonic_ns() >= self._deadline_ns:
                raise past_deadline(self._connection.link.where, int(self.done.sum()), len(self.done))
            start = self._ledger.start_next()
            if start is not None:
                self._post(start)
            if not self._harvest() and start is None:
                self._wait(self._deadline_ns)

    def _post(self, start: Start) -> None:
        lane, index = self._connection.queues[start.queue]
        members = start.chain.pieces
        lengths = self._pieces.lengths[members]
        remote = self._pieces.remote_offsets[members] + np.uint64(lane.address)
        if start.slot < 0:
            local = self._pieces.local_addresses[members]
            registration = self._targets.registrations[start.chain.range_position][lane.device_position]
        else:
            bounce = self._needed_bounce()
            local = np.cumsum(lengths) - lengths + np.uint64(bounce.address(start.slot))
            registration = bounce.registrations[lane.device_position]
        reads = Reads(lane.rkey, registration.lkey, remote.tolist(), local.tolist(), lengths.tolist())
        lane.queue_set.post(index, start.first_wr_id, reads)
        self._connection.read_bytes[self._connection.lanes.index(lane)] += start.chain.num_bytes

    def _harvest(self) -> bool:
        """Take in completions; return whether there were any."""
        is_any = False
        for lane in self._connection.lanes:
            for completion in lane.queue_set.poll():
                is_any = True
                self._settle(completion)
        return is_any

    def _settle(self, completion: Completion) -> None:
        if not self._ledger.is_active(completion.wr_id):
            logger.debug("passing over a completion of nothing under way: %s", completion)
            return
        is_ok = completion.status is Status.OK
        if not is_ok:
            self._fail(self._explain(completion))
        end = self._ledger.settle(completion.wr_id, is_ok=is_ok)
        if end is None:
            return
        if end.slot >= 0:
            self._copy_out(end)
        else:
            self.done[end.chain.pieces[:end.num_done]] = True

    def _copy_out(self, end: End) -> None:
        members = end.chain.pieces[:end.num_done]
        if len(members) == 0:
            return
        lengths = self._pieces.lengths[members]
        batch = ReadBatch(np.cumsum(lengths) - lengths, self._pieces.local_addresses[members], lengths)
        result = copy_batch(batch, self._needed_bounce().address(end.slot), medium=self._connection.link.where,
                            deadline_ns=self._deadline_ns)
        self.done[members] = result.ok
        if result.error is not None:
            self._fail(result.error)

    def _wait(self, until_ns: int) -> None:
        """Wait until something completes, the link ends, or it is time."""
        spin_until_ns = min(time.monotonic_ns() + SPIN_NS, until_ns)
        while time.monotonic_ns() < spin_until_ns:
            if self._harvest():
                return
        for lane in self._connection.lanes:
            lane.queue_set.arm()
        if self._harvest():
            return
        if not self._connection.wait(max(0.0, (until_ns - time.monotonic_ns()) / 1e9)) and not self._harvest():
            self._fail(PeerUnreachable("the owner hung up: it is gone, or no longer serves the region",
                                       where=self._connection.link.where))

    def _drain(self) -> None:
        """Stop the queue pairs and wait for what was under way: some of it may have been complete."""
        until_ns = time.monotonic_ns() + int(DRAIN_MAX_S * 1e9)
        try:
            for lane in self._connection.lanes:
                lane.queue_set.fail()
            while self._ledger.num_active and time.monotonic_ns() < until_ns:
                if not self._harvest():
                    time.sleep(0.0005)
        except MooncakeError as error:
            logger.warning("cannot stop a read in order: %s", error)
        if self._ledger.num_active:
            logger.warning("%d chains of reads did not end within %g s", self._ledger.num_active, DRAIN_MAX_S)

    def _fail(self, error: MooncakeError) -> None:
        # what was flushed failed because of something else, which may be reported after it
        self.error = self.error or error

    def _explain(self, completion: Completion) -> MooncakeError:
        where, text = self._connection.link.where, f"{completion.status.value} ({completion.detail})"
        if completion.status is Status.REMOTE_ACCESS:
            return RegionGone(f"{text}: the region is no longer served", where=where)
        if completion.status in (Status.RETRIES, Status.FLUSHED):
            return PeerUnreachable(text, where=where)
        return TransferFailed(text, where=where)

    def _needed_bounce(self) -> Bounce:
        if self._bounce is None:
            raise TransferFailed("no bounce buffer", where=self._connection.link.where)
        return self._bounce


__all__ = ["BOUNCED", "Bounce", "Connection", "Lane", "Reading", "Targets"]
