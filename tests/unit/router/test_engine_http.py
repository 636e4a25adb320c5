"""Engines that close, hang up, say nothing or are not there are told apart."""

from __future__ import annotations

import asyncio

import pytest

from mooncake_connector.router.engine_http import EngineBroke, EngineHttp, EngineUnreachable

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def serve(answer: bytes) -> tuple[asyncio.Server, str, list[int]]:
    """Start an engine that gives every request this answer; the list counts its connections."""
    count = [0]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count[0] += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(2)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", count


async def test_connections_are_kept() -> None:
    server, url, count = await serve(ANSWER)
    http = EngineHttp(connect_timeout_s=5.0, connections_max=2)
    sent = []
    for number in range(4):
        answer = await http.post(url, "/x", b"{}", {"X-Request-Id": "1"}, on_sent=lambda n=number: sent.append(n))
        assert (await answer.read(), answer.status) == (b"ok", 200)
        answer.close()
    assert count == [1] and sent == [0, 1, 2, 3]
    await http.close()
    server.close()


async def test_no_more_connections_than_allowed() -> None:
    server, url, count = await serve(ANSWER[:-1])
    http = EngineHttp(connect_timeout_s=0.3, connections_max=2)
    held = [await http.post(url, "/x", b"{}", {}) for _ in range(2)]
    with pytest.raises(EngineUnreachable):
        await http.post(url, "/x", b"{}", {})
    for answer in held:
        answer.close()
    assert count == [2]
    await http.close()
    server.close()


@pytest.mark.parametrize("said", [b"", ANSWER[:-1]], ids=["nothing", "half an answer"])
async def test_what_an_engine_left_lying_is_broken_off_and_nothing_else(said: bytes) -> None:
    frozen, frozen_url, _ = await serve(said)
    lively, lively_url, _ = await serve(ANSWER)
    http = EngineHttp(connect_timeout_s=5.0, connections_max=9)

    async def ask(url: str) -> bytes:
        answer = await http.post(url, "/x", b"{}", {})
        try:
            return await answer.read()
        finally:
            answer.close()

    waiting = asyncio.create_task(ask(frozen_url))
    await asyncio.sleep(0.1)
    assert http.abort(frozen_url, silent_s=1000.0) == 0 and not waiting.done()
    assert http.abort(lively_url, silent_s=0.0) == 0
    assert http.abort(frozen_url, silent_s=0.0) == 1
    with pytest.raises(EngineBroke):
        await asyncio.wait_for(waiting, 5)
    assert not waiting.cancelled() and http.abort(frozen_url, silent_s=0.0) == 0
    assert await ask(lively_url) == b"ok"
    await http.close()
    frozen.close()
    lively.close()


async def test_who_cancels_a_request_is_obeyed() -> None:
    server, url, _ = await serve(b"")
    http = EngineHttp(connect_timeout_s=5.0, connections_max=2)
    waiting = asyncio.create_task(http.post(url, "/x", b"{}", {}))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert http.abort(url, silent_s=0.0) == 0
    await http.close()
    server.close()


async def test_nobody_listens_and_an_engine_that_says_nothing() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    http = EngineHttp(connect_timeout_s=5.0, connections_max=2)
    try:
        with pytest.raises(EngineBroke):
            await http.post(f"http://127.0.0.1:{port}", "/x", b"{}", {})
        server.close()
        await server.wait_closed()
        with pytest.raises(EngineUnreachable):
            await http.post(f"http://127.0.0.1:{port}", "/x", b"{}", {})
    finally:
        await http.close()
