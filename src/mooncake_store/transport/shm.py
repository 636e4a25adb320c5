"""Let peers on this host map our memfd and copy out of it themselves.

The descriptor is handed over by SCM_RIGHTS on an abstract unix socket, so there are no names to clean up and the memory
goes with its last user. Only processes of the same user (or root) get it, and only for reading.

Peer death is harmless: the mapping, and the bytes as the owner left them, stay valid for as long as we hold it. A
successful read therefore proves neither that the owner lives nor that the bytes are the wanted ones: that comes from
the lease or the epoch word the caller holds. A withdrawn region is refused (guard.py).

Abstract sockets belong to a network namespace: containers on one host reach each other only if they share it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time

from mooncake_store.errors import CapacityExceeded, MooncakeError, PeerUnreachable, TransferFailed
from mooncake_store.transport.base import LocalMemory, ReadBatch, ReadResult, RegionDescriptor, RegionGone, ShmOffer
from mooncake_store.transport.copying import copy_batch
from mooncake_store.transport.guard import GuardPage
from mooncake_store.transport.memory import PAGE_BYTES, Mapping, is_sealed, populate, seal

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
REQUEST_TIMEOUT_S = 2.0
POPULATE_MAX_BYTES = 4 << 30
"""A larger region is faulted in as it is read: at 40 ms/GiB, more would eat the deadline of an attach."""

MAGIC = b"MSHM"
VERSION = 1
REQUEST = struct.Struct("<4sHxxQ")  # magic, version, region id
REPLY = struct.Struct("<4sHHQQ")  # magic, version, status, size, offset of the guard word
GRANTED, UNKNOWN_REGION, OTHER_USER, BAD_REQUEST = range(4)
REFUSALS = {
    OTHER_USER: "the owner runs as another user",
    BAD_REQUEST: "the owner speaks another version of the protocol",
}
CROWDED_WAIT_S = 0.002
_PEER_CREDENTIALS = struct.Struct("3i")


class ShmTransport:
    """Serves memfds and maps those of peers. Implements ``base.Transport``.

    Threads: one, started by the first ``serve``, hands descriptors to whoever attaches.
    """

    medium = "shm"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: _FdServer | None = None
        self._is_closed = False

    def probe(self) -> str:
        """Return why this medium cannot work here, empty when it can."""
        try:
            os.close(os.memfd_create("mooncake-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.bind(_socket_address(_socket_name()))
        except OSError as error:
            return f"no memfd or abstract unix socket: {error}"
        return ""

    def serve(self, region_id: int, memory: LocalMemory) -> ShmOffer | None:
        """Hand the memory's memfd to peers that ask; None when it has none, or one that could shrink under a reader.

        Raises:
            MooncakeError: the guard page cannot be made or is full.
            OSError: no descriptors or threads left.
        """
        if memory.memfd < 0 or not (is_sealed(memory.memfd) or seal(memory.memfd)):
            return None
        with self._lock:
            if self._is_closed:
                raise TransferFailed("transport is closed", where="shm")
            if self._server is None:
                self._server = _FdServer()
            self._server.add(region_id, memory)
            return ShmOffer(self._server.name)

    def withdraw(self, region_id: int) -> None:
        """Refuse the region from here on, also to those that have it mapped. Idempotent."""
        with self._lock:
            if self._server is not None:
                self._server.remove(region_id)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> ShmAttachment:
        """Ask the owner for the descriptor and map it, faulted in.

        Raises:
            RegionGone: the owner does not serve the region.
            PeerUnreachable: nobody listens, or the owner does not answer.
            TransferFailed: the memory cannot be mapped here.
        """
        offer = next((offer for offer in region.offers if isinstance(offer, ShmOffer)), None)
        if offer is None:
            raise TransferFailed("the region is not offered over shm")
        memfd, guard_fd, guard_offset = _fetch(offer, region.region_id, deadline_ns)
        try:
            if os.fstat(memfd).st_size < region.size_bytes or not is_sealed(memfd):
                raise TransferFailed("the owner's memfd is smaller than the region, or could shrink", where="shm")
            mapping = Mapping(memfd, region.size_bytes, writable=False)
            guard = Mapping(guard_fd, PAGE_BYTES, writable=False)
            if region.size_bytes <= POPULATE_MAX_BYTES:
                populate(mapping.address, region.size_bytes, for_writing=False)
        except (OSError, CapacityExceeded) as error:
            raise TransferFailed(f"cannot map {region.size_bytes} bytes of the owner: {error}", where="shm") from error
        finally:
            os.close(memfd)
            os.close(guard_fd)
        return ShmAttachment(region, mapping, guard, guard_offset)

    def close(self) -> None:
        """Withdraw everything and stop the thread. Idempotent."""
        with self._lock:
            self._is_closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()


class ShmAttachment:
    """Copies out of one mapped region. Implements ``base.Attachment``; holds no descriptor."""

    medium = "shm"

    def __init__(self, region: RegionDescriptor, mapping: Mapping, guard: Mapping, guard_offset: int) -> None:
        self._region = region
        self._maps: tuple[Mapping, Mapping] | None = (mapping, guard)
        self._guard_offset = guard_offset

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``."""
        batch.check(self._region.size_bytes)
        maps = self._maps  # our reference keeps both mapped, whatever `close` does meanwhile
        if maps is None:
            return ReadResult.failed(batch, TransferFailed("attachment is closed", where="shm"))
        mapping, guard = maps
        result = copy_batch(batch, mapping.address, medium=self.medium, deadline_ns=deadline_ns)
        # after the copy, so that all of it was made while the region was served
        if ctypes.c_uint64.from_address(guard.address + self._guard_offset).value != self._region.region_id:
            return ReadResult.failed(batch, RegionGone(
                f"the owner no longer serves region {self._region.region_id:#x}", where="shm"))
        return result

    def close(self) -> None:
        """Unmap the region once no read is using it. Idempotent."""
        self._maps = None


