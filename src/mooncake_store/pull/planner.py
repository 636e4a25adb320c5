"""Choose whom to ask for which blocks, and how much at a time.

Pure. The order of preference is: a peer on our host, then the peer with the least outstanding bytes (counted in steps
of ``BALANCE_STEP_BYTES``, so that one small pull goes to one peer), then the smaller id, so that the choice is
repeatable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mooncake_store.pull.base import GetOutcome, Scatter
from mooncake_store.types import BlockKey, NodeId

__all__ = ["Batch", "GetOutcome", "PeerFacts", "Plan", "Scatter", "StaleEntries", "Want", "plan_pull"]

BATCH_BLOCKS_MAX = 256
BALANCE_STEP_BYTES = 32 << 20
STALE_ENTRIES_MAX = 65_536


class Want(NamedTuple):
    """One block to pull. ``position`` is its place in the caller's list."""

    position: int
    key: BlockKey
    num_bytes: int


class PeerFacts(NamedTuple):
    """What matters about a peer when choosing. ``blocked_reason`` is why not to ask it now; empty when usable."""

    is_same_host: bool
    outstanding_bytes: int
    blocked_reason: str = ""


class Batch(NamedTuple):
    """Blocks to ask one peer for under one lease."""

    peer: NodeId
    wants: tuple[Want, ...]

    @property
    def num_bytes(self) -> int:
        """Sum of the blocks' bytes."""
        return sum(want.num_bytes for want in self.wants)


class Plan(NamedTuple):
    """Batches in the order to start them, and the positions nobody can be asked for, with the reason."""

    batches: tuple[Batch, ...]
    unavailable: tuple[tuple[int, str], ...]


class StaleEntries:
    """Remembers for a short time that a peer did not have a block which the directory said it had.

    Not thread-safe. Bounded: beyond ``max_entries`` the oldest is forgotten, which costs one denied lease.
    """

    def __init__(self, *, lifetime_ns: int, max_entries: int = STALE_ENTRIES_MAX) -> None:
        self._lifetime_ns = lifetime_ns
        self._max_entries = max_entries
        self._until: OrderedDict[tuple[NodeId, BlockKey], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, peer: NodeId, key: BlockKey, now_ns: int) -> None:
        """Remember that ``peer`` has no ``key``."""
        self._until.pop((peer, key), None)
        self._until[peer, key] = now_ns + self._lifetime_ns
        while len(self._until) > self._max_entries:
            self._until.popitem(last=False)

    def holds(self, peer: NodeId, key: BlockKey, now_ns: int) -> bool:
        """Tell whether asking ``peer`` for ``key`` is known to be in vain."""
        until_ns = self._until.get((peer, key))
        if until_ns is None:
            return False
        if until_ns <= now_ns:
            del self._until[peer, key]
            return False
        return True


def plan_pull(wants: Sequence[Want], holders: Sequence[Collection[NodeId]], peers: Mapping[NodeId, PeerFacts], *,
              batch_max_bytes: int) -> Plan:
    """Choose a replica for every block and group by peer.

    Args:
        wants: blocks, in the order the caller needs them.
        holders: for each want, the peers that may be asked (stale ones already left out).
        peers: facts of every peer that can be reached at all; a holder that is missing here is no candidate.
        batch_max_bytes: bound of a batch; one larger block makes a batch of its own.
    """
    load = {peer: facts.outstanding_bytes for peer, facts in peers.items()}
    groups: dict[NodeId, list[Want]] = {}
    unavailable: list[tuple[int, str]] = []
    for want, holding in zip(wants, holders, strict=True):
        usable = [peer for peer in holding if peer in peers and not peers[peer].blocked_reason]
        if not usable:
            reasons = [peers[peer].blocked_reason for peer in holding if peer in peers]
            unavailable.append((want.position, reasons[0] if reasons else "no replica"))
            continue
        chosen = usable[0] if len(usable) == 1 else min(
            usable, key=lambda peer: (not peers[peer].is_same_host, load[peer] // BALANCE_STEP_BYTES, peer))
        load[chosen] += want.num_bytes
        groups.setdefault(chosen, []).append(want)
    # Remote peers first: their answers take longest, and same-host copies fill the wait.
    order = sorted(groups, key=lambda peer: peers[peer].is_same_host)
    batches = [batch for peer in order for batch in _split(peer, groups[peer], batch_max_bytes)]
    return Plan(tuple(batches), tuple(unavailable))


def _split(peer: NodeId, wants: Sequence[Want], batch_max_bytes: int) -> list[Batch]:
    batches: list[Batch] = []
    current: list[Want] = []
    size_bytes = 0
    for want in wants:
        if current and (len(current) >= BATCH_BLOCKS_MAX or size_bytes + want.num_bytes > batch_max_bytes):
            batches.append(Batch(peer, tuple(current)))
            current, size_bytes = [], 0
        current.append(want)
        size_bytes += want.num_bytes
    if current:
        batches.append(Batch(peer, tuple(current)))
    return batches
