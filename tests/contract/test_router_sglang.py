"""The gateway in front of SGLang servers, alone and beside vLLM's: pairs of one kind, and clear ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from mooncake_connector.router.dialects.sglang import room_of
from mooncake_connector.router.engines import EngineState
from unit.router.cell import TEXT, Cell, events, eventually, running_cell
from unit.router.fake_sglang import FIELDS, FakeSglang, Meeting

CHAT = "/v1/chat/completions"


class Pool(NamedTuple):
    """A cell with SGLang servers; ``cell.engines`` are vLLM's."""

    cell: Cell
    prefills: list[FakeSglang]
    decodes: list[FakeSglang]
    wholes: list[FakeSglang]

    @property
    def servers(self) -> list[FakeSglang]:
        return [*self.prefills, *self.decodes, *self.wholes]


@asynccontextmanager
async def running_pool(num_prefills: int = 1, num_decodes: int = 1, num_wholes: int = 0, *, num_vllm: int = 0,
                       model: str = "smollm2", **config: Any) -> AsyncIterator[Pool]:
    meeting = Meeting()
    made = {mode: [await FakeSglang(mode, meeting, model=model).start() for _ in range(number)]
            for mode, number in (("prefill", num_prefills), ("decode", num_decodes), ("null", num_wholes))}
    servers = [each for group in made.values() for each in group]
    try:
        # Each is given as an engine for anything: it tells itself what it is.
        async with running_cell(num_prefills=num_vllm, num_decodes=num_vllm,
                                **{"engine": tuple(each.url for each in servers), **config}) as cell:
            yield Pool(cell, made["prefill"], made["decode"], made["null"])
            await cell.wait_idle()
            await eventually(lambda: not any(each.num_open for each in servers), 5, "calls")
    finally:
        for each in servers:
            await each.stop()


def meeting_of(call) -> tuple[Any, ...]:
    return tuple(call.body.get(name) for name in FIELDS)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
async def test_both_legs_meet_in_one_room(path: str, is_stream: bool) -> None:
    async with running_pool() as pool:
        [prefill], [decode] = pool.prefills, pool.decodes
        prefill.set(prefill_s=0.1)
        status, headers, body = await pool.cell.ask(path, stream=is_stream, bootstrap_host="evil")
        assert status == 200, body
        assert (headers["x-mooncake-prefill"], headers["x-mooncake-decode"]) == (prefill.url, decode.url)
        room = room_of(headers["x-mooncake-transfer-id"])
        assert meeting_of(prefill.legs[0]) == meeting_of(decode.legs[0]) == (
            "127.0.0.1", prefill.bootstrap_port, room)
        assert decode.legs[0].at_s - prefill.legs[0].at_s < 0.09, "the legs go out together"
        assert prefill.legs[0].body["max_tokens"] == 8 and not prefill.legs[0].body["stream"]
        assert (events(body)[-1] == "[DONE]") if is_stream else b"kv_transfer_params" in body
        assert pool.cell.sample('mooncake_router_introductions_total{result="connector"}') == 2


async def test_rooms_of_many_requests_differ() -> None:
    async with running_pool() as pool:
        answers = await asyncio.gather(*(pool.cell.ask() for _ in range(50)))
        assert [answer[0] for answer in answers] == [200] * 50
        assert len({meeting_of(call) for call in pool.decodes[0].legs}) == 50


async def test_vllm_and_sglang_pairs_of_one_model_are_never_mixed() -> None:
    async with running_pool(num_vllm=1) as pool:
        answers = await asyncio.gather(*(pool.cell.ask() for _ in range(40)))
        assert {answer[0] for answer in answers} == {200}
        kinds = {(headers["x-mooncake-prefill"], headers["x-mooncake-decode"]) for _, headers, _ in answers}
        assert kinds == {(pool.prefills[0].url, pool.decodes[0].url), (pool.cell.prefill.url, pool.cell.decode.url)}


async def test_pools_are_by_model() -> None:
    async with running_pool(num_vllm=1, model="other") as pool:
        for model, pair in (("other", (pool.prefills[0], pool.decodes[0])),
                            ("smollm2", (pool.cell.prefill, pool.cell.decode))):
            for _ in range(3):
                status, headers, _ = await pool.cell.ask(model=model)
                assert status == 200
                assert (headers["x-mooncake-prefill"], headers["x-mooncake-decode"]) == tuple(e.url for e in pair)
        async with pool.cell.http.get(pool.cell.app.url + "/v1/models") as response:
            assert {card["id"] for card in (await response.json())["data"]} == {"other", "smollm2"}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("fault", [{"die_on_prefill": True}, {"fail_prefill_status": 500}])
async def test_a_prefill_that_fails_means_another_pair(fault: dict, is_stream: bool) -> None:
    async with running_pool(num_prefills=2) as pool:
        bad, good = pool.prefills
        bad.set(**fault)
        pool.decodes[0].set(lost_s=30.0)
        for number in range(4):
            status, headers, body = await pool.cell.ask(stream=is_stream, prompt=f"{number} {TEXT}")
            assert status == 200 and headers["x-mooncake-prefill"] == good.url, body
        assert len(bad.legs) >= 1
        rooms = [meeting_of(call)[2] for call in pool.decodes[0].legs]
        assert len(set(rooms)) == len(rooms), "a new room for each try"
        await eventually(lambda: pool.decodes[0].num_cancelled == len(bad.legs), 5, "the decode legs in vain")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_unreachable_prefill_is_replaced(is_stream: bool) -> None:
    async with running_pool(num_prefills=2) as pool:
        await pool.prefills[0].stop()
        for _ in range(2):
            status, headers, _ = await pool.cell.ask(stream=is_stream)
            assert status == 200 and headers["x-mooncake-prefill"] == pool.prefills[1].url


