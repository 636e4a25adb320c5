"""Be both ends of the gateway benchmark: an engine that says what it is told to, and clients that take the time.

Plain sockets and epoll; nothing is parsed that need not be.

    gateway_load.py engine PORT [PORT ...]

The prompt tells the engine how to answer: ``EVENTS=n GAP_MS=g`` at its start.
"""

from __future__ import annotations

import heapq
import json
import re
import resource
import select
import socket
import sys
import time
from typing import NamedTuple

MODEL = "bench"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_SAID = re.compile(rb"EVENTS=(\d+) GAP_MS=(\d+)")
READ_BYTES = 256 << 10
DONE = b"data: [DONE]\n\n"


# ---- engine


def _whole(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(body), body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ANSWER = _whole(json.dumps({
    "id": "cmpl-1", "object": "text_completion", "model": MODEL, "created": 1,
    "choices": [{"index": 0, "text": "All work and no play. " * 16, "finish_reason": "length", "logprobs": None}],
    "usage": {"prompt_tokens": 500, "completion_tokens": 100, "total_tokens": 600},
}).encode())  # fmt: skip
MODELS = _whole(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "vllm"}]}).encode())
INFO = _whole(json.dumps({"model_path": MODEL, "model_id": MODEL, "is_generation": True, "version": "0"}).encode())
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = _chunk(b"data: " + json.dumps({
    "id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [{"index": 0, "text": " word"}],
}).encode() + b"\n\n")  # fmt: skip
STREAM_END = _chunk(DONE) + b"0\r\n\r\n"


class Engine:
    """Serve on some ports, from one thread, for ever."""

    def __init__(self, ports: list[int]) -> None:
        self._poll = select.epoll()
        self._listeners: dict[int, socket.socket] = {}
        self._open: dict[int, socket.socket] = {}
        self._got: dict[int, bytes] = {}
        self._due: list[tuple[float, int, socket.socket, int, float]] = []
        for port in ports:
            listener = socket.create_server(("127.0.0.1", port), backlog=8192)
            listener.setblocking(False)
            self._listeners[listener.fileno()] = listener
            self._poll.register(listener, select.EPOLLIN)

    def serve(self) -> None:
        """Answer until killed."""
        while True:
            wait_s = max(self._due[0][0] - time.monotonic(), 0.0) if self._due else -1
            for number, _ in self._poll.poll(wait_s):
                if number in self._listeners:
                    self._accept(self._listeners[number])
                else:
                    self._read(number)
            now_s = time.monotonic()
            while self._due and self._due[0][0] <= now_s:
                due_s, number, peer, left, gap_s = heapq.heappop(self._due)
                if self._open.get(number) is peer:
                    self._next_event(due_s, number, peer, left, gap_s)

    def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                peer, _ = listener.accept()
                peer.setblocking(False)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open[peer.fileno()] = peer
                self._got[peer.fileno()] = b""
                self._poll.register(peer, select.EPOLLIN)
        except BlockingIOError:
            pass

    def _read(self, number: int) -> None:
        peer = self._open[number]
        try:
            data = peer.recv(READ_BYTES)
        except OSError:
            data = b""
        if not data:
            del self._open[number], self._got[number]
            peer.close()
            return
        data = self._got[number] + data
        head = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data[:head]) if head >= 0 else None
        if head < 0 or (length and len(data) < head + 4 + int(length[1])):
            self._got[number] = data
            return
        self._got[number] = b""
        self._answer(number, peer, data, data[head + 4 :])

    def _answer(self, number: int, peer: socket.socket, head: bytes, body: bytes) -> None:
        if head.startswith(b"POST"):
            said = _SAID.search(body)
            if said is None or int(said[1]) == 0:
                _send(peer, ANSWER)
            elif int(said[2]) == 0:
                _send(peer, STREAM_HEAD + EVENT * int(said[1]) + STREAM_END)
            else:
                _send(peer, STREAM_HEAD)
                self._next_event(time.monotonic(), number, peer, int(said[1]), int(said[2]) / 1e3)
        elif head.startswith(b"GET /v1/models"):
            _send(peer, MODELS)
        elif head.startswith(b"GET /health"):
            _send(peer, _whole(b"", b"text/plain"))
        else:
            _send(peer, INFO)

    def _next_event(self, due_s: float, number: int, peer: socket.socket, left: int, gap_s: float) -> None:
        if left == 0:
            _send(peer, STREAM_END)
            return
        _send(peer, EVENT)
        heapq.heappush(self._due, (due_s + gap_s, number, peer, left - 1, gap_s))


