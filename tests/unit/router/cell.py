"""A router in front of fake engines, in this process, with short timeouts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from mooncake_connector.router.app import RouterApp
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.engines import EngineState
from unit.router.fake_engine import MODEL, FakeEngine

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


class Cell:
    """What a test needs: the router, its engines, and a client."""

    def __init__(self, app: RouterApp, prefills: list[FakeEngine], decodes: list[FakeEngine],
                 http: aiohttp.ClientSession) -> None:
        self.app = app
        self.prefills = prefills
        self.decodes = decodes
        self.http = http

    @property
    def prefill(self) -> FakeEngine:
        return self.prefills[0]

    @property
    def decode(self) -> FakeEngine:
        return self.decodes[0]

    @property
    def engines(self) -> list[FakeEngine]:
        return [*self.prefills, *self.decodes]

    def post(self, path: str = "/v1/completions", *, headers: dict[str, str] | None = None, **body: Any) -> Any:
        body = {"model": MODEL, "prompt": TEXT, "max_tokens": 8, **body}
        if path.endswith("chat/completions"):
            body.setdefault("messages", [{"role": "user", "content": body.pop("prompt")}])
        return self.http.post(self.app.url + path, data=json.dumps(body), headers=headers)

    async def ask(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, str], bytes]:
        async with self.post(path, **body) as response:
            return response.status, dict(response.headers), await response.read()

    def sample(self, name: str) -> float:
        return self.app.metrics.snapshot().get(name, 0.0)

    async def wait_state(self, engine: FakeEngine, state: EngineState, timeout_s: float = 5.0) -> None:
        def is_there() -> bool:
            known = self.app.placer.table.get(engine.url)
            return known is not None and known.state is state

        await eventually(is_there, timeout_s, f"{engine.url} {state}")

    async def wait_idle(self, timeout_s: float = 5.0) -> None:
        """Nothing may be left of any request: no placement, no work on any engine, no open call."""
        await eventually(lambda: not self.app.placer.num_open and not self.app.gateway.num_open, timeout_s, "requests")
        for engine in self.app.placer.table:
            assert (engine.prefill_tokens, engine.decode_tokens, engine.num_open) == (0, 0, 0), engine
        await eventually(lambda: not any(each.num_open for each in self.engines), timeout_s, "calls")


async def eventually(condition: Any, timeout_s: float, what: str) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


@asynccontextmanager
async def running_cell(*, num_prefills: int = 1, num_decodes: int = 1, num_both: int = 0, is_idle_checked: bool = True,
                       engine_knobs: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Cell]:
    """Start engines and a router; check at the end that nothing is left of any request."""
    prefills = [await FakeEngine(**(engine_knobs or {})).start() for _ in range(num_prefills)]
    decodes = [await FakeEngine(**(engine_knobs or {})).start() for _ in range(num_decodes)]
    both = [await FakeEngine(**(engine_knobs or {})).start() for _ in range(num_both)]
    settings = RouterConfig(
        **{"prefill": tuple(each.url for each in prefills), "decode": tuple(each.url for each in decodes),
           "engine": tuple(each.url for each in both), "port": 0, "placement": "", "health_interval_s": 30.0,
           "decode_recovery_s": 0.3, "refused_grace_s": 0.2, "decode_token_s": 0.01, "total_timeout_s": 20.0, **config})
    app = RouterApp(settings)
    try:
        await app.start()
        await app.watch.wait_settled(5)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            cell = Cell(app, prefills, [*decodes, *both], http)
            yield cell
            if is_idle_checked:
                await cell.wait_idle()
    finally:
        await app.stop(drain_timeout_s=0)
        for each in (*prefills, *decodes, *both):
            await each.stop()


def events(stream: bytes) -> list[Any]:
    """Return the JSON of every event of a stream, "[DONE]" as it is; the stream must be well-formed."""
    assert stream.endswith(b"\n\n")
    found = []
    for block in stream.decode().strip().split("\n\n"):
        assert block.startswith("data: "), block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found
