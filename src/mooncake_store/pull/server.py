"""Answer peers: grant leases on our blocks, take offers and reports, tell our status.

Architecture::

    PullServer   one thread, one ROUTER socket; owns the lease table
      ├─ BlockSource   pins, unpins, verifies (any thread)
      ├─ on_offer      what to do with offers; None refuses them
      └─ on_dropped    a block turned out to be damaged and is gone

Threading model: one thread does everything; ``close`` may be called from any other. It never waits for a peer: answers
that a peer does not take are dropped, and leases nobody renews expire.

Failure model: what cannot be decoded is counted by reason and answered with ``Denied``; nothing a peer sends ends the
thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import zmq

from mooncake_store.errors import LocalProtocolError, PeerUnreachable
from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import BlockSource, HeldBlock
from mooncake_store.pull.leases import LeaseTable
from mooncake_store.pull.link import is_readable
from mooncake_store.pull.wire import (
    MESSAGE_MAX_BYTES,
    Accepted,
    Acquire,
    BlockEntry,
    Denied,
    Granted,
    Hello,
    Message,
    Offer,
    Release,
    Renew,
    Renewed,
    Report,
    StatusReply,
    StatusRequest,
    Welcome,
    WireError,
    decode,
    encode,
)
from mooncake_store.types import BlockKey

logger = logging.getLogger(__name__)

PEERS_MAX = 4096
REPORTS_PER_SECOND_MAX = 50
SEND_QUEUE_MAX = 1024
RECEIVE_QUEUE_MAX = 1024
MESSAGES_PER_POLL_MAX = 64
IDLE_POLL_MS = 1000


class OfferAnswer(NamedTuple):
    """How many offered blocks will be pulled, and how many are held already."""

    num_wanted: int
    num_held: int


class ServerHooks(NamedTuple):
    """What the server calls, from its thread; none may block.

    Attributes:
        on_offer: take an offer; None when this node keeps no copies for others.
        on_dropped: a block was damaged and is gone.
        status: samples and facts for a ``StatusRequest``.
    """

    on_offer: Callable[[Offer], OfferAnswer] | None
    on_dropped: Callable[[BlockKey], None]
    status: Callable[[], tuple[dict[str, float], dict[str, str]]]


class PullServer:
    """Serves one process's blocks.

    Args:
        context: ZeroMQ context; outlives the server.
        host: address to bind; the port is chosen by the system.
        welcome: what to answer a Hello with; its request id is not used.
        source: the blocks.
        lease_max_ms: longest lease granted at a time.
        hooks, metrics: see there.

    Raises:
        PeerUnreachable: the address cannot be bound.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], *, host: str, welcome: Welcome, source: BlockSource,
                 lease_max_ms: int, hooks: ServerHooks, metrics: Metrics) -> None:
        self._welcome = welcome
        self._source = source
        self._lease_max_ms = lease_max_ms
        self._hooks = hooks
        self._metrics = metrics
        self._leases = LeaseTable()
        self._greeted: OrderedDict[bytes, None] = OrderedDict()
        self._report_window = (0, 0)  # second, reports taken in it
        self._socket = context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 100), (zmq.SNDHWM, SEND_QUEUE_MAX), (zmq.RCVHWM, RECEIVE_QUEUE_MAX),
                              (zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES), (zmq.IPV6, 1)):
            self._socket.set(option, value)
        try:
            self._socket.bind(f"tcp://{_bracketed(host)}:0")
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise PeerUnreachable(f"cannot bind {host}: {error}", where="$.host",
                                  hint="use an address of this machine") from error
        port = self._socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        self.address = f"tcp://{_bracketed(host)}:{port}"
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_closing = False
        self._close_lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start answering."""
        self._thread = threading.Thread(target=self._run, name="mooncake-pull-server", daemon=True)
        self._thread.start()

    def close(self, *, timeout_s: float = 2.0) -> None:
        """Stop answering and let all leases go. Idempotent."""
        with self._close_lock:
            if self._is_closing:
                return
            self._is_closing = True
        if self._thread is None:
            self._socket.close(linger=0)
            os.close(self._wake_fd)
            return
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        try:
            while not self._is_closing:
                poller.poll(self._poll_timeout_ms())
                for _ in range(MESSAGES_PER_POLL_MAX):
                    if self._is_closing or not self._serve_one():
                        break
                self._let_go([lease.blocks for lease in self._leases.expire(time.monotonic_ns())], "expired")
        finally:
            self._let_go([lease.blocks for lease in self._leases.clear()], "closed")
            self._socket.close()
            os.close(self._wake_fd)

    def _poll_timeout_ms(self) -> int:
        due_ns = self._leases.next_deadline_ns()
        if due_ns is None:
            return IDLE_POLL_MS
        return max(0, min(IDLE_POLL_MS, -(-(due_ns - time.monotonic_ns()) // 1_000_000)))

    def _serve_one(self) -> bool:
        """Take and answer one message; False when there is none."""
        if not is_readable(self._socket):
            return False
        frames = self._socket.recv_multipart(zmq.DONTWAIT)
        peer, body = frames[0], frames[1:]
        answer: Message | None
        try:
            if len(body) != 1:
                raise WireError("malformed", f"a message of {len(body)} frames")
            answer = self._answer(peer, decode(body[0]))
        except WireError as error:
            self._metrics.add("mooncake_protocol_errors_total", reason=error.reason)
            logger.debug("rejected a message: %s", error.message)
            answer = Denied(0, "version" if error.reason == "version" else "malformed", error.message[:200])
        except Exception:  # the thread's border: a bug met by one message must not end service to all peers
            self._metrics.add("mooncake_protocol_errors_total", reason="internal")
            logger.exception("a message could not be served")
            answer = Denied(0, "unexpected", "internal error")
        if answer is not None:
            self._send(peer, answer)
        return True

    def _send(self, peer: bytes, answer: Message) -> None:
        try:
            self._socket.send_multipart([peer, encode(answer)], zmq.DONTWAIT)
        except (zmq.Again, LocalProtocolError) as error:
            # The asker's own deadline covers an answer that never comes.
            self._metrics.add("mooncake_protocol_errors_total", reason="unsent")
            logger.warning("an answer could not be sent: %s", error)

    def _answer(self, peer: bytes, message: Message) -> Message | None:
        match message:
            case Acquire():
                return self._acquire(peer, message)
            case Release(lease_id):
                lease = self._leases.release(peer, lease_id)
                if lease is not None:
                    self._let_go([lease.blocks], "released")
                return None
            case Renew(request_id, lease_id, ttl_ms):
                ttl_ms = min(ttl_ms, self._lease_max_ms)
                is_alive = self._leases.renew(peer, lease_id, deadline_ns=_after(ttl_ms))
                return Renewed(request_id, lease_id, ttl_ms) if is_alive else Denied(request_id, "no_such_lease")
            case Hello(request_id):
                return self._greet(peer, request_id)
            case Report(key):
                self._check_reported(peer, BlockKey(key))
                return None
            case Offer():
                return self._take_offer(message)
            case StatusRequest(request_id):
                samples, info = self._hooks.status()
                return StatusReply(request_id, samples, info)
        self._metrics.add("mooncake_protocol_errors_total", reason="unexpected")
        return Denied(getattr(message, "request_id", 0), "unexpected", type(message).__name__)

    def _greet(self, peer: bytes, request_id: int) -> Message:
        self._greeted[peer] = None
        self._greeted.move_to_end(peer)
        while len(self._greeted) > PEERS_MAX:
            self._greeted.popitem(last=False)
        welcome = self._welcome
        return Welcome(request_id, welcome.node_id, welcome.host, welcome.version, welcome.region)

    def _acquire(self, peer: bytes, message: Acquire) -> Message:
        # A new process may have taken over a dead one's port: whoever did not greet *us* may hold another's region.
        if peer not in self._greeted:
            return Denied(message.request_id, "hello_first")
        if not self._leases.has_room(peer):
            self._metrics.add("mooncake_leases_total", result="denied")
            return Denied(message.request_id, "too_many_leases")
        found = self._source.pin([BlockKey(key) for key in message.keys])
        entries = tuple(BlockEntry(block.extent.offset, block.extent.length, block.checksum)
                        if block is not None else None for block in found)
        held: tuple[HeldBlock, ...] = tuple(block for block in found if block is not None)
        ttl_ms = min(message.ttl_ms, self._lease_max_ms)
        lease_id = 0
        if held:
            lease_id = self._leases.grant(peer, held, deadline_ns=_after(ttl_ms))
            self._metrics.set("mooncake_leases_active", len(self._leases))
        return Granted(message.request_id, lease_id, ttl_ms, entries)

    def _check_reported(self, peer: bytes, key: BlockKey) -> None:
        second = time.monotonic_ns() // 1_000_000_000
        count = self._report_window[1] if self._report_window[0] == second else 0
        if peer not in self._greeted or count >= REPORTS_PER_SECOND_MAX:
            return
        self._report_window = (second, count + 1)
        if self._source.verify(key) is False:
            self._hooks.on_dropped(key)

    def _take_offer(self, message: Offer) -> Message:
        if self._hooks.on_offer is None:
            return Denied(message.request_id, "not_a_store")
        answer = self._hooks.on_offer(message)
        return Accepted(message.request_id, answer.num_wanted, answer.num_held)

    def _let_go(self, holdings: list[tuple[HeldBlock, ...]], result: str) -> None:
        if not holdings:
            return
        for blocks in holdings:
            self._source.unpin(blocks)
        self._metrics.add("mooncake_leases_total", len(holdings), result=result)
        self._metrics.set("mooncake_leases_active", len(self._leases))


def _after(ttl_ms: int) -> int:
    return time.monotonic_ns() + ttl_ms * 1_000_000


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
