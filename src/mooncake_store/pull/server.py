"""Answer peers: grant leases on our blocks, take offers and reports, tell our status.

Architecture::

    PullServer   one thread; owns the lease table
      ├─ Listener      listener.py: the connections of peers
      ├─ BlockSource   pins, unpins, verifies (any thread)
      ├─ on_offer      what to do with offers; None refuses them
      └─ on_dropped    a block turned out to be damaged and is gone

Threading model: one thread does everything; ``close`` may be called from any other. It never waits for a peer: one that
does not take its answers is not listened to and then dropped, and leases nobody renews expire. A lease outlives its
connection, since its holder may still be reading.

Failure model: what cannot be decoded is counted by reason and answered with ``Denied``; nothing a peer sends ends the
thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from mooncake_store.errors import LocalProtocolError
from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import BlockSource, HeldBlock
from mooncake_store.pull.leases import LeaseTable
from mooncake_store.pull.listener import Listener, Peer
from mooncake_store.pull.wire import (
    Accepted,
    Acquire,
    BlockEntry,
    Denied,
    Fetch,
    Fetched,
    FetchedBlock,
    FramingError,
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
)
from mooncake_store.types import BlockKey

logger = logging.getLogger(__name__)

REPORTS_PER_SECOND_MAX = 50
MESSAGES_PER_TURN_MAX = 64
IDLE_WAIT_S = 1.0


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
        host: address to bind; the port is chosen by the system.
        welcome: what to answer a Hello with; its request id is not used.
        source: the blocks.
        lease_max_ms: longest lease granted at a time.
        fetch_max_bytes: blocks that together have no more are sent to whoever fetches them; 0 refuses that.
        hooks, metrics: see there.

    Raises:
        PeerUnreachable: the address cannot be bound.
    """

    def __init__(self, *, host: str, welcome: Welcome, source: BlockSource, lease_max_ms: int,
                 fetch_max_bytes: int, hooks: ServerHooks, metrics: Metrics) -> None:
        self._welcome = welcome
        self._source = source
        self._lease_max_ms = lease_max_ms
        self._fetch_max_bytes = fetch_max_bytes
        self._hooks = hooks
        self._metrics = metrics
        self._leases = LeaseTable()
        self._report_window = (0, 0)  # second, reports taken in it
        self._listener = Listener(host)
        self.address = self._listener.address
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
            self._listener.close()
            return
        self._listener.wake()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._is_closing:
                for peer in self._listener.wait(self._wait_s()):
                    try:
                        self._serve(peer)
                    except (OSError, FramingError) as error:
                        self._listener.drop(peer, str(error))
                self._let_go([lease.blocks for lease in self._leases.expire(time.monotonic_ns())], "expired")
        except Exception:  # the thread's border
            self._metrics.add("mooncake_protocol_errors_total", reason="internal")
            logger.exception("peers are not answered any more")
        finally:
            self._let_go([lease.blocks for lease in self._leases.clear()], "closed")
            self._listener.close()

    def _wait_s(self) -> float:
        due_ns = self._leases.next_deadline_ns()
        return IDLE_WAIT_S if due_ns is None else min(IDLE_WAIT_S, max(0.0, (due_ns - time.monotonic_ns()) / 1e9))

    def _serve(self, peer: Peer) -> None:
        """Take what a peer sent and answer it, as long as it takes the answers. Raises OSError, FramingError."""
        channel = peer.channel
        if channel.unsent:
            channel.flush()
        elif peer.is_heard:
            channel.receive()
        num_served, has_more = 0, True
        while has_more and num_served < MESSAGES_PER_TURN_MAX and not channel.unsent and not self._is_closing:
            has_more = self._serve_one(peer)
            num_served += has_more
        self._listener.settle(peer, num_served=num_served, has_more=has_more)

    def _serve_one(self, peer: Peer) -> bool:
        """Take and answer one message; False when there is none. Raises OSError, FramingError."""
        answer: Message | None
        try:
            message = peer.channel.take()
            if message is None:
                return False
            answer = self._answer(peer, message)
        except WireError as error:
            self._metrics.add("mooncake_protocol_errors_total", reason=error.reason)
            logger.debug("rejected a message: %s", error.message)
            if isinstance(error, FramingError):
                raise
            answer = Denied(0, "version" if error.reason == "version" else "malformed", error.message[:200])
        except Exception:  # the thread's border: a bug met by one message must not end service to all peers
            self._metrics.add("mooncake_protocol_errors_total", reason="internal")
            logger.exception("a message could not be served")
            answer = Denied(0, "unexpected", "internal error")
        try:
            if answer is not None:
                peer.channel.send(answer)
        except LocalProtocolError as error:
            # The asker's own deadline covers an answer that never comes.
            self._metrics.add("mooncake_protocol_errors_total", reason="unsent")
            logger.warning("an answer could not be sent: %s", error)
        return True

    def _answer(self, peer: Peer, message: Message) -> Message | None:
        match message:
            case Fetch():
                return self._fetch(message)
            case Acquire():
                return self._acquire(peer, message)
            case Release(lease_id):
                lease = self._leases.release(peer.number, lease_id)
                if lease is not None:
                    self._let_go([lease.blocks], "released")
                return None
            case Renew(request_id, lease_id, ttl_ms):
                ttl_ms = min(ttl_ms, self._lease_max_ms)
                is_alive = self._leases.renew(peer.number, lease_id, deadline_ns=_after(ttl_ms))
                return Renewed(request_id, lease_id, ttl_ms) if is_alive else Denied(request_id, "no_such_lease")
            case Hello(request_id):
                peer.is_greeted = True
                welcome = self._welcome
                return Welcome(request_id, welcome.node_id, welcome.host, welcome.version, welcome.region)
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

    def _acquire(self, peer: Peer, message: Acquire) -> Message:
        # A new process may have taken over a dead one's port: whoever did not greet *us* may hold another's region.
        if not peer.is_greeted:
            return Denied(message.request_id, "hello_first")
        if not self._leases.has_room(peer.number):
            self._metrics.add("mooncake_leases_total", result="denied")
            return Denied(message.request_id, "too_many_leases")
        found = self._source.pin([BlockKey(key) for key in message.keys])
        entries = tuple([BlockEntry(block.extent.offset, block.extent.length, block.checksum)
                         if block is not None else None for block in found])
        held: tuple[HeldBlock, ...] = tuple([block for block in found if block is not None])
        ttl_ms = min(message.ttl_ms, self._lease_max_ms)
        lease_id = 0
        if held:
            lease_id = self._leases.grant(peer.number, held, deadline_ns=_after(ttl_ms))
            self._metrics.set("mooncake_leases_active", len(self._leases))
        return Granted(message.request_id, lease_id, ttl_ms, entries)

    def _fetch(self, message: Fetch) -> Message:
        found = self._source.pin([BlockKey(key) for key in message.keys])
        held = [block for block in found if block is not None]
        try:
            if sum([block.extent.length for block in held]) > self._fetch_max_bytes:
                return Denied(message.request_id, "too_large")
            return Fetched(message.request_id, tuple([FetchedBlock(block.checksum, self._source.bytes_of(block))
                                                      if block is not None else None for block in found]))
        finally:
            self._source.unpin(held)

    def _check_reported(self, peer: Peer, key: BlockKey) -> None:
        second = time.monotonic_ns() // 1_000_000_000
        count = self._report_window[1] if self._report_window[0] == second else 0
        if not peer.is_greeted or count >= REPORTS_PER_SECOND_MAX:
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
