"""Answer read requests over tcp, for all regions of the process, on one thread.

The thread does little Python per megabyte: a request frame of up to 1,024 reads is checked with numpy and sent with
``sendmsg`` straight from the region, without the GIL. A lone small read is answered without numpy.

Readers are trusted to have been told the region's id (random, 63 bits), and with TLS to belong to the cell; not to be
well behaved: connections and bytes kept per connection are bounded, and whatever a reader begins must end in time.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading
import time

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import RemoteProtocolError
from mooncake_store.transport import tcp_wire
from mooncake_store.transport.base import LocalMemory
from mooncake_store.transport.checksum import checksum_of
from mooncake_store.transport.copying import single_range
from mooncake_store.transport.cursor import RangeCursor
from mooncake_store.transport.tcp_stream import SPACE, WOULD_BLOCK, has_pending, send, tune
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
STEP_MAX_S = 30.0
"""A TLS greeting, a request that has begun and an answer (at most 8 MiB) must each be through after this."""
IDLE_MAX_S = 600.0
"""A connection nobody used for this long is closed; its reader opens another when it needs one."""
TURN_S = 1.0
"""How often lateness is looked for."""
_NO_READS = np.empty((0, 2), np.uint64)


class _Answer:
    """One response on its way out.

    Args:
        header: its header, or all of it.
        request: what is answered; None when ``header`` is all there is to say.
        reads: the memory to send, uint64 [n, 2] of (address, length).

    Attributes:
        region_id: whose memory it is sent from; 0 when from none.
        cursor: what is being sent. It stops behind each chunk, until ``go_on``.
    """

    def __init__(self, header: bytes, request: Request | None = None,
                 reads: npt.NDArray[np.uint64] = _NO_READS) -> None:
        self.region_id = request.region_id if request else 0
        self._header = np.frombuffer(header, np.uint8)  # kept alive while it is sent, as the checksums are
        self._reads = reads
        is_checked = request is not None and request.flags & tcp_wire.WANT_CHECKSUM
        self._chunks = list(tcp_wire.chunks(reads[:, 1])) if is_checked else []
        self._checksums = np.empty(len(self._chunks), "<u8")
        self._num_begun = 0
        self.cursor = RangeCursor(tcp_wire.lay_out(
            single_range(self._header.ctypes.data, self._header.nbytes), reads,
            [chunk.stop for chunk in self._chunks], self._checksums.ctypes.data))
        if self._chunks:
            self.go_on()

    def go_on(self) -> bool:
        """Begin with the next chunk, once the one before is sent; False when there is none."""
        number = self._num_begun
        if number == len(self._chunks):
            return False
        chunk = self._chunks[number]
        self._checksums[number] = checksum_of(self._reads[chunk.start:chunk.stop])
        self._num_begun += 1
        self.cursor.stop = 1 + chunk.stop + self._num_begun
        return True


class _Connection:
    """State of one reader: bytes of requests not yet looked at, and the answer being sent.

    ``due_s`` is when what the reader is doing must be over.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.fd = sock.fileno()
        self.inbox = bytearray(INBOX_BYTES)
        self.filled = 0
        self.answer: _Answer | None = None
        self.is_greeting = isinstance(sock, ssl.SSLSocket)
        self.is_refused = False
        self.events = select.EPOLLIN
        self.due_s = time.monotonic() + STEP_MAX_S

    def receive(self) -> None:
        """Take in what the inbox has room for. Raises OSError."""
        with memoryview(self.inbox) as view:
            while self.filled < INBOX_BYTES:
                try:
                    count = self.socket.recv_into(view[self.filled:])
                except WOULD_BLOCK:
                    return
                if count == 0:
                    raise OSError("the reader hung up")
                self.filled += count
                if not has_pending(self.socket):
                    return

    def next_request(self) -> tuple[Request, bytes] | None:
        """Take a complete request out of the inbox, None when there is none. Raises RemoteProtocolError."""
        if self.filled < HEADER_BYTES:
            return None
        request = unpack_request(self.inbox)
        size = HEADER_BYTES + request.num_reads * READ_BYTES
        if self.filled < size:
            return None
        reads = bytes(self.inbox[HEADER_BYTES:size])
        if self.filled > size:
            self.inbox[:self.filled - size] = self.inbox[size:self.filled]
        self.filled -= size
        return request, reads

    def has_more(self) -> bool:
        """Tell whether there is work that no poll would report: a request in the inbox, or bytes already decrypted."""
        if has_pending(self.socket):
            return True
        if self.filled < HEADER_BYTES:
            return False
        try:
            return self.filled >= HEADER_BYTES + READ_BYTES * unpack_request(self.inbox).num_reads
        except RemoteProtocolError:
            return True  # the next step will say so


