"""Pull blocks from peers into our memory: drive sessions, move bytes, verify them, try the next replica once.

Architecture::

    Puller       one per process: peers, stale entries, what is tried and how often
      ├─ Fetcher   (fetch.py)   small blocks, in one question and answer, when all is well
      └─ PullRound (round.py)   one plan carried out in the caller's thread, all its peers at the same time
           └─ PeerLink -> PeerSession (pure) -> instructions

Threading model: ``pull`` blocks its caller and may run in many threads at once; it needs no thread of its own.

Failure model: a block that cannot be had in time is an outcome, never an exception.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from mooncake_store.config import StoreConfig
from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import Cell, GetOutcome, PeerAddress, Pulled, Runs
from mooncake_store.pull.fetch import Fetcher
from mooncake_store.pull.link import Attacher, PeerLink
from mooncake_store.pull.peers import Peers
from mooncake_store.pull.planner import StaleEntries, Want, plan_pull
from mooncake_store.pull.round import PullRound
from mooncake_store.pull.session import PeerSession
from mooncake_store.pull.wire import Hello
from mooncake_store.types import BlockKey, NodeId

ANSWER_TIMEOUT_NS = 1_000_000_000
"""Longest wait for one answer of a peer; a stopped process costs this once, then it is left alone for a while."""

STALE_NS = 2_000_000_000
ROUNDS_MAX = 2
MISS = Pulled(GetOutcome("miss", "", 0, "no replica"), 0, "")


class Puller:
    """Pulls blocks for one process.

    Args:
        hello: what to say of ourselves; its request id is not used.
        cell: who holds what.
        media: what opens a peer's region.
        config: timeouts and bounds.
        fetch_max_bytes: blocks that together have no more are fetched, without a lease.
        metrics: where to count.
    """

    def __init__(self, *, hello: Hello, cell: Cell, media: Attacher, config: StoreConfig, fetch_max_bytes: int,
                 metrics: Metrics) -> None:
        self._hello = hello
        self._cell = cell
        self._media = media
        self._config = config
        self._metrics = metrics
        self._peers = Peers(self._connect, inflight_max_bytes=config.inflight_max_bytes)
        self._fetcher = Fetcher(self._peers, own_host=hello.host, max_bytes=fetch_max_bytes,
                                is_verifying=config.checksum, metrics=metrics)
        self._stale = StaleEntries(lifetime_ns=STALE_NS)
        self._stale_lock = threading.Lock()
        self._closing = threading.Event()

    def pull(self, keys: Sequence[BlockKey], targets: Sequence[Runs], *, deadline_ns: int,
             source: PeerAddress | None = None) -> list[Pulled]:
        """Pull blocks; returns one result per key, in order.

        Args:
            keys: distinct or not; each is pulled for its own target.
            targets: where each block goes; must stay mapped until this returns.
            deadline_ns: CLOCK_MONOTONIC; also bounded by ``pull_timeout_s``.
            source: ask this peer only, whatever the directory says.
        """
        now_ns = time.monotonic_ns()
        deadline_ns = min(deadline_ns, now_ns + int(self._config.pull_timeout_s * 1e9))
        holders = [[source.node_id] for _ in keys] if source is not None else self._holders(keys, now_ns)
        fetched = self._fetcher.fetch(keys, targets, holders, now_ns=now_ns, deadline_ns=deadline_ns)
        if fetched is not None:
            return fetched
        wants = [Want(position, key, sum([length for _, length in runs]))
                 for position, (key, runs) in enumerate(zip(keys, targets, strict=True))]
        addresses = self._addresses(holders, source)
        results: list[Pulled] = [MISS] * len(keys)
        for number in range(ROUNDS_MAX):
            candidates = [holders[want.position] for want in wants]
            if not any(candidates) or time.monotonic_ns() >= deadline_ns or self._closing.is_set():
                break
            plan = plan_pull(wants, candidates, self._peers.facts(addresses, self._hello.host, now_ns),
                             batch_max_bytes=max(1, self._config.inflight_max_bytes // 2))
            if number == 0:
                for position, reason in plan.unavailable:
                    results[position] = Pulled(GetOutcome("miss", "", 0, reason), 0, "")
            round_ = PullRound(self._peers, self._media, targets, deadline_ns=deadline_ns, metrics=self._metrics,
                               is_verifying=self._config.checksum, closing=self._closing)
            outcome = round_.run(plan.batches, addresses)
            if outcome.stale:
                self._remember_stale(outcome.stale)
            for position, pulled in outcome.pulled.items():
                if number == 0 or pulled.outcome.result == "ok":
                    results[position] = pulled
            wants = [want for want in wants if results[want.position].outcome.result != "ok"]
            for batch in plan.batches if wants else ():
                for want in batch.wants:
                    holders[want.position].remove(batch.peer)
            now_ns = time.monotonic_ns()
        return results

    def sweep(self) -> None:
        """Close links to peers that left the cell; call about once a second."""
        self._peers.sweep(self._cell.members().keys(), time.monotonic_ns())

    def num_links(self) -> int:
        """Count the open connections to peers."""
        return self._peers.num_links()

    def close(self) -> None:
        """End running pulls within a tenth of a second and close idle links. Idempotent."""
        self._closing.set()
        self._peers.close()

    def _connect(self, peer: PeerAddress) -> PeerLink:
        hello = self._hello
        session = PeerSession(peer, node_id=hello.node_id, host=hello.host, version=hello.version,
                              lease_ttl_ms=max(1, int(self._config.lease_s * 1000)),
                              answer_timeout_ns=ANSWER_TIMEOUT_NS)
        return PeerLink(peer, session)

    def _holders(self, keys: Sequence[BlockKey], now_ns: int) -> list[list[NodeId]]:
        """Return whom to ask for each key: members other than us that are not known to have lost it."""
        own, members = self._hello.node_id, self._cell.members()
        located = self._cell.locate(keys)
        with self._stale_lock:
            return [[node for node in nodes if node != own and node in members
                     and not self._stale.holds(node, key, now_ns)] for key, nodes in zip(keys, located, strict=True)]

    def _addresses(self, holders: Sequence[Sequence[NodeId]], source: PeerAddress | None) -> dict[NodeId, PeerAddress]:
        if source is not None:
            return {source.node_id: source}
        members = self._cell.members()
        return {node: PeerAddress(node, members[node].control, members[node].host)
                for node in {node for nodes in holders for node in nodes} if node in members}

    def _remember_stale(self, entries: Sequence[tuple[NodeId, BlockKey]]) -> None:
        now_ns = time.monotonic_ns()
        with self._stale_lock:
            for node_id, key in entries:
                self._stale.add(node_id, key, now_ns)
