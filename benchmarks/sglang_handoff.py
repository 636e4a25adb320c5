"""What a hand-over costs the user on SGLang: decode's first token minus the prefill's completion, ours beside in-tree.

Two pairs of servers run side by side and alternate: transfer backend ``mooncake_pull``, and SGLang's own
``mooncake_tcp`` (started on a CPU by ``sglang_intree_cpu``; it needs the engine environment to have
mooncake-transfer-engine-non-cuda and the system libibverbs1). Both legs are sent at the same moment, straight to the
servers. The prefill's completion is the prefill server's own time stamp; the first token's is ours, at the client.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import harness

from mooncake_connector.demo.client import session
from mooncake_connector.demo.processes import ProcessSpec, Supervisor, free_ports, stop_signals

LENGTHS = (64, 512, 2048, 4096, 6144)
LENGTHS_QUICK = (64, 512)
OUTPUT_TOKENS = 8
PAUSE_S = 1.0
CHUNK_TOKENS = 512
BACKENDS = {"pull": "mooncake_pull", "in-tree": "mooncake_tcp"}
FLAGS = ("--device", "cpu", "--attention-backend", "torch_native", "--host", "127.0.0.1", "--page-size", "16",
         "--mem-fraction-static", "0.5", "--max-total-tokens", "8192", "--max-running-requests", "4",
         "--chunked-prefill-size", str(CHUNK_TOKENS), "--enable-metrics", "--sleep-on-idle")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "2",
               # Ours does that by itself; for the other, SGLang would ask for a CUDA event.
               "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "false"}


def main() -> None:
    """Start the pairs, measure, publish."""
    parser = harness.parser(__doc__.splitlines()[0], needs_engine=True)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--lengths", default="", help="comma separated prompt lengths")
    parser.add_argument("--modes", default="pull,in-tree", help="comma separated: pull, in-tree")
    args = parser.parse_args()
    modes = tuple(args.modes.split(","))
    if unknown := set(modes) - set(BACKENDS):
        parser.error(f"unknown mode {', '.join(sorted(unknown))}")
    if "in-tree" in modes:
        require_intree(args.python)
    with stop_signals(), Supervisor(harness.run_dir(args, "sglang-handoff")) as supervisor:
        pairs = {mode: Pair(supervisor, mode, args) for mode in modes}
        supervisor.wait_ready()
        rows = asyncio.run(measure(pairs, args))
    harness.publish(args, rows, title="Exposed hand-over on SGLang in ms, medians (min..max)", notes=[
        f"{dtype(args)}; prefill chunk {CHUNK_TOKENS} tokens; goal: pull <= in-tree at every length, and flat"],
        sglang=version(args.python))


def require_intree(python: str) -> None:
    """End with a clear message when SGLang's own backend cannot be imported."""
    found = subprocess.run([python, "-c", "import mooncake.engine"], capture_output=True, text=True, timeout=60,
                           check=False)
    if found.returncode:
        raise SystemExit(f"mooncake_tcp cannot run: {(found.stderr.splitlines() or ['?'])[-1]}\n"
                         f"  do: {python} -m pip install mooncake-transfer-engine-non-cuda; apt install libibverbs1; "
                         "or --modes pull")


def version(python: str) -> str:
    """Return the engine's version."""
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def dtype(args: Any) -> str:
    """Return the element type: SGLang's torch fallbacks are slower in bfloat16."""
    return "float32" if args.dtype == "auto" else str(args.dtype)


