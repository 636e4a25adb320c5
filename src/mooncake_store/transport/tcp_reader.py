"""Read a peer's memory over tcp, into scattered targets.

A batch is cut into frames of up to 1,024 reads; frames go over a few streams per attachment, two at a time on each, and
the bytes are received straight into their targets. One thread, the caller's, drives all streams of its attachment. A
lone small read, such as one block of a small model or an epoch word, takes a shorter path: one send, one receive.

A stream is dropped, with what was in flight on it, on any error and at the deadline, so that nothing is written to a
target after ``read`` has returned; the next read opens a new one.

Integrity: about every 512 KiB carry a checksum (tcp's own sum misses one corruption in 65,536). A mismatch fails its
requests. There is none under TLS, which authenticates every byte, nor where the caller compares one of its own.
"""

from __future__ import annotations

import math
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import ChecksumMismatch, MooncakeError, PeerUnreachable, RemoteProtocolError, TransferFailed
from mooncake_store.transport import tcp_wire
from mooncake_store.transport.base import ReadBatch, ReadResult, RegionDescriptor, RegionGone, TcpOffer
from mooncake_store.transport.checksum import checksum_of
from mooncake_store.transport.coalesce import Group, Pieces, coalesce, groups
from mooncake_store.transport.copying import past_deadline, single_range
from mooncake_store.transport.cursor import RangeCursor
from mooncake_store.transport.tcp_stream import SPACE, WOULD_BLOCK, hang_up, has_pending, receive, tune
from mooncake_store.transport.tcp_wire import CHECKSUM_BYTES, FRAME_READS_MAX, HEADER_BYTES, WANT_CHECKSUM, Request

FRAME_BYTES = 4 << 20
"""Bytes asked for in one frame, give or take a read."""
FRAMES_IN_FLIGHT_MAX = 2
SECOND_STREAM_BYTES = 8 << 20
"""A smaller read uses one stream."""
LONE_READ_BYTES = 64 << 10
"""A lone read up to this takes the short path."""
CONNECT_TIMEOUT_S = 3.0


class _Frame(NamedTuple):
    """One request in flight."""

    frame_id: int
    group: Group


class _Incoming:
    """The response to a frame as it comes in: a header, then chunk by chunk the reads and their checksum.

    Attributes:
        frame: what was asked for.
        cursor: where it goes: a header buffer, the targets, checksum words of our own.
        has_header: whether the header has come and was what it should be.
    """

    def __init__(self, frame: _Frame, header: npt.NDArray[np.uint8], pieces: Pieces, flags: int) -> None:
        group = frame.group
        lengths = pieces.lengths[group.start:group.stop]
        self.frame = frame
        self.has_header = False
        self._is_checked = bool(flags)
        self._reads = np.column_stack((pieces.local_addresses[group.start:group.stop], lengths))
        self._chunks = list(tcp_wire.chunks(lengths)) if flags else [Group(0, len(lengths), group.num_bytes)]
        self._checksums = np.zeros(len(self._chunks), "<u8")
        self._num_whole = 0
        self._end = HEADER_BYTES
        self.cursor = RangeCursor(tcp_wire.lay_out(
            single_range(header.ctypes.data, HEADER_BYTES), self._reads,
            [chunk.stop for chunk in self._chunks] if flags else (), self._checksums.ctypes.data))

    def whole_chunks(self) -> Iterator[tuple[Group, bool]]:
        """Yield each chunk once all of it is here, and whether it is what was sent."""
        while self._num_whole < len(self._chunks):
            chunk = self._chunks[self._num_whole]
            end = self._end + chunk.num_bytes + (CHECKSUM_BYTES if self._is_checked else 0)
            if end > self.cursor.position:
                return
            is_intact = not self._is_checked or (
                checksum_of(self._reads[chunk.start:chunk.stop]) == int(self._checksums[self._num_whole]))
            self._num_whole += 1
            self._end = end
            yield chunk, is_intact