class ReadServer:
    """Serves regions on ``host`` at a port of the system's choice.

    Args:
        host: address to bind.
        tls: wraps every connection; None = plain.

    Threads: one, ``mooncake-tcp``. A withdrawal waits for the step that is touching the region (some ms at most).

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, host: str, tls: ssl.SSLContext | None = None) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._listener = socket.create_server(address, family=family, backlog=128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._tls = tls
        self._lock = threading.Lock()
        self._regions: dict[int, LocalMemory] = {}
        self._connections: dict[int, _Connection] = {}
        self._epoll = select.epoll()
        self._wake_read, self._wake_write = socket.socketpair()
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._epoll.register(self._listener, select.EPOLLIN)
        self._sweep_s = 0.0
        self._thread = threading.Thread(target=self._run, name="mooncake-tcp", daemon=True)
        self._thread.start()

    def add(self, region_id: int, memory: LocalMemory) -> None:
        """Serve a region; ``memory.owner`` is kept."""
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
            for connection in self._connections.values():
                connection.socket.close()
            self._listener.close()
            self._wake_read.close()
            self._epoll.close()

    def _turn(self) -> bool:
        for fd, _ in self._epoll.poll(TURN_S if self._connections else -1):
            connection = self._connections.get(fd)
            if connection is not None:
                self._step(connection)
            elif fd == self._listener.fileno():
                self._accept()
            else:
                return False
        now_s = time.monotonic()
        if now_s >= self._sweep_s:
            self._sweep_s = now_s + TURN_S
            for connection in [late for late in self._connections.values() if late.due_s < now_s]:
                self._drop(connection, "it took too long")
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
            logger.warning("turning a reader over tcp away: there are %d already", CONNECTIONS_MAX)
            sock.close()
            return
        try:
            tune(sock)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except OSError as error:
            logger.debug("a reader over tcp left at once: %s", error)
            sock.close()
            return
        connection = _Connection(sock)
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, connection.events)

    def _drop(self, connection: _Connection, why: str) -> None:
        logger.debug("dropping a reader over tcp: %s", why)
        del self._connections[connection.fd]
        self._epoll.unregister(connection.fd)
        connection.socket.close()

    def _step(self, connection: _Connection) -> None:
        """Do one thing for a connection: greet, or take bytes in, begin an answer and send some of it."""
        try:
            events = self._greet(connection) if connection.is_greeting else self._serve(connection)
        except (RemoteProtocolError, OSError) as error:
            self._drop(connection, str(error))
            return
        if events != connection.events:
            connection.events = events
            self._epoll.modify(connection.fd, events)

    def _greet(self, connection: _Connection) -> int:
        """Go on with the TLS handshake; return what to wait for. Raises OSError."""
        assert isinstance(connection.socket, ssl.SSLSocket)
        try:
            connection.socket.do_handshake()
        except ssl.SSLWantReadError:
            return select.EPOLLIN
        except ssl.SSLWantWriteError:
            return select.EPOLLOUT
        connection.is_greeting = False
        return select.EPOLLOUT if has_pending(connection.socket) else select.EPOLLIN

    def _serve(self, connection: _Connection) -> int:
        """Take bytes in, begin an answer, send some of it; return what to wait for.

        A request that is in the inbox already waits for its turn as a writable socket: turns are shared fairly.

        Raises:
            RemoteProtocolError, OSError: the connection is of no more use.
        """
        if connection.answer is None:
            was_empty = connection.filled == 0
            if connection.filled < INBOX_BYTES:
                connection.receive()
            taken = connection.next_request()
            if taken is None:
                if was_empty:
                    connection.due_s = time.monotonic() + STEP_MAX_S
                return select.EPOLLIN
            connection.due_s = time.monotonic() + STEP_MAX_S
            with self._lock:
                connection.answer = self._begin(connection, *taken)
        if connection.answer is not None:
            self._send(connection, connection.answer)
        if connection.answer is not None:
            return select.EPOLLOUT
        if connection.is_refused:
            raise OSError("its request was refused")
        connection.due_s = time.monotonic() + (STEP_MAX_S if connection.filled else IDLE_MAX_S)
        return select.EPOLLOUT if connection.has_more() else select.EPOLLIN

    def _begin(self, connection: _Connection, request: Request, packed: bytes) -> _Answer | None:
        """Check a request and begin its answer; None when all of it has been sent at once. Raises OSError."""
        region = self._regions.get(request.region_id)
        if region is not None and request.num_reads == 1:
            offset, length = tcp_wire.unpack_read(packed)
            size_bytes = region.size_bytes
            if 0 < length <= min(STAGED_MAX_BYTES, size_bytes) and offset <= size_bytes - length:
                start = region.address + offset
                return self._send_staged(connection, request, bytes(SPACE[start:start + length]))
        reads = np.frombuffer(packed, "<u8").astype(np.uint64).reshape(-1, 2)
        status = tcp_wire.UNKNOWN_REGION if region is None else tcp_wire.check_reads(reads, region.size_bytes)
        if region is None or status != tcp_wire.OK or request.num_reads == 0:
            connection.is_refused = status != tcp_wire.OK
            return _Answer(pack_response(Response(status, request.frame_id, request.num_reads, 0)))
        ranges = reads
        ranges[:, 0] += np.uint64(region.address)
        num_bytes = int(ranges[:, 1].sum())
        if num_bytes <= STAGED_MAX_BYTES:
            staged = b"".join(SPACE[start:start + length] for start, length in ranges.tolist())
            return self._send_staged(connection, request, staged)
        header = pack_response(Response(tcp_wire.OK, request.frame_id, request.num_reads, num_bytes))
        return _Answer(header, request, ranges)

    def _send_staged(self, connection: _Connection, request: Request, staged: bytes) -> _Answer | None:
        header = pack_response(Response(tcp_wire.OK, request.frame_id, request.num_reads, len(staged)))
        checksum = b""
        if request.flags & tcp_wire.WANT_CHECKSUM:
            where = np.frombuffer(staged, np.uint8)
            value = checksum_of(single_range(where.ctypes.data, len(staged)))
            checksum = value.to_bytes(tcp_wire.CHECKSUM_BYTES, "little")
        data = b"".join((header, staged, checksum))
        try:
            sent = connection.socket.send(data)
        except WOULD_BLOCK:
            sent = 0
        return None if sent == len(data) else _Answer(data[sent:])

    def _send(self, connection: _Connection, answer: _Answer) -> None:
        """Send until the connection takes no more. Raises OSError."""
        while True:
            with self._lock:  # taken for each call, so that a withdrawal gets in between
                if answer.region_id and answer.region_id not in self._regions:
                    raise OSError("its region was withdrawn")
                if answer.cursor.is_done() and not answer.go_on():
                    connection.answer = None
                    return
                try:
                    if not send(connection.socket, answer.cursor):
                        return
                except WOULD_BLOCK:
                    return
