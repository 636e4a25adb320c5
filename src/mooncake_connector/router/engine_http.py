"""Speak HTTP with engines: send a request, read its answer piece by piece, and break off with an engine that is silent.

Threads: one asyncio loop. Connections, their reuse and HTTP itself are aiohttp's; here are the two things that it does
not say: whether a failed request can have been seen by the engine, and which engines have said nothing for how long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import aiohttp

# uvicorn closes an idle connection after 5 s; letting go earlier avoids sending into a connection that just closed.
KEEPALIVE_S = 4.0
READ_BUFFER_BYTES = 64 << 10


class EngineUnreachable(Exception):
    """No connection to an engine could be made; it saw nothing of the request."""


class EngineBroke(Exception):
    """A connection to an engine ended in the middle of an answer, or what came was no HTTP."""


class Answer:
    """An answer whose head is here; the body is read piece by piece. Close it, however it went."""

    def __init__(self, response: aiohttp.ClientResponse, request: _Request, requests: set[_Request]) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._request = request
        self._requests = requests

    async def read_some(self) -> bytes:
        """Return what has arrived, waiting for at least one byte; empty at the end.

        Raises:
            EngineBroke: the connection ended before the answer did.
        """
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineBroke(_describe(error)) from error
        self._request.hear()
        return data

    async def read(self) -> bytes:
        """Return all that is left of the body.

        Raises:
            EngineBroke: the connection ended before the answer did.
        """
        pieces = []
        while data := await self.read_some():
            pieces.append(data)
        return b"".join(pieces)

    def close(self) -> None:
        """Let go of the connection; unless all was read, this ends the request on the engine. Idempotent."""
        self._requests.discard(self._request)
        self._response.close()


class _Request:
    """A request whose answer has not come to its end. ``heard_s`` is when the engine last said something."""

    def __init__(self, url: str, on_sent: Callable[[], None] | None) -> None:
        self.url = url
        self.on_sent = on_sent
        self._is_broken_off = False
        self.response: aiohttp.ClientResponse | None = None
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self.heard_s = self._loop.time()

    def hear(self) -> None:
        self.heard_s = self._loop.time()

    def was_broken_off(self) -> bool:
        """Tell whether the task was cancelled by ``break_off``, and by nobody else; asked once, when it was."""
        return self._is_broken_off and self._task is not None and self._task.uncancel() == 0

    def break_off(self) -> None:
        """Make whoever waits for the answer see that the connection is gone."""
        self._is_broken_off = True
        if self.response is not None:
            self.response.close()
        elif self._task is not None:
            self._task.cancel()


class EngineHttp:
    """Owns the connections to all engines.

    Args:
        connect_timeout_s: longest wait for a connection.
        connections_max: open connections, all engines together.
    """

    def __init__(self, *, connect_timeout_s: float, connections_max: int) -> None:
        self._requests: dict[str, set[_Request]] = {}
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s, sock_connect=connect_timeout_s)
        self._connector = aiohttp.TCPConnector(limit=connections_max, limit_per_host=0, keepalive_timeout=KEEPALIVE_S,
                                               ttl_dns_cache=60)
        tracing = aiohttp.TraceConfig()
        tracing.on_request_headers_sent.append(_mark_sent)
        self._session = self._open([])
        # Tracing tells when a request has left; it takes time, so only who asks for that has it.
        self._traced = self._open([tracing])

    async def post(self, url: str, path: str, body: bytes, headers: Mapping[str, str], *,
                   on_sent: Callable[[], None] | None = None) -> Answer:
        """Send a request and return its answer once the head is here.

        Args:
            url: the engine's base URL.
            path: beginning with a slash.
            body: JSON.
            headers: besides those that describe the connection and the body.
            on_sent: called when the request has left.

        Raises:
            EngineUnreachable: the engine saw nothing.
            EngineBroke: it did, and its answer did not begin.
        """
        request = _Request(url, on_sent)
        requests = self._requests.setdefault(url, set())
        requests.add(request)
        session = self._session if on_sent is None else self._traced
        try:
            request.response = await session.post(url + path, data=body, headers=headers, allow_redirects=False,
                                                  trace_request_ctx=request)
        except BaseException as error:
            requests.discard(request)
            if isinstance(error, asyncio.CancelledError) and request.was_broken_off():
                raise EngineBroke("the engine said nothing") from None
            if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError):
                raise EngineUnreachable(_describe(error)) from error
            if isinstance(error, aiohttp.ClientError | OSError):
                raise EngineBroke(_describe(error)) from error
            raise
        request.hear()
        return Answer(request.response, request, requests)

    def abort(self, url: str, *, silent_s: float) -> int:
        """Break every request at an engine that has said nothing for so long; return how many those were."""
        before_s = asyncio.get_running_loop().time() - silent_s
        silent = [each for each in self._requests.get(url, ()) if each.heard_s <= before_s]
        for request in silent:
            request.break_off()
        return len(silent)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()
        await self._traced.close()
        await self._connector.close()

    def _open(self, tracing: list[aiohttp.TraceConfig]) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=self._connector, connector_owner=False, timeout=self._timeout, trace_configs=tracing,
            read_bufsize=READ_BUFFER_BYTES, cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"})


async def _mark_sent(_session: aiohttp.ClientSession, context: object,
                     _params: aiohttp.TraceRequestHeadersSentParams) -> None:
    request = getattr(context, "trace_request_ctx", None)
    if isinstance(request, _Request) and request.on_sent is not None:
        request.on_sent()


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
