"""Move blocks between our memory and the pool, the same way for every engine: what is there, save, load, count.

Losing a block must never lose a request: whatever goes wrong here is a block that is not there, logged and counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from mooncake_store.client import Scatter, StoreClient
from mooncake_store.metrics import Metrics
from mooncake_store.types import BlockKey

logger = logging.getLogger(__name__)

Locate = Callable[[list[int]], list[Scatter]]
"""Returns where the blocks at these positions are in our memory; asked only for those that move."""


class PoolBlocks:
    """One worker's way to the pool. Threads: any.

    Args:
        timeout_s: longest load.
        min_blocks: shorter hits are not worth a load.
    """

    def __init__(self, client: StoreClient, *, metrics: Metrics, timeout_s: float, min_blocks: int = 1) -> None:
        self._client = client
        self._metrics = metrics
        self._min_blocks = min_blocks
        self._timeout_s = timeout_s

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading blocks somebody holds, by the mirror of the directory; no I/O."""
        found = self._client.match(keys)
        if found < self._min_blocks:
            found = 0
        self._metrics.add("mooncake_prefix_lookups_total", result="hit" if found else "miss")
        return found

    def missing(self, keys: Sequence[BlockKey]) -> list[int]:
        """Return the positions of the blocks that nobody holds, by our segment and the mirror; no I/O."""
        holders = self._client.directory.locate(keys)
        return [i for i, key in enumerate(keys) if not holders[i] and not self._client.has(key)]

    def save(self, keys: Sequence[BlockKey], locate: Locate) -> list[bool]:
        """Save the blocks that nobody holds and offer them to store nodes; for each, whether somebody holds it now."""
        try:
            return self._save(keys, locate)
        except Exception:
            logger.exception("could not save %d blocks; they are not in the pool", len(keys))
            self._count("mooncake_save_blocks_total", len(keys), "error")
            return [False] * len(keys)

    def load(self, keys: Sequence[BlockKey], locate: Locate) -> list[bool]:
        """Fill blocks, waiting until done; for each, whether it is there. What is not there is undefined."""
        started_ns = time.monotonic_ns()
        try:
            outcomes = self._client.get(keys, locate(list(range(len(keys)))),
                                        deadline_ns=started_ns + int(self._timeout_s * 1e9))
        except Exception:
            logger.exception("could not load %d blocks; they are computed instead", len(keys))
            self._count("mooncake_load_blocks_total", len(keys), "error")
            return [False] * len(keys)
        self._metrics.observe("mooncake_load_seconds", (time.monotonic_ns() - started_ns) / 1e9)
        for outcome in outcomes:
            self._metrics.add("mooncake_load_blocks_total", result=outcome.result)
        return [outcome.result == "ok" for outcome in outcomes]

    def _save(self, keys: Sequence[BlockKey], locate: Locate) -> list[bool]:
        is_held = [True] * len(keys)
        wanted = self.missing(keys)
        self._count("mooncake_save_blocks_total", len(keys) - len(wanted), "present")
        if not wanted:
            return is_held
        chosen = [keys[i] for i in wanted]
        stored = self._client.put(chosen, locate(wanted))
        self._count("mooncake_save_blocks_total", sum(stored), "stored")
        self._count("mooncake_save_blocks_total", len(stored) - sum(stored), "no_room")
        self._client.replicate([key for key, is_stored in zip(chosen, stored, strict=True) if is_stored])
        for i, is_stored in zip(wanted, stored, strict=True):
            is_held[i] = is_stored
        return is_held

    def _count(self, metric: str, count: int, result: str) -> None:
        if count:
            self._metrics.add(metric, count, result=result)
