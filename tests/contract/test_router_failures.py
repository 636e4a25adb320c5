"""The gateway's road when something breaks: an answer or a clear error, soon, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import aiohttp
import pytest

from mooncake_connector.router.engines import EngineState, Introduction
from unit.router.cell import TEXT, events, eventually, running_cell
from unit.router.fake_engine import MODEL


def error_of(body: bytes) -> tuple[int, str]:
    error = json.loads(body)["error"]
    assert error["type"] and isinstance(error["message"], str)
    assert "Traceback" not in error["message"]
    return error["code"], error["message"]


async def test_an_unreachable_prefill_engine_is_replaced_within_the_same_transfer() -> None:
    async with running_cell(num_prefills=2) as cell:
        await cell.prefills[0].stop()
        for _ in range(2):  # the second time it is known to be gone
            status, headers, _ = await cell.ask()
            assert status == 200 and headers["x-mooncake-prefill"] == cell.prefills[1].url
        for prefill, decode in zip(cell.prefills[1].legs, cell.decode.legs, strict=True):
            assert prefill.params["transfer_id"] == decode.params["transfer_id"]
            assert decode.params["remote_engine_id"] == cell.prefills[1].engine_id
        assert cell.sample('mooncake_router_retries_total{leg="prefill"}') <= 1


async def test_without_another_prefill_engine_the_decode_engine_does_both() -> None:
    async with running_cell() as cell:
        await cell.prefill.stop()
        for _ in range(2):
            status, headers, _ = await cell.ask(stream=True)
            assert status == 200 and "x-mooncake-prefill" not in headers
        assert [call.params for call in cell.decode.legs] == [{}, {}]
        assert cell.sample('mooncake_router_colocated_total{reason="prefill_unreachable"}') == 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_prefill_engine_that_dies_is_left_to_the_decode_engine_to_survive(is_stream: bool) -> None:
    async with running_cell() as cell:
        cell.prefill.set(die_on_prefill=True)
        cell.decode.set(first_byte_s=0.15)
        status, _, _ = await cell.ask(stream=is_stream)
        assert status == 200
        assert len(cell.decode.legs) == 1, "the decode engine recovers by itself: nothing is sent twice"
        assert cell.sample('mooncake_router_legs_total{leg="prefill",result="lost"}') == 1
        await eventually(lambda: len(cell.prefill.calls) - len(cell.prefill.legs) == 2, 2, "a second introduction")
        await cell.wait_state(cell.prefill, EngineState.UP)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "fault", [{"die_on_prefill": True}, {"fail_prefill_status": 500}, {"fail_prefill_status": 404}]
)
async def test_a_decode_engine_that_does_not_recover_gets_a_plain_request(is_stream: bool, fault: dict) -> None:
    async with running_cell() as cell:
        cell.prefill.set(**fault)
        cell.decode.set(needs_prefill=set())
        status, headers, _ = await cell.ask(stream=is_stream)
        assert status == 200 and "x-mooncake-prefill" not in headers
        first, second = cell.decode.legs
        assert first.params and not second.params
        assert cell.decode.num_cancelled == 1, "the parked request was left behind"


async def test_a_prefill_that_fails_after_the_first_byte_disturbs_nothing() -> None:
    async with running_cell() as cell:
        cell.prefill.set(prefill_s=0.1, die_on_prefill=True)
        cell.decode.set(num_tokens=5, gap_s=0.1)
        status, _, body = await cell.ask(stream=True)
        assert status == 200 and len(events(body)) == 6


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("fault", [{"die_after": 0}, {"fail_status": 500}, "stopped"])
async def test_a_decode_leg_that_fails_early_is_placed_anew_once(is_stream: bool, fault: object) -> None:
    async with running_cell(num_decodes=2) as cell:
        bad, good = cell.decodes
        if isinstance(fault, dict):
            bad.set(**fault)
        else:
            await bad.stop()
        for number in range(2):  # fresh prompts: a known prefix would keep both on one engine
            status, headers, body = await cell.ask(stream=is_stream, prompt=f"{number} {TEXT}")
            assert status == 200 and headers["x-mooncake-decode"] == good.url
            assert b"abc" in body or events(body)[-1] == "[DONE]"
        assert cell.sample('mooncake_router_retries_total{leg="decode"}') == 1
        transfers = [call.params["transfer_id"] for call in cell.prefill.legs]
        assert len(set(transfers)) == len(transfers), "a new placement is a new transfer"


async def test_without_another_decode_engine_a_prefill_engine_does_both() -> None:
    async with running_cell() as cell:
        cell.decode.set(fail_status=503)
        status, headers, _ = await cell.ask()
        assert status == 200 and headers["x-mooncake-decode"] == cell.prefill.url
        assert cell.prefill.legs[-1].params == {}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_when_every_engine_fails_the_client_is_told(is_stream: bool) -> None:
    async with running_cell() as cell:
        for each in cell.engines:
            each.set(fail_status=500)
        status, headers, body = await cell.ask(stream=is_stream)
        assert status == 502 and headers["Content-Type"] == "application/json"
        code, message = error_of(body)
        assert code == 502 and "engine says no" in message
        for each in cell.engines:
            await each.stop()
        status, _, body = await cell.ask(stream=is_stream)
        assert status in (502, 503)
        error_of(body)


async def test_an_engine_that_failed_is_not_asked_again_for_the_same_request() -> None:
    async with running_cell(num_prefills=0, num_decodes=0, num_both=1) as cell:
        cell.decode.set(fail_status=500)
        assert (await cell.ask())[0] == 502
        assert len(cell.decode.legs) == 1


async def test_an_error_of_the_engine_reaches_the_client_unchanged_and_ends_the_prefill() -> None:
    async with running_cell() as cell:
        cell.prefill.set(prefill_s=5.0)
        cell.decode.set(fail_status=422)
        status, _, body = await cell.ask()
        assert status == 422
        assert json.loads(body) == {"error": {"message": "engine says no", "type": "X", "code": 422}}
        await eventually(lambda: cell.prefill.num_cancelled == 1, 2, "the prefill leg to be cancelled")


@pytest.mark.parametrize("fault", [{"die_after": 2}, {"is_done_missing": True}])
async def test_a_stream_that_breaks_ends_with_an_error_event(fault: dict) -> None:
    async with running_cell() as cell:
        cell.decode.set(num_tokens=4, gap_s=0.02, **fault)
        status, _, body = await cell.ask(stream=True)
        assert status == 200
        *texts, error, done = events(body)
        assert len(texts) == fault.get("die_after", 4)
        assert error["error"]["code"] == 502 and cell.decode.url in error["error"]["message"]
        assert done == "[DONE]"


@pytest.mark.parametrize("when", ["parked", "mid_stream", "not_streamed"])
async def test_a_client_that_leaves_ends_both_legs(when: str) -> None:
    async with running_cell() as cell:
        cell.prefill.set(prefill_s=30.0)
        if when == "mid_stream":
            cell.decode.set(num_tokens=1000, gap_s=0.02)
        else:
            cell.decode.set(needs_prefill=set())
        request = asyncio.create_task(cell.ask(stream=when != "not_streamed"))
        await eventually(lambda: cell.decode.num_open and cell.prefill.num_open, 3, "both legs")
        await asyncio.sleep(0.1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await eventually(lambda: not cell.decode.num_open and not cell.prefill.num_open, 1, "both legs to end")
        assert (cell.prefill.num_cancelled, cell.decode.num_cancelled) == (1, 1)
        await cell.wait_idle()
        assert cell.sample("mooncake_router_disconnects_total") == 1
        assert cell.sample('mooncake_router_requests_total{outcome="client_gone"}') == 1


async def test_a_client_that_leaves_while_the_prefill_engine_is_being_reached() -> None:
    async with running_cell(num_prefills=0) as cell:
        # A listening socket whose backlog is full accepts nobody: the connection hangs, as through a firewall.
        silent = socket.create_server(("127.0.0.1", 0), backlog=0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        cell.app.placer.table.add(url, "prefill")
        cell.app.placer.introduce(url, Introduction((MODEL,), "silent", ("tcp://127.0.0.1:1",)))
        request = asyncio.create_task(cell.ask())
        await eventually(lambda: cell.app.placer.num_open, 2, "a placement")
        await asyncio.sleep(0.1)
        request.cancel()
        await cell.wait_idle()
        for each in (silent, *fillers):
            each.close()


async def test_a_client_that_does_not_read_is_cut_off_at_the_deadline() -> None:
    async with running_cell(total_timeout_s=1.0) as cell:
        cell.decode.set(num_tokens=200_000)
        host, port = cell.app.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = json.dumps({"model": MODEL, "prompt": TEXT, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await reader.readexactly(100)
        await eventually(lambda: not cell.app.gateway.num_open, 4, "the request to end")
        writer.close()


@pytest.mark.parametrize("is_started", [False, True])
async def test_a_request_that_takes_too_long_gets_an_error(is_started: bool) -> None:
    async with running_cell(total_timeout_s=0.5) as cell:
        cell.decode.set(first_byte_s=0 if is_started else 30, num_tokens=1000, gap_s=0.05)
        status, _, body = await cell.ask(stream=True)
        if is_started:
            assert status == 200
            *_, error, done = events(body)
            assert error["error"]["code"] == 504 and done == "[DONE]"
        else:
            assert status == 504
            assert error_of(body)[0] == 504


async def test_a_first_byte_that_does_not_come_in_time() -> None:
    async with running_cell(first_byte_timeout_s=0.3) as cell:
        cell.decode.set(first_byte_s=30)
        status, _, body = await cell.ask(stream=True)
        assert status == 504 and cell.decode.url in error_of(body)[1]


MALFORMED = (
    b"", b"{", b"[]", b"null", b'"text"', b'{"prompt": "\xff"}', b"{}", b'{"prompt": null}', b'{"messages": []}',
    b'{"prompt": "a", "n": "many"}', b'{"prompt": "a", "stream": 3}', b'{"prompt": "a", "model": 7}',
    b'{"prompt": "a"} trailing', b'{"prompt": ' + b"[" * 100_000, b"\x00" * 1000, b'{"prompt": [}',
)  # fmt: skip


async def test_a_malformed_body_gets_400() -> None:
    async with running_cell() as cell:
        for body in MALFORMED:
            async with cell.http.post(cell.app.url + "/v1/completions", data=body) as response:
                assert response.status == 400, body[:40]
                assert error_of(await response.read())[0] == 400
        assert not cell.prefill.legs and not cell.decode.legs


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_oversized_body_gets_413(is_chunked: bool) -> None:
    async with running_cell(body_max_bytes=10_000) as cell:
        data = json.dumps({"prompt": "a" * 20_000}).encode()

        async def chunks():
            for start in range(0, len(data), 1000):
                yield data[start : start + 1000]

        async with cell.http.post(cell.app.url + "/v1/completions", data=chunks() if is_chunked else data) as response:
            assert response.status == 413
            assert "10000 bytes" in error_of(await response.read())[1]
        assert (await cell.ask())[0] == 200


async def test_a_body_that_never_ends_gets_408() -> None:
    async with running_cell(body_timeout_s=0.3) as cell:
        host, port = cell.app.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert (await asyncio.wait_for(reader.readline(), 3)).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_wrong_paths_and_methods_get_json() -> None:
    async with running_cell() as cell:
        for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/nowhere", 404), ("GET", "/", 404)):
            async with cell.http.request(method, cell.app.url + path) as response:
                assert response.status == status
                assert error_of(await response.read())[0] == status


async def test_an_unknown_model_and_a_router_without_engines() -> None:
    async with running_cell() as cell:
        status, _, body = await cell.ask(model="gpt-nothing")
        code, message = error_of(body)
        assert (status, code) == (404, 404) and "gpt-nothing" in message and MODEL in message
    async with running_cell(num_prefills=0, num_decodes=0) as cell:
        cell.app.watch.add("http://127.0.0.1:9", "both")
        status, headers, body = await cell.ask()
        assert status == 503 and headers["Retry-After"] == "1"
        assert "http://127.0.0.1:9" in error_of(body)[1]
        async with cell.http.get(cell.app.url + "/ready") as response:
            assert response.status == 503


async def test_more_requests_than_requests_max_get_503() -> None:
    async with running_cell(requests_max=2) as cell:
        cell.decode.set(first_byte_s=0.3)
        answers = await asyncio.gather(*(cell.ask() for _ in range(4)))
        assert sorted(status for status, _, _ in answers) == [200, 200, 503, 503]


async def test_a_new_process_behind_the_same_url_is_asked_anew() -> None:
    async with running_cell(health_interval_s=0.1) as cell:
        old_id = cell.prefill.engine_id
        await cell.ask()
        await cell.prefill.stop()
        await cell.wait_state(cell.prefill, EngineState.DOWN)
        status, _, _ = await cell.ask()
        assert status == 200
        await cell.prefill.start()
        await cell.wait_state(cell.prefill, EngineState.UP)
        await cell.ask()
        assert cell.prefill.engine_id != old_id
        assert cell.decode.legs[-1].params["remote_engine_id"] == cell.prefill.engine_id


async def test_a_prefill_answer_from_another_process_is_believed() -> None:
    async with running_cell() as cell:
        cell.prefill.engine_id = "engine-reborn"  # between two health checks
        await cell.ask()
        await cell.ask()
        assert cell.decode.legs[1].params["remote_engine_id"] == "engine-reborn"


async def test_an_engine_that_fails_its_checks_goes_down_and_comes_back() -> None:
    async with running_cell(health_interval_s=0.05) as cell:
        cell.decode.set(health_status=500)
        await cell.wait_state(cell.decode, EngineState.DOWN)
        _, headers, _ = await cell.ask()
        assert headers["x-mooncake-decode"] == cell.prefill.url
        cell.decode.set(health_status=200)
        await cell.wait_state(cell.decode, EngineState.UP)


async def test_a_storm_of_everything_leaves_nothing_behind() -> None:
    """Engines that die, stall and refuse, clients that leave: every answered request is answered properly."""
    async with running_cell(num_prefills=2, num_decodes=2, health_interval_s=0.1) as cell:
        cell.prefills[0].set(prefill_s=0.05, die_on_prefill=True)
        cell.prefills[1].set(prefill_s=0.02)
        cell.decodes[0].set(num_tokens=6, gap_s=0.01, die_after=3)
        cell.decodes[1].set(num_tokens=6, gap_s=0.01)

        async def one(number: int) -> None:
            request = asyncio.create_task(cell.ask(prompt=f"{number} {TEXT}", stream=number % 2 == 0))
            if number % 5 == 0:
                await asyncio.sleep(0.02 * (number % 7))
                request.cancel()
            try:
                status, _, body = await request
            except asyncio.CancelledError:
                return
            assert status in (200, 502, 503)
            assert events(body)[-1] == "[DONE]" if status == 200 and number % 2 == 0 else json.loads(body)

        async def disturb() -> None:
            for _ in range(3):
                await asyncio.sleep(0.2)
                await cell.decodes[1].stop()
                await asyncio.sleep(0.05)
                await cell.decodes[1].start()

        disturbing = asyncio.create_task(disturb())
        for start in range(0, 100, 10):
            await asyncio.gather(*(one(number) for number in range(start, start + 10)))
        await disturbing


async def test_a_reset_connection_counts_as_a_client_that_left() -> None:
    async with running_cell() as cell:
        cell.decode.set(num_tokens=1000, gap_s=0.01)
        async with aiohttp.ClientSession() as http:
            response = await http.post(cell.app.url + "/v1/completions", json={"prompt": TEXT, "stream": True})
            await response.content.readany()
            assert response.connection is not None and response.connection.transport is not None
            raw = response.connection.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            response.connection.transport.abort()
            response.close()
        await eventually(lambda: not cell.decode.num_open, 2, "the decode leg to end")
