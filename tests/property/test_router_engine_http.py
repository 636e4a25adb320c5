"""However an engine's answer is cut into pieces, what is read of it is the same; and no bytes make the reader raise."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.router.engine_http import EngineBroke, EngineHttp, EngineUnreachable, _Reader, origin_of

pieces = st.lists(st.binary(min_size=1, max_size=300), max_size=8)
cuts = st.lists(st.integers(0, 3000), max_size=20)


def feed(reader: _Reader, data: bytes, at: list[int]) -> bytes:
    """Feed ``data`` cut at these places, and return the body that was read on the way."""
    body = b""
    places = sorted({min(place, len(data)) for place in at} | {0, len(data)})
    for start, end in zip(places, places[1:], strict=False):
        reader.feed(data[start:end])
        body += reader.take()
    return body


@given(pieces, cuts, st.sampled_from(["chunked", "length", "close"]), st.booleans())
def test_any_cut_gives_the_same_answer(parts: list[bytes], at: list[int], framing: str, has_continue: bool) -> None:
    body = b"".join(parts)
    head = b"HTTP/1.1 100 Continue\r\n\r\n" if has_continue else b""
    head += b"HTTP/1.1 200 OK\r\nX-Other: a: b\r\nContent-Type:text/plain \r\n"
    if framing == "chunked":
        wire = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nTrailer: t\r\n\r\n"
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + wire
    elif framing == "length":
        data = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    else:
        data = head + b"\r\n" + body
    reader = _Reader()
    assert feed(reader, data, at) == body
    assert reader.is_complete == (framing != "close")
    reader_head = reader.take_head()
    assert reader_head is not None and reader_head.status == 200
    assert (reader_head.headers["x-other"], reader_head.headers["content-type"]) == ("a: b", "text/plain")
    assert reader.is_reusable == (framing != "close")
    reader.end()
    assert reader.is_complete and not reader.problem and not reader.is_reusable


@given(pieces, st.data())
def test_an_answer_that_is_cut_off_is_not_taken_for_a_whole_one(parts: list[bytes], data: st.DataObject) -> None:
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked
    end = data.draw(st.integers(0, len(whole) - 1))
    reader = _Reader()
    feed(reader, whole[:end], [])
    reader.end()
    assert reader.problem and not reader.is_complete and not reader.is_reusable


@given(st.binary(max_size=2000), cuts, st.booleans())
def test_no_bytes_make_it_raise(noise: bytes, at: list[int], has_head: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" if has_head else b""
    reader = _Reader()
    feed(reader, head + noise, at)
    reader.end("gone")
    assert reader.problem or reader.is_complete


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", b"HTTP/1.1 200 OK\r\n" * 9999,
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000,
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n"],
    ids=lambda data: repr(data[-20:]),
)  # fmt: skip
def test_what_is_no_http_is_a_problem_and_not_kept(data: bytes) -> None:
    reader = _Reader()
    feed(reader, data, [])
    assert reader.problem


def test_where_engines_listen() -> None:
    assert origin_of("http://h:8100") == ("h", 8100, False)
    assert origin_of("https://[::1]") == ("::1", 443, True)
    assert origin_of("http://[::1]:80").authority == "[::1]:80"


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def test_connections_are_kept_and_one_that_closed_while_idle_costs_nothing() -> None:
    num_connections = 0
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        writers.append(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(2)
                if num_connections == 1 and len(seen) == 2:
                    writer.close()  # as a server does whose patience ended just now
                    return
                seen.append(writer)
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass

    seen: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    http = EngineHttp(connect_timeout_s=5.0, connections_max=2)
    try:
        for number in range(4):
            answer = await http.post(url, "/x", b"{}", b"X-Request-Id: 1\r\n")
            assert (await answer.read(), answer.status) == (b"ok", 200)
            answer.close()
            assert num_connections == (1 if number < 2 else 2), "the third request met a closed connection"
        held = [await http.post(url, "/x", b"{}", b"") for _ in range(2)]
        with pytest.raises(EngineUnreachable):
            await http.post(url, "/x", b"{}", b"")
        assert http.abort(url, silent_s=1000.0) == 0
        assert http.abort(url, silent_s=0.0) == 2
        for answer in held:
            assert await answer.read() == b"ok", "what is here already is not lost"
    finally:
        http.close()
        server.close()


async def test_nobody_listens_and_an_engine_that_says_nothing() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    http = EngineHttp(connect_timeout_s=5.0, connections_max=2)
    try:
        with pytest.raises(EngineBroke):
            await http.post(f"http://127.0.0.1:{port}", "/x", b"{}", b"")
        server.close()
        await server.wait_closed()
        with pytest.raises(EngineUnreachable):
            await http.post(f"http://127.0.0.1:{port}", "/x", b"{}", b"")
    finally:
        http.close()