class _FdServer:
    """Answers requests for descriptors on one thread; at most CONNECTIONS_MAX peers at a time."""

    def __init__(self) -> None:
        self.name = _socket_name()
        self._guards = GuardPage()
        self._lock = threading.Lock()
        self._regions: dict[int, tuple[LocalMemory, int]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(_socket_address(self.name))
        self._listener.listen(CONNECTIONS_MAX)
        self._wake_read, self._wake_write = socket.socketpair()
        self._waiting: dict[socket.socket, float] = {}
        self._thread = threading.Thread(target=self._run, name="mooncake-shm", daemon=True)
        self._thread.start()

    def add(self, region_id: int, memory: LocalMemory) -> None:
        # a duplicate of the memfd: the owner may close its own while we serve
        guard_offset = self._guards.hold(region_id)
        ours = LocalMemory(memory.address, memory.size_bytes, os.dup(memory.memfd), memory.owner)
        with self._lock:
            self._regions[region_id] = (ours, guard_offset)

    def remove(self, region_id: int) -> None:
        with self._lock:
            entry = self._regions.pop(region_id, None)
            if entry is not None:
                self._guards.release(region_id)
                os.close(entry[0].memfd)

    def close(self) -> None:
        self._wake_write.send(b"x")
        self._thread.join(timeout=5.0)
        with self._lock:
            for memory, _ in self._regions.values():
                os.close(memory.memfd)
            self._regions.clear()
        self._guards.close()
        self._wake_write.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            try:
                while self._turn(selector):
                    pass
            except Exception:
                logger.exception("the shm server stopped")
            finally:
                for connection in [*self._waiting, self._listener, self._wake_read]:
                    connection.close()

    def _turn(self, selector: selectors.BaseSelector) -> bool:
        for key, _ in selector.select(timeout=REQUEST_TIMEOUT_S if self._waiting else None):
            if key.fileobj is self._wake_read:
                return False
            if key.fileobj is self._listener:
                self._accept(selector)
            elif isinstance(key.fileobj, socket.socket):
                self._answer(key.fileobj)
                self._drop(selector, key.fileobj)
        expired = [connection for connection, since in self._waiting.items()
                   if time.monotonic() - since > REQUEST_TIMEOUT_S]
        for connection in expired:
            self._drop(selector, connection)
        return True

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("cannot accept a reader over shm: %s", error)
            time.sleep(0.05)  # out of descriptors: the listener stays readable, so do not spin on it
            return
        if len(self._waiting) >= CONNECTIONS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        self._waiting[connection] = time.monotonic()
        selector.register(connection, selectors.EVENT_READ)

    def _drop(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        self._waiting.pop(connection, None)
        selector.unregister(connection)
        connection.close()

    def _answer(self, connection: socket.socket) -> None:
        try:
            request = connection.recv(REQUEST.size + 1)
            _, uid, _ = _PEER_CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size))
            with self._lock:  # a withdrawal waits: the descriptor stays ours until it is sent
                status, entry = self._decide(request, uid)
                size_bytes, guard_offset = (entry[0].size_bytes, entry[1]) if entry else (0, 0)
                reply = REPLY.pack(MAGIC, VERSION, status, size_bytes, guard_offset)
                descriptors = [entry[0].memfd, self._guards.memfd] if entry else []
                socket.send_fds(connection, [reply], descriptors)
        except OSError as error:
            logger.debug("a reader over shm went away: %s", error)

    def _decide(self, request: bytes, uid: int) -> tuple[int, tuple[LocalMemory, int] | None]:
        if len(request) != REQUEST.size:
            return BAD_REQUEST, None
        magic, version, region_id = REQUEST.unpack(request)
        if magic != MAGIC or version != VERSION:
            return BAD_REQUEST, None
        if uid not in (0, os.geteuid()):
            return OTHER_USER, None
        entry = self._regions.get(region_id)
        return (GRANTED, entry) if entry else (UNKNOWN_REGION, None)


