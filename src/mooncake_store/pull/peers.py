"""Know every peer: its idle links, how much we have outstanding with it, and whether to leave it alone for a while.

Threading model: every method may be called from any thread. Links are closed outside the lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from mooncake_store.pull.base import PeerAddress
from mooncake_store.pull.link import PeerLink
from mooncake_store.pull.planner import PeerFacts
from mooncake_store.types import HostIdentity, NodeId

LINKS_PER_PEER_MAX = 4
BLAME_NS = 2_000_000_000
IDLE_LINK_NS = 60_000_000_000
BLAMED_MAX = 4096


class _Peer:
    """What we keep of one peer."""

    __slots__ = ("blamed_until_ns", "idle", "num_links", "outstanding_bytes", "reason")

    def __init__(self) -> None:
        self.idle: list[tuple[int, PeerLink]] = []  # (since when, link), most recently used last
        self.num_links = 0
        self.outstanding_bytes = 0
        self.blamed_until_ns = 0
        self.reason = ""


class Peers:
    """All peers of one puller.

    Args:
        connect: makes a new link to a peer.
        inflight_max_bytes: bound of the bytes asked for and not yet settled, over all peers and threads. One larger
            batch passes when nothing else is in flight.
    """

    def __init__(self, connect: Callable[[PeerAddress], PeerLink], *, inflight_max_bytes: int) -> None:
        self._connect = connect
        self._inflight_max_bytes = inflight_max_bytes
        self._peers: dict[NodeId, _Peer] = {}
        self._inflight_bytes = 0
        self._is_closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0

    def facts(self, addresses: Mapping[NodeId, PeerAddress], own_host: HostIdentity,
              now_ns: int) -> dict[NodeId, PeerFacts]:
        """Return what the planner needs of these peers."""
        facts: dict[NodeId, PeerFacts] = {}
        with self._lock:
            for node_id, address in addresses.items():
                is_near = address.host == own_host
                peer = self._peers.get(node_id)
                if peer is None:
                    facts[node_id] = PeerFacts(is_near, 0)
                else:
                    blocked = f"left alone after: {peer.reason}" if peer.blamed_until_ns > now_ns else ""
                    facts[node_id] = PeerFacts(is_near, peer.outstanding_bytes, blocked)
        return facts

    def try_begin(self, address: PeerAddress, num_bytes: int) -> PeerLink | None:
        """Take a link to a peer and book ``num_bytes``; None when either bound is reached now.

        Raises:
            PeerUnreachable: the peer's address cannot be used.
        """
        dead: list[PeerLink] = []
        try:
            with self._lock:
                return self._try_begin(address, num_bytes, dead)
        finally:
            for broken in dead:
                broken.close()

    def take_idle(self, candidates: Sequence[NodeId], num_bytes: int, *, own_host: HostIdentity,
                  now_ns: int) -> PeerLink | None:
        """Take a link that is open to one of these peers, near ones first, and book ``num_bytes``; None if none is."""
        with self._lock:
            found = [peer for node_id in candidates if (peer := self._peers.get(node_id)) is not None
                     and peer.idle and peer.blamed_until_ns <= now_ns]
            if not found or self._is_over(num_bytes):
                return None
            peer = found[0] if len(found) == 1 else min(
                found, key=lambda peer: (peer.idle[-1][1].peer.host != own_host, peer.outstanding_bytes))
            _, link = peer.idle.pop()
            self._book(peer, num_bytes)
            return link

    def end(self, link: PeerLink, num_bytes: int, *, is_reusable: bool) -> None:
        """Give a link back, or close it."""
        node_id = link.peer.node_id
        with self._lock:
            peer = self._peer(node_id)
            peer.outstanding_bytes -= num_bytes
            self._inflight_bytes -= num_bytes
            if is_reusable and not self._is_closed:
                peer.idle.append((time.monotonic_ns(), link))
            else:
                peer.num_links -= 1
                is_reusable = False
            if self._num_waiting:
                self._changed.notify_all()
        if not is_reusable:
            link.close()

    def wait(self, timeout_s: float) -> None:
        """Wait until a link or some bytes may have become free."""
        with self._lock:
            self._num_waiting += 1
            try:
                self._changed.wait(timeout_s)
            finally:
                self._num_waiting -= 1

    def blame(self, node_id: NodeId, reason: str, now_ns: int) -> None:
        """Leave a peer alone for two seconds."""
        with self._lock:
            peer = self._peer(node_id)
            peer.blamed_until_ns = now_ns + BLAME_NS
            peer.reason = reason[:200]

    def sweep(self, alive: Collection[NodeId], now_ns: int) -> None:
        """Close links to peers that left the cell and links idle for a minute; forget what is over."""
        closing: list[PeerLink] = []
        with self._lock:
            for node_id, peer in list(self._peers.items()):
                is_alive = node_id in alive
                keep = [(since, link) for since, link in peer.idle if is_alive and now_ns - since < IDLE_LINK_NS]
                closing += [link for since, link in peer.idle if (since, link) not in keep]
                peer.num_links -= len(peer.idle) - len(keep)
                peer.idle = keep
                if not peer.num_links and peer.blamed_until_ns <= now_ns:
                    del self._peers[node_id]
        for link in closing:
            link.close()

    def _try_begin(self, address: PeerAddress, num_bytes: int, dead: list[PeerLink]) -> PeerLink | None:
        if self._is_over(num_bytes):
            return None
        peer = self._peer(address.node_id)
        link: PeerLink | None = None
        while peer.idle and link is None:
            _, candidate = peer.idle.pop()
            if candidate.lost_reason():
                peer.num_links -= 1
                dead.append(candidate)
            else:
                link = candidate
        if link is None:
            if peer.num_links >= LINKS_PER_PEER_MAX:
                return None
            link = self._connect(address)
            peer.num_links += 1
        self._book(peer, num_bytes)
        return link

    def _is_over(self, num_bytes: int) -> bool:
        """Tell whether so much more may not be asked for now."""
        return self._is_closed or 0 < self._inflight_bytes > self._inflight_max_bytes - num_bytes

    def _book(self, peer: _Peer, num_bytes: int) -> None:
        peer.outstanding_bytes += num_bytes
        self._inflight_bytes += num_bytes

    def _peer(self, node_id: NodeId) -> _Peer:
        peer = self._peers.get(node_id)
        if peer is None:
            peer = self._peers[node_id] = _Peer()
        return peer

    def num_links(self) -> int:
        """Count the open links."""
        with self._lock:
            return sum(peer.num_links for peer in self._peers.values())

    def close(self) -> None:
        """Close idle links; those in use are closed when they come back. Idempotent."""
        with self._lock:
            self._is_closed = True
            idle = [link for peer in self._peers.values() for _, link in peer.idle]
            for peer in self._peers.values():
                peer.num_links -= len(peer.idle)
                peer.idle = []
            self._changed.notify_all()
        for link in idle:
            link.close()
