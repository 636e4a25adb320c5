"""Give readers queue pairs to read our regions with, from one thread; reading itself then takes none of our time.

Whoever can connect and knows a region's id (random, 63 bits) can read the region: bind a private network.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mooncake_store.errors import MooncakeError, RemoteProtocolError
from mooncake_store.transport.base import LocalMemory
from mooncake_store.transport.rdma import wire
from mooncake_store.transport.rdma.backend import Device, QueueSet, Registration, Route
from mooncake_store.transport.rdma.gids import Gid
from mooncake_store.transport.rdma.link import tune
from mooncake_store.transport.rdma.rails import RailEnd, RailPair, pair_rails

logger = logging.getLogger(__name__)

LINKS_MAX = 1024
GREETING_MAX_S = 10.0
"""A connection that has not asked after this long is dropped."""
TURN_S = 2.0


class ServedRegion(NamedTuple):
    """Memory, and its registration on each device."""

    memory: LocalMemory
    registrations: tuple[Registration, ...]

    def close(self) -> None:
        """Take the memory from every device."""
        for registration in self.registrations:
            registration.close()


class _Connection:
    """One reader: what it sent so far, then the queue pairs that serve it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.inbox = b""
        self.since_s = time.monotonic()
        self.region_id = 0
        self.queue_sets: list[QueueSet] = []

    def close(self) -> None:
        for queue_set in self.queue_sets:
            queue_set.close()
        self.queue_sets.clear()
        self.socket.close()


class LinkServer:
    """Answers readers on ``host`` at a port of the system's choice.

    Args:
        host: address to bind.
        devices: opened rails.
        is_routed: see ``pair_rails``.

    Threads: one, ``mooncake-rdma``; methods may be called from any.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, host: str, devices: Sequence[Device], is_routed: Callable[[Gid, Gid], bool]) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._devices = devices
        self._ends = [RailEnd(device.rail.link_layer, device.rail.gids) for device in devices]
        self._is_routed = is_routed
        self._lock = threading.Lock()
        self._regions: dict[int, ServedRegion] = {}
        self._connections: set[_Connection] = set()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="mooncake-rdma", daemon=True)
        self._thread.start()

    def add(self, region_id: int, region: ServedRegion) -> None:
        """Serve a region."""
        with self._lock:
            self._regions[region_id] = region

    def remove(self, region_id: int) -> None:
        """Stop serving: deregister, and drop the queue pairs of its readers before this returns. Idempotent."""
        with self._lock:
            region = self._regions.pop(region_id, None)
            if region is None:
                return
            region.close()
            for connection in self._connections:
                if connection.region_id == region_id:
                    for queue_set in connection.queue_sets:
                        queue_set.close()
                    connection.queue_sets.clear()
                    try:
                        connection.socket.shutdown(socket.SHUT_RDWR)  # the thread then drops the rest
                    except OSError:
                        pass  # the reader was faster

    def close(self) -> None:
        """Stop the thread, drop every reader, deregister everything."""
        self._wake_write.send(b"x")
        self._thread.join(timeout=5.0)
        with self._lock:
            for region in self._regions.values():
                region.close()
            self._regions.clear()
        self._wake_write.close()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            logger.exception("the rdma link server stopped")
        finally:
            with self._lock:
                for connection in self._connections:
                    connection.close()
                self._connections.clear()
            self._listener.close()
            self._wake_read.close()
            self._selector.close()

    def _turn(self) -> bool:
        for key, _ in self._selector.select(timeout=TURN_S):
            if key.fileobj is self._wake_read:
                return False
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._receive(key.data)
        oldest = time.monotonic() - GREETING_MAX_S
        for connection in [c for c in self._connections if not c.region_id and c.since_s < oldest]:
            self._drop(connection, "asked for nothing")
        return True

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("cannot accept a reader over rdma: %s", error)
            time.sleep(0.05)  # out of descriptors: the listener stays readable, so do not spin on it
            return
        if len(self._connections) >= LINKS_MAX:
            sock.close()
            return
        sock.setblocking(False)
        tune(sock)
        connection = _Connection(sock)
        with self._lock:
            self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _drop(self, connection: _Connection, why: str) -> None:
        logger.debug("dropping a reader over rdma: %s", why)
        self._selector.unregister(connection.socket)
        with self._lock:
            self._connections.discard(connection)
            connection.close()

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(wire.HEADER.size + wire.BODY_MAX_BYTES)
            if not data:
                raise OSError("it hung up")
            connection.inbox += data
            if connection.region_id:
                raise RemoteProtocolError("a reader asks twice")
            if len(connection.inbox) < wire.HEADER.size:
                return
            length = wire.unpack_header(connection.inbox[:wire.HEADER.size])
            if len(connection.inbox) < wire.HEADER.size + length:
                return
            message = wire.unpack_body(connection.inbox[wire.HEADER.size:])
            if not isinstance(message, wire.Open):
                raise RemoteProtocolError(f"a reader sent {type(message).__name__}")
            answer = wire.pack(self._open(connection, message))
            if connection.socket.send(answer) != len(answer):
                raise OSError("it does not read")
        except BlockingIOError:
            return
        except (OSError, RemoteProtocolError) as error:
            self._drop(connection, str(error))

    def _open(self, connection: _Connection, request: wire.Open) -> wire.Opened | wire.Refused:
        """Make and connect our end of the reader's rails."""
        connection.inbox = b""
        connection.region_id = request.region_id
        with self._lock:
            region = self._regions.get(request.region_id)
            if region is None:
                return wire.Refused(True, "the owner does not serve this region (any more)")
            pairs = pair_rails(self._ends, [rail.end() for rail in request.rails], self._is_routed)
            if not pairs:
                return wire.Refused(False, "no RDMA port of the owner reaches one of the reader's: they share no "
                                           "link layer, RoCE version, address family or route")
            try:
                rails = tuple(self._connect(connection, region, pair, request.rails[pair.peer]) for pair in pairs)
            except MooncakeError as error:
                logger.warning("cannot serve a reader over rdma: %s", error)
                return wire.Refused(False, f"the owner cannot connect: {error.message}"[:1000])
            return wire.Opened(region.memory.size_bytes, rails)

    def _connect(self, connection: _Connection, region: ServedRegion, pair: RailPair,
                 theirs: wire.ReaderRail) -> wire.OwnerRail:
        device = self._devices[pair.own]
        queue_set = device.open_queues(len(theirs.queues), is_reader=False)
        connection.queue_sets.append(queue_set)
        mtu, reads_max = min(device.mtu, theirs.mtu), min(device.reads_max, theirs.reads_max)
        route = Route(pair.gids.own.table_index, pair.gids.peer.raw, theirs.lid, pair.gids.is_global, mtu, reads_max)
        queue_set.connect(route, wire.unpack_queues(theirs.queues), is_reader=False)
        return wire.OwnerRail(
            pair.peer, pair.gids.peer.table_index, pair.gids.own.raw, device.rail.lid, pair.gids.is_global, mtu,
            reads_max, region.memory.address, region.registrations[pair.own].rkey,
            wire.pack_queues(queue_set.queues))
