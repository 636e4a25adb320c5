"""Fill a decode engine's blocks from prefill workers.

Architecture::

    model thread        apply(plan) / take_results()        never waits for a peer
      PrefillPeer       one thread per prefill worker (peer.py): its own socket, pulls, heartbeats, pidfd
        Inbox           what the peers report, taken by the model thread once per step

One thread per peer isolates failures: a hung peer delays only its own transfers. Bounded by PEERS_MAX; an idle peer's
thread ends after PEER_IDLE_S.
"""

from __future__ import annotations

import logging
import threading

from mooncake_connector.transfer.peer import Cancel, PeerContext, PrefillPeer
from mooncake_connector.transfer.steps import Announced, HandoffLoad, Received, StepPlan, StepResults
from mooncake_store.metrics import Metrics

logger = logging.getLogger(__name__)

PEERS_MAX = 64


class Inbox:
    """Collects what finished, for the model thread. Threads: any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results = StepResults()

    def receive(self, item: Received) -> None:
        """Say that a parked request's wait is over; exactly once per request."""
        with self._lock:
            self._results.received.add(item.request_id)
            self._results.bad_blocks.update(item.bad_blocks)
            if item.reason:
                self._results.lost[item.request_id] = item.reason
            elif item.note is not None:
                self._results.notes[item.request_id] = item.note

    def take(self) -> StepResults:
        """Return everything since the last call."""
        with self._lock:
            results, self._results = self._results, StepResults()
        return results


class Consumer:
    """The decode side of one worker.

    Args:
        context: what every peer thread needs; its ``report`` is our inbox's.
        rank: our TP rank; we pull from the prefill worker of the same rank.
    """

    def __init__(self, context: PeerContext, *, rank: int, metrics: Metrics) -> None:
        self._context = context
        self._rank = rank
        self._metrics = metrics
        self._lock = threading.Lock()
        self._peers: dict[str, PrefillPeer] = {}
        self._addresses: dict[str, str] = {}

    def apply(self, plan: StepPlan) -> None:
        """Start, announce and cancel transfers. Returns at once."""
        for item in plan.announced:
            peer = self._peer_of(item)
            if peer is not None:
                peer.send(item)
        for load in plan.handoffs:
            peer = self._peer_of(load)
            if peer is None:
                self._refuse(load)
            else:
                peer.send(load)
        for request_id in plan.cancelled:
            address = self._addresses.pop(request_id, None)
            peer = self._peers.get(address) if address else None
            if peer is not None:
                peer.send(Cancel(request_id))
        if plan.is_empty or plan.announced or plan.handoffs:
            self._metrics.set("mooncake_transfers_active", self.num_active, role="decode")

    def forget(self, request_ids: set[str]) -> None:
        """Drop what we remember of requests whose wait is over."""
        for request_id in request_ids:
            self._addresses.pop(request_id, None)
        if request_ids:
            self._metrics.set("mooncake_transfers_active", self.num_active, role="decode")

    @property
    def num_active(self) -> int:
        """Return the transfers that are not over."""
        return sum(peer.num_active for peer in self._peers.values())

    def close(self) -> None:
        """Stop every peer thread. Idempotent, bounded."""
        peers = list(self._peers.values())
        for peer in peers:
            peer.stop()
        for peer in peers:
            peer.join(timeout_s=2.0)
        self._peers.clear()

    def _peer_of(self, item: Announced | HandoffLoad) -> PrefillPeer | None:
        if self._rank >= len(item.addresses):
            return None
        address = item.addresses[self._rank]
        for gone in [key for key, peer in self._peers.items() if not peer.is_alive]:
            del self._peers[gone]
        peer = self._peers.get(address)
        if peer is None:
            if len(self._peers) >= PEERS_MAX:
                logger.warning("%d prefill workers are connected; transfer %s is computed here",
                               PEERS_MAX, item.transfer_id)
                return None
            peer = self._peers[address] = PrefillPeer(address, self._context)
        self._addresses[item.request_id] = address
        return peer

    def _refuse(self, load: HandoffLoad) -> None:
        logger.warning("transfer %s names no usable prefill address for rank %d: %s",
                       load.transfer_id, self._rank, load.addresses)
        self._metrics.add("mooncake_transfers_total", role="decode", result="no_peer")
        self._context.report(Received(request_id=load.request_id, bad_blocks=load.block_ids[load.first_block:],
                                      reason="no usable prefill address"))
