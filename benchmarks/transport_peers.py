"""Read the same scattered blocks with one system, when told to; started by transport_vs_peers.py.

    transport_peers.py SYSTEM          reads commands from standard input and answers each with one line of JSON
    transport_peers.py SYSTEM-owner    the process that has the bytes

SYSTEM: mooncake-shm, mooncake-cma, mooncake-tcp, mooncake-tcp-unverified (this package; the last without checksums, as
every peer), te-tcp (Mooncake Transfer Engine), nixl-... (UCX; UCX_TLS says over what). Runs in the system's
own environment: imports numpy and that system only.
Commands: ``check BLOCK BATCH``, ``read BLOCK BATCH`` (BATCH blocks a call, 0 = all in one), ``quit``.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

TOTAL_BYTES = int(os.environ.get("TRANSPORT_PEERS_TOTAL", 64 << 20))
SEED = 20


def content() -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, 256, TOTAL_BYTES, np.uint8)


def plan(block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return source and target offsets of every block, both in random order."""
    count = TOTAL_BYTES // block_bytes
    return tuple(np.random.default_rng(seed).permutation(count) * block_bytes for seed in (1, 2))


class Mooncake:
    """This package, one medium."""

    def __init__(self, target: np.ndarray, medium: str) -> None:
        from mooncake_store.transport import bench
        from mooncake_store.transport.base import ReadBatch
        from mooncake_store.transport.media import TransportSettings
        from mooncake_store.transport.tcp import TcpTransport

        self._target, self._batch = target.ctypes.data, ReadBatch
        medium, _, is_unverified = medium.partition("-")
        self._owner = bench.Owner([medium], TransportSettings(), TOTAL_BYTES)
        transport = TcpTransport("127.0.0.1", checksum=False) if is_unverified else None
        self._attachment = self._owner.attach(medium, transport)

    def prepare(self, sources: np.ndarray, targets: np.ndarray, block_bytes: int) -> Callable[[], None]:
        """Return a call that reads these blocks. It raises what the system raises."""
        batch = self._batch(sources.astype(np.uint64), targets.astype(np.uint64) + np.uint64(self._target),
                            np.full(len(sources), block_bytes, np.uint64))

        def read() -> None:
            result = self._attachment.read(batch, deadline_ns=time.monotonic_ns() + 60_000_000_000)
            if result.error is not None:
                raise result.error

        return read

    def close(self) -> None:
        """End it."""
        self._attachment.close()
        self._owner.close()


class TransferEngine:
    """Mooncake Transfer Engine over tcp."""

    def __init__(self, target: np.ndarray, _: str) -> None:
        from mooncake.engine import TransferEngine as Engine

        self._peer = Peer("te-tcp-owner")
        self._engine = Engine()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("it does not initialize")
        self._engine.register_memory(target.ctypes.data, TOTAL_BYTES)
        self._target = target.ctypes.data
        self._name = f"127.0.0.1:{self._peer.facts['port']}"

    def prepare(self, sources: np.ndarray, targets: np.ndarray, block_bytes: int) -> Callable[[], None]:
        """Return a call that reads these blocks. It raises what the system raises."""
        local = (targets + self._target).tolist()
        remote = (sources + self._peer.facts["address"]).tolist()
        lengths = [block_bytes] * len(local)

        def read() -> None:
            code = self._engine.batch_transfer_sync_read(self._name, local, remote, lengths)
            if code != 0:
                raise RuntimeError(f"a batch of {len(local)} returned {code}")

        return read

    def close(self) -> None:
        """End it."""
        self._peer.close()


class Nixl:
    """NIXL with the UCX backend."""

    def __init__(self, target: np.ndarray, _: str) -> None:
        self._peer = Peer("nixl-owner")
        self._agent = nixl_agent("reader")
        self._agent.register_memory([(target.ctypes.data, TOTAL_BYTES, 0, "target")], "DRAM")
        self._target = target.ctypes.data
        self._name = self._agent.add_remote_agent(base64.b64decode(self._peer.facts["metadata"]))

    def prepare(self, sources: np.ndarray, targets: np.ndarray, block_bytes: int) -> Callable[[], None]:
        """Return a call that reads these blocks. It raises what the system raises."""
        agent, start = self._agent, self._peer.facts["address"]
        local = agent.get_xfer_descs([(int(at) + self._target, block_bytes, 0) for at in targets], "DRAM")
        remote = agent.get_xfer_descs([(int(at) + start, block_bytes, 0) for at in sources], "DRAM")

        def read() -> None:
            handle = agent.initialize_xfer("READ", local, remote, self._name)
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            agent.release_xfer_handle(handle)
            if state != "DONE":
                raise RuntimeError(f"the transfer ended as {state}")

        return read

    def close(self) -> None:
        """End it."""
        self._peer.close()


