"""Pass an engine's stream on to a client, chunk by chunk as it comes, and note its pace.

Threads: one asyncio loop.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from aiohttp import web

from mooncake_connector.router.answers import is_finished_stream
from mooncake_connector.router.engine_http import EngineBroke
from mooncake_connector.router.legs import StreamedAnswer

LAST_WORDS_S = 1.0
EVENT_END = b"\n\n"


class Passed(NamedTuple):
    """What was passed on.

    Attributes:
        problem: why the stream broke; empty when it ended well.
        num_events: about the number of tokens.
        took_s: from the first chunk to the last one.
        blocked_s: how much of that was waiting for the client to read.
    """

    problem: str
    num_events: int
    took_s: float
    blocked_s: float


async def pass_on(response: web.StreamResponse, opened: StreamedAnswer) -> Passed:
    """Write a stream to a prepared response, and return how it ended.

    Raises:
        ConnectionResetError: the client is gone.
    """
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    blocked_s = 0.0
    data = opened.first
    num_events = 0
    problem = ""
    while True:
        num_events += data.count(EVENT_END)
        before_s = loop.time()
        await response.write(data)
        blocked_s += loop.time() - before_s
        try:
            data = await opened.read()
        except EngineBroke as error:
            problem = str(error) or type(error).__name__
            break
        if not data:
            problem = "it ended without [DONE]"
            break
    if is_finished_stream(opened.tail):
        problem, num_events = "", num_events - 1  # [DONE] is no token
    return Passed(problem, num_events, loop.time() - begun_s, blocked_s)


async def end_late(request: web.BaseRequest, response: web.StreamResponse, last_words: bytes) -> None:
    """End a stream that ran out of time; a client that does not read is cut off."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            await response.write(last_words)
            await response.write_eof()
    except (TimeoutError, ConnectionResetError):
        if request.transport is not None:
            request.transport.abort()
