"""What the connector costs when there is nothing to share: one engine with it, one without, requests alternating.

Both engines run side by side and one is idle while the other works. Prompts are new every time, so the pool never hits.
``saved`` rows include what saving every block costs, because that is what a user gets by turning the connector on.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from typing import Any

import harness

from mooncake_connector.demo.client import Answer, complete, session
from mooncake_connector.demo.cluster import engine_options, engine_spec, etcd_spec, probe_python
from mooncake_connector.demo.processes import Supervisor, free_ports, stop_signals

WARM_RUNS = 2


def main() -> None:
    args = parse()
    options = engine_options(args.python, args.model, dtype=args.dtype)
    folder = harness.run_dir(args, "idle")
    with stop_signals(), Supervisor(folder) as supervisor:
        etcd_port, *ports = free_ports(3)
        supervisor.start(etcd_spec(etcd_port, folder / "etcd"))
        supervisor.wait_ready()
        settings: dict[str, object] = {"directory": f"etcd://127.0.0.1:{etcd_port}"}
        # the page cache and the CPU are shared: start both at once so that neither profits
        supervisor.start(engine_spec("plain", ports[0], options=options))
        supervisor.start(engine_spec("connector", ports[1], options=options, role="kv_both", connector=settings))
        supervisor.wait_ready()
        urls = {"plain": f"http://127.0.0.1:{ports[0]}", "connector": f"http://127.0.0.1:{ports[1]}"}
        rows = asyncio.run(measure(urls, args))
    harness.publish(args, rows, title="Cost of an idle connector (ratio = connector / plain; < 1.03 wanted for TTFT, "
                                      "> 0.97 for tokens/s)", vllm=probe_python(args.python).vllm)


def parse() -> Any:
    parser = harness.parser(__doc__.splitlines()[0], needs_engine=True)
    parser.add_argument("--reps", type=int, default=9)
    return parser.parse_args()


async def measure(urls: dict[str, str], args: Any) -> list[dict[str, Any]]:
    rng = random.Random()
    sizes = ((64, 16, 3), (512, 16, 2)) if args.quick else ((64, 64, args.reps), (512, 64, args.reps),
                                                            (2048, 32, max(5, args.reps // 2)))
    rows = []
    async with session() as http:
        for length, max_tokens, reps in sizes:
            runs: dict[str, list[Answer]] = {name: [] for name in urls}
            for index in range(WARM_RUNS + reps):
                names = list(urls) if index % 2 else list(urls)[::-1]
                prompt_pair = [harness.random_prompt(length, rng) for _ in names]
                for name, prompt in zip(names, prompt_pair, strict=True):
                    answer = await complete(http, urls[name], prompt, max_tokens=max_tokens, ignore_eos=True)
                    if answer.error or len(answer.times) < 2:
                        raise SystemExit(f"{name} did not answer: {answer.error}")
                    if index >= WARM_RUNS:
                        runs[name].append(answer)
            rows.append(row(length, runs))
            harness.say(f"  {length} tokens: TTFT ratio {rows[-1]['ttft_ratio']:.3f}, tokens/s ratio "
                        f"{rows[-1]['rate_ratio']:.3f}")
    return rows


def row(length: int, runs: dict[str, list[Answer]]) -> dict[str, Any]:
    """Compare pairs: each ratio is of two neighbouring requests, so that slow drift of the machine cancels."""
    pairs = list(zip(runs["plain"], runs["connector"], strict=True))
    return {
        "prompt_tokens": length, "pairs": len(pairs),
        "ttft_plain_ms": harness.median_ms([answer.ttft_s for answer in runs["plain"]]),
        "ttft_connector_ms": harness.median_ms([answer.ttft_s for answer in runs["connector"]]),
        "ttft_ratio": round(statistics.median(on.ttft_s / off.ttft_s for off, on in pairs), 4),
        "rate_plain_per_s": round(statistics.median(1 / answer.step_s for answer in runs["plain"]), 2),
        "rate_connector_per_s": round(statistics.median(1 / answer.step_s for answer in runs["connector"]), 2),
        "rate_ratio": round(statistics.median(off.step_s / on.step_s for off, on in pairs), 4),
    }


if __name__ == "__main__":
    harness.run(main)
