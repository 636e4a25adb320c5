"""Read the same scattered blocks with this package, Mooncake Transfer Engine (tcp) and NIXL (UCX over shm, and tcp).

Every system runs in processes of its own and all take turns within each repetition; those not in turn are stopped
(NIXL's would poll meanwhile). The ratio is to one memcpy of the same bytes made by the same process just before. A peer
that cannot run gets rows that say why. Environments for the peers are made once below .cache/peers:
mooncake-transfer-engine-non-cuda, and nixl-cu12 without its dependencies.
On Debian 12 they need: apt install libibverbs1 librdmacm1 libnuma1 libcurl4 liburing2
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import parser, publish, run, say

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "peers"
WORKER = Path(__file__).with_name("transport_peers.py")
TOTAL_BYTES, TOTAL_QUICK_BYTES = 64 << 20, 4 << 20
BLOCKS = (1 << 20, 64 << 10, 16 << 10)
ANSWER_TIMEOUT_S = 120.0
INSTALL_TIMEOUT_S = 600.0
TE_BATCH = 512
"""Transfer Engine refuses larger batches over tcp."""
REFUSED_BLOCK = 16 << 10

SYSTEMS = {
    "mooncake-shm": ("shm", "", {}), "mooncake-cma": ("shm", "", {}), "mooncake-tcp": ("tcp", "", {}),
    "mooncake-tcp-unverified": ("tcp", "", {}),
    "te-tcp": ("tcp", "te", {"MC_TCP_BIND_ADDRESS": "127.0.0.1"}),
    "nixl-shm": ("shm", "nixl", {"UCX_TLS": "sysv,posix,cma,self,tcp"}),
    "nixl-tcp": ("tcp", "nixl", {"UCX_TLS": "tcp,self"}),
}
"""Name -> (class of medium, environment, variables)."""
PACKAGES = {"te": ["numpy", "mooncake-transfer-engine-non-cuda"], "nixl": ["numpy"]}
WITHOUT_DEPENDENCIES = {"nixl": ["nixl-cu12"]}


class Worker:
    """One system's reading process; ``obstacle`` says why it cannot go on."""

    def __init__(self, name: str, python: str, total_bytes: int, obstacle: str = "") -> None:
        self.name = name
        self.obstacle = obstacle
        self.times: dict[int, list[tuple[float, float]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        if obstacle:
            return
        variables = {"PYTHONPATH": str(ROOT / "src"), **SYSTEMS[name][2], "TRANSPORT_PEERS_TOTAL": str(total_bytes)}
        self._process = subprocess.Popen([python, str(WORKER), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, env={**os.environ, **variables}, bufsize=0,
                                         start_new_session=True)
        self._buffer = b""

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer; one with ``error`` when there is none in time."""
        if self._process is None:
            return {"error": self.obstacle}
        self._signal(signal.SIGCONT)
        try:
            return self._ask(command)
        finally:
            self._signal(signal.SIGSTOP)

    def _ask(self, command: str) -> dict[str, Any]:
        try:
            self._process.stdin.write(f"{command}\n".encode())
        except OSError:
            return {"error": "the process ended"}
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                while b"\n" in self._buffer:
                    line, self._buffer = self._buffer.split(b"\n", 1)
                    if line.startswith(b"RESULT "):
                        return json.loads(line[7:])
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return {"error": f"no answer within {ANSWER_TIMEOUT_S:g} s"}
                chunk = os.read(self._process.stdout.fileno(), 65536)
                if not chunk:
                    return {"error": f"the process ended with code {self._process.wait()}"}
                self._buffer += chunk

    def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(b"quit\n")
            self._process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        """Send a signal to the reader and its owner process."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass


def make_environment(name: str) -> tuple[str, str]:
    """Return the interpreter that has a peer, made if it is not there; and what went wrong, empty if nothing."""
    folder = CACHE / name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return str(python), ""
    say(f"making {folder}")
    commands = [[sys.executable, "-m", "venv", str(folder)],
                [str(python), "-m", "pip", "install", "-q", *PACKAGES[name]]]
    if name in WITHOUT_DEPENDENCIES:
        commands.append([str(python), "-m", "pip", "install", "-q", "--no-deps", *WITHOUT_DEPENDENCIES[name]])
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return "", f"cannot be installed: {error}"[:160]
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
            return "", f"cannot be installed: {lines[-1]}"[:160]
    (folder / "complete").touch()
    return str(python), ""


def batch_of(name: str) -> int:
    return TE_BATCH if name == "te-tcp" else 0


def measure(workers: list[Worker], block_bytes: int, num_reps: int) -> None:
    for worker in workers:
        if not worker.obstacle:
            worker.obstacle = worker.ask(f"check {block_bytes} {batch_of(worker.name)}").get("error", "")
    for _ in range(num_reps):
        for worker in workers:
            if worker.obstacle:
                continue
            answer = worker.ask(f"read {block_bytes} {batch_of(worker.name)}")
            worker.obstacle = answer.get("error", "")
            if not worker.obstacle:
                worker.times.setdefault(block_bytes, []).append((answer["seconds"], answer["memcpy_s"]))


def row(worker: Worker, block_bytes: int, best_s: dict[str, float]) -> dict[str, Any]:
    times = worker.times.get(block_bytes, [])
    medium = SYSTEMS[worker.name][0]
    seconds = statistics.median(value for value, _ in times) if times else None
    memcpy_s = statistics.median(value for _, value in times) if times else None
    return {"block_kib": block_bytes >> 10, "system": worker.name, "class": medium,
            "ms": round(seconds * 1e3, 1) if seconds else None,
            "x_memcpy": round(seconds / memcpy_s, 2) if seconds and memcpy_s else None,
            "x_ours": round(seconds / best_s[medium], 2) if seconds and medium in best_s else None,
            "note": "" if times else worker.obstacle}


def try_one_batch(workers: list[Worker], block_bytes: int) -> list[dict[str, Any]]:
    """Read everything in one call, then once more in the usual way: what a refused batch leaves behind."""
    rows = []
    for worker in workers:
        if worker.obstacle:
            continue
        first = worker.ask(f"check {block_bytes} 0").get("error", "")
        after = worker.ask(f"check {block_bytes} {batch_of(worker.name)}").get("error", "")
        note = f"one batch: {first or 'ok'}" + (f"; then: {after or 'ok'}" if first else "")
        rows.append({**row(worker, 0, {}), "block_kib": block_bytes >> 10, "note": note})
    return rows


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--systems", default=",".join(SYSTEMS), help="(default: %(default)s)")
    arguments.add_argument("--reps", type=int, default=15)
    args = arguments.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped processes would stay
    names = [name for name in args.systems.split(",") if name in SYSTEMS]
    total_bytes = TOTAL_QUICK_BYTES if args.quick else TOTAL_BYTES
    environments = {"": (sys.executable, "")}
    for environment in {SYSTEMS[name][1] for name in names} - {""}:
        environments[environment] = make_environment(environment)
    workers = [Worker(name, environments[SYSTEMS[name][1]][0], total_bytes, environments[SYSTEMS[name][1]][1])
               for name in names]
    rows: list[dict[str, Any]] = []
    try:
        for block_bytes in BLOCKS:
            measure(workers, block_bytes, 3 if args.quick else args.reps)
            best_s = {medium: min(statistics.median(value for value, _ in worker.times[block_bytes])
                                  for worker in workers if worker.name.startswith("mooncake")
                                  and SYSTEMS[worker.name][0] == medium and block_bytes in worker.times)
                      for medium in {SYSTEMS[worker.name][0] for worker in workers
                                     if worker.name.startswith("mooncake") and block_bytes in worker.times}}
            rows += [row(worker, block_bytes, best_s) for worker in workers]
            say(f"done: {block_bytes >> 10} KiB")
        rows += try_one_batch(workers, REFUSED_BLOCK)
    finally:
        for worker in workers:
            worker.close()
    publish(args, rows, title=f"{total_bytes >> 20} MiB read in blocks that lie scattered at both ends",
            notes=["x_ours: time over our best of the same class, in this run.",
                   "mooncake-tcp verifies a checksum of every frame; no peer does.",
                   f"te-tcp reads {TE_BATCH} blocks a call; the last rows are one call for all."])


if __name__ == "__main__":
    run(main)
