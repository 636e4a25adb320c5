"""Send the two legs of a request to engines and say how each ended.

Threads: one asyncio loop. Failures are results here, never exceptions; only cancellation passes through.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Literal, NamedTuple

import aiohttp
import msgspec

from mooncake_connector.router.answers import is_json
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.dialects.base import Dialect
from mooncake_connector.router.dialects.vllm import read_introduction
from mooncake_connector.router.engines import Introduction
from mooncake_connector.router.usage import UNKNOWN, Usage, read_usage

log = logging.getLogger(__name__)

# uvicorn closes an idle connection after 5 s; letting go earlier avoids sending into a connection that just closed.
KEEPALIVE_S = 4.0
READ_BUFFER_BYTES = 64 << 10
TAIL_BYTES = 64
JSON = "application/json"
EVENT_STREAM = "text/event-stream"
BAD_REQUEST_STATUSES = frozenset({400, 413, 422})

FailureKind = Literal["unsent", "lost", "refused", "timeout"]


class WholeAnswer(NamedTuple):
    """An answer that is complete: not streamed, or an error of the engine's."""

    status: int
    content_type: str
    body: bytes


class LegFailure(NamedTuple):
    """A leg that brought nothing.

    ``unsent``: no connection, the engine saw nothing; ``lost``: the connection broke; ``refused``: the engine, alive,
    answered with an error ``status``; ``timeout``: a deadline passed. ``complaint`` is the engine's own answer when the
    request itself is to blame, as opposed to the engine.
    """

    kind: FailureKind
    url: str
    message: str
    status: int = 0
    complaint: WholeAnswer | None = None


