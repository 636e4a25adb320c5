"""Offer our blocks to capacity nodes, so that they outlive us.

``rendezvous`` is pure; :class:`Replicator` is one thread with a bounded queue. Nothing waits for it: a block that is
not replicated in time is only less safe.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mooncake_store.errors import MooncakeError
from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import Cell, PeerAddress
from mooncake_store.pull.control import ask
from mooncake_store.pull.wire import Accepted, Offer
from mooncake_store.types import BlockKey, NodeId

logger = logging.getLogger(__name__)

QUEUE_MAX = 8192
OFFER_BLOCKS_MAX = 256
OFFER_TIMEOUT_S = 1.0
TICK_S = 1.0
STORE_KIND = "store"


def rendezvous(key: BlockKey, nodes: Sequence[NodeId]) -> NodeId:
    """Choose the node for a key so that all choosers agree, and a node that leaves moves only its own keys.

    Raises:
        ValueError: ``nodes`` is empty.
    """
    return max(nodes, key=lambda node: (hashlib.blake2b(key, digest_size=8, key=node.encode()[:64]).digest(), node))


class ReplicatorHooks(NamedTuple):
    """What the replicator calls, from its thread.

    Attributes:
        lengths: the size in bytes of each block in our segment, None where it is gone.
        tick: called about once a second.
    """

    lengths: Callable[[Sequence[BlockKey]], list[int | None]]
    tick: Callable[[], None]


class Replicator:
    """Offers blocks to the capacity nodes of the cell, in the background.

    Args:
        own: our address, from which the nodes pull.
    """

    def __init__(self, *, own: PeerAddress, cell: Cell, hooks: ReplicatorHooks, metrics: Metrics) -> None:
        self._own = own
        self._cell = cell
        self._hooks = hooks
        self._metrics = metrics
        self._queue: OrderedDict[BlockKey, None] = OrderedDict()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_busy = False
        self._thread = threading.Thread(target=self._run, name="mooncake-replicator", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def offer(self, keys: Sequence[BlockKey]) -> None:
        """Queue blocks; those beyond ``QUEUE_MAX`` are dropped and counted."""
        num_dropped = 0
        with self._changed:
            for key in keys:
                if len(self._queue) < QUEUE_MAX or key in self._queue:
                    self._queue[key] = None
                else:
                    num_dropped += 1
            self._changed.notify()
        if num_dropped:
            self._metrics.add("mooncake_replicate_blocks_total", num_dropped, result="dropped")

    def is_idle(self) -> bool:
        """Tell whether everything queued so far has been offered."""
        with self._changed:
            return not self._queue and not self._is_busy

    def close(self, *, timeout_s: float = 1.5) -> None:
        """Stop the thread; what is queued is not offered. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                if not self._queue and not self._is_closing:
                    self._changed.wait(TICK_S)
                if self._is_closing:
                    return
                keys = [self._queue.popitem(last=False)[0] for _ in range(min(OFFER_BLOCKS_MAX, len(self._queue)))]
                self._is_busy = bool(keys)
            try:
                self._hooks.tick()
                if keys:
                    self._offer_batch(keys)
            except Exception:  # the thread's border: a bug met by one batch must not end replication
                self._metrics.add("mooncake_replicate_blocks_total", len(keys), result="error")
                logger.exception("%d blocks could not be offered", len(keys))

    def _offer_batch(self, keys: Sequence[BlockKey]) -> None:
        nodes = {node_id: member for node_id, member in self._cell.members().items()
                 if member.kind == STORE_KIND and node_id != self._own.node_id}
        if not nodes:
            self._metrics.add("mooncake_replicate_blocks_total", len(keys), result="no_node")
            return
        names = sorted(nodes)
        groups: dict[NodeId, list[tuple[BlockKey, int]]] = {}
        for key, length in zip(keys, self._hooks.lengths(keys), strict=True):
            if length is None:
                self._metrics.add("mooncake_replicate_blocks_total", result="gone")
            else:
                groups.setdefault(rendezvous(key, names), []).append((key, length))
        for node_id, blocks in groups.items():
            self._offer_to(nodes[node_id].control, blocks)

    def _offer_to(self, control: str, blocks: Sequence[tuple[BlockKey, int]]) -> None:
        offer = Offer(1, self._own.node_id, self._own.control, self._own.host,
                      tuple(key for key, _ in blocks), tuple(length for _, length in blocks))
        try:
            answer = ask(control, offer, Accepted, timeout_s=OFFER_TIMEOUT_S)
        except MooncakeError as error:
            logger.debug("%d blocks were not taken by %s: %s", len(blocks), control, error.message)
            self._metrics.add("mooncake_replicate_blocks_total", len(blocks), result="failed")
            return
        num_refused = max(0, len(blocks) - answer.num_wanted - answer.num_held)
        for result, count in (("accepted", answer.num_wanted), ("held", answer.num_held), ("refused", num_refused)):
            if count:
                self._metrics.add("mooncake_replicate_blocks_total", min(count, len(blocks)), result=result)
