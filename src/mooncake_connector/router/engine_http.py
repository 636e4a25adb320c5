"""Speak HTTP/1.1 with engines: connections that are kept, one request at a time on each.

Threads: one asyncio loop. A general client costs more time than everything else the router does for a request; this one
knows only what engines need: POST with a body, an answer of known length, in chunks, or until the end. Bounds:
``HEAD_MAX_BYTES`` for the head of an answer, ``BUFFER_MAX_BYTES`` unread before the engine is made to wait.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from typing import NamedTuple, cast
from urllib.parse import urlsplit

HEAD_MAX_BYTES = 64 << 10
BUFFER_MAX_BYTES = 256 << 10
CHUNK_LINE_MAX_BYTES = 1024
# uvicorn closes an idle connection after 5 s; letting go earlier avoids sending into a connection that just closed.
KEEPALIVE_S = 4.0
IDLE_MAX = 512

_FIXED = "Content-Type: application/json\r\nAccept-Encoding: identity\r\n"
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?")


class EngineUnreachable(Exception):
    """No connection to an engine could be made; it saw nothing of the request."""


class EngineBroke(Exception):
    """A connection to an engine ended in the middle of an answer, or what came was no HTTP."""


class Origin(NamedTuple):
    """Where an engine listens."""

    host: str
    port: int
    is_tls: bool

    @property
    def authority(self) -> str:
        """Return what to put into the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def origin_of(url: str) -> Origin:
    """Return where the engine with this base URL listens."""
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    return Origin(parts.hostname or "", parts.port or (443 if is_tls else 80), is_tls)