def nixl_agent(name: str):
    try:
        from nixl_cu12._api import nixl_agent as agent
        from nixl_cu12._api import nixl_agent_config as config
    except ImportError:
        from nixl._api import nixl_agent as agent
        from nixl._api import nixl_agent_config as config
    return agent(name, config(backends=["UCX"]))


class Peer:
    """The owner process of a system, and what it said of itself."""

    def __init__(self, role: str) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, role], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        for line in self._process.stdout:
            if line.startswith("READY "):
                self.facts = json.loads(line[6:])
                return
        raise RuntimeError(f"the owner process ended with code {self._process.wait()}")

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()


def own(role: str) -> None:
    """Serve the bytes until standard input ends."""
    source = content()
    if role == "te-tcp-owner":
        from mooncake.engine import TransferEngine as Engine

        engine = Engine()
        engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
        engine.register_memory(source.ctypes.data, TOTAL_BYTES)
        facts = {"port": engine.get_rpc_port(), "address": source.ctypes.data}
    else:
        agent = nixl_agent("owner")
        agent.register_memory([(source.ctypes.data, TOTAL_BYTES, 0, "source")], "DRAM")
        facts = {"metadata": base64.b64encode(agent.get_agent_metadata()).decode(), "address": source.ctypes.data}
    print(f"READY {json.dumps(facts)}", flush=True)
    sys.stdin.read()
    os._exit(0)  # not every system ends its threads


class Work:
    """One size of block: the calls that read everything."""

    def __init__(self, system: Mooncake | TransferEngine | Nixl, block_bytes: int, batch: int) -> None:
        self.sources, self.targets = plan(block_bytes)
        step = batch or len(self.sources)
        starts = range(0, len(self.sources), step)
        self._calls: Sequence[Callable[[], None]] = [
            system.prepare(self.sources[at:at + step], self.targets[at:at + step], block_bytes) for at in starts]

    def read(self) -> float:
        """Read everything once and return the seconds."""
        started = time.perf_counter()
        for call in self._calls:
            call()
        return time.perf_counter() - started


def answer(system: Mooncake | TransferEngine | Nixl, known: dict, command: str, target: np.ndarray,
           source: np.ndarray) -> dict:
    verb, block, batch = command.split()
    block_bytes = int(block)
    if (block, batch) not in known:
        known[block, batch] = Work(system, block_bytes, int(batch))
    work = known[block, batch]
    if verb == "check":
        target[:] = 0
        work.read()
        rows = target.reshape(-1, block_bytes)[work.targets // block_bytes]
        if not np.array_equal(rows, source.reshape(-1, block_bytes)[work.sources // block_bytes]):
            raise RuntimeError("wrong bytes arrived")
        return {}
    started = time.perf_counter()
    ctypes.memmove(target.ctypes.data, source.ctypes.data, TOTAL_BYTES)
    memcpy_s = time.perf_counter() - started
    return {"memcpy_s": memcpy_s, "seconds": work.read()}


def main(name: str) -> None:
    if name.endswith("-owner"):
        own(name)
    target, source = np.zeros(TOTAL_BYTES, np.uint8), content()
    kind, _, medium = name.partition("-")
    system: Mooncake | TransferEngine | Nixl | None = None
    known: dict = {}
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        try:
            if system is None:
                system = {"mooncake": Mooncake, "te": TransferEngine, "nixl": Nixl}[kind](target, medium)
            result = answer(system, known, line, target, source)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises becomes a row of the table
            result = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(f"RESULT {json.dumps(result)}", flush=True)
    if system is not None:
        system.close()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
