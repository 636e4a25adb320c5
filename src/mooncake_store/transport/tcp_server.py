"""Answer read requests over tcp, for all regions of the process, on one thread.

The thread does little Python per megabyte: a request frame of up to 1,024 reads is checked with numpy and sent with
``sendmsg`` straight from the region, without the GIL.

Whoever can connect and knows a region's id (random, 63 bits) can read the region: bind a private network.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import RemoteProtocolError
from mooncake_store.transport import libc, tcp_wire
from mooncake_store.transport.base import LocalMemory
from mooncake_store.transport.checksum import checksum_of
from mooncake_store.transport.copying import single_range
from mooncake_store.transport.cursor import RangeCursor
from mooncake_store.transport.tcp_wire import (
    HEADER_BYTES,
    READ_BYTES,
    REQUEST_MAX_BYTES,
    Request,
    Response,
    pack_response,
    unpack_request,
)

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 512
INBOX_BYTES = 2 * REQUEST_MAX_BYTES
STAGED_MAX_BYTES = 64 << 10
"""A smaller response is copied first: its checksum then fits its bytes even while the owner writes."""
STALL_MAX_S = 60.0
"""A reader that takes nothing for this long is dropped."""
TURN_S = 5.0


def tune(connection: socket.socket) -> None:
    """Set what both ends want: no delay, and a dead peer noticed within half a minute."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


class _Answer:
    """One response on its way out. Keeps its header, checksum and staged bytes alive while they are sent."""

    def __init__(self, region_id: int, parts: list[npt.NDArray[np.uint8]],
                 middle: npt.NDArray[np.uint64] | None) -> None:
        self.region_id = region_id
        self._parts = parts
        rows = [np.array([[part.ctypes.data, part.nbytes]], np.uint64) for part in parts if part.nbytes]
        if middle is not None:
            rows.insert(1, middle)
        self.cursor = RangeCursor(np.concatenate(rows))


