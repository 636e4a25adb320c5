"""What the etcd directory does on this machine: publications, propagation, recovery, idle cost, delay of other threads.

etcd, the publisher and a watching instance are three processes. Wanted: >= 20,000 block publications/s seen by the
watcher, idle cost < 1 % of a core per instance.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness

from mooncake_store.config import StoreConfig
from mooncake_store.directory.etcd import EtcdDirectory
from mooncake_store.directory.open import open_directory
from mooncake_store.directory.pages import PageTable
from mooncake_store.directory.schema import PAGE_ENTRIES_MAX
from mooncake_store.directory.server import EtcdServer
from mooncake_store.metrics import Metrics
from mooncake_store.testing.directory import make_keys, make_member, wait_until
from mooncake_store.types import BlockKey

DEADLINE_S = 120.0
NEIGHBOUR_S = 0.001


def main() -> None:
    args = harness.parser(__doc__.splitlines()[0]).parse_args()
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="mooncake-bench-directory-"))
    try:
        for page_entries in (PAGE_ENTRIES_MAX,) if args.quick else (PAGE_ENTRIES_MAX, 64, 16, 1):
            with EtcdServer(folder / f"page-{page_entries}") as server, Watcher(server.url) as watcher:
                rows += measure_rates(server, watcher, page_entries, args)
        with EtcdServer(folder / "rest") as server:
            with Watcher(server.url) as watcher:
                rows += measure_propagation(server, args)
                rows += measure_idle(watcher, args)
            rows += measure_recovery(server, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    harness.publish(args, rows, title="Directory on etcd (three processes)")


def row(measurement: str, value: float, unit: str, detail: str) -> dict[str, Any]:
    harness.say(f"  {measurement}: {value:.4g} {unit} ({detail})")
    return {"measurement": measurement, "value": round(value, 4), "unit": unit, "detail": detail}


# ---------------------------------------------------------------------- the watching process


class Watcher:
    """Another process with a mirror, and a neighbour thread that wants the GIL every millisecond."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=watch, args=(url, there), daemon=True)
        self._process.start()
        assert self.answer() == "ready"

    def ask(self, *question: Any) -> Any:
        """Return the answer to a question."""
        self._pipe.send(question)
        return self.answer()

    def answer(self) -> Any:
        """Return the next answer."""
        if not self._pipe.poll(DEADLINE_S):
            raise SystemExit("the watching process does not answer")
        return self._pipe.recv()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(("stop",))
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()


def watch(url: str, pipe: Connection) -> None:
    """Answer questions about a mirror until told to stop."""
    directory = opened(url)
    directory.join(make_member("watcher"))
    directory.flush(DEADLINE_S)
    lateness_s: list[float] = []
    is_sampling = threading.Event()
    threading.Thread(target=neighbour, args=(lateness_s, is_sampling), daemon=True).start()
    pipe.send("ready")
    while True:
        question, *arguments = pipe.recv()
        if question == "stop":
            directory.close()
            return
        if question == "wait":
            pipe.send((directory.wait_revision(arguments[0], DEADLINE_S), directory.health().num_blocks))
        elif question == "cpu":
            pipe.send(time.process_time())
        elif question == "sample":
            lateness_s.clear()
            is_sampling.set()
            pipe.send(True)
        elif question == "lateness":
            is_sampling.clear()
            pipe.send(sorted(lateness_s))


def neighbour(lateness_s: list[float], is_sampling: threading.Event) -> None:
    """Sleep a millisecond again and again and note how late we woke: an engine's thread next to the mirror."""
    while True:
        is_sampling.wait()
        begin = time.perf_counter()
        time.sleep(NEIGHBOUR_S)
        lateness_s.append(time.perf_counter() - begin - NEIGHBOUR_S)


def opened(url: str, ttl_s: int = 10) -> EtcdDirectory:
    directory = open_directory(StoreConfig(directory=url, membership_ttl_s=ttl_s), Metrics())
    assert isinstance(directory, EtcdDirectory)
    return directory


@contextlib.contextmanager
def publisher(url: str, page_entries: int = PAGE_ENTRIES_MAX, ttl_s: int = 10) -> Iterator[EtcdDirectory]:
    directory = opened(url, ttl_s)
    # The page size is no setting: only this benchmark varies it, to show why it is what it is.
    directory._session._table = PageTable(page_entries=page_entries, unwritten_max=1 << 22)
    directory.join(make_member("publisher"))
    try:
        assert directory.flush(DEADLINE_S)
        yield directory
    finally:
        directory.close()


# ---------------------------------------------------------------------- measurements


