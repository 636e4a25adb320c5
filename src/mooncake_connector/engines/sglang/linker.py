"""Be SGLang's external cache linker: pages of its device cache go to the pool and come back, past any host cache.

Architecture::

    scheduler thread   UnifiedRadixCache -> PoolLinker    lookup: the mirror of the directory, no I/O
      PoolBlocks         transfer/pool.py                 load: before the request's forward pass, which then needs it
      PoolWorker         transfer/prefix.py               offload: a thread; SGLang locks the pages meanwhile

A page that the directory names may be gone when it is fetched. SGLang aborts requests whose load fails once their
forward pass has begun, but computes what a load that was *not accepted* would have brought. So a load is complete
before it is accepted (docs/adr/0011-sglang.md).
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker
from sglang.srt.runtime_context import get_parallel

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.engines.sglang import compat, describe
from mooncake_connector.engines.sglang.counters import process_metrics
from mooncake_connector.engines.sglang.names import PageNames
from mooncake_connector.transfer.holds import Holds
from mooncake_connector.transfer.memory import PageReader
from mooncake_connector.transfer.pool import PoolBlocks
from mooncake_connector.transfer.prefix import PoolWorker
from mooncake_connector.transfer.steps import PoolSave, StepPlan
from mooncake_store.client import StoreClient
from mooncake_store.config import load_config
from mooncake_store.errors import ConfigError
from mooncake_store.log import set_up_logging
from mooncake_store.types import BlockKey

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.hicache_storage import PoolTransfer
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

RESET_WAIT_S = 5.0
"""Longest wait for saves that are queued when SGLang empties its cache; what is left then is not saved."""


class PoolLinker(UnifiedCacheLinker):
    """Loads and saves pages of one rank. Threads: the scheduler's.

    Args:
        components: what SGLang's cache tree keeps; only full attention is supported.
        extra_config: our settings, in place of ``MOONCAKE_*``.

    Raises:
        ConfigError: an unusable setting, or a cache that we cannot address; SGLang does not start then.
    """

    def __init__(self, server_args: ServerArgs, params: CacheInitParams, *, components: set[Any],
                 extra_config: dict[str, Any], forward_stream: object = None, **more: object) -> None:
        set_up_logging()
        config = load_config(ConnectorConfig, extra_config)
        set_up_logging(config.log_level)
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        buffers = describe.Buffers.of_pool(pool, int(params.page_size))
        _require_supported(buffers, server_args, params, components)
        parallel = get_parallel()
        cache = describe.cache_memory(buffers, server_args, tensor_parallel=parallel.attn_tp_size)
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerWiseLoadCounter(int(pool.layer_num))
        self.forward_stream = forward_stream
        self._params = params
        self._names = PageNames(cache.fingerprint, int(parallel.attn_tp_rank))
        self._page_size = buffers.page_size
        self._lock = threading.Lock()
        self._holds = Holds()
        self._offloads: collections.deque[str] = collections.deque()
        self._saved: set[str] = set()
        self._num_offloads = 0
        self._accepted: set[str] = set()
        metrics = process_metrics()
        self._client = StoreClient(config, kind="engine", metrics=metrics)
        self._blocks = PoolBlocks(self._client, metrics=metrics, timeout_s=config.pull_timeout_s,
                                  min_blocks=config.load_min_blocks)
        self._worker = PoolWorker(
            client=self._client, pages=PageReader(cache.layout, cache.address), rank=0, holds=self._holds,
            lock=self._lock, queue_max_blocks=config.save_queue_max_blocks, pull_timeout_s=config.pull_timeout_s,
            metrics=metrics, on_news=lambda: None)
        logger.info("cache linker: %d pages of %d bytes, rank %d of %d", cache.layout.num_blocks,
                    cache.layout.block_bytes, parallel.attn_tp_rank, parallel.attn_tp_size)

    # ---- loads

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Return every number of leading pages that this rank can load; SGLang takes the longest that all ranks can."""
        keys, _ = self._pages(transfers)
        return list(range(1, self._blocks.match(keys) + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Fill the request's pages; False, on every rank, when a rank lacks one: the request is then computed.

        The pages are this request's alone and no forward pass touches them yet. Waits, ``pull_timeout_s`` at most.
        """
        keys, pages = self._pages(transfers)
        missing = self._worker.fill(keys, pages)
        if missing:
            logger.warning("request %s: %d of %d pages were not in the pool any more", rid, len(missing), len(pages))
        if not compat.is_true_on_all_ranks(not missing, self._params):
            return False
        self._accepted.add(rid)
        return True

    def start_layer_wise_loading(self) -> int:
        """Return that nothing is under way: what was accepted is there."""
        self._accepted.clear()
        return -1

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Return that everything is there."""
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Forget a load whose forward pass has not begun."""
        was_accepted = rid in self._accepted
        self._accepted.discard(rid)
        return was_accepted

    # ---- offloads

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Queue the pages that nobody holds; False when there is none, which lets SGLang unlock them at once."""
        keys, pages = self._pages(transfers)
        wanted = self._blocks.missing(keys)
        if not wanted:
            return False
        self._num_offloads += 1
        name = str(self._num_offloads)
        self._worker.finish_step(StepPlan(pool_saves=[
            PoolSave(name, [[keys[i] for i in wanted]], [pages[i] for i in wanted])]))
        with self._lock:
            self._holds.keep(name, len(wanted))
        self._offloads.append(name)
        return True

    def num_completed_offloads(self) -> int:
        """Return how many of the oldest offloads are through."""
        with self._lock:
            self._saved |= self._holds.take_ready()
        count = 0
        for name in self._offloads:
            if name not in self._saved:
                break
            count += 1
        return count

    def pop_completed_offload(self) -> bool:
        """Let the oldest completed offload's pages go. What could not be saved counts too: it is not tried again."""
        self._saved.remove(self._offloads.popleft())
        return True

    # ---- both

    def reset(self) -> None:
        """Touch no page any more: SGLang empties its cache. What the pool holds stays."""
        deadline = time.monotonic() + RESET_WAIT_S
        while self.num_completed_offloads() < len(self._offloads) and time.monotonic() < deadline:
            time.sleep(0.005)
        self._worker.before_step(StepPlan(preempted=list(self._offloads)))
        self.num_completed_offloads()
        self._offloads.clear()
        self._saved.clear()
        self._accepted.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Leave the cell. Idempotent."""
        self._worker.close()
        self._client.close()

    def _pages(self, transfers: list[PoolTransfer]) -> tuple[list[BlockKey], list[int]]:
        """Return keys, and our page ids where the transfer names token slots."""
        [transfer] = transfers
        keys, slots = self._names.keys(transfer.keys or ()), transfer.device_indices
        return keys, [] if slots is None else (slots[:: self._page_size] // self._page_size).tolist()


def _require_supported(buffers: describe.Buffers, server_args: ServerArgs, params: CacheInitParams,
                       components: set[Any]) -> None:
    problems = describe.cache_problems(buffers, server_args)
    others = sorted(str(component.name) for component in components if component.name != "FULL")
    if others:
        problems.append(f"the model keeps {', '.join(others)} state beside its KV cache")
    if not hasattr(params.token_to_kv_pool_allocator.get_kvcache(), "k_buffer"):
        problems.append("its cache does not keep keys and values apart (multi-head latent attention)")
    if params.is_eagle or params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        problems.append("speculative decoding adds a draft model's cache")
    if problems:
        raise ConfigError("; ".join(problems), where="--unified-cache-external-linker-config",
                          hint="leave the linker out for this model; docs/limits.md")
