"""Keep the promises an owner made: which lease holds which blocks, for whom, and until when.

Pure and not thread-safe; the server's one thread owns it. Expiry is a heap, so a tick costs nothing while none is due.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from mooncake_store.pull.base import HeldBlock

LEASES_MAX = 16_384
LEASES_PER_PEER_MAX = 1_024


class Lease(NamedTuple):
    """One promise. ``peer`` is the number of the connection it was given to; no other can renew or release it."""

    lease_id: int
    peer: int
    blocks: tuple[HeldBlock, ...]


class LeaseTable:
    """All leases of one owner.

    Args:
        max_leases: bound over all peers.
        max_per_peer: bound for one connection, so that one leaking reader cannot starve the others.
    """

    def __init__(self, *, max_leases: int = LEASES_MAX, max_per_peer: int = LEASES_PER_PEER_MAX) -> None:
        self._max_leases = max_leases
        self._max_per_peer = max_per_peer
        self._leases: dict[int, Lease] = {}
        self._deadlines: dict[int, int] = {}
        self._per_peer: dict[int, int] = {}
        self._due: list[tuple[int, int]] = []  # (deadline_ns, lease_id); renewals leave stale pairs behind
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._leases)

    def has_room(self, peer: int) -> bool:
        """Tell whether one more lease may be granted to this connection."""
        return len(self._leases) < self._max_leases and self._per_peer.get(peer, 0) < self._max_per_peer

    def grant(self, peer: int, blocks: tuple[HeldBlock, ...], *, deadline_ns: int) -> int:
        """Record a promise and return its id, which is never reused."""
        self._last_id += 1
        lease_id = self._last_id
        self._leases[lease_id] = Lease(lease_id, peer, blocks)
        self._per_peer[peer] = self._per_peer.get(peer, 0) + 1
        self._schedule(lease_id, deadline_ns)
        return lease_id

    def renew(self, peer: int, lease_id: int, *, deadline_ns: int) -> bool:
        """Prolong a promise; False when there is none such for this connection. Never shortens."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.peer != peer:
            return False
        if deadline_ns > self._deadlines[lease_id]:
            self._schedule(lease_id, deadline_ns)
        return True

    def release(self, peer: int, lease_id: int) -> Lease | None:
        """End a promise; None when there is none such for this connection (it expired)."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.peer != peer:
            return None
        self._forget(lease)
        return lease

    def expire(self, now_ns: int) -> list[Lease]:
        """End and return every promise whose deadline has come."""
        ended: list[Lease] = []
        while self._due and self._due[0][0] <= now_ns:
            deadline_ns, lease_id = heapq.heappop(self._due)
            lease = self._leases.get(lease_id)
            if lease is not None and self._deadlines[lease_id] == deadline_ns:
                self._forget(lease)
                ended.append(lease)
        return ended

    def clear(self) -> list[Lease]:
        """End and return every promise."""
        ended = list(self._leases.values())
        for lease in ended:
            self._forget(lease)
        return ended

    def next_deadline_ns(self) -> int | None:
        """Return when ``expire`` has something to look at, None while there is nothing."""
        return self._due[0][0] if self._due else None

    def _schedule(self, lease_id: int, deadline_ns: int) -> None:
        self._deadlines[lease_id] = deadline_ns
        heapq.heappush(self._due, (deadline_ns, lease_id))
        if len(self._due) > 4 * len(self._leases) + 64:
            self._due = [(deadline, lease) for lease, deadline in self._deadlines.items()]
            heapq.heapify(self._due)

    def _forget(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        del self._deadlines[lease.lease_id]
        remaining = self._per_peer[lease.peer] - 1
        if remaining:
            self._per_peer[lease.peer] = remaining
        else:
            del self._per_peer[lease.peer]
