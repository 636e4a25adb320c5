"""Read a peer's memory by RDMA: one-sided reads that take none of the owner's time.

::

    reader                                            owner
    RdmaAttachment ── link (tcp): Open, Opened ─────► LinkServer       once per attachment
       └─ Connection                                     └─ queue pairs, registered region
            └─ queue pairs ◄──── RDMA READ ─────────── device          every read, the owner's CPU is not asked

A region is registered when it is served, and our reads write straight into served memory. Other targets are reached
through a bounce buffer, because memory that is not ours to keep cannot stay registered (docs/adr/0006-rdma.md).

The owner withdraws a region by deregistering it: from then on its device refuses every read.

After any failure, and at the deadline, a connection is stopped, drained and destroyed, so that nothing is written to a
target after ``read`` has returned; the next read opens a new one.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from mooncake_store.errors import MooncakeError, RemoteProtocolError, TransferFailed
from mooncake_store.transport.base import LocalMemory, RdmaOffer, ReadBatch, ReadResult, RegionDescriptor
from mooncake_store.transport.coalesce import coalesce
from mooncake_store.transport.copying import past_deadline
from mooncake_store.transport.rdma import wire
from mooncake_store.transport.rdma.backend import Backend, Device, QueueSet, Registration, Route
from mooncake_store.transport.rdma.chains import LocalRanges
from mooncake_store.transport.rdma.link import Link
from mooncake_store.transport.rdma.reading import BOUNCED, Bounce, Connection, Lane, Reading, Targets
from mooncake_store.transport.rdma.server import LinkServer, ServedRegion
from mooncake_store.transport.rdma.verbs import VerbsBackend

logger = logging.getLogger(__name__)

NUM_QUEUES = 2
PIECE_MAX_BYTES = 1 << 20
"""Longest single read: what is lost on an error, and what a bounce slot must hold."""
SMALL_REGION_BYTES = 1 << 20
"""A region up to this, such as a page of epoch words, is read over one queue pair on one rail."""
PAGE_BYTES = 4096


class RdmaTransport:
    """Serves and reads memory by RDMA. Implements ``base.Transport``.

    Args:
        host: address that the link server binds and announces; the bytes take the rails, whatever their addresses.
        backend: verbs library; pyverbs when None.
        num_queues: queue pairs per attachment and rail.

    Threads: one, started by the first ``serve``, connects readers; reading uses the caller's thread.
    """

    medium = "rdma"

    def __init__(self, host: str = "127.0.0.1", *, backend: Backend | None = None,
                 num_queues: int = NUM_QUEUES) -> None:
        self._host = host
        self._backend: Backend = backend or VerbsBackend()
        self._num_queues = num_queues
        self._lock = threading.Lock()
        self._devices: list[Device] = []
        self._server: LinkServer | None = None
        self._targets = Targets(LocalRanges(), ())
        self._own: dict[int, tuple[LocalMemory, tuple[Registration, ...]]] = {}
        self._attachments: weakref.WeakSet[RdmaAttachment] = weakref.WeakSet()
        self._is_closed = False

    def probe(self) -> str:
        """Return why this medium cannot work here, empty when it can: opens a port for a moment, where there is one."""
        obstacle = self._backend.probe()
        if obstacle:
            return obstacle
        try:
            family, _, _, _, address = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[0]
            with socket.create_server(address[:2], family=family) as listener:
                if listener.getsockname()[0] in ("0.0.0.0", "::"):
                    return f"{self._host} is no address a peer can connect to; set `host` to this machine's"
        except OSError as error:
            return f"cannot bind {self._host}: {error}"
        return ""

    def serve(self, region_id: int, memory: LocalMemory) -> RdmaOffer | None:
        """Register the memory on every rail and let peers read it; takes the GIL for as long as the pages are pinned.

        Raises:
            TransferFailed: the memory cannot be registered, for example above the locked-memory limit.
            OSError: the address cannot be bound.
        """
        with self._lock:
            devices = self._open_devices()
            registrations, is_target = _register(devices, memory)
            if self._server is None:
                self._server = LinkServer(self._host, devices, self._backend.is_routed)
            self._server.add(region_id, ServedRegion(memory, registrations))
            if is_target:
                self._own[region_id] = (memory, registrations)
                self._set_targets()
            return RdmaOffer(self._host, self._server.port)

    def withdraw(self, region_id: int) -> None:
        """Deregister: once this returns no device touches the memory. Idempotent."""
        with self._lock:
            if self._own.pop(region_id, None) is not None:
                self._set_targets()
            if self._server is not None:
                self._server.remove(region_id)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> RdmaAttachment:
        """Connect queue pairs to the owner's.

        Raises:
            RegionGone: the owner does not serve the region.
            PeerUnreachable: nobody answers.
            TransferFailed: not offered, no rail reaches the owner's, or a device refuses.
        """
        offer = next((offer for offer in region.offers if isinstance(offer, RdmaOffer)), None)
        if offer is None:
            raise TransferFailed("the region is not offered over rdma")
        with self._lock:
            devices = self._open_devices()
            attachment = RdmaAttachment(region, offer, devices, lambda: self._targets, num_queues=self._num_queues)
            self._attachments.add(attachment)
        try:
            attachment.connect(deadline_ns)
        except MooncakeError:
            attachment.close()
            raise
        return attachment

    def close(self) -> None:
        """Close every attachment, withdraw everything, stop the thread, close the ports. Idempotent."""
        with self._lock:
            self._is_closed = True
            server, self._server = self._server, None
            attachments = list(self._attachments)
        for attachment in attachments:  # their queue pairs must go before the ports
            attachment.close()
        with self._lock:
            self._own.clear()
            self._set_targets()
        if server is not None:
            server.close()
        with self._lock:
            for device in self._devices:
                device.close()
            self._devices.clear()

    def _open_devices(self) -> tuple[Device, ...]:
        if self._is_closed:
            raise TransferFailed("transport is closed", where="rdma")
        if not self._devices:
            failure: TransferFailed | None = None
            for rail in self._backend.rails():
                try:
                    self._devices.append(self._backend.open(rail))
                except TransferFailed as error:
                    logger.warning("not using %s: %s", rail.device, error)
                    failure = error
            if not self._devices:
                raise failure or TransferFailed("no RDMA port is active", where="rdma")
            logger.info("rdma uses %s", ", ".join(device.rail.device for device in self._devices))
        return tuple(self._devices)

    def _set_targets(self) -> None:
        own = list(self._own.values())
        self._targets = Targets(LocalRanges([(memory.address, memory.size_bytes) for memory, _ in own]),
                                [registrations for _, registrations in own])


def _register(devices: Sequence[Device], memory: LocalMemory) -> tuple[tuple[Registration, ...], bool]:
    """Register on every device; return the registrations and whether our own reads may write there too."""
    made: list[Registration] = []
    for is_target in (True, False):
        try:
            for device in devices:
                made.append(device.register(memory.address, memory.size_bytes, is_target=is_target))
            return tuple(made), is_target
        except TransferFailed:
            for registration in made:
                registration.close()
            made.clear()
            if not is_target:  # a read-only mapping can be served, but not read into
                raise
    raise AssertionError("unreachable")


class RdmaAttachment:
    """Reads one region over its own queue pairs. Implements ``base.Attachment``.

    Threads: one reads at a time; ``close`` may come from another and ends the read.

    Attributes:
        read_bytes: bytes asked for by device name; for tests and diagnosis.
    """

    medium = "rdma"

    def __init__(self, region: RegionDescriptor, offer: RdmaOffer, devices: Sequence[Device],
                 targets: Callable[[], Targets], *, num_queues: int) -> None:
        is_small = region.size_bytes <= SMALL_REGION_BYTES
        self._region = region
        self._offer = offer
        self._devices = devices[:1] if is_small else devices
        self._num_queues = 1 if is_small else num_queues
        self._piece_bytes = min(PIECE_MAX_BYTES, region.size_bytes + -region.size_bytes % PAGE_BYTES)
        self._targets = targets
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._bounce: Bounce | None = None
        self._is_closed = False
        self.read_bytes: dict[str, int] = {}

    def connect(self, deadline_ns: int) -> None:
        """Open a connection. Raises as ``RdmaTransport.attach``."""
        with self._lock:
            self._connected(deadline_ns)

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``."""
        batch.check(self._region.size_bytes)
        if time.monotonic_ns() >= deadline_ns:
            return ReadResult.failed(batch, past_deadline("rdma", 0, len(batch.lengths)))
        pieces = coalesce(batch, piece_max_bytes=self._piece_bytes)
        with self._lock:
            targets = self._targets()
            positions = targets.ranges.find(pieces.local_addresses, pieces.lengths)
            try:
                connection = self._connected(deadline_ns)
                bounce = self._opened_bounce() if bool((positions == BOUNCED).any()) else None
                reading = Reading(connection, pieces, targets, positions, bounce=bounce, deadline_ns=deadline_ns)
            except MooncakeError as error:
                return ReadResult.failed(batch, error)
            try:
                reading.run()
            finally:
                for lane, num_bytes in zip(connection.lanes, connection.read_bytes, strict=True):
                    name = self._devices[lane.device_position].rail.device
                    self.read_bytes[name] = self.read_bytes.get(name, 0) + num_bytes
                connection.read_bytes = [0] * len(connection.lanes)
                if reading.error is not None or not reading.done.all():
                    self._disconnect()
        return ReadResult.of(batch, pieces.outcome(reading.done), reading.error)

    def close(self) -> None:
        """Destroy the queue pairs; a read in another thread fails at once. Idempotent."""
        self._is_closed = True
        connection = self._connection
        if connection is not None:
            connection.link.shut()
        with self._lock:
            self._disconnect()
            if self._bounce is not None:
                self._bounce.close()
                self._bounce = None

    def _connected(self, deadline_ns: int) -> Connection:
        if self._is_closed:
            raise TransferFailed("attachment is closed", where="rdma")
        if self._connection is not None and self._connection.link.is_broken():
            self._disconnect()
        if self._connection is None:
            self._connection = open_connection(self._region, self._offer, self._devices,
                                               num_queues=self._num_queues, deadline_ns=deadline_ns)
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _opened_bounce(self) -> Bounce:
        if self._bounce is None:
            self._bounce = Bounce(self._devices, 2 * self._piece_bytes)
        return self._bounce