class Answer:
    """An answer whose head is here; the body is read piece by piece. Close it, however it went."""

    def __init__(self, connection: _Connection, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection

    async def read_some(self) -> bytes:
        """Return what has arrived, waiting for at least one byte; empty at the end.

        Raises:
            EngineBroke: the connection ended before the answer did.
        """
        return await self._connection.read_some()

    async def read(self) -> bytes:
        """Return all that is left of the body.

        Raises:
            EngineBroke: the connection ended before the answer did.
        """
        pieces = []
        while data := await self._connection.read_some():
            pieces.append(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Let go of the connection; unless all was read, this ends the request on the engine. Idempotent."""
        self._connection.let_go()


class EngineHttp:
    """Owns the connections to all engines.

    Args:
        connect_timeout_s: longest wait for a new connection.
        connections_max: open connections, all engines together.
    """

    def __init__(self, *, connect_timeout_s: float, connections_max: int) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._connections_max = connections_max
        self._origins: dict[str, Origin] = {}
        self._idle: dict[Origin, list[_Connection]] = {}
        self._busy: dict[Origin, set[_Connection]] = {}
        self._num_open = 0
        self._loop = asyncio.get_running_loop()
        self._tls: ssl.SSLContext | None = None

    async def post(
        self,
        url: str,
        path: str,
        body: bytes,
        headers: bytes,
        *,
        on_sent: Callable[[], None] | None = None,
    ) -> Answer:
        """Send a request and return its answer once the head is here.

        Args:
            url: the engine's base URL.
            path: beginning with a slash.
            body: JSON.
            headers: lines besides those that describe the connection and the body, each with its end.
            on_sent: called when the request has left; once more when it has to be sent anew on a fresh connection.

        Raises:
            EngineUnreachable: the engine saw nothing.
            EngineBroke: it did, and its answer did not begin.
        """
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = origin_of(url)
        first = f"POST {path} HTTP/1.1\r\nHost: {origin.authority}\r\n{_FIXED}Content-Length: {len(body)}\r\n"
        head = b"%s%s\r\n" % (first.encode(), headers)
        while True:
            connection = self._take_idle(origin)
            is_reused = connection is not None
            if connection is None:
                connection = await self._connect(origin)
            try:
                connection.send(head, body)
                if on_sent is not None:
                    on_sent()
                return await connection.read_head()
            except EngineBroke:
                connection.let_go()
                # It was closed while idle, and the request crossed its end: nobody has seen it.
                if not (is_reused and connection.is_untouched):
                    raise
            except BaseException:
                connection.let_go()
                raise

    def abort(self, url: str, *, silent_s: float) -> int:
        """Break every request at an engine that has said nothing for so long; return how many those were."""
        origin, before_s = origin_of(url), self._loop.time() - silent_s
        silent = [each for each in self._busy.get(origin, ()) if each.heard_s <= before_s]
        for connection in silent:
            connection.abort()
        return len(silent)

    def close(self) -> None:
        """Close every connection."""
        for connections in (*self._idle.values(), *self._busy.values()):
            for connection in tuple(connections):
                connection.abort()
        self._idle.clear()

    def _take_idle(self, origin: Origin) -> _Connection | None:
        idle = self._idle.get(origin)
        before_s = self._loop.time() - KEEPALIVE_S
        while idle:
            connection = idle.pop()
            if connection.is_open and connection.heard_s > before_s:
                self._busy[origin].add(connection)
                return connection
            connection.abort()
        return None

    async def _connect(self, origin: Origin) -> _Connection:
        if self._num_open >= self._connections_max:
            raise EngineUnreachable(f"{self._num_open} connections to engines are open, the most that are allowed")
        if origin.is_tls and self._tls is None:
            self._tls = ssl.create_default_context()
        self._num_open += 1
        connection = _Connection(self, origin, self._loop)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._loop.create_connection(
                    lambda: connection, origin.host, origin.port, ssl=self._tls if origin.is_tls else None
                )
        except TimeoutError as error:
            self._num_open -= 1
            raise EngineUnreachable(f"no connection within {self._connect_timeout_s:g} s") from error
        except OSError as error:
            self._num_open -= 1
            raise EngineUnreachable(error.strerror or str(error)) from error
        except asyncio.CancelledError:
            if not connection.is_open:
                self._num_open -= 1
            connection.abort()
            raise
        self._busy.setdefault(origin, set()).add(connection)
        return connection

    def take_back(self, connection: _Connection, *, is_reusable: bool) -> None:
        """Take a connection whose request is over. Called by the connection."""
        self._busy.get(connection.origin, set()).discard(connection)
        idle = self._idle.setdefault(connection.origin, [])
        if is_reusable and connection.is_open and len(idle) < IDLE_MAX:
            idle.append(connection)
        else:
            connection.abort()

    def note_closed(self, connection: _Connection) -> None:
        """Forget a connection that is gone. Called by the connection."""
        self._num_open -= 1
        self._busy.get(connection.origin, set()).discard(connection)


class _Connection(asyncio.Protocol):
    """One connection: at most one request at a time."""

    def __init__(self, owner: EngineHttp, origin: Origin, loop: asyncio.AbstractEventLoop) -> None:
        self.origin = origin
        self.is_open = False
        self.is_untouched = True
        self.heard_s = 0.0
        self._owner = owner
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._reader = _Reader()
        self._is_paused = False
        self._is_busy = False

    # ---- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked: uvloop's transports are no subclass.
        self._transport, self.is_open = cast(asyncio.Transport, transport), True
        self.heard_s = self._loop.time()

    def data_received(self, data: bytes) -> None:
        self.heard_s = self._loop.time()
        self.is_untouched = False
        self._reader.feed(data)
        if self._reader.num_unread > BUFFER_MAX_BYTES and self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._reader.end()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._reader.end(str(error) if error else "")
        self._owner.note_closed(self)
        self._wake()

    # ---- what the owner does

    def send(self, head: bytes, body: bytes) -> None:
        """Send one request."""
        if self._transport is None or not self.is_open:
            raise EngineBroke("the connection is closed")
        self._reader = _Reader()
        self.is_untouched, self._is_busy = True, True
        self.heard_s = self._loop.time()
        self._transport.write(head + body)

    async def read_head(self) -> Answer:
        """Wait for the head of the answer."""
        while True:
            head = self._reader.take_head()
            if head is not None:
                return Answer(self, head.status, head.headers)
            self._raise_if_broken()
            await self._wait()

    async def read_some(self) -> bytes:
        """Return what has arrived of the body; empty at its end."""
        while True:
            data = self._reader.take()
            if data:
                if self._is_paused and self._transport is not None:
                    self._is_paused = False
                    self._transport.resume_reading()
                return data
            if self._reader.is_complete:
                return b""
            self._raise_if_broken()
            await self._wait()

    def let_go(self) -> None:
        """Give the connection back: to be used again when the answer was read to its end, else to be closed."""
        if self._is_busy:
            self._is_busy = False
            self._owner.take_back(self, is_reusable=self._reader.is_reusable and not self._is_paused)

    def abort(self) -> None:
        """Close at once; whoever waits is told."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _raise_if_broken(self) -> None:
        if self._reader.problem:
            raise EngineBroke(self._reader.problem)
        if not self.is_open:
            raise EngineBroke("the connection was closed")


class _Head(NamedTuple):
    status: int
    headers: dict[str, str]


class _Reader:
    """Takes an answer apart as it arrives. Knows nothing of connections.

    Attributes:
        problem: why no more can come; empty while it can.
        is_complete: the whole body is here.
    """

    def __init__(self) -> None:
        self.problem = ""
        self.is_complete = False
        self._raw = b""
        self._head: _Head | None = None
        self._is_head_taken = False
        self._body: list[bytes] = []
        self.num_unread = 0
        self._left: int | None = None
        self._is_chunked = False
        self._is_kept = True

    @property
    def is_reusable(self) -> bool:
        """Tell whether another request may follow on the connection."""
        return self.is_complete and self._is_kept and not self.problem and not self._raw

    def feed(self, data: bytes) -> None:
        """Take in bytes."""
        if self.problem or self.is_complete:
            self._is_kept = False  # more than was announced
            return
        if self._head is None:
            self._raw += data
            if not self._find_head():
                return
            data, self._raw = self._raw, b""
        if self._is_chunked:
            self._feed_chunks(data)
        elif self._left is None:
            self._add(data)
        else:
            self._add(data[: self._left])
            self._is_kept = self._is_kept and len(data) <= self._left
            self._left -= min(len(data), self._left)
            self.is_complete = not self._left

    def end(self, why: str = "") -> None:
        """Take in that nothing more will come."""
        if self._head is not None and not self._is_chunked and self._left is None and not why:
            self.is_complete, self._is_kept = True, False
        elif not self.is_complete:
            self.problem = self.problem or why or "the connection was closed in the middle of the answer"
        self._is_kept = False

    def take_head(self) -> _Head | None:
        """Return the head when it is here."""
        return self._head

    def take(self) -> bytes:
        """Return the body so far, and forget it."""
        if not self._body:
            return b""
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        self.num_unread = 0
        return data

    def _add(self, data: bytes) -> None:
        if data:
            self._body.append(data)
            self.num_unread += len(data)

    def _find_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > HEAD_MAX_BYTES:
                self.problem = f"the head of the answer is longer than {HEAD_MAX_BYTES} bytes"
            return False
        first, *lines = self._raw[:end].split(b"\r\n")
        status = _STATUS.fullmatch(first)
        if status is None:
            self.problem = f"the answer is no HTTP: {first[:80]!r}"
            return False
        self._raw = self._raw[end + 4 :]
        if status[1].startswith(b"1"):  # 100 Continue and its like announce the answer
            return self._find_head()
        headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        self._head = _Head(int(status[1]), headers)
        self._expect(self._head, is_old=first.startswith(b"HTTP/1.0"))
        return not self.problem

    def _expect(self, head: _Head, *, is_old: bool) -> None:
        self._is_kept = not is_old and head.headers.get("connection", "").lower() != "close"
        length = head.headers.get("content-length", "")
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            self._is_chunked = True
        elif length.isascii() and length.isdigit():
            self._left = int(length)
            self.is_complete = not self._left
        elif length:
            self.problem = f"the answer's length makes no sense: {length[:40]!r}"
        elif head.status in (204, 304):
            self.is_complete = True

    def _feed_chunks(self, data: bytes) -> None:
        """Take chunks apart; ``_left`` is what is missing of the current one, its line end included."""
        raw, at = self._raw + data if self._raw else data, 0
        while at < len(raw):
            if self._left:
                piece = raw[at : at + self._left]
                self._add(piece[: max(self._left - 2, 0)])
                self._left -= len(piece)
                at += len(piece)
                continue
            line_end = raw.find(b"\r\n", at)
            if line_end < 0:
                break
            try:
                size = int(raw[at:line_end].partition(b";")[0], 16)
            except ValueError:
                size = -1
            if size < 0:
                self.problem = f"a chunk of the answer makes no sense: {raw[at : at + 40]!r}"
                return
            if size == 0:
                self._end_chunks(raw, at, line_end)
                return
            at, self._left = line_end + 2, size + 2
        self._raw = raw[at:]
        if len(self._raw) > CHUNK_LINE_MAX_BYTES:
            self.problem = "a chunk of the answer has no size"

    def _end_chunks(self, raw: bytes, at: int, line_end: int) -> None:
        """Take in the last chunk and what may follow it: trailers, then an empty line."""
        end = raw.find(b"\r\n\r\n", line_end)
        if end >= 0:
            self.is_complete, self._raw = True, raw[end + 4 :]
        elif len(raw) - at > HEAD_MAX_BYTES:
            self.problem = f"the trailers of the answer are longer than {HEAD_MAX_BYTES} bytes"
        else:
            self._raw = raw[at:]