class _Stream:
    """One connection: requests going out, and the response that is coming in."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.poller = select.poll()
        self.poller.register(sock, select.POLLIN)
        self.outgoing = b""
        self.frames: deque[_Frame] = deque()
        self.incoming: _Incoming | None = None
        self.header = np.zeros(HEADER_BYTES, np.uint8)
        self.checksum = np.zeros(1, "<u8")

    def is_stale(self) -> bool:
        """Tell whether an idle connection has something to read: the peer has closed it."""
        return bool(self.poller.poll(0))

    def send(self) -> None:
        """Send what the socket takes of the requests. Raises OSError."""
        try:
            self.outgoing = self.outgoing[self.socket.send(self.outgoing):]
        except WOULD_BLOCK:
            pass  # poll says when


class _Run:
    """What one ``read`` keeps: its pieces, which of them are complete, the frames not asked for yet."""

    def __init__(self, pieces: Pieces, deadline_ns: int, flags: int) -> None:
        self.pieces = pieces
        self.deadline_ns = deadline_ns
        self.flags = flags
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

    def __init__(self, region: RegionDescriptor, offer: TcpOffer, *, num_streams: int, checksum: bool,
                 tls: ssl.SSLContext | None) -> None:
        self._region = region
        self._offer = offer
        self._where = f"tcp {offer.host}:{offer.port}"
        self._num_streams = num_streams
        self._flags = WANT_CHECKSUM if checksum else 0
        self._tls = tls
        self._lock = threading.Lock()
        self._streams: list[_Stream] = []
        self._next_frame_id = 0
        self._is_closed = False

    def greet(self, deadline_ns: int) -> None:
        """Ask with a frame of no reads whether the region is served. Raises as ``TcpTransport.attach``."""
        nothing = np.empty(0, np.uint64)
        run = _Run(Pieces(nothing, nothing, nothing, nothing.astype(np.int64), nothing.astype(np.int64)),
                   deadline_ns, self._flags)
        run.frames.append(Group(0, 0, 0))
        with self._lock:
            self._drive(run, 1)
        if run.error is not None:
            raise run.error

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``."""
        batch.check(self._region.size_bytes)
        if time.monotonic_ns() >= deadline_ns:
            return ReadResult.failed(batch, past_deadline(self._where, 0, len(batch.lengths)))
        if len(batch.lengths) == 1 and self._tls is None and int(batch.lengths[0]) <= LONE_READ_BYTES:
            return self._read_one(batch, deadline_ns)
        pieces = coalesce(batch, piece_max_bytes=tcp_wire.CHUNK_BYTES)
        run = _Run(pieces, deadline_ns, self._flags_of(batch))
        wanted = self._num_streams if int(pieces.lengths.sum()) >= SECOND_STREAM_BYTES else 1
        with self._lock:
            self._drive(run, wanted)
        return ReadResult.of(batch, pieces.outcome(run.done), run.error)

    def close(self) -> None:
        """Drop the streams; a read in another thread fails at once. Idempotent."""
        self._is_closed = True
        for stream in list(self._streams):
            hang_up(stream.socket)
        with self._lock:
            for stream in self._streams:
                stream.socket.close()
            self._streams.clear()

    def _read_one(self, batch: ReadBatch, deadline_ns: int) -> ReadResult:
        """Copy a lone small read, with little Python."""
        offset, length = int(batch.remote_offsets[0]), int(batch.lengths[0])
        address, flags = int(batch.local_addresses[0]), self._flags_of(batch)
        with self._lock:
            stream: _Stream | None = None
            try:
                self._open(1, deadline_ns)
                stream = self._streams[0]
                frame = _Frame(self._number(), Group(0, 1, length))
                stream.socket.send(tcp_wire.pack_single(
                    Request(flags, frame.frame_id, 1, self._region.region_id), offset, length))
                self._receive_one(stream, frame, [SPACE[address:address + length],
                                                  *([stream.checksum.data.cast("B")] if flags else [])], deadline_ns)
            except (OSError, MooncakeError) as error:
                if stream is not None:
                    self._drop(stream)
                return ReadResult.failed(batch, self._explain(error))
            if flags and checksum_of(single_range(address, length)) != int(stream.checksum[0]):
                return ReadResult.failed(batch, self._mismatch(length))
        return ReadResult(np.ones(1, np.bool_), length)

    def _receive_one(self, stream: _Stream, frame: _Frame, targets: list[memoryview], deadline_ns: int) -> None:
        """Wait for the only answer. Raises OSError, MooncakeError: the stream is of no more use."""
        buffers = [stream.header.data, *targets]
        total, received = sum(map(len, buffers)), 0
        stream.frames.append(frame)
        while received < total:
            remaining_ms = (deadline_ns - time.monotonic_ns()) / 1e6
            if remaining_ms <= 0 or not stream.poller.poll(math.ceil(remaining_ms)):
                raise past_deadline(self._where, 0, 1)
            count = stream.socket.recvmsg_into(_behind(buffers, received))[0]
            if count == 0:
                raise ConnectionResetError("the owner hung up")
            if received < HEADER_BYTES <= received + count:
                self._check_header(stream)
            received += count
        stream.frames.clear()

    def _flags_of(self, batch: ReadBatch) -> int:
        return 0 if batch.is_verified_later else self._flags

    def _number(self) -> int:
        self._next_frame_id = (self._next_frame_id + 1) & 0xFFFFFFFF
        return self._next_frame_id

    def _mismatch(self, num_bytes: int) -> ChecksumMismatch:
        return ChecksumMismatch(f"{num_bytes} bytes arrived changed", where=self._where)

    def _drive(self, run: _Run, wanted: int) -> None:
        """Work until every frame is answered or lost; what is then in flight is dropped with its stream."""
        try:
            self._open(wanted, run.deadline_ns)
        except MooncakeError as error:
            run.fail(error)
            return
        poller = select.poll()
        busy: dict[int, _Stream] = {}
        for stream in list(self._streams):
            if self._try(self._feed, stream, run) and stream.frames:
                busy[stream.socket.fileno()] = stream
                poller.register(stream.socket, select.POLLIN | (select.POLLOUT if stream.outgoing else 0))
        while busy:
            remaining_s = (run.deadline_ns - time.monotonic_ns()) / 1e9
            ready = poller.poll(math.ceil(remaining_s * 1e3)) if remaining_s > 0 else []
            if not ready and time.monotonic_ns() >= run.deadline_ns:
                run.fail(past_deadline(self._where, int(run.done.sum()), len(run.done)))
                break
            for fd, _ in ready:
                stream = busy[fd]
                was_sending = bool(stream.outgoing)
                if not self._try(self._advance, stream, run) or not stream.frames:
                    poller.unregister(fd)
                    del busy[fd]
                elif was_sending or stream.outgoing:
                    poller.modify(fd, select.POLLIN | (select.POLLOUT if stream.outgoing else 0))
        for stream in [stream for stream in self._streams if stream.frames or stream.outgoing]:
            self._drop(stream)
        if run.frames:
            run.fail(TransferFailed("every stream broke", where=self._where))

    def _try(self, step: Callable[[_Stream, _Run], None], stream: _Stream, run: _Run) -> bool:
        """Take a step on a stream; False when it broke, which is then noted and the stream dropped."""
        try:
            step(stream, run)
        except (OSError, MooncakeError) as error:
            run.fail(self._explain(error))
            self._drop(stream)
            return False
        return True

    def _open(self, wanted: int, deadline_ns: int) -> None:
        """Have ``wanted`` streams ready; an idle stream with something to read has been closed by the peer."""
        for stream in [stream for stream in self._streams if stream.is_stale()]:
            self._drop(stream)
        while len(self._streams) < wanted:
            if self._is_closed:
                raise TransferFailed("attachment is closed", where=self._where)
            remaining_s = (deadline_ns - time.monotonic_ns()) / 1e9
            if remaining_s <= 0:
                raise past_deadline(self._where, 0, 0)
            try:
                sock = self._connect(min(remaining_s, CONNECT_TIMEOUT_S))
            except OSError as error:
                if self._streams:
                    return  # one stream does it too
                raise self._explain(error) from error
            self._streams.append(_Stream(sock))

    def _connect(self, timeout_s: float) -> socket.socket:
        """Open a connection, and greet if under TLS; each of these has this much time. Raises OSError."""
        sock = socket.create_connection((self._offer.host, self._offer.port), timeout=timeout_s)
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock)
            tune(sock)
        except OSError:
            sock.close()
            raise
        return sock

    def _drop(self, stream: _Stream) -> None:
        self._streams.remove(stream)
        stream.socket.close()

    def _feed(self, stream: _Stream, run: _Run) -> None:
        """Ask for the next frames on this stream, and prepare to receive the one that comes first. Raises OSError."""
        while run.frames and len(stream.frames) < FRAMES_IN_FLIGHT_MAX:
            group = run.frames.popleft()
            window = slice(group.start, group.stop)
            frame = _Frame(self._number(), group)
            reads = np.column_stack((run.pieces.remote_offsets[window], run.pieces.lengths[window]))
            request = Request(run.flags, frame.frame_id, group.stop - group.start, self._region.region_id)
            stream.outgoing += tcp_wire.pack_request(request, reads)
            stream.frames.append(frame)
        if stream.outgoing:
            stream.send()
        if stream.incoming is None and stream.frames:
            stream.incoming = _Incoming(stream.frames[0], stream.header, run.pieces, run.flags)

    def _advance(self, stream: _Stream, run: _Run) -> None:
        """Send and receive what is possible now. Raises OSError, MooncakeError: the stream is of no more use."""
        if stream.outgoing:
            stream.send()
        may_have_more = True
        while may_have_more and (incoming := stream.incoming) is not None:
            try:
                may_have_more = receive(stream.socket, incoming.cursor)
            except WOULD_BLOCK:
                return
            if not incoming.has_header and incoming.cursor.position >= HEADER_BYTES:
                self._check_header(stream)
                incoming.has_header = True
            for chunk, is_intact in incoming.whole_chunks():
                first = incoming.frame.group.start
                run.done[first + chunk.start:first + chunk.stop] = is_intact
                if not is_intact:
                    run.fail(self._mismatch(chunk.num_bytes))
            if incoming.cursor.is_done():
                stream.frames.popleft()
                stream.incoming = None
                self._feed(stream, run)
        if stream.incoming is None and has_pending(stream.socket):
            raise RemoteProtocolError("the owner sent bytes nobody asked for", where=self._where)

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

    def _explain(self, error: OSError | MooncakeError) -> MooncakeError:
        if isinstance(error, MooncakeError):
            return error
        if isinstance(error, ConnectionRefusedError):
            return PeerUnreachable("nobody listens: the owner is gone", where=self._where)
        if isinstance(error, ssl.SSLError):
            return TransferFailed(f"TLS failed: {error.reason or error}", where=self._where,
                                  hint="each member's tls_cert must be valid now and signed by the others' tls_ca")
        return PeerUnreachable(f"the connection broke: {error}", where=self._where)


def _behind(buffers: list[memoryview], position: int) -> list[memoryview]:
    """Return what of buffers, one after the other, lies behind ``position``."""
    rest = []
    for buffer in buffers:
        if position < len(buffer):
            rest.append(buffer[position:] if position else buffer)
        position = max(0, position - len(buffer))
    return rest
