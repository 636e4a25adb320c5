"""What a hand-over costs the user: decode's first token minus the prefill's completion, beside a lone decode step.

Two pairs of engines run side by side: ours, where each request chooses to publish per layer or per step, and vLLM's own
MooncakeConnector over TCP (started on a CPU by ``intree_cpu``; it needs the engine environment to have
mooncake-transfer-engine-non-cuda and the system libibverbs1). Modes alternate, so drift of the machine hits all alike.
Both legs are sent at the same moment, straight to the engines. The lone step is the median time between later tokens on
our decode engine, at that context, with everything else idle. Negative = the token came before the prefill's answer.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import harness
import msgspec

from mooncake_connector.demo.client import Handoff, hand_over, introduce, session
from mooncake_connector.demo.cluster import Cell, EngineOptions, engine_options, engine_spec, probe_python
from mooncake_connector.demo.processes import Supervisor, free_ports, stop_signals

LENGTHS = (64, 512, 2048, 4096, 6144)
LENGTHS_QUICK = (64, 512)
OUTPUT_TOKENS = 12
PAUSE_S = 2.0
"""The in-tree pair spins for a second after each message (ADR 0003); what follows must not pay for it."""
OURS = ("layer", "step")
INTREE = "in-tree"


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], needs_engine=True)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--lengths", default="", help="comma separated prompt lengths")
    parser.add_argument("--modes", default="layer,step,in-tree", help="comma separated: layer, step, in-tree")
    args = parser.parse_args()
    modes = tuple(args.modes.split(","))
    if unknown := set(modes) - {*OURS, INTREE}:
        parser.error(f"unknown mode {', '.join(sorted(unknown))}")
    options = engine_options(args.python, args.model, dtype=args.dtype)
    with stop_signals(), Supervisor(harness.run_dir(args, "handoff")) as supervisor:
        cell = Cell(supervisor, options=options, memory="", connector={"pool": False})
        intree = IntreePair(supervisor, options) if INTREE in modes else None
        cell.start(has_router=False)
        rows = asyncio.run(measure(cell, intree, modes, args))
    harness.publish(args, rows, title="Exposed hand-over in ms, medians (min..max)", notes=[
        f"{options.dtype}; prefill chunk {options.chunk_tokens} tokens; goal: step <= lone step + 25 at every length, "
        "layer <= 40 from 2,048 on"], vllm=probe_python(args.python).vllm)


class IntreePair:
    """vLLM's own MooncakeConnector over TCP: the baseline."""

    def __init__(self, supervisor: Supervisor, options: EngineOptions) -> None:
        bootstrap, *ports = free_ports(3)
        self.bootstrap_url = f"http://127.0.0.1:{bootstrap}"
        self.prefill_url, self.decode_url = (f"http://127.0.0.1:{port}" for port in ports)
        patched = msgspec.structs.replace(options, source_path="", environment={
            "PYTHONPATH": str(Path(__file__).with_name("intree_cpu")), "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(bootstrap)})
        engine_works(options.python)
        for name, port, role in (("intree-prefill", ports[0], "kv_producer"),
                                 ("intree-decode", ports[1], "kv_consumer")):
            supervisor.start(engine_spec(name, port, options=patched, transfer_config={
                "kv_connector": "MooncakeConnector", "kv_role": role,
                "kv_connector_extra_config": {"mooncake_protocol": "tcp"}}))

    def peer(self) -> dict[str, Any]:
        """Return the decode leg's parameters that name the prefill engine."""
        with urllib.request.urlopen(f"{self.bootstrap_url}/query", timeout=10) as answer:
            engine_id = msgspec.json.decode(answer.read())["0"]["engine_id"]
        return {"remote_bootstrap_addr": self.bootstrap_url, "remote_engine_id": engine_id}


def engine_works(python: str) -> None:
    """End with a clear message when the in-tree connector's own engine cannot be imported."""
    found = subprocess.run([python, "-c", "import mooncake.engine"], capture_output=True, text=True, timeout=60,
                           check=False)
    if found.returncode:
        raise SystemExit(f"the in-tree connector cannot run: {(found.stderr.splitlines() or ['?'])[-1]}\n"
                         f"  do: {python} -m pip install mooncake-transfer-engine-non-cuda; apt install libibverbs1; "
                         "or --modes layer,step")


async def measure(cell: Cell, intree: IntreePair | None, modes: tuple[str, ...], args: Any) -> list[dict[str, Any]]:
    """Return one row per prompt length."""
    rng = random.Random()
    rows = []
    lengths = [int(word) for word in args.lengths.split(",")] if args.lengths else (
        LENGTHS_QUICK if args.quick else LENGTHS)
    async with session() as http:
        peers = {mode: await introduce(http, cell.prefill_url) for mode in OURS}
        if intree:
            peers[INTREE] = intree.peer()
        for mode in modes:      # the first request of an engine is slow: not counted
            await once(http, cell, intree, mode, peers, harness.random_prompt(300, rng))
        for length in lengths:
            runs: dict[str, list[Handoff]] = {mode: [] for mode in modes}
            for index in range(2 if args.quick else args.reps):
                for mode in modes if index % 2 else modes[::-1]:
                    found = await once(http, cell, intree, mode, peers, harness.random_prompt(length, rng))
                    if found is None:
                        continue
                    runs[mode].append(found)
                    harness.say(f"  {length:5d} tokens, {mode}: {runs[mode][-1].exposed_s * 1e3:+.0f} ms")
                    await asyncio.sleep(PAUSE_S)
            rows.append(row(length, runs))
    return rows


async def once(http: aiohttp.ClientSession, cell: Cell, intree: IntreePair | None, mode: str, peers: dict[str, Any],
               prompt: list[int]) -> Handoff | None:
    """Hand one prompt over; None when the in-tree connector lost it, which is reported. Ours must not lose any."""
    pair = intree if mode == INTREE and intree else cell
    result = await hand_over(http, prefill_url=pair.prefill_url, decode_url=pair.decode_url, peer=peers[mode],
                             prompt=prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True,
                             prefill_params={} if mode == INTREE else {"publish": mode})
    if result.prefill_error or len(result.decode.times) < 2:
        text = f"{mode}, {len(prompt)} tokens: {result.prefill_error or result.decode.error or 'no tokens'}"
        if mode != INTREE:
            raise SystemExit(text)
        harness.say(f"  lost: {text}")
        return None
    return result


def row(length: int, runs: dict[str, list[Handoff]]) -> dict[str, Any]:
    """Summarise one prompt length."""
    runs = {mode: found for mode, found in runs.items() if found}
    ours = [run for mode in OURS for run in runs.get(mode, ())]
    gaps = [later - earlier for run in ours or runs.get(INTREE, [])
            for earlier, later in zip(run.decode.times[1:], run.decode.times[2:], strict=False)]
    cells: dict[str, Any] = {"prompt_tokens": length, "runs": min(len(found) for found in runs.values())}
    for mode, found in runs.items():
        exposed = [run.exposed_s for run in found]
        cells[f"{mode}_ms"] = harness.median_ms(exposed)
        cells[f"{mode}_spread"] = harness.spread_ms(exposed)
    cells["lone_step_ms"] = harness.median_ms(gaps)
    for mode, found in runs.items():
        cells[f"{mode}_prefill_s"] = round(statistics.median(run.prefill_ended - run.decode.began for run in found), 2)
    return cells


if __name__ == "__main__":
    harness.run(main)
