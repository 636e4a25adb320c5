"""Run real engines for tests: started once per session, killed and restarted at will, checked for leftovers."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mooncake_connector.demo.client import Answer, Handoff, complete, hand_over, introduce, post, session
from mooncake_connector.demo.cluster import SERVED_NAME, Cell, EngineOptions, engine_options, engine_spec
from mooncake_connector.demo.processes import Supervisor
from mooncake_connector.demo.scenes import DOCUMENT
from mooncake_connector.demo.status import CellStatus, held, scrape, total

ROOT = Path(__file__).resolve().parents[2]
ANSWER_TIMEOUT_S = 15.0
HELD_TIMEOUT_S = 30.0
LEASE_S = 8.0
OUTPUT_TOKENS = 16


def engine_python() -> str:
    """Return the interpreter that has vLLM; fails the test where there is none."""
    path = Path(os.environ.get("VLLM_VENV") or ROOT / ".venv-vllm") / "bin" / "python"
    if path.is_file():
        return str(path)
    pytest.fail("no vLLM: run `make test-engine`, or set VLLM_VENV to an environment that has it")


def model_folder() -> str:
    """Return the model's folder; fails the test where there is none."""
    path = Path(os.environ.get("MODEL") or ROOT / ".cache" / "models" / "smollm2")
    if (path / "config.json").is_file():
        return str(path)
    pytest.fail("no model: run `make test-engine`, or set MODEL to its folder")


def options(dtype: str, **more: Any) -> EngineOptions:
    """Describe test engines: the development server is on, so that a test can empty a device cache."""
    return engine_options(engine_python(), model_folder(), dtype=dtype,
                          environment={"VLLM_SERVER_DEV_MODE": "1"}, **more)


class Fleet:
    """A cell (etcd, store node, prefill, decode, router) and a lone engine without the connector to compare with.

    Args:
        run_dir: where logs go.
        dtype: of all engines.
        shared: use another fleet's etcd and store node instead of own ones.
    """

    def __init__(self, run_dir: Path, dtype: str, *, shared: Fleet | None = None) -> None:
        self.supervisor = Supervisor(run_dir, report=lambda line: print(line, file=sys.stderr, flush=True))
        self.options = options(dtype, cache_gib=1)
        # the 40 prompts of test_tokens are 1.1 GiB of float32 blocks: the store node keeps what the engine evicts
        segment = "1GiB" if dtype == "float32" else "64MiB"
        self.cell = Cell(self.supervisor, options=self.options, memory="1536MiB", connector={
            "verify": True, "segment_bytes": segment, "handoff_lease_s": LEASE_S, "membership_ttl_s": 5})
        self.shared = shared
        self.lone_url = f"http://127.0.0.1:{self.cell.spare_port}"
        self.status: CellStatus | None = None
        self.verified: dict[str, float] = {}
        if shared:
            self.cell.use_directory(shared.cell.directory)

    def start(self) -> None:
        """Start everything at once."""
        self.supervisor.start(engine_spec("lone", self.cell.spare_port, options=self.options))
        self.cell.start(has_router=not self.shared, has_directory=not self.shared)
        self.supervisor.wait_ready()
        self.status = CellStatus(self.cell.directory)

    def close(self) -> None:
        """Stop everything."""
        if self.status:
            self.status.close()
        self.supervisor.close()

    def heal(self) -> None:
        """Restart what a test has killed."""
        dead = [name for name, child in self.supervisor.children.items() if child.has_ended()]
        for name in dead:
            self.supervisor.restart(name, wait=False)
        self.supervisor.wait_ready(dead)

    def urls(self) -> list[str]:
        """Return the two engines of the cell."""
        return [self.cell.prefill_url, self.cell.decode_url]

    # ---- asking

    async def lone(self, http: aiohttp.ClientSession, prompt: Sequence[int], **body: Any) -> Answer:
        """Ask the engine without the connector."""
        return checked(await complete(http, self.lone_url, prompt, **{"max_tokens": OUTPUT_TOKENS, **body}))

    async def split(self, http: aiohttp.ClientSession, prompt: Sequence[int], **more: Any) -> Handoff:
        """Prefill on one engine, decode on the other."""
        peer = more.pop("peer", None) or await introduce(http, self.cell.prefill_url)
        return await hand_over(http, prefill_url=more.pop("prefill_url", self.cell.prefill_url),
                               decode_url=self.cell.decode_url, peer=peer, prompt=prompt,
                               **{"max_tokens": OUTPUT_TOKENS, **more})

    async def forget(self, http: aiohttp.ClientSession) -> None:
        """Empty both engines' own caches; the pool keeps its blocks."""
        for url in self.urls():
            for _ in range(50):     # refused while blocks are in use
                async with http.post(f"{url}/reset_prefix_cache") as reply:
                    if reply.status == 200:
                        break
                await asyncio.sleep(0.2)
            else:
                raise AssertionError(f"{url} keeps blocks in use: {await reply.text()}")

    # ---- looking

    def samples(self) -> dict[str, float]:
        """Return every member's samples, added up."""
        assert self.status is not None
        totals: dict[str, float] = {}
        for member in self.status.ask():
            for name, value in member.samples.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def process_samples(self, name: str) -> dict[str, float]:
        """Return the samples of the member that is (a child of) one process."""
        assert self.status is not None
        pids = set(self.supervisor.children[name].pids())
        return next((member.samples for member in self.status.ask() if member.member.pid in pids), {})

    def wait_saved(self, timeout_s: float = 20.0) -> None:
        """Wait until saving and copying to the store node have come to rest."""
        deadline, previous = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline:
            samples = self.samples()
            now = (total(samples, "mooncake_segment_blocks"), total(samples, "mooncake_replicate_blocks_total"))
            if now == previous and not total(samples, "mooncake_save_queue_blocks"):
                return
            previous = now
            time.sleep(0.7)
        raise AssertionError(f"still saving after {timeout_s} s: {previous}")

    def assert_nothing_held(self, timeout_s: float = HELD_TIMEOUT_S) -> None:
        """Assert that within 30 s no block, lease or transfer is held, and no request is left in an engine."""
        assert self.status is not None
        deadline = time.monotonic() + timeout_s
        left: dict[str, float] = {"never asked": 1.0}
        while left and time.monotonic() < deadline:
            time.sleep(0.3)
            statuses = self.status.ask()
            left = held(statuses)
            left |= {f"{status.member.kind} {status.member.pid} {status.error}": 1.0
                     for status in statuses if status.error}
            for url in self.urls():
                scraped = scrape(url)
                for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                    if scraped.get(name):
                        left[f"{url} {name}"] = scraped[name]
        assert not left, f"still held after {timeout_s} s: {left}"


def checked(answer: Answer) -> Answer:
    """Return the answer, or fail with the server's error."""
    assert not answer.error and answer.token_ids, f"HTTP {answer.status}: {answer.error or 'no tokens'}"
    return answer


def run(play: Any) -> Any:
    """Run ``play(http)`` to its end in an event loop of its own."""
    async def with_session() -> Any:
        async with session() as http:
            return await play(http)
    return asyncio.run(with_session())


def random_prompt(length: int, seed: int) -> list[int]:
    """Return token ids; the same seed gives the same prompt."""
    rng = random.Random(seed)
    return [rng.randint(100, 40_000) for _ in range(length)]


async def document_tokens(http: aiohttp.ClientSession, url: str) -> list[int]:
    """Return real text as token ids."""
    answer = await post(http, f"{url}/tokenize", {"model": SERVED_NAME, "prompt": DOCUMENT.read_text()})
    return list(answer["tokens"])


