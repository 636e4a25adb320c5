"""Running a router: engines that come and go, settings that change, engines and routers that are drained."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.discovery import engines_of
from mooncake_connector.router.engines import EngineState
from mooncake_store.directory.memory import MemoryDirectory, shared_cell
from mooncake_store.errors import ConfigError
from mooncake_store.types import HostIdentity, Member, NodeId
from unit.router.cell import TEXT, Cell, events, eventually, running_cell
from unit.router.fake_engine import FakeEngine

SRC = Path(__file__).resolve().parents[2] / "src"


def changed(cell: Cell, **settings: Any) -> RouterConfig:
    config = cell.app.config
    fields = {name: getattr(config, name) for name in config.__struct_fields__}
    return RouterConfig(**{**fields, **settings})


def member(name: str, about: str) -> Member:
    return Member(NodeId(name), "engine", "tcp://127.0.0.1:1", HostIdentity("boot", 1), 1, 0, "0", about)


# ---- breaker


async def test_an_engine_that_answers_checks_and_fails_requests_is_left_alone() -> None:
    async with running_cell(num_decodes=2, health_interval_s=0.05, breaker_failures=3, breaker_hold_s=30.0) as cell:
        bad, good = cell.decodes
        bad.set(fail_status=500)
        for number in range(40):
            status, headers, _ = await cell.ask(prompt=f"{number} {TEXT}")
            assert (status, headers["x-mooncake-decode"]) == (200, good.url)
            await asyncio.sleep(0.01)
            if cell.sample("mooncake_router_breaker_opened_total"):
                break
        assert len(bad.legs) == 3
        await asyncio.sleep(0.3)  # several checks
        assert cell.app.placer.table.get(bad.url).state is EngineState.SUSPECT  # type: ignore[union-attr]
        for number in range(10):
            assert (await cell.ask(prompt=f"again {number} {TEXT}"))[0] == 200
        assert len(bad.legs) == 3


async def test_an_engine_that_is_well_again_gets_work_after_the_pause() -> None:
    async with running_cell(num_decodes=2, health_interval_s=0.05, breaker_failures=1, breaker_hold_s=0.2) as cell:
        bad = cell.decodes[0]
        bad.set(fail_status=500)
        for number in range(4):
            await cell.ask(prompt=f"{number} {TEXT}")
        assert cell.sample("mooncake_router_breaker_opened_total") == 1
        bad.set(fail_status=0)
        await cell.wait_state(bad, EngineState.UP)
        for number in range(4):
            await cell.ask(prompt=f"again {number} {TEXT}")
        assert len(bad.legs) > 1


# ---- draining


async def test_an_engine_that_is_drained_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with running_cell(num_decodes=2) as cell:
        for each in cell.decodes:
            each.set(num_tokens=20, gap_s=0.03)
        running = [asyncio.create_task(cell.ask(prompt=f"{number} {TEXT}", stream=True)) for number in range(4)]
        await eventually(lambda: sum(each.num_open for each in cell.decodes) == 4, 3, "all streams")
        leaving, staying = cell.decodes
        cell.app.reconfigure(changed(cell, draining=(leaving.url,)))
        before = len(leaving.legs)
        for number in range(4):
            _, headers, _ = await cell.ask(prompt=f"new {number} {TEXT}")
            assert headers["x-mooncake-decode"] == staying.url
        async with cell.http.get(cell.app.url + "/ready") as response:
            assert (await response.json())["engines"][leaving.url].startswith("drain")
        for status, _, body in await asyncio.gather(*running):
            assert status == 200 and events(body)[-1] == "[DONE]"
        assert len(leaving.legs) == before
        await cell.wait_idle()
        async with cell.http.get(cell.app.url + "/ready") as response:
            assert (await response.json())["engines"][leaving.url] == "drained"
        cell.app.reconfigure(changed(cell, draining=()))
        for number in range(4):
            await cell.ask(prompt=f"newer {number} {TEXT}")
        assert len(leaving.legs) > before


# ---- settings


async def test_settings_change_while_requests_run() -> None:
    async with running_cell(num_decodes=2) as cell:
        cell.decodes[0].set(num_tokens=10, gap_s=0.05)
        cell.decodes[1].set(num_tokens=10, gap_s=0.05)
        running = asyncio.create_task(cell.ask(stream=True))
        await eventually(lambda: any(each.num_open for each in cell.decodes), 3, "a stream")
        newcomer = await FakeEngine().start()
        try:
            cell.app.reconfigure(
                changed(cell, decode=(cell.decodes[1].url, newcomer.url), policy="round_robin",
                        classes={"paid": ServiceClass(ttft_s=9.0)}, total_timeout_s=7.0)
            )  # fmt: skip
            await cell.wait_state(newcomer, EngineState.UP)
            for number in range(6):
                status, headers, _ = await cell.ask(prompt=f"{number}", headers={"x-mooncake-class": "paid"})
                assert status == 200 and headers["x-mooncake-decode"] != cell.decodes[0].url
            assert newcomer.legs
            status, _, body = await running
            assert status == 200 and events(body)[-1] == "[DONE]"
            assert cell.app.placer.policy.name == "round_robin"
            await cell.wait_idle()
        finally:
            await newcomer.stop()


@pytest.mark.parametrize(
    "settings",
    [{"port": 1}, {"placement": "tcp://127.0.0.1:1"}, {"admission_rule": "no:rule"}, {"decode": ("http://a:1",) * 2},
     {"tenants": {"a": {"api_key": "12345678", "service_class": "gold"}}}],
    ids=str,
)  # fmt: skip
async def test_settings_that_cannot_be_used_change_nothing(settings: dict[str, Any]) -> None:
    async with running_cell() as cell:
        before = cell.app.config
        if "tenants" in settings:
            from mooncake_connector.router.config import Tenant

            settings = {"tenants": {name: Tenant(**each) for name, each in settings["tenants"].items()}}
        with pytest.raises(ConfigError):
            cell.app.reconfigure(changed(cell, **{"policy": "random", **settings}))
        assert cell.app.config is before and cell.app.placer.policy.name == "joint"
        assert (await cell.ask())[0] == 200


# ---- discovery


def test_what_members_say_of_their_servers() -> None:
    said = ["prefill http://a:1", "both http://b:1/", "decode https://c:1", "prefill http://a:1", "", "prefill",
            "boss http://d:1", "both ftp://e:1", "both http://f:1/v1", "both http://g h", "decode " + "http://x" * 500]
    found = engines_of(member(f"m{number}", about) for number, about in enumerate(said))
    assert found == {"http://a:1": "prefill", "http://b:1": "both", "https://c:1": "decode"}


async def test_engines_are_found_in_the_cell_and_leave_with_it() -> None:
    async with running_cell(num_prefills=0, directory="memory", cell="found") as cell:
        engine = await FakeEngine().start()
        workers = [MemoryDirectory(shared_cell("found")) for _ in range(2)]
        for number, worker in enumerate(workers):  # two workers of one engine
            worker.join(member(f"w{number}", f"prefill {engine.url}"))
        given = MemoryDirectory(shared_cell("found"))
        given.join(member("given", f"prefill {cell.decode.url}"))  # also given by hand, as a decode engine
        try:
            await cell.wait_state(engine, EngineState.UP)
            _, headers, _ = await cell.ask()
            assert headers["x-mooncake-prefill"] == engine.url
            assert cell.app.placer.table.get(cell.decode.url).role == "decode"  # type: ignore[union-attr]
            workers[0].close()
            await asyncio.sleep(0.7)
            assert cell.app.placer.table.get(engine.url) is not None, "one worker is left"
            workers[1].close()
            given.close()
            await eventually(lambda: cell.app.placer.table.get(engine.url) is None, 3, "it to be given up")
            assert cell.app.placer.table.get(cell.decode.url) is not None
            status, headers, _ = await cell.ask()
            assert status == 200 and "x-mooncake-prefill" not in headers
        finally:
            await engine.stop()


# ---- the process


@asynccontextmanager
async def router_process(*flags: str, log: Path) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mooncake_connector.cli", "router", "--port", str(port), "--placement", "",
             *flags], env={**os.environ, "PYTHONPATH": str(SRC)}, stderr=stream,
        )  # fmt: skip
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(30):
            while True:
                try:
                    async with http.get(f"http://127.0.0.1:{port}/ready") as response:
                        if response.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


async def test_sigterm_finishes_streams_and_then_ends(tmp_path: Path) -> None:
    engine = await FakeEngine(num_tokens=30, gap_s=0.05).start()
    try:
        log = tmp_path / "log"
        async with router_process("--engine", engine.url, log=log) as (url, process), aiohttp.ClientSession() as http:
            body = {"prompt": TEXT, "stream": True}
            async with http.post(f"{url}/v1/completions", json=body) as response:
                first = await response.content.readany()
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
                async with http.post(f"{url}/v1/completions", json=body) as late:
                    assert late.status == 503
                text = first + await response.read()
            assert len(events(text)) == 31
            await asyncio.to_thread(process.wait, 10)
            assert process.returncode == 0 and b"Traceback" not in log.read_bytes()
    finally:
        await engine.stop()


async def test_the_file_is_followed_and_a_bad_one_is_refused_with_the_reason(tmp_path: Path) -> None:
    first, second = await FakeEngine().start(), await FakeEngine().start()
    file, log = tmp_path / "router.json", tmp_path / "log"

    def write(**settings: object) -> None:
        new = file.with_suffix(".new")
        new.write_text(json.dumps(settings))
        new.replace(file)

    async def engines(http: aiohttp.ClientSession, url: str) -> set[str]:
        async with http.get(f"{url}/ready") as response:
            return set((await response.json())["engines"])

    async def until(http: aiohttp.ClientSession, url: str, wanted: set[str]) -> None:
        async with asyncio.timeout(10):
            while await engines(http, url) != wanted:
                await asyncio.sleep(0.05)

    async def until_logged(text: bytes) -> None:
        async with asyncio.timeout(10):
            while text not in log.read_bytes():
                await asyncio.sleep(0.05)

    write(engine=[first.url])
    try:
        async with router_process("--config", str(file), log=log) as (url, process), aiohttp.ClientSession() as http:
            write(engine=[first.url, second.url])
            await until(http, url, {first.url, second.url})
            write(engine=[first.url], policy="bogus")
            await until_logged(b"policy='bogus'")
            write(engine=[first.url], drain_timeout_s=-1)
            process.send_signal(signal.SIGHUP)
            await until_logged(b"drain_timeout_s=-1")
            assert await engines(http, url) == {first.url, second.url}
            async with http.post(f"{url}/v1/completions", json={"prompt": TEXT}) as response:
                assert response.status == 200
            async with http.get(f"{url}/metrics") as response:
                text = await response.text()
            assert 'mooncake_router_config_reloads_total{result="ok"} 1.0' in text
            write(engine=[second.url])
            process.send_signal(signal.SIGHUP)
            await until(http, url, {second.url})
    finally:
        await first.stop()
        await second.stop()
