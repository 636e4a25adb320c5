"""What the store's tests share: blocks with known bytes, clients of one cell, and an owner in another process.

Run as a program it *is* that other process: it puts blocks and obeys one command per line on stdin.
"""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.pull import wire
from mooncake_store.pull.base import Scatter
from mooncake_store.pull.channel import split_address
from mooncake_store.types import block_key

NUM_PIECES = 5
PIECE_BYTES = 24 << 10
BLOCK_BYTES = NUM_PIECES * PIECE_BYTES


def key_of(number: int):
    return block_key(b"store-test-cell!", 0, number.to_bytes(8, "big"))


def content_of(number: int, *, size_bytes: int = BLOCK_BYTES) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, size_bytes, dtype=np.uint8)


class Blocks:
    """Memory for some blocks, laid out as an engine does: all blocks' piece 0, then all blocks' piece 1, ..."""

    def __init__(self, count: int):
        self.memory = np.zeros((NUM_PIECES, count, PIECE_BYTES), dtype=np.uint8)

    def scatter(self, index: int) -> Scatter:
        addresses = [self.memory[piece, index].ctypes.data for piece in range(NUM_PIECES)]
        return Scatter(np.array(addresses, dtype=np.uint64), np.full(NUM_PIECES, PIECE_BYTES, dtype=np.uint64))

    def scatters(self) -> list[Scatter]:
        return [self.scatter(index) for index in range(self.memory.shape[1])]

    def image(self, index: int) -> np.ndarray:
        return self.memory[:, index].reshape(-1)

    def fill(self, numbers) -> Blocks:
        for index, number in enumerate(numbers):
            self.memory[:, index] = content_of(number).reshape(NUM_PIECES, PIECE_BYTES)
        return self


def put(client: StoreClient, numbers) -> list[bool]:
    numbers = list(numbers)
    blocks = Blocks(len(numbers)).fill(numbers)
    return client.put([key_of(number) for number in numbers], blocks.scatters())


def get(client: StoreClient, numbers, *, timeout_s: float = 5.0):
    """Return the outcomes; asserts that every ``ok`` block has exactly its bytes."""
    numbers = list(numbers)
    targets = Blocks(len(numbers))
    deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
    outcomes = client.get([key_of(number) for number in numbers], targets.scatters(), deadline_ns=deadline_ns)
    assert len(outcomes) == len(numbers)
    for index, (number, outcome) in enumerate(zip(numbers, outcomes, strict=True)):
        if outcome.result == "ok":
            assert np.array_equal(targets.image(index), content_of(number)), f"block {number} has wrong bytes"
    return outcomes


def results(outcomes) -> list[str]:
    return [outcome.result for outcome in outcomes]


def wait_for(condition, timeout_s: float = 5.0, what: str = "the condition"):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout_s} s"
        time.sleep(0.01)
    return value


def assert_at_rest(status: dict[str, float]) -> None:
    """No leases held; every byte in use belongs to a block that can be found (all test blocks have one size)."""
    occupied = -(-BLOCK_BYTES // 4096) * 4096
    assert status["mooncake_leases_active"] == 0
    assert status["mooncake_segment_used_bytes"] == status["mooncake_segment_blocks"] * occupied


def flip_byte(client: StoreClient, number: int, *, offset: int = BLOCK_BYTES // 2) -> None:
    """Damage a block in its owner's memory."""
    (block,) = client._segment.pin([key_of(number)])
    address = client._segment.address_of(block) + offset
    value = ctypes.string_at(address, 1)[0]
    ctypes.memset(address, value ^ 0xFF, 1)
    client._segment.unpin([block])


class RawPeer:
    """A connection to a member's control socket that sends anything; use it as a context manager."""

    def __init__(self, address: str):
        self.socket = socket.create_connection(split_address(address), timeout=10)
        self._inbox = wire.Inbox()

    def send(self, message: wire.Message) -> None:
        self.socket.sendall(wire.frame(message))

    def send_bytes(self, data: bytes) -> None:
        """Send these bytes as one message."""
        self.socket.sendall(len(data).to_bytes(wire.LENGTH_BYTES, "big") + data)

    def receive(self) -> wire.Message:
        while (message := self._inbox.take()) is None:
            data = self.socket.recv(1 << 16)
            assert data, "the member hung up"
            self._inbox.feed(data)
        return message

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


class OwnerProcess:
    """A StoreClient (or StoreNode) in another process."""

    def __init__(self, directory: str, numbers, *, kind: str = "engine", **settings):
        arguments = {"directory": directory, "numbers": list(numbers), "kind": kind, "settings": settings}
        source = Path(__file__).resolve().parents[2] / "src"
        self.process = subprocess.Popen([sys.executable, __file__, json.dumps(arguments)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin"})
        self.hello = json.loads(self.process.stdout.readline())
        self.address, self.node_id = self.hello["address"], self.hello["node_id"]

    def ask(self, command: str, **arguments):
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(18)  # SIGCONT, should it be stopped
            try:
                self.ask("quit")
                self.process.wait(10)
            except (BrokenPipeError, ValueError, subprocess.TimeoutExpired):
                self.process.kill()
        self.process.wait(5)
        self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def _serve(arguments) -> None:
    config = StoreConfig(directory=arguments["directory"], **{"segment_bytes": 32 << 20, **arguments["settings"]})
    if arguments["kind"] == "store":
        from mooncake_store.node import StoreNode
        part = StoreNode(config)
        client = part.client
    else:
        part = client = StoreClient(config)
    if arguments["numbers"]:
        assert all(put(client, arguments["numbers"]))
    client.directory.flush(10.0)
    print(json.dumps({"address": client.address, "node_id": client.node_id}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: object = None
        if request["command"] == "quit":
            break
        if request["command"] == "get":
            answer = results(get(client, request["numbers"], timeout_s=request["timeout_s"]))
        elif request["command"] == "status":
            answer = client.status()
        elif request["command"] == "flip":
            answer = flip_byte(client, request["number"])
        elif request["command"] == "drop":
            answer = client._segment.drop(key_of(request["number"]))
        print(json.dumps(answer), flush=True)
    part.close()
    print("null", flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
