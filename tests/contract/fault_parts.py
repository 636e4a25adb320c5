"""What the fault tests share: small blocks whose bytes follow from their key, pulls from several threads, an owner.

Run as a program it is an owner: it puts blocks, says where it is, and lives until it is killed.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from contract.store_parts import key_of, wait_for
from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.directory.memory import MemoryCell, MemoryDirectory
from mooncake_store.pull.base import Scatter
from mooncake_store.transport.memory import host_identity
from mooncake_store.types import Member, NodeId

NUM_BLOCKS = 64
SHARED = range(32)
"""Blocks with two owners in the tests about death; the others have one."""
BLOCKS_PER_PULL = 4
NUM_THREADS = 4
SLOT_BYTES = 16 << 10
SLACK_S = 5.0
"""How late a pull may return on a busy machine; without a deadline it would not return at all."""


def size_of(number: int) -> int:
    return 4096 * (1 + number % 4)


@functools.cache
def content_of(number: int) -> np.ndarray:
    return np.random.default_rng(1_000 + number).integers(0, 256, size_of(number), dtype=np.uint8)


def scatter_at(memory: np.ndarray, slot: int, number: int) -> Scatter:
    """Lay a block out as two pieces with a gap between."""
    first, half = memory.ctypes.data + 2 * slot * SLOT_BYTES, size_of(number) // 2
    return Scatter(np.array([first, first + SLOT_BYTES], np.uint64), np.array([half, half], np.uint64))


def put_blocks(client: StoreClient, numbers) -> None:
    for number in numbers:
        memory = np.zeros(2 * SLOT_BYTES, np.uint8)
        half = size_of(number) // 2
        memory[:half], memory[SLOT_BYTES:SLOT_BYTES + half] = content_of(number)[:half], content_of(number)[half:]
        assert client.put([key_of(number)], [scatter_at(memory, 0, number)]) == [True]


class Pulls:
    """Pulls random blocks from some threads; compares every byte of what is ``ok``.

    Attributes:
        outcomes: how many blocks ended how.
        late: pulls that took longer than their deadline and SLACK_S.
        wrong: blocks said to be ``ok`` whose bytes are not those of their key.
    """

    def __init__(self, client: StoreClient, numbers, *, seed: int = 1) -> None:
        self._client = client
        self._numbers = np.array(list(numbers))
        self._seed = seed
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.late: list[float] = []
        self.wrong: list[int] = []
        self.errors: list[BaseException] = []
        self.num_pulls = 0
        self._lock = threading.Lock()

    def run(self, num_pulls: int, *, deadline_s: float = 0.5) -> Pulls:
        shares = [num_pulls // NUM_THREADS + (index < num_pulls % NUM_THREADS) for index in range(NUM_THREADS)]
        threads = [threading.Thread(target=self._work, args=(index, share, deadline_s))
                   for index, share in enumerate(shares)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100.0 + num_pulls * 0.1)
            assert not thread.is_alive(), "a pull hangs"
        self._seed += NUM_THREADS
        assert not self.errors, self.errors[0]
        assert not self.late and not self.wrong
        return self

    def _work(self, index: int, count: int, deadline_s: float) -> None:
        try:
            rng = np.random.default_rng(self._seed + index)
            memory = np.empty(2 * BLOCKS_PER_PULL * SLOT_BYTES, np.uint8)
            for _ in range(count):
                self._pull(rng, memory, 0.001 if rng.random() < 0.02 else deadline_s)
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            self.errors.append(error)

    def _pull(self, rng: np.random.Generator, memory: np.ndarray, deadline_s: float) -> None:
        numbers = rng.choice(self._numbers, BLOCKS_PER_PULL, replace=False).tolist()
        memory[:] = 0xEE
        scatters = [scatter_at(memory, slot, number) for slot, number in enumerate(numbers)]
        started_ns = time.monotonic_ns()
        outcomes = self._client.get([key_of(number) for number in numbers], scatters,
                                    deadline_ns=started_ns + int(deadline_s * 1e9))
        elapsed_s = (time.monotonic_ns() - started_ns) / 1e9
        if elapsed_s > deadline_s + SLACK_S:
            self.late.append(elapsed_s)
        for slot, (number, outcome) in enumerate(zip(numbers, outcomes, strict=True)):
            self.outcomes[outcome.result] += 1
            self.reasons[outcome.reason[:60]] += 1
            if outcome.result != "ok":
                continue
            start, half = 2 * slot * SLOT_BYTES, size_of(number) // 2
            image = np.concatenate((memory[start:start + half], memory[start + SLOT_BYTES:start + SLOT_BYTES + half]))
            if not np.array_equal(image, content_of(number)):
                self.wrong.append(number)
        with self._lock:
            self.num_pulls += 1


class Holdings:
    """Counts what this process holds: descriptors, threads, mappings of shared memory."""

    def __init__(self) -> None:
        self._before = _holdings()

    def check(self) -> None:
        wait_for(lambda: all(now <= before for now, before in zip(_holdings(), self._before, strict=True)),
                 10, f"giving back what was held (before {self._before}, now {_holdings()})")


def _holdings() -> tuple[int, int, int]:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), maps.count("/memfd:")


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


class MortalOwner:
    """An owner in a process of its own, which the given cell believes to live for ever."""

    def __init__(self, cell: MemoryCell, medium: str, numbers) -> None:
        source, tests = Path(__file__).resolve().parents[2] / "src", Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"medium": medium, "numbers": list(numbers)})],
            stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": f"{source}:{tests}", "PATH": "/usr/bin:/bin"})
        self._cell = cell
        self._numbers = list(numbers)

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        hello = json.loads(self.process.stdout.readline())
        ghost = MemoryDirectory(self._cell)
        ghost.join(Member(NodeId(hello["node_id"]), "engine", hello["address"], host_identity(), self.process.pid,
                          1 << 20, "0"))
        ghost.publish([key_of(number) for number in self._numbers])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _serve(medium: str, numbers: list[int]) -> None:
    client = StoreClient(StoreConfig(directory="off", segment_bytes=2 << 20, media=(medium,)))
    put_blocks(client, numbers)
    print(json.dumps({"address": client.address, "node_id": client.node_id}), flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
