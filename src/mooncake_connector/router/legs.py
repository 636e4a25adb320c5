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
from mooncake_connector.router.engine_http import Answer, EngineBroke, EngineHttp, EngineUnreachable
from mooncake_connector.router.engines import Introduction
from mooncake_connector.router.usage import UNKNOWN, Usage, read_usage

log = logging.getLogger(__name__)

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

    def __init__(self, answer: Answer, first: bytes) -> None:
        self.content_type = answer.headers.get("Content-Type", EVENT_STREAM)
        self.first = first
        self.tail = first[-TAIL_BYTES:]
        self._answer = answer

    async def read(self) -> bytes:
        """Return what has arrived, waiting for at least one byte; empty at the end.

        Raises:
            EngineBroke: the connection broke.
        """
        data = await self._answer.read_some()
        self.tail = (self.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        return data

    def close(self) -> None:
        """Let go of the connection; unless all was read, this ends the request on the engine."""
        self._answer.close()


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
        connect_s = config.connect_timeout_s
        self._http = EngineHttp(connect_timeout_s=connect_s, connections_max=config.connections_max)
        self.session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": JSON},
        )
        """For questions that are not a client's."""

    def reconfigure(self, config: RouterConfig) -> None:
        """Use other timeouts for what is sent from now on; that of connecting stays."""
        self._config = config

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()
        await self.session.close()

    def abort_silent(self, url: str, *, silent_s: float) -> int:
        """End every leg at an engine that has said nothing for so long, as lost; return how many those were."""
        return self._http.abort(url, silent_s=silent_s)

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
            async with asyncio.timeout(self._config.total_timeout_s):
                answer = await self._http.post(leg.url, route, body, headers, on_sent=leg.mark_sent)
                try:
                    data = await answer.read()
                finally:
                    answer.close()
        except TimeoutError:
            kind: FailureKind = "timeout" if leg.is_sent else "unsent"
            return LegFailure(kind, leg.url, "timed out")
        except (EngineUnreachable, EngineBroke, OSError) as error:
            return LegFailure("lost" if leg.is_sent else "unsent", leg.url, _describe(error))
        if answer.status != 200:
            message = _summary(answer.status, data)
            return LegFailure("refused", leg.url, message, answer.status, _complaint(answer, data))
        return PrefillDone(leg.url, loop.time() - start_s, read_introduction(data, ()), read_usage(data))

    async def open_decode(
        self, url: str, route: str, body: bytes, headers: Mapping[str, str], *, dialect: Dialect, is_stream: bool
    ) -> StreamedAnswer | WholeAnswer | LegFailure:
        """Send a decode request; return when the first byte of a stream, or the whole of another answer, is here."""
        # What is not streamed has no time limit of its own beside the request's.
        limit_s = self._config.first_byte_timeout_s if is_stream else None
        answer: Answer | None = None
        is_kept = False
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._http.post(url, route, body, headers)
                opened = await _first_of(answer, url, dialect, is_stream=is_stream)
            is_kept = isinstance(opened, StreamedAnswer)
            return opened
        except TimeoutError:
            return LegFailure("timeout", url, f"no answer within {limit_s or 0:g} s")
        except EngineUnreachable as error:
            return LegFailure("unsent", url, _describe(error))
        except (EngineBroke, OSError) as error:
            return LegFailure("lost", url, _describe(error))
        finally:
            if answer is not None and not is_kept:
                answer.close()


async def _first_of(
    answer: Answer, url: str, dialect: Dialect, *, is_stream: bool
) -> StreamedAnswer | WholeAnswer | LegFailure:
    if is_stream and answer.status == 200:
        first = await answer.read_some()
        if not first:
            return LegFailure("lost", url, "the stream ended before its first byte")
        failure = dialect.stream_failure(first)
        if failure is not None and failure.status >= 500:
            return LegFailure("refused", url, f"HTTP {failure.status}: {failure.message[:500]}", failure.status)
        return StreamedAnswer(answer, first)
    body = await answer.read()
    if answer.status >= 500:
        return LegFailure("refused", url, _summary(answer.status, body), answer.status)
    if answer.status >= 400 and not is_json(body):
        return LegFailure("refused", url, _summary(answer.status, body), answer.status)
    return WholeAnswer(answer.status, answer.headers.get("Content-Type", JSON), body)


def _complaint(answer: Answer, body: bytes) -> WholeAnswer | None:
    """Return an engine's answer to a bad request; None for errors that another engine might not make."""
    if answer.status not in BAD_REQUEST_STATUSES or not is_json(body):
        return None
    return WholeAnswer(answer.status, answer.headers.get("Content-Type", JSON), body)


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
