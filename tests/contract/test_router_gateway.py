"""The gateway's road when all goes well: both legs at once, nothing buffered, nothing changed, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import pytest

from mooncake_connector.router.engines import EngineState
from unit.router.cell import TEXT, events, eventually, running_cell
from unit.router.fake_engine import MODEL


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_both_legs_go_at_once_and_name_the_same_transfer(path: str, is_stream: bool) -> None:
    async with running_cell() as cell:
        cell.prefill.set(prefill_s=0.4)
        cell.decode.set(needs_prefill=cell.prefill.prefilled)
        status, headers, body = await cell.ask(path, stream=is_stream)
        assert status == 200
        (prefill,), (decode,) = cell.prefill.legs, cell.decode.legs
        assert prefill.path == decode.path == path
        assert 0 <= decode.at_s - prefill.at_s < 0.2, "the decode leg waited for the prefill leg"
        transfer_id = prefill.params["transfer_id"]
        assert prefill.params == {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
        assert decode.params == {
            "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer_id,
            "remote_engine_id": cell.prefill.engine_id,
            "remote_addresses": cell.prefill.own_params()["remote_addresses"],  # type: ignore[index]
        }
        assert headers["x-mooncake-prefill"] == cell.prefill.url
        assert headers["x-mooncake-decode"] == cell.decode.url
        assert headers["x-mooncake-transfer-id"] == transfer_id
        if is_stream:
            assert headers["Content-Type"].startswith("text/event-stream")
            assert [event for event in events(body) if event == "[DONE]"] == ["[DONE]"]
            assert len(events(body)) == cell.decode.num_tokens + 1
        else:
            assert json.loads(body)["choices"][0]["text"] == "abc"


async def test_the_prefill_leg_asks_for_one_token_and_the_decode_leg_for_what_the_client_asked() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    asked = {
        "model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, image]}],
        "max_tokens": 50, "max_completion_tokens": 50, "min_tokens": 3, "stream": True,
        "stream_options": {"include_usage": True}, "n": 1, "logprobs": True, "top_logprobs": 2, "temperature": 0.25,
        "unknown_field": {"deep": [1, 2.50, None, "ü"]}, "seed": 12345678901234567890,
        "kv_transfer_params": {"do_remote_prefill": True, "remote_addresses": ["tcp://evil:1"]},
    }  # fmt: skip
    async with running_cell() as cell:
        async with cell.http.post(cell.app.url + "/v1/chat/completions", data=json.dumps(asked)) as response:
            assert response.status == 200
            await response.read()
        prefill, decode = cell.prefill.legs[0].body, cell.decode.legs[0].body
    assert decode.pop("kv_transfer_params")["remote_addresses"] != ["tcp://evil:1"]
    prefill.pop("kv_transfer_params")
    del asked["kv_transfer_params"]
    assert decode == asked
    assert (prefill["max_tokens"], prefill["max_completion_tokens"], prefill["stream"]) == (1, 1, False)
    assert not {"stream_options", "min_tokens", "n", "logprobs", "top_logprobs"} & prefill.keys()
    for name in ("model", "messages", "temperature", "unknown_field", "seed"):
        assert prefill[name] == asked[name]


async def test_a_stream_is_passed_on_as_it_comes() -> None:
    async with running_cell() as cell:
        cell.decode.set(num_tokens=4, gap_s=0.15)
        loop = asyncio.get_running_loop()
        arrivals = []
        async with cell.post(stream=True) as response:
            while data := await response.content.readany():
                arrivals.extend([loop.time()] * data.count(b'"text"'))
        sent_s = cell.decode.legs[0].at_s
        assert len(arrivals) == 4
        for number, at_s in enumerate(arrivals):
            assert at_s - sent_s < number * 0.15 + 0.1, f"event {number} was held back"


async def test_small_writes_leave_at_once() -> None:
    async with running_cell() as cell:
        cell.decode.set(gap_s=0.05)
        async with cell.post(stream=True) as response:
            assert cell.app._runner is not None and cell.app._runner.server is not None
            transports = [each.transport for each in cell.app._runner.server.connections]
            accepted = [each.get_extra_info("socket") for each in transports if each is not None]
            assert accepted
            assert all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in accepted)
            await response.read()


async def test_the_request_id_goes_end_to_end() -> None:
    async with running_cell() as cell:
        async with cell.http.post(
            cell.app.url + "/v1/completions", json={"prompt": TEXT}, headers={"X-Request-Id": "mine-1", "X-Other": "o"}
        ) as response:
            assert response.headers["x-request-id"] == "mine-1"
        for call in (cell.prefill.legs[0], cell.decode.legs[0]):
            assert call.headers["X-Request-ID"] == "mine-1"
            assert call.headers["X-Other"] == "o"
        async with cell.http.post(
            cell.app.url + "/v1/completions", json={"prompt": TEXT}, headers={"X-Request-Id": "no spaces"}
        ) as response:
            made = response.headers["x-request-id"]
        assert made != "no spaces"
        assert cell.prefill.legs[1].headers["X-Request-ID"] == made


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "n"),
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"use_beam_search": True}, "beam_search"),
        ({"prompt": ["one", "two"]}, "prompt_list"),
        ({"prompt": [[1, 2], [3]]}, "prompt_list"),
    ],
)
async def test_what_a_split_would_change_runs_whole_on_the_decode_engine(body: dict[str, object], reason: str) -> None:
    async with running_cell() as cell:
        status, headers, _ = await cell.ask(**body)
        assert status == 200
        assert "x-mooncake-prefill" not in headers
        assert not cell.prefill.legs
        assert cell.decode.legs[0].params == {}
        assert cell.sample(f'mooncake_router_colocated_total{{reason="{reason}"}}') == 1


@pytest.mark.parametrize("prompt", [["one"], [1, 2, 3], [[1, 2, 3]]])
async def test_one_prompt_in_a_list_is_split(prompt: list[object]) -> None:
    async with running_cell() as cell:
        assert (await cell.ask(prompt=prompt))[0] == 200
        assert cell.prefill.legs[0].body["prompt"] == cell.decode.legs[0].body["prompt"] == prompt


async def test_short_prompts_run_whole_when_asked_to() -> None:
    async with running_cell(min_split_tokens=100) as cell:
        await cell.ask(prompt="short")
        await cell.ask(prompt="long " * 200)
        assert len(cell.prefill.legs) == 1
        assert len(cell.decode.legs) == 2


async def test_one_engine_for_both_roles_serves_alone_and_two_share() -> None:
    async with running_cell(num_prefills=0, num_decodes=0, num_both=1) as cell:
        assert (await cell.ask())[0] == 200
        assert [call.params for call in cell.decode.legs] == [{}]
    async with running_cell(num_prefills=0, num_decodes=0, num_both=2) as cell:
        _, headers, _ = await cell.ask()
        assert {headers["x-mooncake-prefill"], headers["x-mooncake-decode"]} == {each.url for each in cell.engines}


async def test_an_engine_without_the_connector_serves_whole_requests() -> None:
    async with running_cell() as cell:
        cell.prefill.has_connector = False
        await cell.prefill.stop()
        await cell.ask()  # notices that it is gone
        await cell.prefill.start()
        await cell.wait_state(cell.prefill, EngineState.UP)
        status, headers, _ = await cell.ask()
        assert status == 200 and "x-mooncake-prefill" not in headers


async def test_200_streams_at_once() -> None:
    async with running_cell(num_prefills=2, num_decodes=2) as cell:
        for each in cell.engines:
            each.set(num_tokens=5, gap_s=0.05)

        async def one(number: int) -> None:
            status, _, body = await cell.ask(prompt=f"{number} {TEXT}", stream=True)
            assert status == 200
            assert len(events(body)) == 6

        await asyncio.gather(*(one(number) for number in range(200)))
        assert sum(len(each.legs) for each in cell.prefills) == 200
        assert all(60 <= len(each.legs) <= 140 for each in cell.engines), "equal requests are spread"


async def test_models_health_ready_and_metrics() -> None:
    async with running_cell(num_prefills=2) as cell:
        await cell.ask()
        async with cell.http.get(cell.app.url + "/v1/models") as response:
            assert [card["id"] for card in (await response.json())["data"]] == [MODEL]
        async with cell.http.get(cell.app.url + "/health") as response:
            assert response.status == 200
        async with cell.http.get(cell.app.url + "/ready") as response:
            assert response.status == 200
            assert (await response.json())["engines"] == {each.url: "up" for each in cell.engines}
        async with cell.http.get(cell.app.url + "/metrics") as response:
            text = await response.text()
        assert 'mooncake_router_engines{state="up"} 3.0' in text
        assert 'mooncake_router_requests_total{outcome="ok"} 1.0' in text
        assert "mooncake_router_open_placements 0.0" in text


async def test_a_request_that_comes_before_the_first_introduction_waits_for_it() -> None:
    async with running_cell() as cell:
        restarted = type(cell.app)(cell.app.config)
        await restarted.start()
        try:
            async with cell.http.post(restarted.url + "/v1/completions", json={"prompt": TEXT}) as response:
                assert response.status == 200
                assert response.headers["x-mooncake-prefill"] == cell.prefill.url
        finally:
            await restarted.stop(drain_timeout_s=0)


async def test_drain_lets_running_requests_end_and_refuses_new_ones() -> None:
    async with running_cell(is_idle_checked=False) as cell:
        cell.decode.set(num_tokens=10, gap_s=0.05)
        running = asyncio.create_task(cell.ask(stream=True))
        await eventually(lambda: cell.decode.legs, 2, "the request at the engine")
        stopping = asyncio.create_task(cell.app.stop(drain_timeout_s=10))
        await asyncio.sleep(0.05)
        status, headers, body = await cell.ask()
        assert status == 503 and headers["Retry-After"] == "1"
        assert "shutting down" in json.loads(body)["error"]["message"]
        async with cell.http.get(cell.app.url + "/ready") as response:
            assert response.status == 503
        status, _, body = await running
        assert status == 200 and events(body)[-1] == "[DONE]"
        await stopping
        with pytest.raises(aiohttp.ClientConnectorError):
            await cell.ask()


async def test_drain_is_bounded() -> None:
    async with running_cell(is_idle_checked=False) as cell:
        cell.decode.set(num_tokens=1000, gap_s=0.05)
        running = asyncio.create_task(cell.ask(stream=True))
        await eventually(lambda: cell.decode.legs, 2, "the request at the engine")
        start_s = asyncio.get_running_loop().time()
        await cell.app.stop(drain_timeout_s=0.2)
        assert asyncio.get_running_loop().time() - start_s < 4
        with pytest.raises(aiohttp.ClientError):
            await running
        await eventually(lambda: not cell.decode.num_open, 2, "the engine's call to end")
        assert not cell.app.placer.num_open
