"""Share prefixes through the pool: match in the scheduler, save and load in the workers.

Architecture::

    scheduler process   PoolView      match(): dictionary probes in the directory's mirror, no I/O
    worker process      PoolWorker    saver thread (KV cache -> pool) and loader threads (pool -> KV cache)

A save reads the engine's blocks after the step that filled them; until it is through, the blocks are held (holds.py),
and a preemption waits for the one batch that is being copied. A load that fails is reported as blocks that were not
filled.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mooncake_connector.kv.keys import PromptKeys
from mooncake_connector.transfer.holds import Holds, Why
from mooncake_connector.transfer.memory import PageReader
from mooncake_connector.transfer.pool import Locate, PoolBlocks
from mooncake_connector.transfer.steps import PoolLoad, PoolSave, StepPlan, StepResults
from mooncake_store.client import StoreClient
from mooncake_store.directory.base import Directory
from mooncake_store.metrics import Metrics
from mooncake_store.types import BlockKey

logger = logging.getLogger(__name__)

SAVE_BATCH_BLOCKS = 4
"""Blocks copied without looking up: bounds how long a preemption waits (some 12 MiB of copying here)."""

LOADERS_MAX = 2
REVISION_WAIT_S = 0.5


class PoolView:
    """The scheduler's side: what the pool holds of a prompt. Threads: one. Never does I/O."""

    def __init__(self, directory: Directory, *, min_blocks: int) -> None:
        self._directory = directory
        self._min_blocks = min_blocks

    def match(self, keys: PromptKeys, first: int, last: int) -> int:
        """Return how many blocks from ``first`` on, and before ``last``, every worker can load."""
        if first >= last:
            return 0
        found = last - first
        for part in range(keys.num_parts):
            found = min(found, self._directory.match(keys.part(part, first, first + found)))
            if found < self._min_blocks:
                return 0
        return found

    def missing(self, keys: PromptKeys, first: int, last: int) -> list[int]:
        """Return the logical blocks in [first, last) that some worker's part of the pool lacks."""
        lacking: set[int] = set()
        for part in range(keys.num_parts):
            nodes = self._directory.locate(keys.part(part, first, last))
            lacking.update(first + i for i, holders in enumerate(nodes) if not holders)
        return sorted(lacking)

    @property
    def revision(self) -> int:
        """Return what the mirror has seen; a worker waits until its own mirror has seen as much."""
        return self._directory.revision()