def _socket_name() -> str:
    return f"mooncake-shm-{os.getpid()}-{secrets.token_hex(8)}"


def _socket_address(name: str) -> bytes:
    return b"\0" + name.encode()


def _connect(connection: socket.socket, name: str, deadline_ns: int) -> None:
    """Connect; wait while more readers than fit want in, which the kernel reports instead of waiting itself.

    Raises:
        OSError: nobody listens, or it does not work before the deadline.
    """
    while True:
        try:
            return connection.connect(_socket_address(name))
        except BlockingIOError:
            if time.monotonic_ns() + int(CROWDED_WAIT_S * 1e9) >= deadline_ns:
                raise
            time.sleep(CROWDED_WAIT_S)


def _fetch(offer: ShmOffer, region_id: int, deadline_ns: int) -> tuple[int, int, int]:
    """Return the memfd, the guard's memfd and the guard word's offset; the caller closes the descriptors."""
    where = f"shm socket @{offer.socket}"
    remaining_s = (deadline_ns - time.monotonic_ns()) / 1e9
    if remaining_s <= 0:
        raise PeerUnreachable("deadline passed before the owner was asked", where=where)
    descriptors: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(remaining_s)
            _connect(connection, offer.socket, deadline_ns)
            connection.send(REQUEST.pack(MAGIC, VERSION, region_id))
            reply, descriptors, _, _ = socket.recv_fds(connection, REPLY.size, 2, socket.MSG_CMSG_CLOEXEC)
        return _unpack(reply, descriptors, where)
    except OSError as error:
        raise _unreachable(error, where) from error
    except MooncakeError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _unpack(reply: bytes, descriptors: list[int], where: str) -> tuple[int, int, int]:
    if len(reply) != REPLY.size:
        raise PeerUnreachable("the owner hung up", where=where)
    magic, version, status, _, guard_offset = REPLY.unpack(reply)
    if magic != MAGIC or version != VERSION:
        raise TransferFailed("the owner speaks another version of the protocol", where=where)
    if status == UNKNOWN_REGION:
        raise RegionGone("the owner does not serve this region (any more)", where=where)
    if status != GRANTED:
        raise PeerUnreachable(REFUSALS.get(status, f"the owner refused with status {status}"), where=where)
    if len(descriptors) != 2 or guard_offset > PAGE_BYTES - 8:
        raise TransferFailed("the owner's answer has no descriptors", where=where,
                             hint="raise the limit on open files (ulimit -n)")
    return descriptors[0], descriptors[1], guard_offset


def _unreachable(error: OSError, where: str) -> PeerUnreachable:
    if error.errno == errno.ECONNREFUSED:
        return PeerUnreachable("nobody listens: the owner is gone, or lives in another network namespace", where=where,
                               hint="containers on one host must share the network namespace for shm")
    return PeerUnreachable(f"the owner does not answer: {error}", where=where)
