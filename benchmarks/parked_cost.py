"""What a parked request costs the machine.

A request is parked on the decode engine while its prefill has not happened yet, and on the prefill engine while nobody
has fetched its cache. Both are asked for: processor time of each engine while parked, and how much longer the other
engine's 2,048-token prefill takes beside a parked request than alone, alternating, in one run.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import uuid
from typing import Any

import aiohttp
import harness

from mooncake_connector.demo.client import complete, introduce, post, session
from mooncake_connector.demo.cluster import SERVED_NAME, Cell, engine_options, probe_python
from mooncake_connector.demo.processes import Supervisor, cpu_seconds, stop_signals

PARKED_TOKENS = 200
WATCH_S = 5.0
SETTLE_S = 1.0
LEASE_S = 90.0


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], needs_engine=True)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the neighbour's prefill")
    args = parser.parse_args()
    options = engine_options(args.python, args.model, dtype=args.dtype)
    with stop_signals(), Supervisor(harness.run_dir(args, "parked")) as supervisor:
        # long patience: the parked request must stay parked while it is watched
        cell = Cell(supervisor, options=options, memory="", connector={
            "pool": False, "handoff_lease_s": LEASE_S, "handoff_timeout_s": LEASE_S})
        cell.start(has_router=False)
        rows = asyncio.run(Bench(cell, args).measure())
    harness.publish(args, rows, title="Cost of a parked request (<= 0.2 core and ratio <= 1.03 wanted)",
                    vllm=probe_python(args.python).vllm)


class Bench:
    """Measures one cell."""

    def __init__(self, cell: Cell, args: Any) -> None:
        self.cell = cell
        self.args = args
        self.rng = random.Random()

    async def measure(self) -> list[dict[str, Any]]:
        """Return one row per side on which a request is parked."""
        async with session() as http:
            peer = await introduce(http, self.cell.prefill_url)
            for url in (self.cell.prefill_url, self.cell.decode_url):
                await complete(http, url, harness.random_prompt(300, self.rng), max_tokens=4)
            return [await self.side(http, "decode", peer), await self.side(http, "prefill", peer)]

    async def side(self, http: aiohttp.ClientSession, parked_on: str, peer: dict[str, Any]) -> dict[str, Any]:
        """Measure with a request parked on one engine and the prefill on the other."""
        neighbour = self.cell.prefill_url if parked_on == "decode" else self.cell.decode_url
        idle = await self.cores()
        parked = await self.with_parked(http, parked_on, peer, self.cores)
        ratios, alone_s, beside_s = [], [], []
        for _ in range(2 if self.args.quick else self.args.reps):
            alone_s.append(await self.prefill(http, neighbour))
            beside_s.append(await self.with_parked(http, parked_on, peer, lambda: self.prefill(http, neighbour)))
            ratios.append(beside_s[-1] / alone_s[-1])
            harness.say(f"  parked on {parked_on}: neighbour {alone_s[-1]:.3f} s alone, {beside_s[-1]:.3f} s beside")
        return {"parked_on": parked_on, "idle_cores": round(sum(idle.values()), 3),
                "parked_prefill_cores": round(parked["prefill"], 3), "parked_decode_cores": round(parked["decode"], 3),
                "neighbour_alone_s": round(statistics.median(alone_s), 3),
                "neighbour_beside_s": round(statistics.median(beside_s), 3),
                "ratio": round(statistics.median(ratios), 4), "runs": len(ratios)}

    async def cores(self) -> dict[str, float]:
        """Return the cores that each engine uses over a few seconds."""
        children = {name: self.cell.supervisor.children[name].pids() for name in ("prefill", "decode")}
        before = {name: cpu_seconds(pids) for name, pids in children.items()}
        began = time.monotonic()
        await asyncio.sleep(WATCH_S)
        elapsed = time.monotonic() - began
        return {name: (cpu_seconds(pids) - before[name]) / elapsed for name, pids in children.items()}

    async def prefill(self, http: aiohttp.ClientSession, url: str) -> float:
        """Return how long a fresh prompt takes to its first token."""
        answer = await complete(http, url, harness.random_prompt(self.args.tokens, self.rng), max_tokens=1)
        if not answer.times:
            raise SystemExit(f"{url} did not answer: {answer.error}")
        return answer.ttft_s

    async def with_parked(self, http: aiohttp.ClientSession, parked_on: str, peer: dict[str, Any], measure: Any) -> Any:
        """Run ``measure`` while a request is parked; then send the missing leg and let both end."""
        prompt = harness.random_prompt(PARKED_TOKENS, self.rng)
        transfer_id = uuid.uuid4().hex

        async def prefill_leg() -> Any:
            return await post(http, f"{self.cell.prefill_url}/v1/completions", {
                "model": SERVED_NAME, "prompt": prompt, "temperature": 0, "max_tokens": 1, "kv_transfer_params": {
                    "do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}})

        async def decode_leg() -> Any:
            return await complete(http, self.cell.decode_url, prompt, max_tokens=2, kv_transfer_params={
                "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer_id, **peer})

        first, second = (decode_leg, prefill_leg) if parked_on == "decode" else (prefill_leg, decode_leg)
        task = asyncio.create_task(first())
        if parked_on == "prefill":
            await task          # its answer comes at once; the blocks stay held
        await asyncio.sleep(SETTLE_S)
        result = await measure()
        if parked_on == "decode" and task.done():
            raise SystemExit("the request did not stay parked; see decode.log")
        await asyncio.gather(task, second())
        await asyncio.sleep(SETTLE_S)
        return result


if __name__ == "__main__":
    harness.run(main)