class StreamedAnswer:
    """An answer whose first bytes are here.

    ``tail`` keeps the last bytes read, to tell a finished stream from a cut one.
    """

    def __init__(self, response: aiohttp.ClientResponse, first: bytes) -> None:
        self.content_type = response.headers.get("Content-Type", EVENT_STREAM)
        self.first = first
        self.tail = first[-TAIL_BYTES:]
        self._response = response

    async def read(self) -> bytes:
        """Return what has arrived, waiting for at least one byte; empty at the end.

        Raises:
            aiohttp.ClientError: the connection broke.
        """
        data = await self._response.content.readany()
        self.tail = (self.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        return data

    def close(self) -> None:
        """Let go of the connection; unless all was read, this ends the request on the engine."""
        self._response.close()


class PrefillDone(NamedTuple):
    """A prefill leg that succeeded; ``introduction`` has no models and is None without the connector's params."""

    url: str
    duration_s: float
    introduction: Introduction | None
    usage: Usage = UNKNOWN


class PrefillLeg:
    """One prefill request in flight.

    ``task`` ends with PrefillDone or LegFailure; cancel it to end the request on the engine.
    """

    def __init__(self, legs: Legs, url: str, route: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.url = url
        self.is_sent = False
        self._moved = asyncio.Event()
        self.task = asyncio.create_task(legs.run_prefill(self, route, body, headers), name=f"prefill {url}")
        self.task.add_done_callback(lambda _: self._moved.set())

    def mark_sent(self) -> None:
        """Note that the request has left this machine."""
        self.is_sent = True
        self._moved.set()

    async def wait_sent(self) -> bool:
        """Wait until the request has left this machine; False when it never will. Bounded by the connect timeout."""
        await self._moved.wait()
        return self.is_sent

    def outcome(self) -> PrefillDone | LegFailure | None:
        """Return how it ended, None while it runs or when it was cancelled."""
        if not self.task.done() or self.task.cancelled():
            return None
        return self.task.result()


class Legs:
    """Owns the connections to engines."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._connector = aiohttp.TCPConnector(
            limit=config.connections_max, limit_per_host=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=60
        )
        tracing = aiohttp.TraceConfig()
        tracing.on_request_headers_sent.append(_mark_sent)
        self._decode_session = self._session([])
        # Tracing tells when a request has left; it costs some microseconds, so only the prefill leg has it.
        self._prefill_session = self._session([tracing])

    def reconfigure(self, config: RouterConfig) -> None:
        """Use other timeouts for what is sent from now on; that of connecting stays."""
        self._config = config

    async def close(self) -> None:
        """Close every connection."""
        await self._decode_session.close()
        await self._prefill_session.close()
        await self._connector.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """Return the session for anything that is not a prefill leg."""
        return self._decode_session

    def start_prefill(self, url: str, route: str, body: bytes, headers: Mapping[str, str]) -> PrefillLeg:
        """Send a prefill request; returns at once."""
        return PrefillLeg(self, url, route, body, headers)

    async def run_prefill(
        self, leg: PrefillLeg, route: str, body: bytes, headers: Mapping[str, str]
    ) -> PrefillDone | LegFailure:
        """Send one prefill request and read its answer. Called by :class:`PrefillLeg`."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        try:
            async with (
                asyncio.timeout(self._config.total_timeout_s),
                self._prefill_session.post(
                    leg.url + route, data=body, headers=headers, trace_request_ctx=leg
                ) as response,
            ):
                data = await response.read()
                if response.status != 200:
                    complaint = _complaint(response, data)
                    return LegFailure("refused", leg.url, _summary(response.status, data), response.status, complaint)
                return PrefillDone(leg.url, loop.time() - start_s, read_introduction(data, ()), read_usage(data))
        except TimeoutError:
            kind: FailureKind = "timeout" if leg.is_sent else "unsent"
            return LegFailure(kind, leg.url, "timed out")
        except (aiohttp.ClientError, OSError) as error:
            return LegFailure("lost" if leg.is_sent else "unsent", leg.url, _describe(error))

    async def open_decode(
        self, url: str, route: str, body: bytes, headers: Mapping[str, str], *, dialect: Dialect, is_stream: bool
    ) -> StreamedAnswer | WholeAnswer | LegFailure:
        """Send a decode request; return when the first byte of a stream, or the whole of another answer, is here."""
        limit_s = self._config.first_byte_timeout_s if is_stream else self._config.total_timeout_s
        response: aiohttp.ClientResponse | None = None
        is_kept = False
        try:
            async with asyncio.timeout(limit_s):
                response = await self._decode_session.post(url + route, data=body, headers=headers)
                answer = await _first_of(response, url, dialect, is_stream=is_stream)
            is_kept = isinstance(answer, StreamedAnswer)
            return answer
        except TimeoutError as error:
            if isinstance(error, aiohttp.ServerTimeoutError):
                return LegFailure("unsent", url, _describe(error))
            return LegFailure("timeout", url, f"no answer within {limit_s:g} s")
        except aiohttp.ClientConnectorError as error:
            return LegFailure("unsent", url, _describe(error))
        except (aiohttp.ClientError, OSError) as error:
            return LegFailure("lost", url, _describe(error))
        finally:
            if response is not None and not is_kept:
                response.close()

    def _session(self, trace_configs: list[aiohttp.TraceConfig]) -> aiohttp.ClientSession:
        connect_s = self._config.connect_timeout_s
        return aiohttp.ClientSession(
            connector=self._connector,
            connector_owner=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s),
            trace_configs=trace_configs,
            read_bufsize=READ_BUFFER_BYTES,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
            headers={"Accept-Encoding": "identity", "Content-Type": JSON},
        )


async def _first_of(
    response: aiohttp.ClientResponse, url: str, dialect: Dialect, *, is_stream: bool
) -> StreamedAnswer | WholeAnswer | LegFailure:
    if is_stream and response.status == 200:
        first = await response.content.readany()
        if not first:
            return LegFailure("lost", url, "the stream ended before its first byte")
        failure = dialect.stream_failure(first)
        if failure is not None and failure.status >= 500:
            return LegFailure("refused", url, f"HTTP {failure.status}: {failure.message[:500]}", failure.status)
        return StreamedAnswer(response, first)
    body = await response.read()
    if response.status >= 500:
        return LegFailure("refused", url, _summary(response.status, body), response.status)
    content_type = response.headers.get("Content-Type", JSON)
    if response.status >= 400 and not is_json(body):
        return LegFailure("refused", url, _summary(response.status, body), response.status)
    return WholeAnswer(response.status, content_type, body)


async def _mark_sent(
    _session: aiohttp.ClientSession, context: object, _params: aiohttp.TraceRequestHeadersSentParams
) -> None:
    leg = getattr(context, "trace_request_ctx", None)
    if isinstance(leg, PrefillLeg):
        leg.mark_sent()


def _complaint(response: aiohttp.ClientResponse, body: bytes) -> WholeAnswer | None:
    """Return an engine's answer to a bad request; None for errors that another engine might not make."""
    if response.status not in BAD_REQUEST_STATUSES or not is_json(body):
        return None
    return WholeAnswer(response.status, response.headers.get("Content-Type", JSON), body)


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


class _EngineError(msgspec.Struct):
    message: str = ""


class _EngineErrorAnswer(msgspec.Struct):
    """OpenAI's shape, or SGLang's: the message beside everything else."""

    error: _EngineError | None = None
    message: str = ""


def _summary(status: int, body: bytes) -> str:
    try:
        answer = msgspec.json.decode(body, type=_EngineErrorAnswer)
        text = answer.error.message if answer.error is not None else answer.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        text = body[:200].decode("utf-8", "replace").strip()
    return f"HTTP {status}: {text[:500]}" if text else f"HTTP {status}"
