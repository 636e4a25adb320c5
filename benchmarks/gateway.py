"""What a gateway adds: this router and others, each on one core, in front of the same fake engines.

Rows per gateway: one client's median beside the same request without a gateway, requests per second of 64 clients, time
to the first event of paced streams, and how many of many concurrent streams end well. The gateway has one core, engines
and clients share another one. Gateways take turns, several rounds, and the best round of each counts: what disturbs a
round only ever makes it slower.

Others are optional: ``--vllm-router`` and ``--sglang-router`` name their programs (PyPI ``vllm-router``,
``sglang-router``).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gateway_load as load
import harness

from mooncake_connector.demo.processes import free_ports

NUM_ENGINES = 2
READY_TIMEOUT_S = 60.0
GATEWAY_CORE, LOAD_CORE = 0, 1
SRC = Path(__file__).resolve().parents[1] / "src"


class Gateway(NamedTuple):
    """A program in front of engines."""

    name: str
    command: Callable[[int, list[str]], list[str]]
    ready_path: str = "/health"


def mooncake(*flags: str) -> Callable[[int, list[str]], list[str]]:
    def command(port: int, urls: list[str]) -> list[str]:
        router = [sys.executable, "-m", "mooncake_connector.cli", "router", "--port", str(port), "--placement", ""]
        return [*router, "--engine", *urls, *flags]

    return command


def other(program: list[str], policy: str, metrics_port: int) -> Callable[[int, list[str]], list[str]]:
    def command(port: int, urls: list[str]) -> list[str]:
        return [*program, "--host", "127.0.0.1", "--port", str(port), "--policy", policy, "--worker-urls", *urls,
                "--prometheus-port", str(metrics_port), "--log-level", "error"]  # fmt: skip

    return command


def main() -> None:
    args = parse()
    load.allow_many_files()
    folder = Path(args.run_dir or "/tmp") / f"mooncake-bench-gateway-{os.getpid()}"
    folder.mkdir(parents=True)
    os.sched_setaffinity(0, {LOAD_CORE})
    ports = free_ports(NUM_ENGINES)
    engines = [f"http://127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        engine = [sys.executable, load.__file__, "engine", *map(str, ports)]
        stack.enter_context(process(engine, LOAD_CORE, folder / "engines.log"))
        wait_ready(f"{engines[0]}/health")
        running = []
        for gateway in gateways(args):
            port = free_ports(1)[0]
            log = folder / f"{gateway.name.replace(' ', '-')}.log"
            pid = stack.enter_context(process(gateway.command(port, engines), GATEWAY_CORE, log))
            running.append(Running(gateway.name, port, pid, []))
            wait_ready(f"http://127.0.0.1:{port}{gateway.ready_path}")
        rows = measure(running, ports[0], args)
    harness.publish(
        args, rows, title="A gateway on one core, in front of fake engines",
        notes=["added = with the gateway less without, medians of the same round; best of rounds; ms",
               f"streams held: {args.held} at once for {args.held_s} s, an event a second each"],
    )  # fmt: skip


def parse() -> Any:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--vllm-router", default="", metavar="PROGRAM", help="measure it too")
    parser.add_argument("--sglang-router", default="", metavar="PROGRAM", help="measure it too")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only gateways whose name has this in it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell")
    parser.add_argument("--held", type=int, default=0, help="also hold so many streams at once")
    parser.add_argument("--held-s", type=int, default=60, help="for so long")
    parser.add_argument("--held-only", action="store_true", help="and measure nothing else")
    parser.add_argument("--run-dir", default="", help="where logs go (default: /tmp)")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 0.5
    return args


def gateways(args: Any) -> Iterator[Gateway]:
    found = [Gateway("mooncake router", mooncake(), "/ready")]
    metrics_ports = iter(free_ports(4))
    for name, program in (("vllm-router", args.vllm_router), ("sglang-router", args.sglang_router)):
        if program:
            words = [program, "launch"] if name == "sglang-router" and "launch" not in program else [program]
            for policy in ("round_robin", "cache_aware"):
                found.append(Gateway(f"{name} {policy}", other(words, policy, next(metrics_ports))))
    return (each for each in found if not args.only or any(part in each.name for part in args.only))


class Running(NamedTuple):
    """A gateway that was started, and what its rounds gave."""

    name: str
    port: int
    pid: int
    rounds: list[dict[str, float]]


def measure(running: list[Running], engine_port: int, args: Any) -> list[dict[str, Any]]:
    if not args.held_only:
        for each in running:
            load.drive(each.port, load.requests(each.port), num_clients=8, duration_s=min(args.seconds, 2.0))  # warm
        for number in range(args.rounds):
            for each in running if number % 2 == 0 else reversed(running):
                harness.say(f"round {number + 1}: {each.name}")
                each.rounds.append(one_round(each.port, engine_port, args))
    return [row_of(each, args) for each in running]


def row_of(gateway: Running, args: Any) -> dict[str, Any]:
    port, rounds = gateway.port, gateway.rounds
    row: dict[str, Any] = {"gateway": gateway.name}
    if rounds:
        row["added p50, 1 client"] = min(each["p50"] for each in rounds)
        row["requests/s, 64 clients"] = max(each["rate"] for each in rounds)
        row["p99 at 64"] = min(each["p99"] for each in rounds)
        row["added TTFT, 4 streams"] = min(each["ttft"] for each in rounds)
        row["streams/s, 64 clients"] = max(each["streams"] for each in rounds)
        row["failed"] = sum(each["failed"] for each in rounds)
    if args.held:
        held = load.drive(port, load.requests(port, num_events=args.held_s, gap_ms=1000), num_clients=args.held,
                          num_each=1)  # fmt: skip
        row["streams held"], row["broken"] = len(held.whole_s), held.num_failed
        row["held TTFT p99"] = held.first_ms(0.99)
    row["RSS MB"] = rss_mb(gateway.pid)
    return row


def one_round(port: int, engine_port: int, args: Any) -> dict[str, float]:
    """Return added times in ms and rates of one round, each beside the same without the gateway."""
    seconds = args.seconds
    direct = load.drive(engine_port, load.requests(engine_port), num_clients=1, duration_s=seconds / 2)
    alone = load.drive(port, load.requests(port), num_clients=1, duration_s=seconds)
    many = load.drive(port, load.requests(port), num_clients=64, duration_s=seconds)
    paced = {"num_events": 20, "gap_ms": 10}
    direct_paced = load.drive(engine_port, load.requests(engine_port, **paced), num_clients=4, duration_s=seconds / 2)
    through_paced = load.drive(port, load.requests(port, **paced), num_clients=4, duration_s=seconds)
    streams = load.drive(port, load.requests(port, num_events=32), num_clients=64, duration_s=seconds)
    return {
        "p50": alone.whole_ms() - direct.whole_ms(),
        "rate": many.rate,
        "p99": many.whole_ms(0.99),
        "ttft": through_paced.first_ms() - direct_paced.first_ms(),
        "streams": streams.rate,
        "failed": sum(each.num_failed for each in (alone, many, through_paced, streams)),
    }


# ---- processes


@contextmanager
def process(command: list[str], core: int, log: Path) -> Iterator[int]:
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with log.open("wb") as stream:
        started = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment,
                                   preexec_fn=lambda: _pin(core))  # fmt: skip
    try:
        yield started.pid
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _pin(core: int) -> None:
    os.sched_setaffinity(0, {core})
    load.allow_many_files()


def wait_ready(url: str) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline_s:
            sys.exit(f"{url} was not ready within {READY_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    harness.run(main)
