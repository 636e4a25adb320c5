"""What the router must survive: each fault is caused here, and leaves no stuck request behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mooncake_connector.router.engines import EngineState
from mooncake_store.config import StoreConfig
from mooncake_store.directory.open import open_directory
from mooncake_store.directory.server import EtcdServer
from mooncake_store.metrics import Metrics
from mooncake_store.types import HostIdentity, Member, NodeId
from unit.router.cell import TEXT, Cell, events, eventually, running_cell
from unit.router.fake_engine import MODEL, FakeEngine

ROOT = Path(__file__).resolve().parents[2]
QUICK: dict[str, Any] = {"health_interval_s": 0.1, "health_timeout_s": 0.4, "is_idle_checked": False}


class EngineProcess:
    """A fake engine that can be killed or stopped like a real one."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def engine_process(**knobs: Any) -> AsyncIterator[EngineProcess]:
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    process = subprocess.Popen([sys.executable, "-m", "unit.router.fake_engine", json.dumps(knobs)], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    try:
        assert process.stdout is not None
        url = (await asyncio.to_thread(process.stdout.readline)).strip()
        assert url.startswith("http://")
        yield EngineProcess(process, url)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def state_of(cell: Cell, url: str) -> EngineState:
    engine = cell.app.placer.table.get(url)
    assert engine is not None
    return engine.state


async def until_up(cell: Cell, url: str) -> None:
    await eventually(lambda: state_of(cell, url) is EngineState.UP, 15, f"{url} to be up")


async def stream(cell: Cell, number: int) -> tuple[int, dict[str, str], list[Any]]:
    status, headers, body = await cell.ask(prompt=f"{number} {TEXT}", stream=True)
    return status, headers, events(body) if status == 200 else [json.loads(body)]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_decode_engine_is_killed_or_frozen_in_the_middle_of_streams(fault: signal.Signals) -> None:
    async with engine_process(num_tokens=400, gap_s=0.05) as victim, running_cell(num_decodes=0, **QUICK) as cell:
        other = await FakeEngine(num_tokens=400, gap_s=0.05).start()
        for url in (victim.url, other.url):
            cell.app.watch.add(url, "decode")
            await until_up(cell, url)
        running = [asyncio.create_task(stream(cell, number)) for number in range(8)]
        await eventually(lambda: other.num_open == 4 and cell.app.placer.num_open == 8, 5, "streams on both")
        await asyncio.sleep(0.3)
        other.set(num_tokens=3, gap_s=0.0)
        begun_s = time.monotonic()
        victim.send(fault)
        answers = await asyncio.wait_for(asyncio.gather(*running), 40)
        broken = [found for status, headers, found in answers if headers["x-mooncake-decode"] == victim.url]
        whole = [found for status, headers, found in answers if headers["x-mooncake-decode"] == other.url]
        assert (len(broken), len(whole)) == (4, 4)
        for found in broken:
            assert found[-1] == "[DONE]" and found[-2]["error"]["code"] == 502
        for found in whole:
            assert found[-1] == "[DONE]" and len(found) == 401
        assert time.monotonic() - begun_s < 35
        for number in range(4):  # new ones go elsewhere
            status, headers, _ = await stream(cell, 100 + number)
            assert (status, headers["x-mooncake-decode"]) == (200, other.url)
        await cell.wait_idle()
        if fault == signal.SIGSTOP:
            victim.send(signal.SIGCONT)
            await until_up(cell, victim.url)
        await other.stop()


async def test_requests_that_wait_for_a_frozen_engine_are_served_by_another() -> None:
    async with engine_process(first_byte_s=60.0) as victim, running_cell(**QUICK) as cell:
        cell.app.watch.add(victim.url, "decode")
        await until_up(cell, victim.url)
        running = [asyncio.create_task(stream(cell, number)) for number in range(6)]
        await eventually(lambda: cell.app.placer.num_open == 3, 5, "three to be answered by the other one")
        victim.send(signal.SIGSTOP)
        answers = await asyncio.wait_for(asyncio.gather(*running), 20)
        assert all(status == 200 and found[-1] == "[DONE]" for status, _, found in answers)
        assert state_of(cell, victim.url) is EngineState.DOWN
        await cell.wait_idle()


async def test_a_frozen_prefill_engine_leaves_its_requests_to_the_decode_engine() -> None:
    async with engine_process(prefill_s=60.0) as victim, running_cell(num_prefills=0, **QUICK) as cell:
        cell.decode.set(needs_prefill=set())
        cell.app.watch.add(victim.url, "prefill")
        await until_up(cell, victim.url)
        running = [asyncio.create_task(stream(cell, number)) for number in range(3)]
        await eventually(lambda: cell.decode.num_open == 3, 5, "all decode legs")
        victim.send(signal.SIGSTOP)
        answers = await asyncio.wait_for(asyncio.gather(*running), 20)
        assert all(status == 200 and "x-mooncake-prefill" not in headers for status, headers, _ in answers)
        await cell.wait_idle()


async def test_a_client_that_does_not_read_makes_its_engine_wait_and_costs_no_memory() -> None:
    async with running_cell(is_idle_checked=False, total_timeout_s=12.0) as cell:
        cell.decode.set(num_tokens=1_000_000, padding="x" * 30_000)
        host, port = cell.app.url.removeprefix("http://").split(":")
        body = json.dumps({"model": MODEL, "prompt": TEXT, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        before_bytes = psutil.Process().memory_info().rss
        writers = []
        for _ in range(10):
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            writer.write(head.encode() + body)
            await reader.readexactly(100)
            writers.append(writer)
        sent = -1
        async with asyncio.timeout(8):  # until the engine is made to wait
            while sent != cell.decode.num_events:
                sent = cell.decode.num_events
                await asyncio.sleep(0.5)
        assert sent < 100_000
        assert psutil.Process().memory_info().rss - before_bytes < 64 << 20
        assert (await cell.ask())[0] == 200, "others are served meanwhile"
        await eventually(lambda: not cell.app.gateway.num_open, 15, "the slow ones to be cut off")
        for writer in writers:
            writer.close()


async def test_a_hundred_clients_that_leave_at_once() -> None:
    async with running_cell(num_prefills=2, num_decodes=2) as cell:
        for each in cell.prefills:
            each.set(prefill_s=30.0)
        for number, each in enumerate(cell.decodes):
            each.set(num_tokens=1000, gap_s=0.02, needs_prefill=set() if number else None)
        running = [asyncio.create_task(stream(cell, number)) for number in range(100)]
        await eventually(lambda: cell.app.gateway.num_open == 100, 5, "all requests")
        await asyncio.sleep(0.3)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await cell.wait_idle()
        assert cell.app.dispatcher.num_held == 0


@pytest.mark.etcd
async def test_etcd_goes_away_and_comes_back(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path / "etcd")
    server.start()
    joined = []

    def join(name: str, engine: FakeEngine) -> None:
        directory = open_directory(StoreConfig(directory=server.url, membership_ttl_s=2), Metrics())
        member = Member(NodeId(name), "engine", "tcp://127.0.0.1:1", HostIdentity("boot", 1), 1, 0, "0",
                        f"decode {engine.url}")  # fmt: skip
        directory.join(member)
        joined.append(directory)

    first, second = await FakeEngine().start(), await FakeEngine().start()
    try:
        await asyncio.to_thread(join, "first", first)
        async with running_cell(num_decodes=0, directory=server.url) as cell:
            await eventually(lambda: cell.app.placer.table.get(first.url), 10, "the first engine to be found")
            await until_up(cell, first.url)
            assert (await cell.ask())[1]["x-mooncake-decode"] == first.url
            server.kill()
            for number in range(10):  # longer than the membership lasts without etcd
                status, headers, _ = await cell.ask(prompt=f"{number} {TEXT}")
                assert (status, headers["x-mooncake-decode"]) == (200, first.url)
                await asyncio.sleep(0.3)
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(join, "second", second)
            await eventually(lambda: cell.app.placer.table.get(second.url), 20, "the second engine to be found")
            await until_up(cell, second.url)
            assert cell.app.placer.table.get(first.url) is not None
    finally:
        for directory in joined:
            await asyncio.to_thread(directory.close)
        server.stop()
        await first.stop()
        await second.stop()
