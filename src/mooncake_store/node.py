"""Run a capacity node: memory for the pool without an engine.

A :class:`StoreNode` is a StoreClient that announces itself as ``store`` and takes what others offer: it pulls offered
blocks through the same puller as any reader, so their checksums are verified on arrival.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.directory.base import Directory
from mooncake_store.errors import ConfigError
from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import PeerAddress
from mooncake_store.pull.replication import STORE_KIND
from mooncake_store.pull.server import OfferAnswer
from mooncake_store.pull.wire import Offer
from mooncake_store.transport.media import Media
from mooncake_store.types import BlockKey, NodeId

logger = logging.getLogger(__name__)

INTAKE_BLOCKS_MAX = 8192
ADOPT_BLOCKS_MAX = 64


class StoreNode:
    """One capacity node; usable once constructed.

    Args:
        config: settings; ``segment_bytes`` is what it lends.
        directory, media, metrics: as for StoreClient.

    Threads: any; one thread of its own takes offered blocks in.

    Raises:
        What StoreClient raises.
    """

    def __init__(self, config: StoreConfig, *, directory: Directory | None = None, media: Media | None = None,
                 metrics: Metrics | None = None) -> None:
        self._queue: deque[tuple[Offer, tuple[int, ...]]] = deque()  # offers, each with the indices still to pull
        self._num_queued = 0
        self._num_working = 0
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self.client = StoreClient(config, kind=STORE_KIND, directory=directory, media=media, metrics=metrics,
                                  on_offer=self._take)
        self._thread = threading.Thread(target=self._run, name="mooncake-intake", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Return where the control socket answers."""
        return self.client.address

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every accepted offer has been dealt with; False on timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_queued and not self._num_working, timeout_s)

    def close(self) -> None:
        """Leave the cell; idempotent, within some seconds."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self.client.close()
        if self._thread is not None:
            self._thread.join(2.0)

    def _take(self, offer: Offer) -> OfferAnswer:
        """Queue what we do not have; runs in the server's thread."""
        client = self._ready_client()
        if client is None:
            return OfferAnswer(0, 0)
        missing = [index for index, key in enumerate(offer.keys) if not client.has(BlockKey(key))]
        num_held = len(offer.keys) - len(missing)
        with self._changed:
            missing = missing[:max(0, INTAKE_BLOCKS_MAX - self._num_queued)]
            for start in range(0, len(missing), ADOPT_BLOCKS_MAX):
                self._queue.append((offer, tuple(missing[start:start + ADOPT_BLOCKS_MAX])))
            self._num_queued += len(missing)
            self._changed.notify_all()
        return OfferAnswer(len(missing), num_held)

    def _ready_client(self) -> StoreClient | None:
        # The client's server runs before its constructor has returned.
        return getattr(self, "client", None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._num_working = 0
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._is_closing)
                if self._is_closing:
                    return
                offer, indices = self._queue.popleft()
                self._num_queued -= len(indices)
                self._num_working = len(indices)
            try:
                self._pull(offer, indices)
            except Exception:  # the thread's border: a bug met by one offer must not end the intake
                self.client.metrics.add("mooncake_protocol_errors_total", reason="internal")
                logger.exception("%d offered blocks of %s could not be taken", len(indices), offer.node_id)

    def _pull(self, offer: Offer, indices: tuple[int, ...]) -> None:
        source = PeerAddress(NodeId(offer.node_id), offer.control, offer.host)
        deadline_ns = time.monotonic_ns() + int(self.client.config.pull_timeout_s * 1e9)
        self.client.adopt([BlockKey(offer.keys[index]) for index in indices],
                          [offer.lengths[index] for index in indices], source, deadline_ns=deadline_ns)


def run_store_node(config: StoreConfig, stop_event: threading.Event, *,
                   announce: Callable[[str], None] = print) -> None:
    """Run a capacity node until ``stop_event`` is set, then leave the cell; announces one line when ready.

    Raises:
        ConfigError: it would lend no memory, or what StoreClient raises.
    """
    if config.segment_bytes <= 0:
        raise ConfigError("a store node that lends no memory is of no use", where="$.segment_bytes",
                          hint="give it memory, e.g. --memory 2GiB")
    node = StoreNode(config)
    try:
        announce(f"mooncake store ready: {node.client.node_id} lends {config.segment_bytes} bytes at {node.address} "
                 f"(cell {config.cell}, directory {config.directory})")
        sys.stdout.flush()
        stop_event.wait()
    finally:
        node.close()