class PoolWorker:
    """A worker's side.

    Args:
        holds: guarded by ``lock``, shared with the producer.
        on_news: called from our threads when there is something to take.
    """

    def __init__(
        self,
        *,
        client: StoreClient,
        pages: PageReader,
        rank: int,
        holds: Holds,
        lock: threading.Lock,
        queue_max_blocks: int,
        pull_timeout_s: float,
        metrics: Metrics,
        on_news: Callable[[], None],
    ) -> None:
        self._client = client
        self._pages = pages
        self._rank = rank
        self._holds = holds
        self._lock = lock
        self._queue_max_blocks = queue_max_blocks
        self._metrics = metrics
        self._blocks = PoolBlocks(client, metrics=metrics, timeout_s=pull_timeout_s)
        self._on_news = on_news
        self._queue: collections.deque[PoolSave] = collections.deque()
        self._num_queued = 0
        self._pending: collections.Counter[str] = collections.Counter()
        self._wake = threading.Condition(lock)
        self._copying = ""
        self._is_cut = False
        self._results = StepResults()
        self._stopping = False
        self._loaders = ThreadPoolExecutor(LOADERS_MAX, thread_name_prefix="mooncake-load")
        self._saver = threading.Thread(target=self._save_loop, daemon=True, name="mooncake-save")
        self._saver.start()

    # ---- model thread

    def before_step(self, plan: StepPlan) -> None:
        """Forget saves of preempted requests; waits for the batch being copied, if it is one of theirs."""
        if not plan.preempted:
            return
        gone = set(plan.preempted)
        with self._wake:
            kept = [job for job in self._queue if job.request_id not in gone]
            for job in self._queue:
                if job.request_id in gone:
                    self._finish_job(job.request_id, len(job.block_ids))
                    self._metrics.add("mooncake_save_blocks_total", len(job.block_ids), result="preempted")
            self._queue = collections.deque(kept)
            self._is_cut = self._copying in gone
            while self._copying in gone:
                self._wake.wait(timeout=1.0)

    def finish_step(self, plan: StepPlan) -> None:
        """Queue the blocks that the step completed; beyond the bound they are skipped and counted."""
        for job in plan.pool_saves:
            with self._wake:
                if self._num_queued + len(job.block_ids) > self._queue_max_blocks:
                    self._metrics.add("mooncake_save_blocks_total", len(job.block_ids), result="queue_full")
                    continue
                self._queue.append(job)
                self._num_queued += len(job.block_ids)
                self._pending[job.request_id] += 1
                self._holds.add(job.request_id, Why.SAVE)
                self._wake.notify_all()

    def start_loads(self, plan: StepPlan) -> None:
        """Start loading. Returns at once."""
        for load in plan.pool_loads:
            self._loaders.submit(self._load, load)

    def fill(self, keys: list[BlockKey], block_ids: list[int]) -> list[int]:
        """Load blocks, waiting until done; return those that were not filled. Threads: any."""
        is_there = self._blocks.load(keys, self._locate(block_ids))
        return [block for block, is_here in zip(block_ids, is_there, strict=True) if not is_here]

    def take_results(self) -> StepResults:
        """Return the loads that ended since the last call."""
        with self._lock:
            results, self._results = self._results, StepResults()
        return results

    def close(self) -> None:
        """Stop both sides; a save that is queued is dropped. Idempotent, bounded."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._saver.join(timeout=2.0)

    # ---- saver thread

    def _save_loop(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._stopping:
                    self._wake.wait(timeout=1.0)
                if self._stopping:
                    return
                job = self._queue.popleft()
                self._copying = job.request_id
            batch, rest = self._split(job)
            self._blocks.save(batch.keys[self._rank], self._locate(batch.block_ids))
            with self._wake:
                self._copying = ""
                if rest is not None and not self._is_cut:
                    self._queue.appendleft(rest)
                    self._num_queued -= len(batch.block_ids)
                else:
                    self._finish_job(job.request_id, len(job.block_ids))
                    self._is_cut = False
                self._metrics.set("mooncake_save_queue_blocks", self._num_queued)
                self._wake.notify_all()

    def _split(self, job: PoolSave) -> tuple[PoolSave, PoolSave | None]:
        if len(job.block_ids) <= SAVE_BATCH_BLOCKS:
            return job, None
        n = SAVE_BATCH_BLOCKS
        return (PoolSave(job.request_id, [keys[:n] for keys in job.keys], job.block_ids[:n]),
                PoolSave(job.request_id, [keys[n:] for keys in job.keys], job.block_ids[n:]))

    def _locate(self, block_ids: list[int]) -> Locate:
        return lambda positions: self._pages.scatters([block_ids[i] for i in positions])

    def _finish_job(self, request_id: str, num_blocks: int) -> None:
        self._num_queued -= num_blocks
        self._pending[request_id] -= 1
        if self._pending[request_id] <= 0:
            del self._pending[request_id]
            self._holds.drop(request_id, Why.SAVE)

    # ---- loader threads

    def _load(self, load: PoolLoad) -> None:
        bad_blocks = list(load.block_ids)
        try:
            self._client.directory.wait_revision(load.revision, REVISION_WAIT_S)
            bad_blocks = self.fill(load.keys[self._rank], load.block_ids)
        except Exception:
            logger.exception("pool load of request %s failed; it is computed instead", load.request_id)
            self._metrics.add("mooncake_load_blocks_total", len(load.block_ids), result="error")
        if bad_blocks:
            logger.warning("request %s: %d of %d blocks were not in the pool any more", load.request_id,
                           len(bad_blocks), len(load.block_ids))
        with self._lock:
            self._results.received.add(load.request_id)
            self._results.bad_blocks.update(bad_blocks)
        self._on_news()
