"""Read a peer's memory over tcp: any memory, any machine.

A batch is cut into frames of up to 1,024 reads; frames go over a few streams per attachment, two at a time on each, and
the bytes are received straight into their targets. One thread, the caller's, drives all streams of its attachment.

A stream is dropped, with what was in flight on it, on any error and at the deadline, so that nothing is written to a
target after ``read`` has returned; the next read opens a new one.

Integrity: each frame carries a checksum (tcp's own sum misses one corruption in 65,536). A mismatch fails the frame's
requests.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import threading
import time
from collections import deque
from typing import NamedTuple

import numpy as np

from mooncake_store.errors import ChecksumMismatch, MooncakeError, PeerUnreachable, RemoteProtocolError, TransferFailed
from mooncake_store.transport import libc, tcp_wire
from mooncake_store.transport.base import LocalMemory, ReadBatch, ReadResult, RegionDescriptor, RegionGone, TcpOffer
from mooncake_store.transport.checksum import checksum_of
from mooncake_store.transport.coalesce import Group, Pieces, coalesce, groups
from mooncake_store.transport.copying import past_deadline
from mooncake_store.transport.cursor import RangeCursor
from mooncake_store.transport.tcp_server import ReadServer, tune
from mooncake_store.transport.tcp_wire import CRC_BYTES, FRAME_READS_MAX, HEADER_BYTES, WANT_CRC, Request

logger = logging.getLogger(__name__)

NUM_STREAMS = 2
FRAME_BYTES = 4 << 20
"""Bytes asked for in one frame, give or take a read."""
FRAMES_IN_FLIGHT_MAX = 2
SECOND_STREAM_BYTES = 8 << 20
"""A smaller read uses one stream."""
CONNECT_TIMEOUT_S = 3.0


class TcpTransport:
    """Serves and reads memory over tcp. Implements ``base.Transport``.

    Args:
        host: address to bind and to announce.
        num_streams: connections of one attachment.
        checksum: verify the checksum of every frame.

    Threads: one, started by the first ``serve``, answers all readers; reading uses the caller's thread.
    """

    medium = "tcp"

    def __init__(self, host: str = "127.0.0.1", *, num_streams: int = NUM_STREAMS, checksum: bool = True) -> None:
        self._host = host
        self._num_streams = num_streams
        self._checksum = checksum
        self._lock = threading.Lock()
        self._server: ReadServer | None = None
        self._is_closed = False

    def probe(self) -> str:
        """Return why this medium cannot work here, empty when it can: binds the address for a moment."""
        try:
            family, _, _, _, address = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[0]
            with socket.create_server(address[:2], family=family) as listener:
                if listener.getsockname()[0] in ("0.0.0.0", "::"):
                    return f"{self._host} is no address a peer can connect to; set `host` to this machine's"
        except OSError as error:
            return f"cannot bind {self._host}: {error}"
        return ""

    def serve(self, region_id: int, memory: LocalMemory) -> TcpOffer | None:
        """Let peers read the memory through the read server.

        Raises:
            TransferFailed: the transport is closed.
            OSError: the address cannot be bound.
        """
        with self._lock:
            if self._is_closed:
                raise TransferFailed("transport is closed", where="tcp")
            if self._server is None:
                self._server = ReadServer(self._host)
            self._server.add(region_id, memory)
            return TcpOffer(self._host, self._server.port)

    def withdraw(self, region_id: int) -> None:
        """Stop serving; answers under way break off. Idempotent."""
        with self._lock:
            if self._server is not None:
                self._server.remove(region_id)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> TcpAttachment:
        """Connect, and ask whether the region is served.

        Raises:
            RegionGone: it is not.
            PeerUnreachable: nobody answers.
            TransferFailed: not offered, or not our protocol.
        """
        offer = next((offer for offer in region.offers if isinstance(offer, TcpOffer)), None)
        if offer is None:
            raise TransferFailed("the region is not offered over tcp")
        attachment = TcpAttachment(region, offer, num_streams=self._num_streams, checksum=self._checksum)
        try:
            attachment.greet(deadline_ns)
        except MooncakeError:
            attachment.close()
            raise
        return attachment

    def close(self) -> None:
        """Withdraw everything and stop the thread. Idempotent."""
        with self._lock:
            self._is_closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()


class _Frame(NamedTuple):
    """One request in flight."""

    frame_id: int
    group: Group


class _Stream:
    """One connection: requests going out, and the response that is coming in."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.outgoing = b""
        self.frames: deque[_Frame] = deque()
        self.cursor: RangeCursor | None = None
        self.header = np.zeros(HEADER_BYTES, np.uint8)
        self.crc = np.zeros(1, "<u8")
        self.has_header = False

    def send(self) -> None:
        """Send what the socket takes of the requests. Raises OSError."""
        try:
            self.outgoing = self.outgoing[self.socket.send(self.outgoing):]
        except BlockingIOError:
            pass  # poll says when