class Pair:
    """A prefill and a decode server with one transfer backend."""

    def __init__(self, supervisor: Supervisor, mode: str, args: Any) -> None:
        prefill, decode, self.bootstrap = free_ports(3)
        self.prefill, self.decode = f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}"
        path = os.pathsep.join(filter(None, (str(Path(__file__).with_name("sglang_intree_cpu")),
                                             os.environ.get("PYTHONPATH", ""))))
        for role, port, more in (
            ("prefill", prefill, ("--disaggregation-bootstrap-port", str(self.bootstrap))),
            ("decode", decode, ("--disaggregation-decode-retraction-backup", "cpu_tensor")),
        ):
            supervisor.start(ProcessSpec(
                name=f"{mode}-{role}", stop_order=1, ready_url=f"http://127.0.0.1:{port}/health", ready_timeout_s=300.0,
                command=(args.python, "-m", "sglang.launch_server", "--model-path", args.model, "--port", str(port),
                         "--dtype", dtype(args), *FLAGS, "--disaggregation-mode", role,
                         "--disaggregation-transfer-backend", BACKENDS[mode], *more),
                environment={**ENVIRONMENT, **({"PYTHONPATH": path} if mode == "in-tree" else {})},
                hint="four servers need some 12 GiB of memory; the log says what it missed"))


class Handoff(NamedTuple):
    """One request: when its prefill ended and its tokens came, in seconds since it was sent."""

    prefill_s: float
    token_s: list[float]

    @property
    def exposed_s(self) -> float:
        """Return how long after the prefill's end the first token came."""
        return self.token_s[0] - self.prefill_s


async def measure(pairs: dict[str, Pair], args: Any) -> list[dict[str, Any]]:
    """Return one row per prompt length."""
    rng = random.Random()
    lengths = [int(word) for word in args.lengths.split(",")] if args.lengths else (
        LENGTHS_QUICK if args.quick else LENGTHS)
    rows = []
    async with session() as http:
        for pair in pairs.values():     # the first requests of a server are slow: not counted
            for length in (64, 600):
                await hand_over(http, pair, harness.random_prompt(length, rng))
        for length in lengths:
            runs: dict[str, list[Handoff]] = {mode: [] for mode in pairs}
            for index in range(2 if args.quick else args.reps):
                for mode in list(pairs) if index % 2 else list(pairs)[::-1]:
                    found = await hand_over(http, pairs[mode], harness.random_prompt(length, rng))
                    runs[mode].append(found)
                    harness.say(f"  {length:5d} tokens, {mode}: {found.exposed_s * 1e3:+.0f} ms")
                    await asyncio.sleep(PAUSE_S)
            rows.append(row(length, runs))
    return rows


async def hand_over(http: aiohttp.ClientSession, pair: Pair, prompt: list[int]) -> Handoff:
    """Send one prompt to both servers, as a router does."""
    body = {"input_ids": prompt, "bootstrap_host": "127.0.0.1", "bootstrap_port": pair.bootstrap,
            "bootstrap_room": random.getrandbits(62),
            "sampling_params": {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}}
    began = time.time()
    ended, tokens = await asyncio.gather(prefill_end(http, pair.prefill, body), token_times(http, pair.decode, body))
    return Handoff(ended - began, [at - began for at in tokens])


async def prefill_end(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> float:
    """Return when the prefill server had computed the prompt, by its own account."""
    async with http.post(f"{url}/generate", json=body) as answer:
        answer.raise_for_status()
        return float((await answer.json())["meta_info"]["prefill_finished_time"])


async def token_times(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[float]:
    """Return when each piece of the decode server's stream came."""
    times = []
    async with http.post(f"{url}/generate", json={**body, "stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                times.append(time.time())
    if len(times) < 2:
        raise SystemExit(f"{url} streamed {len(times)} pieces; its log says why")
    return times


def row(length: int, runs: dict[str, list[Handoff]]) -> dict[str, Any]:
    """Summarise one prompt length."""
    cells: dict[str, Any] = {"prompt_tokens": length, "runs": min(map(len, runs.values()))}
    for mode, found in runs.items():
        exposed = [run.exposed_s for run in found]
        cells[f"{mode}_ms"] = harness.median_ms(exposed)
        cells[f"{mode}_spread"] = harness.spread_ms(exposed)
    every = [run for found in runs.values() for run in found]
    cells["lone_step_ms"] = harness.median_ms([
        later - earlier for run in every for earlier, later in zip(run.token_s[1:], run.token_s[2:], strict=False)])
    for mode, found in runs.items():
        cells[f"{mode}_prefill_s"] = round(statistics.median(run.prefill_s for run in found), 2)
    return cells


if __name__ == "__main__":
    harness.run(main)