def measure_rates(
    server: EtcdServer, watcher: Watcher, page_entries: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Publish in bulk, then withdraw, then at a steady 25,000/s; the watcher has to have seen it all."""
    keys = make_keys(40_000 if args.quick else 200_000 if page_entries > 1 else 60_000)
    what = f"{page_entries} entries per page"
    with publisher(server.url, page_entries) as directory:
        watcher.ask("sample")
        seconds, cpu_s = timed(directory, watcher, lambda: publish_in_calls(directory, keys, 256))
        rows = [
            row("publish in bulk", len(keys) / seconds, "blocks/s", f"{what}, 256 per call, {len(keys)} blocks"),
            row("publisher CPU per 1,000 blocks", cpu_s[0] / len(keys) * 1e6, "ms", what),
            row("watcher CPU per 1,000 blocks", cpu_s[1] / len(keys) * 1e6, "ms", what),
        ]
        rows += late(watcher, f"{what}, during bulk")
        seconds, _ = timed(directory, watcher, lambda: directory.withdraw(keys[::2]))
        rows.append(row("withdraw every other", len(keys) / 2 / seconds, "blocks/s", what))
        more = make_keys(25_000 * (2 if args.quick else 6), "steady")
        watcher.ask("sample")
        seconds, cpu_s = timed(directory, watcher, lambda: publish_steadily(directory, more, 25_000, 16))
        rows.append(row("publish at 25,000/s", len(more) / seconds, "blocks/s", f"{what}, 16 per call"))
        rows.append(row("publisher CPU at 25,000/s", cpu_s[0] / seconds * 100, "% of a core", what))
        rows.append(row("watcher CPU at 25,000/s", cpu_s[1] / seconds * 100, "% of a core", what))
        rows += late(watcher, f"{what}, at 25,000/s")
    return rows


def timed(directory: EtcdDirectory, watcher: Watcher, work: Any) -> tuple[float, tuple[float, float]]:
    """Return seconds until the watcher has seen the work, and CPU seconds of (publisher, watcher)."""
    cpu_s, watcher_cpu_s, begin = time.process_time(), watcher.ask("cpu"), time.perf_counter()
    work()
    assert directory.flush(DEADLINE_S)
    is_seen, num_blocks = watcher.ask("wait", directory.revision())
    seconds = time.perf_counter() - begin
    assert is_seen and num_blocks == directory.health().num_blocks
    return seconds, (time.process_time() - cpu_s, watcher.ask("cpu") - watcher_cpu_s)


def publish_in_calls(directory: EtcdDirectory, keys: list[BlockKey], per_call: int) -> None:
    for start in range(0, len(keys), per_call):
        directory.publish(keys[start : start + per_call])


def publish_steadily(directory: EtcdDirectory, keys: list[BlockKey], per_second: int, per_call: int) -> None:
    begin = time.perf_counter()
    for start in range(0, len(keys), per_call):
        directory.publish(keys[start : start + per_call])
        time.sleep(max(0.0, begin + (start + per_call) / per_second - time.perf_counter()))


def late(watcher: Watcher, detail: str) -> list[dict[str, Any]]:
    lateness_s = watcher.ask("lateness")
    return [
        row("neighbour thread late, p50", lateness_s[len(lateness_s) // 2] * 1e3, "ms", detail),
        row("neighbour thread late, p99", lateness_s[int(len(lateness_s) * 0.99)] * 1e3, "ms", detail),
    ]


def measure_propagation(server: EtcdServer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Publish one block at a time and look for it in another instance's mirror."""
    delays_s = []
    reader = opened(server.url)
    with publisher(server.url) as directory:
        for key in make_keys(20 if args.quick else 200, "propagation"):
            begin = time.perf_counter()
            directory.publish([key])
            while not reader.match([key]):
                time.sleep(0.0002)
                assert time.perf_counter() - begin < DEADLINE_S
            delays_s.append(time.perf_counter() - begin)
            time.sleep(0.005)
    reader.close()
    delays_s.sort()
    detail = f"one block, {len(delays_s)} times, 20 ms of it are the batch"
    return [
        row("propagation, p50", statistics.median(delays_s) * 1e3, "ms", detail),
        row("propagation, p99", delays_s[int(len(delays_s) * 0.99)] * 1e3, "ms", detail),
    ]


def measure_idle(watcher: Watcher, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Let a joined mirror rest."""
    seconds = 5.0 if args.quick else 30.0
    time.sleep(1.0)
    cpu_s = watcher.ask("cpu")
    time.sleep(seconds)
    idle_percent = (watcher.ask("cpu") - cpu_s) / seconds * 100
    rows = [row("idle CPU of one instance", idle_percent, "% of a core", f"joined, TTL 10 s, {seconds:.0f} s")]
    watcher.ask("sample")
    time.sleep(2.0)
    return rows + late(watcher, "idle")


def measure_recovery(server: EtcdServer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Kill etcd, start it again at once, with and without its data, under a directory of many blocks."""
    keys = make_keys(20_000 if args.quick else 100_000, "recovery")
    rows = []
    with publisher(server.url, ttl_s=5) as directory:
        reader = opened(server.url, ttl_s=5)
        directory.publish(keys)
        assert directory.flush(DEADLINE_S) and reader.wait_revision(directory.revision(), DEADLINE_S)
        for number, is_kept in enumerate((True, False)):
            begin = time.perf_counter()
            server.kill()
            if not is_kept:
                shutil.rmtree(server.data_dir / "data")
            server.start()
            started = time.perf_counter()
            probe = make_keys(1, f"probe {number}")
            directory.publish(probe)
            shortest = len(keys)
            while not reader.match(probe):
                shortest = min(shortest, reader.match(keys))
                assert time.perf_counter() - begin < DEADLINE_S
                time.sleep(0.002)
            assert wait_until(lambda: reader.health().connected and directory.health().connected, DEADLINE_S)
            detail = f"{len(keys)} blocks, data {'kept' if is_kept else 'lost'}"
            rows.append(row("etcd killed to new block seen", time.perf_counter() - begin, "s", detail))
            rows.append(row("etcd healthy to new block seen", time.perf_counter() - started, "s", detail))
            rows.append(row("blocks missed meanwhile", len(keys) - shortest, "blocks", detail))
        reader.close()
    return rows


if __name__ == "__main__":
    harness.run(main)