def open_connection(region: RegionDescriptor, offer: RdmaOffer, devices: Sequence[Device], *, num_queues: int,
                    deadline_ns: int) -> Connection:
    """Make queue pairs on every device and connect those that the owner can reach. Raises as ``attach``."""
    link = Link(offer.host, offer.port, deadline_ns=deadline_ns)
    queue_sets: list[QueueSet] = []
    lanes: list[Lane] = []
    try:
        for device in devices:
            queue_sets.append(device.open_queues(num_queues, is_reader=True))
        ours = tuple(wire.ReaderRail(device.rail.link_layer, device.rail.lid, device.mtu, device.reads_max,
                                     wire.pack_gids(device.rail.gids), wire.pack_queues(queue_set.queues))
                     for device, queue_set in zip(devices, queue_sets, strict=True))
        answer = link.ask(wire.Open(region.region_id, ours), deadline_ns=deadline_ns)
        if answer.size_bytes < region.size_bytes:
            raise TransferFailed(f"the owner serves {answer.size_bytes} bytes of {region.size_bytes}", where=link.where)
        for theirs in answer.rails:
            if theirs.position >= len(devices) or len(theirs.queues) != num_queues:
                raise RemoteProtocolError("the owner connected what we did not ask for", where=link.where)
            device, queue_set = devices[theirs.position], queue_sets[theirs.position]
            route = Route(theirs.reader_gid_index, theirs.gid, theirs.lid, theirs.is_global,
                          min(theirs.mtu, device.mtu), min(theirs.reads_max, device.reads_max))
            queue_set.connect(route, wire.unpack_queues(theirs.queues), is_reader=True)
            lanes.append(Lane(theirs.position, queue_set, theirs.address, theirs.rkey))
        for position in set(range(len(devices))) - {lane.device_position for lane in lanes}:
            queue_sets[position].close()
        return Connection(link, lanes)
    except MooncakeError as error:
        for queue_set in queue_sets:
            queue_set.close()
        link.close()
        if isinstance(error, RemoteProtocolError):
            raise TransferFailed(f"the owner does not speak our protocol: {error.message}", where=link.where,
                                 hint=error.hint) from error
        raise


__all__ = ["RdmaAttachment", "RdmaTransport"]
