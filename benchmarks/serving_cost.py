"""What serving tcp readers costs an engine: decode tokens/s while a peer pulls from its worker, over tokens/s alone.

One vLLM engine decodes one request. In the middle of it a reader in a process of its own begins to pull from the memory
that the engine's worker lends, over tcp, as fast as it gets, scattered blocks at both ends; every other request it is
the other way round. Where a core is free, the engine computes on one core and the reader is kept on the last one.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import harness
import msgspec
import numpy as np
import psutil

from mooncake_connector.demo.client import complete, session
from mooncake_connector.demo.cluster import Cell, engine_options, etcd_spec, probe_python
from mooncake_connector.demo.processes import Supervisor, stop_signals
from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.pull import wire
from mooncake_store.pull.control import ask
from mooncake_store.transport.base import ReadBatch, RegionDescriptor
from mooncake_store.transport.tcp import TcpTransport

BATCH_BYTES = 64 << 20
BLOCK_BYTES = 64 << 10
PULL_TIMEOUT_S = 60.0
MEMBER_TIMEOUT_S = 20.0
PREFILL_S = 0.5
FIRST_HALF_S = 3.0


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], needs_engine=True)
    parser.add_argument("--reps", type=int, default=6, help="requests per row; half of them are pulled from first")
    parser.add_argument("--cores", default="free,none", help="is a core free for the reader (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=160, help="tokens of each request")
    args = parser.parse_args()
    rows = []
    cores = sorted(os.sched_getaffinity(0))
    for word in args.cores.split(","):
        is_free = word == "free"
        threads = len(cores) - 1 if is_free else len(cores)
        options = engine_options(args.python, args.model, dtype=args.dtype,
                                 environment={"OMP_NUM_THREADS": str(max(1, threads))})
        logs = harness.run_dir(args, f"serving-{word}")
        with stop_signals(), Supervisor(logs) as supervisor:
            cell = Cell(supervisor, options=options, memory="", connector={"segment_bytes": 4 * BATCH_BYTES})
            region = start(cell)
            rows.append(asyncio.run(measure(cell, region, args, reader_core=cores[-1] if is_free else None)))
    harness.publish(args, rows, title="Decode while a peer pulls over tcp (ratio >= 0.9 wanted with a free core)",
                    vllm=probe_python(args.python).vllm)


def start(cell: Cell) -> RegionDescriptor:
    """Start etcd and one engine; return the memory that its worker lends."""
    cell.supervisor.start(etcd_spec(cell.etcd_port, cell.supervisor.run_dir / "etcd"))
    cell.supervisor.wait_ready(["etcd"])
    cell.supervisor.start(cell.engine("prefill", "kv_producer"))
    cell.supervisor.wait_ready()
    client = StoreClient(StoreConfig(directory=cell.directory, segment_bytes=0, media=("tcp",)))
    try:
        stop_s = time.monotonic() + MEMBER_TIMEOUT_S
        while time.monotonic() < stop_s:
            others = [member for node, member in client.directory.members().items() if node != client.node_id]
            if others:
                return ask_region(others[0].control, client)
            time.sleep(0.1)
    finally:
        client.close()
    raise SystemExit("the engine's worker did not join the cell; see prefill.log")


def ask_region(control: str, client: StoreClient) -> RegionDescriptor:
    """Say hello to a member, as a puller does."""
    hello = wire.Hello(1, client.node_id, client.media.identity(), "0")
    region = ask(control, hello, wire.Welcome, timeout_s=MEMBER_TIMEOUT_S).region
    if region is None:
        raise SystemExit(f"{control} lends no memory")
    return region


async def measure(cell: Cell, region: RegionDescriptor, args: Any, *, reader_core: int | None) -> dict[str, Any]:
    """Decode requests, pull during half of each, compare."""
    rng = random.Random(0)
    tokens = 40 if args.quick else args.tokens
    alone_hz, beside_hz, ratios, gib, gbps = [], [], [], 0.0, []
    with Reader(region, reader_core) as reader:
        async with session() as http:
            await complete(http, cell.prefill_url, harness.random_prompt(64, rng), max_tokens=8, ignore_eos=True)
            for rep in range(2 if args.quick else args.reps):
                task = asyncio.create_task(complete(http, cell.prefill_url, harness.random_prompt(64, rng),
                                                    max_tokens=tokens, ignore_eos=True))
                await asyncio.sleep(PREFILL_S)
                half_s = tokens / 2 / alone_hz[-1] if alone_hz else FIRST_HALF_S
                is_first = rep % 2 == 1
                if is_first:
                    reader.go()
                await asyncio.sleep(half_s)
                turn_s = time.monotonic()
                pulled = reader.stop() if is_first else None
                if not is_first:
                    reader.go()
                answer = await task
                if pulled is None:
                    pulled = reader.stop()
                if answer.error:
                    raise SystemExit(f"the engine did not answer: {answer.error}")
                before, after = rate(answer.times, 0.0, turn_s), rate(answer.times, turn_s, answer.times[-1])
                alone, beside = (after, before) if is_first else (before, after)
                alone_hz.append(alone)
                beside_hz.append(beside)
                ratios.append(beside / alone)
                gib += pulled[0] / (1 << 30)
                gbps.append(pulled[0] / pulled[1] / 1e9)
                harness.say(f"  {alone:.2f} tokens/s alone, {beside:.2f} beside a reader at {gbps[-1]:.2f} GB/s")
    return {"free_core": reader_core is not None, "alone_tokens_per_s": round(statistics.median(alone_hz), 2),
            "beside_tokens_per_s": round(statistics.median(beside_hz), 2), "ratio": round(statistics.median(ratios), 3),
            "ratio_range": f"{min(ratios):.2f}..{max(ratios):.2f}", "pulled_gib": round(gib, 1),
            "pull_gb_per_s": round(statistics.median(gbps), 2), "requests": len(ratios)}


def rate(times: list[float], since_s: float, until_s: float) -> float:
    """Return tokens per second between two moments, from the first token in there to the last."""
    inside = [moment for moment in times if since_s <= moment <= until_s]
    return (len(inside) - 1) / (inside[-1] - inside[0]) if len(inside) > 2 else float("nan")


class Reader:
    """A process that pulls while told to."""

    def __init__(self, region: RegionDescriptor, core: int | None) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, "--reader", msgspec.json.encode(region).hex()],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if core is not None:
            psutil.Process(self._process.pid).cpu_affinity([core])

    def __enter__(self) -> Reader:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit("the reader could not attach")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def go(self) -> None:
        """Begin to pull."""
        self._say("go")

    def stop(self) -> tuple[int, float]:
        """Stop pulling; return bytes and seconds."""
        self._say("stop")
        assert self._process.stdout is not None
        num_bytes, seconds = self._process.stdout.readline().split()
        return int(num_bytes), float(seconds)

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()


def read_on_command(region: RegionDescriptor) -> None:
    """Pull between the lines ``go`` and ``stop`` of standard input."""
    target = np.zeros(BATCH_BYTES, np.uint8)
    rng = np.random.default_rng(0)
    attachment = TcpTransport().attach(region, deadline_ns=time.monotonic_ns() + int(PULL_TIMEOUT_S * 1e9))
    print("ready", flush=True)
    count = BATCH_BYTES // BLOCK_BYTES
    while sys.stdin.readline():
        stopping = threading.Event()
        threading.Thread(target=lambda event=stopping: (sys.stdin.readline(), event.set()), daemon=True).start()
        began_s, total = time.monotonic(), 0
        while not stopping.is_set():
            offsets = rng.choice(region.size_bytes // BLOCK_BYTES, count, replace=False).astype(np.uint64) * BLOCK_BYTES
            targets = rng.permutation(count).astype(np.uint64) * BLOCK_BYTES + np.uint64(target.ctypes.data)
            result = attachment.read(ReadBatch(offsets, targets, np.full(count, BLOCK_BYTES, np.uint64)),
                                     deadline_ns=time.monotonic_ns() + int(PULL_TIMEOUT_S * 1e9))
            if result.error is not None:
                raise SystemExit(f"the pull failed: {result.error}")
            total += result.num_bytes
        print(total, time.monotonic() - began_s, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reader"]:
        read_on_command(msgspec.json.decode(bytes.fromhex(sys.argv[2]), type=RegionDescriptor))
    else:
        main()