class _Run:
    """What one ``read`` keeps: its pieces, which of them are complete, the frames not asked for yet."""

    def __init__(self, pieces: Pieces, deadline_ns: int) -> None:
        self.pieces = pieces
        self.deadline_ns = deadline_ns
        self.done = np.zeros(len(pieces.lengths), np.bool_)
        self.frames = deque(groups(pieces.lengths, count_max=FRAME_READS_MAX, bytes_max=FRAME_BYTES))
        self.error: MooncakeError | None = None

    def fail(self, error: MooncakeError) -> None:
        """Note the first failure."""
        self.error = self.error or error


class TcpAttachment:
    """Reads one region over its own streams. Implements ``base.Attachment``.

    Threads: one reads at a time; ``close`` may come from another and ends the read.
    """

    medium = "tcp"

    def __init__(self, region: RegionDescriptor, offer: TcpOffer, *, num_streams: int, checksum: bool) -> None:
        self._region = region
        self._offer = offer
        self._where = f"tcp {offer.host}:{offer.port}"
        self._num_streams = num_streams
        self._checksum = checksum
        self._lock = threading.Lock()
        self._streams: list[_Stream] = []
        self._next_frame_id = 0
        self._is_closed = False

    def greet(self, deadline_ns: int) -> None:
        """Ask with a frame of no reads whether the region is served. Raises as ``TcpTransport.attach``."""
        nothing = np.empty(0, np.uint64)
        run = _Run(Pieces(nothing, nothing, nothing, nothing.astype(np.int64), nothing.astype(np.int64)), deadline_ns)
        run.frames.append(Group(0, 0, 0))
        with self._lock:
            self._drive(run, 1)
        if run.error is not None:
            raise run.error

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``."""
        batch.check(self._region.size_bytes)
        if time.monotonic_ns() >= deadline_ns:
            return ReadResult.failed(batch, past_deadline("tcp", 0, len(batch.lengths)))
        pieces = coalesce(batch, piece_max_bytes=FRAME_BYTES)
        run = _Run(pieces, deadline_ns)
        wanted = self._num_streams if int(pieces.lengths.sum()) >= SECOND_STREAM_BYTES else 1
        with self._lock:
            self._drive(run, wanted)
        return ReadResult.of(batch, pieces.outcome(run.done), run.error)

    def close(self) -> None:
        """Drop the streams; a read in another thread fails at once. Idempotent."""
        self._is_closed = True
        for stream in list(self._streams):
            try:
                stream.socket.shutdown(socket.SHUT_RDWR)  # wakes the reader; closing would hand its fd to someone else
            except OSError:
                pass  # the peer was faster
        with self._lock:
            for stream in self._streams:
                stream.socket.close()
            self._streams.clear()

    def _drive(self, run: _Run, wanted: int) -> None:
        """Work until every frame is answered or lost; what is then in flight is dropped with its stream."""
        try:
            self._open(wanted, run.deadline_ns)
        except MooncakeError as error:
            run.fail(error)
            return
        poller = select.poll()
        by_fd = {stream.socket.fileno(): stream for stream in self._streams}
        for fd, stream in by_fd.items():
            self._feed(stream, run)
            poller.register(fd, select.POLLIN | (select.POLLOUT if stream.outgoing else 0))
        while any(stream.frames for stream in by_fd.values()):
            remaining_s = (run.deadline_ns - time.monotonic_ns()) / 1e9
            ready = poller.poll(math.ceil(remaining_s * 1e3)) if remaining_s > 0 else []
            if not ready and time.monotonic_ns() >= run.deadline_ns:
                run.fail(past_deadline(self._where, int(run.done.sum()), len(run.done)))
                break
            for fd, _ in ready:
                stream = by_fd[fd]
                try:
                    self._advance(stream, run)
                except (OSError, MooncakeError) as error:
                    run.fail(self._explain(error))
                    poller.unregister(fd)
                    del by_fd[fd]
                    self._drop(stream)
                    continue
                poller.modify(fd, select.POLLIN | (select.POLLOUT if stream.outgoing else 0))
        for stream in [stream for stream in self._streams if stream.frames or stream.outgoing]:
            self._drop(stream)
        if run.frames:
            run.fail(TransferFailed("every stream broke", where=self._where))

    def _open(self, wanted: int, deadline_ns: int) -> None:
        """Have ``wanted`` streams ready; an idle stream with something to read has been closed by the peer."""
        if self._streams:
            poller = select.poll()
            for stream in self._streams:
                poller.register(stream.socket, select.POLLIN)
            stale = {fd for fd, _ in poller.poll(0)}
            for stream in [stream for stream in self._streams if stream.socket.fileno() in stale]:
                self._drop(stream)
        while len(self._streams) < wanted:
            if self._is_closed:
                raise TransferFailed("attachment is closed", where=self._where)
            remaining_s = (deadline_ns - time.monotonic_ns()) / 1e9
            if remaining_s <= 0:
                raise past_deadline(self._where, 0, 0)
            try:
                sock = socket.create_connection((self._offer.host, self._offer.port),
                                                timeout=min(remaining_s, CONNECT_TIMEOUT_S))
            except OSError as error:
                if self._streams:
                    return  # one stream does it too
                raise self._explain(error) from error
            tune(sock)
            self._streams.append(_Stream(sock))

    def _drop(self, stream: _Stream) -> None:
        self._streams.remove(stream)
        stream.socket.close()

    def _feed(self, stream: _Stream, run: _Run) -> None:
        """Ask for the next frames on this stream, and prepare to receive the one that comes first."""
        while run.frames and len(stream.frames) < FRAMES_IN_FLIGHT_MAX:
            group = run.frames.popleft()
            window = slice(group.start, group.stop)
            self._next_frame_id = (self._next_frame_id + 1) & 0xFFFFFFFF
            reads = np.column_stack((run.pieces.remote_offsets[window], run.pieces.lengths[window]))
            request = Request(WANT_CRC if self._checksum else 0, self._next_frame_id, group.stop - group.start,
                              self._region.region_id)
            stream.outgoing += tcp_wire.pack_request(request, reads)
            stream.frames.append(_Frame(self._next_frame_id, group))
        if stream.outgoing:
            stream.send()
        if stream.cursor is None and stream.frames:
            stream.cursor = self._targets(stream, stream.frames[0], run.pieces)
            stream.has_header = False

    def _targets(self, stream: _Stream, frame: _Frame, pieces: Pieces) -> RangeCursor:
        """List where a response goes: our header buffer, the targets, our checksum word."""
        group = frame.group
        count = group.stop - group.start
        ranges = np.empty((count + 2, 2), np.uint64)
        ranges[0] = stream.header.ctypes.data, HEADER_BYTES
        ranges[1:-1, 0] = pieces.local_addresses[group.start:group.stop]
        ranges[1:-1, 1] = pieces.lengths[group.start:group.stop]
        ranges[-1] = stream.crc.ctypes.data, CRC_BYTES
        return RangeCursor(ranges if self._checksum and count else ranges[:-1])

    def _advance(self, stream: _Stream, run: _Run) -> None:
        """Send and receive what is possible now. Raises OSError, MooncakeError: the stream is of no more use."""
        if stream.outgoing:
            stream.send()
        cursor = stream.cursor
        if cursor is None:
            raise RemoteProtocolError("the owner sent bytes nobody asked for, or hung up", where=self._where)
        try:
            count = libc.receive_ranges(stream.socket.fileno(), cursor.window())
        except BlockingIOError:
            return
        if count == 0:
            raise ConnectionResetError("the owner hung up")
        cursor.advance(count)
        if not stream.has_header and cursor.position >= HEADER_BYTES:
            self._check_header(stream)
        if cursor.is_done():
            frame = stream.frames.popleft()
            stream.cursor = None
            self._finish(stream, frame, run)
            self._feed(stream, run)

    def _check_header(self, stream: _Stream) -> None:
        response = tcp_wire.unpack_response(stream.header.tobytes())
        frame = stream.frames[0]
        if response.status == tcp_wire.UNKNOWN_REGION:
            raise RegionGone(tcp_wire.STATUS_TEXT[response.status], where=self._where)
        if response.status != tcp_wire.OK:
            raise TransferFailed(tcp_wire.STATUS_TEXT.get(response.status, f"refused, status {response.status}"),
                                 where=self._where)
        if response.frame_id != frame.frame_id or response.num_bytes != frame.group.num_bytes:
            raise RemoteProtocolError(f"answer to frame {response.frame_id} of {response.num_bytes} bytes where frame "
                                      f"{frame.frame_id} of {frame.group.num_bytes} was due", where=self._where)
        stream.has_header = True

    def _finish(self, stream: _Stream, frame: _Frame, run: _Run) -> None:
        """Note the frame's pieces as complete, if the checksum is right."""
        window = slice(frame.group.start, frame.group.stop)
        if not self._checksum or frame.group.num_bytes == 0:
            run.done[window] = True
            return
        ranges = np.column_stack((run.pieces.local_addresses[window], run.pieces.lengths[window]))
        if checksum_of(ranges) == int(stream.crc[0]):
            run.done[window] = True
        else:
            run.fail(ChecksumMismatch(f"{frame.group.num_bytes} bytes arrived changed", where=self._where))

    def _explain(self, error: OSError | MooncakeError) -> MooncakeError:
        if isinstance(error, MooncakeError):
            return error
        if isinstance(error, ConnectionRefusedError):
            return PeerUnreachable("nobody listens: the owner is gone", where=self._where)
        return PeerUnreachable(f"the connection broke: {error}", where=self._where)