def _send(peer: socket.socket, data: bytes) -> None:
    try:
        peer.setblocking(True)
        peer.sendall(data)
        peer.setblocking(False)
    except OSError:
        pass


# ---- clients


class Times(NamedTuple):
    """What clients saw.

    Attributes:
        first_s: seconds to the first byte of the body, sorted.
        whole_s: seconds to the last byte, sorted.
        num_failed: answers that were no good.
        took_s: first request to last answer.
    """

    first_s: list[float]
    whole_s: list[float]
    num_failed: int
    took_s: float

    @property
    def rate(self) -> float:
        """Return answers per second."""
        return len(self.whole_s) / self.took_s

    def first_ms(self, quantile: float = 0.5) -> float:
        """Return a quantile of the time to the first byte of the body."""
        return self.first_s[int(quantile * (len(self.first_s) - 1))] * 1e3 if self.first_s else float("nan")

    def whole_ms(self, quantile: float = 0.5) -> float:
        """Return a quantile of the time to the last byte."""
        return self.whole_s[int(quantile * (len(self.whole_s) - 1))] * 1e3 if self.whole_s else float("nan")


def requests(port: int, *, num_events: int = 0, gap_ms: int = 0, num_different: int = 64) -> list[bytes]:
    """Return requests of 2 kB whose prompts differ after a common start."""
    made = []
    for number in range(num_different):
        prompt = f"EVENTS={num_events} GAP_MS={gap_ms} " + "You are a helpful assistant. " * 32 + f"{number:06} " * 130
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 100, "stream": num_events > 0}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        made.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return made


class _Client:
    """One connection, one request at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.got = b""
        self.sent_s = self.first_s = 0.0

    def send(self, request: bytes) -> None:
        self.got, self.first_s = b"", 0.0
        self.sent_s = time.perf_counter()
        if self.socket.send(request) != len(request):
            raise OSError("a request did not fit the socket's buffer")

    def take(self, *, is_stream: bool) -> bool | None:
        """Read what is there; True and False for a good and a bad end, None when there is more to come."""
        try:
            data = self.socket.recv(READ_BYTES)
        except OSError:
            return False
        if not data:
            return False
        self.got += data
        if not self.first_s and (b"\r\n\r\n" in self.got and not self.got.endswith(b"\r\n\r\n")):
            self.first_s = time.perf_counter()
        if is_stream:
            ended = self.got.endswith(b"0\r\n\r\n")
            self.got = self.got[-200:]
            return (DONE in self.got) if ended else None
        head = self.got.find(b"\r\n\r\n")
        length = _LENGTH.search(self.got[:head]) if head >= 0 else None
        if head < 0 or (length and len(self.got) < head + 4 + int(length[1])):
            return None
        return self.got.startswith(b"HTTP/1.1 200")


def drive(port: int, made: list[bytes], *, num_clients: int, duration_s: float = 0.0, num_each: int = 0) -> Times:
    """Let clients ask for ``duration_s``, or ``num_each`` times each, and return what they saw."""
    is_stream = b'"stream": true' in made[0]
    clients = {}
    poll = select.epoll()
    for _ in range(num_clients):
        client = _Client(port)
        clients[client.socket.fileno()] = client
        poll.register(client.socket, select.EPOLLIN)
    first_s: list[float] = []
    whole_s: list[float] = []
    num_failed = num_sent = 0
    begun_s = time.perf_counter()
    num_left = num_each * num_clients
    for client in clients.values():
        client.send(made[num_sent % len(made)])
        num_sent += 1
    num_open = num_clients
    while num_open:
        ready = poll.poll(120)
        if not ready:
            num_failed += num_open
            break
        for number, _ in ready:
            client = clients[number]
            good = client.take(is_stream=is_stream)
            if good is None:
                continue
            now_s = time.perf_counter()
            if good:
                first_s.append((client.first_s or now_s) - client.sent_s)
                whole_s.append(now_s - client.sent_s)
            else:
                num_failed += 1
            if good and (num_sent < num_left if num_each else now_s - begun_s < duration_s):
                client.send(made[num_sent % len(made)])
                num_sent += 1
            else:
                poll.unregister(client.socket)
                client.socket.close()
                num_open -= 1
    return Times(sorted(first_s), sorted(whole_s), num_failed, time.perf_counter() - begun_s)


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may go."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    allow_many_files()
    Engine([int(port) for port in sys.argv[2:]]).serve()
