"""Get one block from another process, over and over, on a warm connection; beside bare round trips in the same run.

A row is one way to move the bytes of blocks of one size: 4 KiB comes with the owner's answer, 64 KiB is leased and read
over the medium named. Directory entries are known beforehand, as they are to a member that watches the directory.
"""

from __future__ import annotations

import json
import multiprocessing
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from harness import parser, publish, run, say

from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.directory.memory import MemoryCell, MemoryDirectory
from mooncake_store.pull.base import Scatter
from mooncake_store.transport.memory import host_identity
from mooncake_store.types import BlockKey, Member, NodeId, block_key

MEDIA = ("shm", "cma", "tcp")
SIZES = (4 << 10, 64 << 10)
NUM_BLOCKS = 16
NUM_GETS, NUM_GETS_QUICK, NUM_WARM_UP = 5000, 300, 300
QUESTION_BYTES = 100
TIMEOUT_S = 10.0


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "owner":
        serve(sys.argv[2])
        return
    args = parser(__doc__.splitlines()[0]).parse_args()
    num_gets = NUM_GETS_QUICK if args.quick else NUM_GETS
    rows = [bare("a socket and an answer", answer_socket, ask_socket, num_gets),
            bare("ZeroMQ and an answer", answer_zmq, ask_zmq, num_gets)]
    for medium in MEDIA:
        rows += get_rows(medium, num_gets)
    for row in rows:
        row["x_socket"] = round(row["p50_us"] / rows[0]["p50_us"], 1)
    publish(args, rows, title="One small block from another process, microseconds")


def summary(what: str, moved_by: str, times_ns: list[int]) -> dict[str, Any]:
    ordered = sorted(times_ns)
    say(f"done: {what}")
    return {"what": what, "moved_by": moved_by, "p50_us": round(ordered[len(ordered) // 2] / 1e3),
            "p99_us": round(ordered[len(ordered) * 99 // 100] / 1e3)}


def timed(call: Callable[[], object], count: int) -> list[int]:
    times = []
    for _ in range(count + NUM_WARM_UP):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return times[NUM_WARM_UP:]


# ---------------------------------------------------------------------------------------------------- bare round trips
def bare(what: str, answer: Callable[[Any], None], ask: Callable[[int], Callable[[], object]],
         count: int) -> dict[str, Any]:
    """Time a question and an answer of some bytes between two processes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs,), daemon=True)
    process.start()
    try:
        return summary(what, "-", timed(ask(ours.recv()), count))
    finally:
        process.terminate()
        process.join()


def answer_socket(pipe: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting = select.epoll()
        waiting.register(connection, select.EPOLLIN)
        while True:
            waiting.poll()
            data = connection.recv(1 << 16)
            if not data:
                return
            connection.send(data)


def ask_socket(port: int) -> Callable[[], object]:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)

    def ask() -> None:
        connection.send(bytes(QUESTION_BYTES))
        waiting.poll()
        connection.recv(1 << 16)

    return ask


def answer_zmq(pipe: Any) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        pipe.send(router.bind_to_random_port("tcp://127.0.0.1"))
        while True:
            router.send_multipart(router.recv_multipart())


def ask_zmq(port: int) -> Callable[[], object]:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{port}")

    def ask() -> None:
        dealer.send(bytes(QUESTION_BYTES))
        dealer.recv()

    return ask


# ---------------------------------------------------------------------------------------------------------- the store
def key_of(size_bytes: int, number: int) -> BlockKey:
    return block_key(b"bench-small-get!", 0, size_bytes.to_bytes(8, "big") + number.to_bytes(8, "big"))


def content_of(size_bytes: int, number: int) -> np.ndarray:
    return np.random.default_rng(size_bytes + number).integers(0, 256, size_bytes, dtype=np.uint8)


def whole(memory: np.ndarray) -> Scatter:
    return Scatter(np.array([memory.ctypes.data], np.uint64), np.array([memory.nbytes], np.uint64))


def serve(medium: str) -> None:
    """Own the blocks until the reader hangs up."""
    client = StoreClient(StoreConfig(directory="off", segment_bytes=8 << 20, media=(medium,)))
    for size_bytes in SIZES:
        for number in range(NUM_BLOCKS):
            content = content_of(size_bytes, number)
            assert client.put([key_of(size_bytes, number)], [whole(content)]) == [True]
    print(json.dumps({"node_id": client.node_id, "control": client.address}), flush=True)
    sys.stdin.read()
    client.close()


def get_rows(medium: str, count: int) -> list[dict[str, Any]]:
    """Time gets of each size from an owner that offers one medium."""
    owner = subprocess.Popen([sys.executable, Path(__file__), "owner", medium], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    hello = json.loads(owner.stdout.readline())
    cell = MemoryCell()
    known = MemoryDirectory(cell)
    known.join(Member(NodeId(hello["node_id"]), "engine", hello["control"], host_identity(), owner.pid, 8 << 20, "0"))
    known.publish([key_of(size_bytes, number) for size_bytes in SIZES for number in range(NUM_BLOCKS)])
    reader = StoreClient(StoreConfig(directory="off", segment_bytes=0, media=(medium,)),
                         directory=MemoryDirectory(cell))
    try:
        return [get_row(reader, medium, size_bytes, count) for size_bytes in SIZES]
    finally:
        reader.close()
        owner.stdin.close()
        owner.wait(TIMEOUT_S)


def get_row(reader: StoreClient, medium: str, size_bytes: int, count: int) -> dict[str, Any]:
    memory = np.zeros(size_bytes, np.uint8)
    target = [whole(memory)]
    keys = [[key_of(size_bytes, number)] for number in range(NUM_BLOCKS)]
    turn, outcome = -1, None

    def get() -> None:
        nonlocal turn, outcome
        turn += 1
        deadline_ns = time.monotonic_ns() + int(TIMEOUT_S * 1e9)
        (outcome,) = reader.get(keys[turn % NUM_BLOCKS], target, deadline_ns=deadline_ns)
        assert outcome.result == "ok", outcome

    times_ns = timed(get, count)
    assert outcome is not None and np.array_equal(memory, content_of(size_bytes, turn % NUM_BLOCKS))
    return summary(f"{size_bytes >> 10} KiB of a peer with {medium}", outcome.medium, times_ns)


if __name__ == "__main__":
    run(main)
