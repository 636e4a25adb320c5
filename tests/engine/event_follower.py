"""Follow an engine's own publisher, in this process, and compare what the router knows with what was published."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooncake_connector.router.engines import EngineTable, Introduction
from mooncake_connector.router.event_subscriber import EventSubscriber
from mooncake_connector.router.index.endpoints import EventSockets
from mooncake_connector.router.index.hashing import pack_tokens
from mooncake_connector.router.index.holdings import Holdings, Source
from mooncake_connector.router.index.lookup import Held
from mooncake_connector.router.metrics import ROUTER_METRICS
from mooncake_store.metrics import Metrics

URL = "http://engine:8000"
TOKENS = list(range(1000, 1128))
WAIT_S = 30.0


class Follower:
    """A router's subscriber, and what it should know."""

    def __init__(self, folder: Path, dialect: str) -> None:
        self.endpoint, self.replay = (f"ipc://{folder}/{name}" for name in ("live", "replay"))
        sockets = EventSockets(endpoint=self.endpoint, replay=self.replay, topic="kv", dialect=dialect)  # type: ignore[arg-type]
        self.holdings = Holdings(4096, secret=b"0123456789abcdef")
        table = EngineTable()
        table.add(URL, "both")
        table.introduce(URL, Introduction(("m",)))
        self.subscriber = EventSubscriber(self.holdings, Metrics(ROUTER_METRICS), table=table, where={"*": sockets})

    async def expect(self, device: int, local: int, *, salt: str = "") -> None:
        held = None
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            prompt = self.holdings.prompt(pack_tokens(TOKENS), salt=salt)
            held = self.holdings.match(prompt).engines.get(URL, Held())
            if (held.device, held.local) == (device, local) and not self.holdings.is_stale(Source(URL)):
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{held}, not {(device, local)}; {self.holdings.counts}")


def run(check: Callable[[Follower], Any], folder: Path, dialect: str) -> None:
    """Run a check beside a running subscriber."""

    async def main() -> None:
        follower = Follower(folder, dialect)
        running = asyncio.create_task(follower.subscriber.run())
        try:
            await check(follower)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await follower.subscriber.close()

    asyncio.run(main())
