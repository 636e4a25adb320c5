"""What requests are promised: order, refusals in time, keys, hints, and what the answer says of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mooncake_connector.router.admission import Outlook, ServiceClass, Waiting
from mooncake_connector.router.config import Tenant
from mooncake_store.errors import ConfigError
from unit.router.cell import TEXT, Cell, eventually, running_cell

KEY = "a-long-key-of-acme"


async def teach(cell: Cell, *, prefill_s: float, num_rounds: int = 15, tenant: str = "") -> None:
    """Let the router see how slow its prefill engines are."""
    for each in cell.prefills:
        each.set(prefill_s=prefill_s, is_serial=True)
    for each in cell.decodes:
        each.set(needs_prefill=cell.prefill.prefilled if len(cell.prefills) == 1 else None)
    for number in range(num_rounds):
        headers = {"x-mooncake-tenant": tenant}
        assert (await cell.ask(prompt=f"teach {number} {TEXT}", headers=headers))[0] == 200


def held(cell: Cell) -> int:
    return cell.app.dispatcher.num_held


async def test_without_classes_nothing_is_refused_however_late_it_is() -> None:
    async with running_cell(hold_above_s=0.02) as cell:
        await teach(cell, prefill_s=0.05)
        answers = await asyncio.gather(*(cell.ask(prompt=f"{number} {TEXT}") for number in range(40)))
        assert {status for status, _, _ in answers} == {200}
        assert cell.sample("mooncake_router_held_seconds_count") > 20, "requests waited at the router"


async def test_the_shortest_that_waits_goes_first() -> None:
    async with running_cell(hold_above_s=0.02) as cell:
        await teach(cell, prefill_s=0.5, num_rounds=6)
        asked = []
        for num_held, (name, length) in enumerate((("first", 1), ("long", 8), ("short", 1))):
            asked.append(asyncio.create_task(cell.ask(prompt=f"{name} {TEXT * length}")))
            await eventually(lambda n=num_held: held(cell) == n and cell.app.placer.num_open == 1, 2, "it to be held")
        await asyncio.gather(*asked)
        order = [call.body["prompt"].split()[0] for call in cell.prefill.legs[-3:]]
        assert order == ["first", "short", "long"]


async def test_what_cannot_be_in_time_is_told_no_soon_and_when_to_come_back() -> None:
    promise = {"default": ServiceClass(ttft_s=1.0, tbt_s=60.0)}
    async with running_cell(hold_above_s=0.05, classes=promise) as cell:
        await teach(cell, prefill_s=0.2)
        loop = asyncio.get_running_loop()
        took_s = []

        async def one(number: int) -> tuple[int, dict[str, str], bytes]:
            begun_s = loop.time()
            answer = await cell.ask(prompt=f"{number} {TEXT}" + TEXT[: 37 * number], stream=True)
            took_s.append((answer[0], loop.time() - begun_s))
            return answer

        answers = await asyncio.gather(*(one(number) for number in range(30)))
        refused = [(headers, body) for status, headers, body in answers if status == 429]
        assert 2 <= len(answers) - len(refused) <= 12, "some five of them can be served in a second"
        for headers, body in refused:
            assert int(headers["Retry-After"]) >= 1
            error = json.loads(body)["error"]
            assert error["type"] == "RateLimitError" and "try again in" in error["message"]
        assert all(seconds < 2.0 for status, seconds in took_s if status == 429)
        assert sum(value for name, value in cell.app.metrics.snapshot().items()
                   if name.startswith("mooncake_router_rejected_total")) == len(refused)  # fmt: skip


async def test_a_first_token_that_cannot_come_in_time_any_more_ends_both_legs() -> None:
    promise = {"fast": ServiceClass(ttft_s=1.0, tbt_s=60.0)}
    async with running_cell(classes=promise) as cell:
        cell.prefill.set(prefill_s=30.0)
        cell.decode.set(needs_prefill=set())
        status, headers, body = await cell.ask(stream=True, headers={"x-mooncake-class": "fast"})
        assert (status, headers["Retry-After"]) == (429, "1")
        assert "within 1 s" in json.loads(body)["error"]["message"]
        await eventually(lambda: cell.prefill.num_cancelled and cell.decode.num_cancelled, 2, "both legs to end")
        assert cell.sample('mooncake_router_rejected_total{reason="late"}') == 1
        cell.prefill.set(prefill_s=0.0)
        cell.decode.set(needs_prefill=None, first_byte_s=1.2)
        assert (await cell.ask(stream=True))[0] == 200, "nothing is promised to those that name no class"


async def test_a_client_that_leaves_while_it_waits_is_forgotten() -> None:
    async with running_cell(hold_above_s=0.02) as cell:
        await teach(cell, prefill_s=0.1)
        cell.prefill.set(prefill_s=0.6)
        first = asyncio.create_task(cell.ask(prompt=f"first {TEXT}"))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(cell.ask(prompt=f"second {TEXT}"))
        await eventually(lambda: held(cell) == 1, 2, "a request to be held")
        second.cancel()
        await eventually(lambda: held(cell) == 0, 2, "it to be forgotten")
        assert (await first)[0] == 200
        assert not any("second" in call.body["prompt"] for call in cell.prefill.legs)


async def test_when_its_engines_go_away_a_request_that_waits_is_told() -> None:
    async with running_cell(hold_above_s=0.02, num_prefills=0, num_decodes=0, num_both=1) as cell:
        cell.decode.set(first_byte_s=0.4)
        for number in range(8):
            await cell.ask(prompt=f"teach {number} {TEXT}", stream=True)
        first = asyncio.create_task(cell.ask(prompt=f"first {TEXT}", stream=True))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(cell.ask(prompt=f"second {TEXT}", stream=True))
        await eventually(lambda: held(cell) == 1, 2, "a request to be held")
        cell.app.watch.remove(cell.decode.url)
        status, _, _ = await asyncio.wait_for(second, 3)
        assert status == 503
        assert (await first)[0] == 200


async def test_the_answer_says_what_was_predicted_and_what_came() -> None:
    async with running_cell() as cell:
        cell.prefill.set(prompt_tokens=600, cached_tokens=512)
        await teach(cell, prefill_s=0.1)
        status, headers, _ = await cell.ask(stream=True)
        assert status == 200
        real_ms, predicted_ms = (float(headers[f"x-mooncake-{name}ttft-ms"]) for name in ("", "predicted-"))
        assert real_ms >= 100 and 0.3 < predicted_ms / real_ms < 3
        assert headers["x-mooncake-tokens-reused"] == "512"
        assert float(headers["x-mooncake-queue-ms"]) < 50
        async with cell.http.get(cell.app.url + "/metrics") as response:
            text = await response.text()
        assert 'mooncake_router_prediction_error{what="prefill"}' in text
        assert 'mooncake_router_prompt_tokens_total{source="reused"}' in text


async def test_keys() -> None:
    tenants = {"acme": Tenant(api_key=KEY)}
    async with running_cell(tenants=tenants, engine_api_key="engines-own") as cell:
        for headers in (None, {"Authorization": "Bearer wrong-key-of-acme"}):
            status, _, body = await cell.ask(headers=headers)
            assert status == 401 and json.loads(body)["error"]["type"] == "AuthenticationError"
        async with cell.http.get(cell.app.url + "/v1/models") as response:
            assert response.status == 401
        assert not cell.prefill.legs
        assert (await cell.ask(headers={"Authorization": f"Bearer {KEY}"}))[0] == 200
        for each in cell.engines:
            assert each.legs[0].headers["Authorization"] == "Bearer engines-own"
        async with cell.http.get(cell.app.url + "/health") as response:
            assert response.status == 200
    async with running_cell() as cell:
        await cell.ask(headers={"Authorization": "Bearer clients-own"})
        assert cell.decode.legs[0].headers["Authorization"] == "Bearer clients-own"


async def test_a_class_that_does_not_exist_is_a_bad_request() -> None:
    async with running_cell(classes={"paid": ServiceClass()}) as cell:
        status, _, body = await cell.ask(headers={"x-mooncake-class": "gold"})
        assert status == 400 and "paid" in json.loads(body)["error"]["message"]
        _, headers, _ = await cell.ask(service_tier="paid")
        assert headers["x-mooncake-class"] == "paid"
        assert cell.decode.legs[-1].body["service_tier"] == "paid"


async def test_a_tenant_that_asks_for_more_than_its_share_waits_for_the_other() -> None:
    async with running_cell(hold_above_s=0.02) as cell:
        await teach(cell, prefill_s=0.1, tenant="greedy")

        async def ask(tenant: str, number: int) -> None:
            await cell.ask(prompt=f"{tenant} {number} {TEXT}", headers={"x-mooncake-tenant": tenant})

        greedy = [asyncio.create_task(ask("greedy", number)) for number in range(14)]
        await asyncio.sleep(0.5)
        modest = asyncio.create_task(ask("modest", 0))
        await modest
        assert any(not each.done() for each in greedy), "the modest one was served before all of the greedy one's"
        await asyncio.gather(*greedy)


def no_strangers(waiting: Waiting, _outlook: Outlook) -> bool:
    return waiting.tenant != "stranger"


async def test_the_operators_own_rule() -> None:
    async with running_cell(admission_rule=f"{__name__}:no_strangers") as cell:
        assert (await cell.ask(headers={"x-mooncake-tenant": "stranger"}))[0] == 429
        assert (await cell.ask(headers={"x-mooncake-tenant": "friend"}))[0] == 200
    for name in ("no_such_module:f", f"{__name__}:no_such", f"{__name__}:KEY"):
        with pytest.raises(ConfigError):
            async with running_cell(admission_rule=name):
                pass


@pytest.mark.parametrize("policy", ["joint", "mooncake_paper", "prefix", "least_loaded", "round_robin", "random"])
@pytest.mark.parametrize("holding", ["queue", "early", "none"])
async def test_every_policy_and_every_way_to_hold_serve(policy: str, holding: str) -> None:
    settings: dict[str, Any] = {"policy": policy, "holding": holding}
    async with running_cell(num_prefills=2, num_decodes=2, **settings) as cell:
        answers = await asyncio.gather(*(cell.ask(prompt=f"{number} {TEXT}", stream=True) for number in range(8)))
        assert {status for status, _, _ in answers} == {200}
    async with running_cell(num_prefills=0, num_decodes=0, num_both=2, engine_knobs={"has_connector": False},
                            **settings) as cell:  # fmt: skip
        answers = await asyncio.gather(*(cell.ask(prompt=f"{number} {TEXT}") for number in range(8)))
        assert {status for status, _, _ in answers} == {200}
        if policy == "round_robin":
            assert [len(each.legs) for each in cell.engines] == [4, 4]
