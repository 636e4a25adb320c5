"""Divide a read into chains of work requests, and keep account of those under way.

Pure. A chain goes to one queue pair in one call and reports once, at its end, so a thousand small reads cost a few
system calls and completions. The id of a work request tells its chain and its place in it; requests of a queue pair
complete in order, so an error at some place says that all before it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_store.transport.coalesce import groups

CHAIN_READS_MAX = 256
CHAIN_MAX_BYTES = 4 << 20
CHAIN_MIN_BYTES = 256 << 10
"""A batch is cut finer than CHAIN_MAX_BYTES to reach every queue pair, but not finer than this."""
CHAINS_PER_QUEUE_MAX = 2
"""Chains under way per queue pair: one on the wire, one behind it."""
QUEUE_DEPTH = CHAIN_READS_MAX * CHAINS_PER_QUEUE_MAX
BOUNCED = -1


class LocalRanges:
    """Registered memory of this process, to find where the targets of a read lie. Immutable.

    Args:
        ranges: (address, size_bytes) each. Where ranges overlap, a target may be missed, which costs a copy.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self._order = sorted(range(len(ranges)), key=lambda i: ranges[i])
        self._starts = np.array([ranges[i][0] for i in self._order], np.uint64)
        self._ends = np.array([sum(ranges[i]) for i in self._order], np.uint64)
        self._positions = np.array(self._order, np.int64)

    def find(self, addresses: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return per target the position of the range that it lies in, or BOUNCED; int64 [n]."""
        found = np.full(len(addresses), BOUNCED, np.int64)
        if len(self._starts) == 0:
            return found
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        candidate = np.maximum(at, 0)
        is_inside = (at >= 0) & (addresses < self._ends[candidate])
        is_inside[is_inside] = lengths[is_inside] <= (self._ends[candidate] - addresses)[is_inside]
        found[is_inside] = self._positions[candidate[is_inside]]
        return found


class Chain(NamedTuple):
    """Pieces (their indexes, int64 [k], 1 <= k <= CHAIN_READS_MAX) with targets in one local range or BOUNCED."""

    pieces: npt.NDArray[np.int64]
    range_position: int
    num_bytes: int


def divide(lengths: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], *, num_queues: int,
           bounced_max_bytes: int) -> list[Chain]:
    """Divide pieces into chains, each piece in one.

    Args:
        lengths: of the pieces, uint64 [m].
        positions: what ``LocalRanges.find`` says of their targets, int64 [m].
        num_queues: queue pairs to occupy.
        bounced_max_bytes: a bounced chain ends at the piece that reaches this.
    """
    share = -(-int(lengths.sum()) // num_queues)
    limit = min(CHAIN_MAX_BYTES, max(CHAIN_MIN_BYTES, share))
    chains: list[Chain] = []
    for position in np.unique(positions).tolist():
        members = np.flatnonzero(positions == position)
        bytes_max = min(limit, bounced_max_bytes) if position == BOUNCED else limit
        for group in groups(lengths[members], count_max=CHAIN_READS_MAX, bytes_max=bytes_max):
            chains.append(Chain(members[group.start:group.stop], position, group.num_bytes))
    return chains


class Start(NamedTuple):
    """Post this chain on that queue; a bounced one goes through ``slot`` of the bounce buffer (else -1)."""

    chain: Chain
    first_wr_id: int
    queue: int
    slot: int


class End(NamedTuple):
    """A chain is over: its first ``num_done`` pieces were read. ``slot`` is free once they are copied out of it."""

    chain: Chain
    num_done: int
    slot: int


class _Active:
    __slots__ = ("first_failed", "queue", "slot")

    def __init__(self, queue: int, slot: int, count: int) -> None:
        self.queue = queue
        self.slot = slot
        self.first_failed = count


class Ledger:
    """Says which chain goes where next, and what a completion means; use once.

    Args:
        chains: in the order to post them.
        num_queues: queue pairs.
        num_slots: slots of the bounce buffer.
        first_number: the first chain's; ids must not come again on the same queue pairs, so that a completion that a
            device reports twice cannot be taken for another's.
    """

    def __init__(self, chains: Sequence[Chain], *, num_queues: int, num_slots: int, first_number: int = 0) -> None:
        self._chains = chains
        self._first_number = first_number
        self._next = 0
        self._load_bytes = [0] * num_queues
        self._given_bytes = [0] * num_queues
        self._num_chains = [0] * num_queues
        self._slots = list(range(num_slots - 1, -1, -1))
        self._active: dict[int, _Active] = {}

    @property
    def num_active(self) -> int:
        """Return how many chains are under way."""
        return len(self._active)

    @property
    def is_finished(self) -> bool:
        """Tell whether every chain was started and is over."""
        return not self._active and self._next == len(self._chains)

    def start_next(self) -> Start | None:
        """Return what to post now, None when there is no room.

        The next chain goes to the queue with the fewest bytes under way, among equals to that with the fewest so far.
        """
        if self._next == len(self._chains):
            return None
        chain = self._chains[self._next]
        open_queues = [i for i, count in enumerate(self._num_chains) if count < CHAINS_PER_QUEUE_MAX]
        is_bounced = chain.range_position == BOUNCED
        if not open_queues or (is_bounced and not self._slots):
            return None
        queue = min(open_queues, key=lambda i: (self._load_bytes[i], self._given_bytes[i]))
        slot = self._slots.pop() if is_bounced else -1
        self._active[self._next] = _Active(queue, slot, len(chain.pieces))
        self._num_chains[queue] += 1
        self._load_bytes[queue] += chain.num_bytes
        self._given_bytes[queue] += chain.num_bytes
        self._next += 1
        return Start(chain, (self._first_number + self._next - 1) * CHAIN_READS_MAX, queue, slot)

    def is_active(self, wr_id: int) -> bool:
        """Tell whether this is a work request of a chain under way."""
        return wr_id // CHAIN_READS_MAX - self._first_number in self._active

    def settle(self, wr_id: int, *, is_ok: bool) -> End | None:
        """Take in one completion; return the chain that it ends, if it ends one.

        Raises:
            KeyError: no chain under way has this id.
        """
        number, place = divmod(wr_id, CHAIN_READS_MAX)
        number -= self._first_number
        active, chain = self._active[number], self._chains[number]
        if not is_ok:
            active.first_failed = min(active.first_failed, place)
        if place != len(chain.pieces) - 1:
            return None
        del self._active[number]
        self._num_chains[active.queue] -= 1
        self._load_bytes[active.queue] -= chain.num_bytes
        if active.slot >= 0:
            self._slots.append(active.slot)
        return End(chain, active.first_failed, active.slot)