class _Connection:
    """State of one reader: bytes of requests not yet looked at, and the answer being sent."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.inbox = bytearray(INBOX_BYTES)
        self.filled = 0
        self.answer: _Answer | None = None
        self.is_refused = False
        self.events = selectors.EVENT_READ
        self.progress_s = time.monotonic()

    def has_request(self) -> bool:
        """Tell whether ``next_request`` would return one, or raise."""
        if self.filled < HEADER_BYTES:
            return False
        try:
            return self.filled >= HEADER_BYTES + READ_BYTES * unpack_request(bytes(self.inbox[:HEADER_BYTES])).num_reads
        except RemoteProtocolError:
            return True

    def next_request(self) -> tuple[Request, npt.NDArray[np.uint64]] | None:
        """Take a complete request out of the inbox, None when there is none. Raises RemoteProtocolError."""
        if self.filled < HEADER_BYTES:
            return None
        request = unpack_request(bytes(self.inbox[:HEADER_BYTES]))
        size = HEADER_BYTES + request.num_reads * READ_BYTES
        if self.filled < size:
            return None
        reads = np.frombuffer(bytes(self.inbox[HEADER_BYTES:size]), "<u8").astype(np.uint64).reshape(-1, 2)
        self.inbox[:self.filled - size] = self.inbox[size:self.filled]
        self.filled -= size
        return request, reads


class ReadServer:
    """Serves regions on ``host`` at a port of the system's choice.

    Threads: one, ``mooncake-tcp``. A withdrawal waits for the step that is touching the region (some ms at most).

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, host: str) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._regions: dict[int, LocalMemory] = {}
        self._connections: set[_Connection] = set()
        self._space = libc.address_space()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="mooncake-tcp", daemon=True)
        self._thread.start()

    def add(self, region_id: int, memory: LocalMemory) -> None:
        """Serve a region."""
        with self._lock:
            self._regions[region_id] = memory

    def remove(self, region_id: int) -> None:
        """Stop serving a region; once this returns its memory is not touched any more. Idempotent."""
        with self._lock:
            self._regions.pop(region_id, None)

    def close(self) -> None:
        """Stop the thread and drop every connection."""
        self._wake_write.send(b"x")
        self._thread.join(timeout=5.0)
        with self._lock:
            self._regions.clear()
        self._wake_write.close()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            logger.exception("the tcp read server stopped")
        finally:
            for connection in self._connections:
                connection.socket.close()
            self._listener.close()
            self._wake_read.close()
            self._selector.close()

    def _turn(self) -> bool:
        for key, _ in self._selector.select(timeout=TURN_S if self._connections else None):
            if key.fileobj is self._wake_read:
                return False
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._step(key.data)
        oldest = time.monotonic() - STALL_MAX_S
        for connection in [c for c in self._connections if c.answer is not None and c.progress_s < oldest]:
            self._drop(connection, "took nothing for too long")
        return True

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            logger.warning("cannot accept a reader over tcp: %s", error)
            time.sleep(0.05)  # out of descriptors: the listener stays readable, so do not spin on it
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            sock.close()
            return
        tune(sock)
        connection = _Connection(sock)
        self._connections.add(connection)
        self._selector.register(sock, connection.events, connection)

    def _drop(self, connection: _Connection, why: str) -> None:
        logger.debug("dropping a reader over tcp: %s", why)
        self._connections.discard(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _step(self, connection: _Connection) -> None:
        """Do one thing for a connection: take bytes in, begin an answer, send some of it."""
        try:
            if connection.answer is None and connection.filled < INBOX_BYTES:
                self._receive(connection)
            if connection.answer is None:
                taken = connection.next_request()
                if taken is not None:
                    with self._lock:
                        connection.answer = self._begin(connection, *taken)
            if connection.answer is not None:
                self._send(connection, connection.answer)
        except (RemoteProtocolError, OSError) as error:
            self._drop(connection, str(error))
            return
        # an unanswered request in the inbox waits for its turn as a writable socket: turns are shared fairly
        busy = connection.answer is not None or connection.has_request()
        events = selectors.EVENT_WRITE if busy else selectors.EVENT_READ
        if connection in self._connections and events != connection.events:
            connection.events = events
            self._selector.modify(connection.socket, events, connection)

    def _receive(self, connection: _Connection) -> None:
        with memoryview(connection.inbox) as view:
            try:
                count = connection.socket.recv_into(view[connection.filled:])
            except BlockingIOError:
                return
        if count == 0:
            raise OSError("the reader hung up")
        connection.filled += count

    def _begin(self, connection: _Connection, request: Request, reads: npt.NDArray[np.uint64]) -> _Answer:
        memory = self._regions.get(request.region_id)
        if memory is None:
            status = tcp_wire.UNKNOWN_REGION
        else:
            status = tcp_wire.check_reads(reads, memory.size_bytes)
        if memory is None or status != tcp_wire.OK or request.num_reads == 0:
            connection.is_refused = status != tcp_wire.OK
            return _Answer(0, [_bytes(pack_response(Response(status, request.frame_id, request.num_reads, 0)))], None)
        lengths = reads[:, 1]
        ranges = reads.copy()
        ranges[:, 0] += np.uint64(memory.address)
        num_bytes = int(lengths.sum())
        header = _bytes(pack_response(Response(status, request.frame_id, request.num_reads, num_bytes)))
        if num_bytes <= STAGED_MAX_BYTES:
            staged = _bytes(b"".join(self._space[start:start + size] for start, size in ranges.tolist()))
            region_id, ranges = 0, single_range(staged.ctypes.data, num_bytes)
        else:
            region_id, staged = request.region_id, _bytes(b"")
        crc = _bytes(b"")
        if request.flags & tcp_wire.WANT_CRC:
            crc = _bytes(checksum_of(ranges).to_bytes(tcp_wire.CRC_BYTES, "little"))
        return _Answer(region_id, [header, staged, crc], None if region_id == 0 else ranges)

    def _send(self, connection: _Connection, answer: _Answer) -> None:
        with self._lock:
            if answer.region_id and answer.region_id not in self._regions:
                raise OSError("its region was withdrawn")
            try:
                answer.cursor.advance(libc.send_ranges(connection.socket.fileno(), answer.cursor.window()))
            except BlockingIOError:
                return
        connection.progress_s = time.monotonic()
        if answer.cursor.is_done():
            connection.answer = None
            if connection.is_refused:
                self._drop(connection, "its request was refused")


def _bytes(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