@pytest.mark.parametrize("is_stream", [False, True])
async def test_without_another_prefill_the_client_hears_why_at_once(is_stream: bool) -> None:
    async with running_pool() as pool:
        pool.prefills[0].set(die_on_prefill=True)
        began = asyncio.get_running_loop().time()
        status, headers, body = await pool.cell.ask(stream=is_stream)
        assert (status, headers["Retry-After"]) == (502, "1")
        message = json.loads(body)["error"]["message"]
        assert pool.prefills[0].url in message and "no other engine" in message
        assert asyncio.get_running_loop().time() - began < 3
        await pool.prefills[0].stop()
        assert (await pool.cell.ask(stream=is_stream))[0] == 502
        await pool.cell.wait_state(pool.prefills[0], EngineState.DOWN)
        status, _, body = await pool.cell.ask(stream=is_stream)
        assert status == 503 and b"no prefill and decode server" in body


async def test_a_whole_server_takes_over_where_there_is_one() -> None:
    async with running_pool(num_wholes=1) as pool:
        pool.prefills[0].set(die_on_prefill=True)
        status, headers, _ = await pool.cell.ask(stream=True)
        assert status == 200 and headers["x-mooncake-decode"] == pool.wholes[0].url
        assert "x-mooncake-prefill" not in headers


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_decode_server_that_fails_means_another(is_stream: bool) -> None:
    async with running_pool(num_decodes=2) as pool:
        if is_stream:
            pool.decodes[0].set(fail_first_event="out of memory")
        else:
            pool.decodes[0].set(fail_status=500)
        for number in range(3):
            status, headers, body = await pool.cell.ask(stream=is_stream, prompt=f"{number} {TEXT}")
            assert status == 200 and headers["x-mooncake-decode"] == pool.decodes[1].url, body
            assert b"out of memory" not in body
        assert len(pool.decodes[0].legs) >= 1


async def test_the_decode_servers_words_reach_the_client() -> None:
    async with running_pool() as pool:
        for knob, is_stream in (({"fail_first_event": "out of memory"}, True), ({"fail_status": 500}, False)):
            pool.decodes[0].set(**knob)
            status, _, body = await pool.cell.ask(stream=is_stream)
            assert status == 502
            assert ("out of memory" if is_stream else "engine says no") in json.loads(body)["error"]["message"]
            await pool.cell.wait_state(pool.decodes[0], EngineState.UP)


async def test_a_request_the_servers_object_to_is_answered_in_their_words() -> None:
    async with running_pool() as pool:
        for each in pool.servers:
            each.set(fail_status=400)
        status, _, body = await pool.cell.ask()
        assert status == 400 and json.loads(body)["message"] == "engine says no"


async def test_what_cannot_be_split_needs_a_whole_server() -> None:
    async with running_pool() as pool:
        status, _, body = await pool.cell.ask(n=2)
        assert status == 503 and b"cannot be split (n)" in body
        for request in ({"prompt": ["a", "b"]}, {"echo": True}):
            status, headers, _ = await pool.cell.ask(**request)
            assert status == 200 and "x-mooncake-prefill" in headers, "SGLang can split these"
    async with running_pool(num_wholes=1) as pool:
        status, headers, _ = await pool.cell.ask(n=2)
        assert status == 200 and headers["x-mooncake-decode"] == pool.wholes[0].url


async def test_a_restarted_prefill_is_used_again() -> None:
    async with running_pool() as pool:
        [prefill] = pool.prefills
        assert (await pool.cell.ask())[0] == 200
        await prefill.stop()
        assert (await pool.cell.ask())[0] == 502
        await pool.cell.wait_state(prefill, EngineState.DOWN)
        prefill.bootstrap_port += 1000
        await prefill.start()
        await pool.cell.wait_state(prefill, EngineState.UP)
        assert (await pool.cell.ask())[0] == 200
        assert meeting_of(pool.decodes[0].legs[-1])[1] == prefill.bootstrap_port


async def test_a_server_of_the_wrong_half_is_not_used() -> None:
    async with running_pool(num_decodes=2) as pool:
        wrong = await FakeSglang("decode", Meeting()).start()
        try:
            pool.cell.app.watch.add(wrong.url, "prefill")
            await eventually(
                lambda: pool.cell.sample('mooncake_router_introductions_total{result="failed"}') > 0, 5, "a refusal")
            assert (await pool.cell.ask())[0] == 200 and not wrong.legs
            pool.cell.app.watch.remove(wrong.url)
        finally:
            await wrong.stop()


async def test_a_client_that_leaves_ends_both_legs() -> None:
    async with running_pool() as pool:
        pool.prefills[0].set(prefill_s=20.0)
        task = asyncio.create_task(pool.cell.ask(stream=True))
        await eventually(lambda: pool.decodes[0].num_open and pool.prefills[0].num_open, 5, "both legs")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: pool.prefills[0].num_cancelled + pool.decodes[0].num_cancelled == 2, 5, "the ends")
