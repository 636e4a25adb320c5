"""Put one worker's parts together: the face that an engine adapter drives, step by step.

Engine-neutral. An adapter describes its cache (layout, address, fingerprint), translates its hooks into the methods
below and its scheduler's decisions into StepPlans. See engines/vllm/worker.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time

import msgspec

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.metrics import CONNECTOR_METRICS
from mooncake_connector.transfer.cache import CacheMemory, serve_cache
from mooncake_connector.transfer.consumer import Consumer, Inbox
from mooncake_connector.transfer.doorbell import Ringer
from mooncake_connector.transfer.epochs import Epochs
from mooncake_connector.transfer.holds import Holds
from mooncake_connector.transfer.memory import PageReader
from mooncake_connector.transfer.peer import PeerContext
from mooncake_connector.transfer.prefix import PoolWorker
from mooncake_connector.transfer.producer import Producer
from mooncake_connector.transfer.steps import Received, StepPlan, StepResults
from mooncake_store.client import StoreClient
from mooncake_store.metrics import STORE_METRICS, Metrics
from mooncake_store.transport.memory import populate

__all__ = ["CacheMemory", "WorkerEndpoint"]

logger = logging.getLogger(__name__)


class WorkerEndpoint:
    """One worker's end of everything. Threads: one, the engine's model thread.

    Args:
        metrics: where to count; None makes its own.
    """

    def __init__(self, config: ConnectorConfig, *, engine_id: str, rank: int, cache: CacheMemory,
                 metrics: Metrics | None = None) -> None:
        self._plan = StepPlan(is_empty=True)
        self._metrics = metrics if metrics is not None else Metrics(STORE_METRICS, CONNECTOR_METRICS)
        if not config.pool:
            config = msgspec.structs.replace(config, directory="off", segment_bytes=0)
        seconds = sum(populate(cache.address + span.offset, span.length) for span in cache.mapped)
        logger.info("populated %d MiB of KV cache in %.2f s", sum(s.length for s in cache.mapped) >> 20, seconds)
        self.client = StoreClient(config, kind="engine", about=config.about, metrics=self._metrics)
        media = self.client.media
        self._lock = threading.Lock()
        self._holds = Holds()
        self._inbox = Inbox()
        self._ringer = Ringer(engine_id)
        self._epochs = Epochs(media)
        pages = PageReader(cache.layout, cache.address)
        self._producer = Producer(
            host=config.host, identity=media.identity(), pid=os.getpid(), fingerprint=cache.fingerprint,
            layout=cache.layout, cache=serve_cache(media, cache), pages=pages, epochs=self._epochs, holds=self._holds,
            lock=self._lock, lease_s=config.handoff_lease_s, metrics=self._metrics,
        )
        context = PeerContext(
            media=media, fingerprint=cache.fingerprint, pages=pages, metrics=self._metrics, report=self._report,
            lease_s=config.handoff_lease_s, timeout_s=config.handoff_timeout_s, pull_timeout_s=config.pull_timeout_s,
            verify=config.verify,
        )
        self._consumer = Consumer(context, rank=rank, metrics=self._metrics)
        self._pool = PoolWorker(
            client=self.client, pages=pages, rank=rank, holds=self._holds, lock=self._lock,
            queue_max_blocks=config.save_queue_max_blocks, pull_timeout_s=config.pull_timeout_s,
            metrics=self._metrics, on_news=self._ringer.ring,
        )
        self._closed = False

    @property
    def address(self) -> str:
        """Return where decode workers reach us."""
        return self._producer.address

    def before_step(self, plan: StepPlan) -> None:
        """Give up what the step takes away: must run before the engine reuses or zeroes any block."""
        self._plan = plan
        self._pool.before_step(plan)
        self._producer.before_step(plan)

    def begin_step(self, plan: StepPlan) -> None:
        """Start what the step brings: must run after the engine zeroed new blocks, before its forward pass."""
        self._consumer.apply(plan)
        self._pool.start_loads(plan)
        self._producer.begin_step(plan)

    def finish_layer(self, num_layers: int) -> None:
        """Say that the running step's KV is final in the first ``num_layers`` layers."""
        self._producer.finish_layer(num_layers)

    def finish_step(self) -> None:
        """Say that the running step's KV is final."""
        self._producer.finish_step()
        self._pool.finish_step(self._plan)

    def take_results(self) -> StepResults:
        """Return what finished since the last call; every request is named once."""
        received, loaded = self._inbox.take(), self._pool.take_results()
        self._consumer.forget(received.received)
        return StepResults(
            sent=self._producer.take_sent(),
            received=received.received | loaded.received,
            bad_blocks=received.bad_blocks | loaded.bad_blocks,
            notes=received.notes,
            lost=self._producer.take_lost() | received.lost,
        )

    def samples(self) -> dict[str, float]:
        """Return every metric of this worker."""
        return self.client.status()

    def close(self) -> None:
        """Stop everything this endpoint started. Idempotent, bounded."""
        if self._closed:
            return
        self._closed = True
        started = time.monotonic()
        self._pool.close()
        self._consumer.close()
        self._producer.close()
        self._epochs.close()
        self.client.close()
        self._ringer.close()
        logger.info("closed in %.1f s", time.monotonic() - started)

    def _report(self, item: Received) -> None:
        self._inbox.receive(item)
        self._ringer.ring()
