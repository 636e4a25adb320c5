"""Be SGLang's HiCache storage: pages of its host cache go to the pool and come back, without a copy in between.

Architecture::

    scheduler process   HiCache's threads -> PoolStorage   backup: batch_set_v1; prefetch: batch_exists, batch_get_v1
      StoreClient       mooncake_store/client.py: our segment, replicas, and other members' segments

``batch_exists`` is answered from the mirror of the directory, without I/O. SGLang's page hashes say nothing about the
model, the element type, the layout or the parallel sizes; the fingerprint, which prefixes every key, does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
from sglang.srt.runtime_context import get_server_args

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.engines.sglang import describe
from mooncake_connector.engines.sglang.counters import process_metrics
from mooncake_connector.engines.sglang.names import PageNames
from mooncake_connector.transfer.pool import Locate, PoolBlocks
from mooncake_store.client import Scatter, StoreClient
from mooncake_store.config import load_config
from mooncake_store.errors import ConfigError, LocalProtocolError
from mooncake_store.log import set_up_logging

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

logger = logging.getLogger(__name__)

SETTINGS_KEY = "mooncake"
"""Of the extra config: our own settings, apart from SGLang's."""

KV_POOL = "kv"


class PoolStorage(HiCacheStorage):
    """Keeps pages in the pool. Threads: HiCache's, several at a time.

    Args:
        storage_config: SGLang's description of this rank; ``extra_config`` must have ``interface_v1`` on.
        more: what SGLang may hand over besides; not used.

    Raises:
        ConfigError: an unusable setting, or a model whose cache we cannot name; SGLang does not start then.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, more: object = None) -> None:
        given = dict(storage_config.extra_config or {})
        set_up_logging()
        self._config = load_config(ConnectorConfig, dict(given.get(SETTINGS_KEY) or {}))
        set_up_logging(self._config.log_level)
        if not given.get("interface_v1"):
            raise ConfigError("interface_v1 is off", where="--hicache-storage-backend-extra-config",
                              hint='add "interface_v1": 1; without it SGLang copies every page twice')
        self._rank = storage_config
        self._require_supported()
        self._metrics = process_metrics()
        self._names: PageNames | None = None
        self._client: StoreClient | None = None
        self._blocks: PoolBlocks | None = None

    def _require_supported(self) -> None:
        problems = [f"{name} is {getattr(self._rank, name)}" for name in ("pp_size", "attn_cp_size", "dcp_size")
                    if int(getattr(self._rank, name, 1) or 1) > 1]
        if self._rank.is_mla_model:
            problems.append("the model uses multi-head latent attention")
        if getattr(self._rank, "should_split_heads", False):
            problems.append("tp_lcm_size splits pages by heads")
        if problems:
            raise ConfigError("; ".join(problems), where="--hicache-storage-backend dynamic",
                              hint="use another storage backend for this model; docs/limits.md")

    # ---- attaching

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Join the cell: now the layout of the pages is known."""
        super().register_mem_pool_host(mem_pool_host)
        pool, rank = mem_pool_host, self._rank
        page_bytes = sum(int(size) for size in pool.get_page_buffer_meta(np.arange(pool.page_size))[1])
        marks = describe.fingerprint(
            get_server_args(), cache_dtype=str(pool.dtype), layout=f"hicache/{pool.layout}",
            block_size=int(pool.page_size), num_layers=int(pool.layer_num), page_bytes=page_bytes,
            tensor_parallel=int(rank.tp_size))
        self._names = PageNames(marks, int(rank.tp_rank))
        if self._client is None:
            self._client = StoreClient(self._config, kind="engine", metrics=self._metrics)
            self._blocks = PoolBlocks(self._client, metrics=self._metrics, timeout_s=self._config.pull_timeout_s,
                                      min_blocks=self._config.load_min_blocks)
        logger.info("HiCache pages of %d bytes, layout %s, rank %d of %d", page_bytes, pool.layout, rank.tp_rank,
                    rank.tp_size)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuse pools beside the KV cache. Raises: ConfigError naming the pool."""
        name = str(getattr(host_pool_name, "value", host_pool_name))
        if name != KV_POOL:
            raise ConfigError(f"the model keeps a pool {name!r} beside its KV cache",
                              where="--hicache-storage-backend dynamic",
                              hint="use another storage backend for this model; docs/limits.md")
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def _attached(self) -> tuple[PageNames, PoolBlocks]:
        if self._names is None or self._blocks is None:
            raise LocalProtocolError("SGLang used the storage before register_mem_pool_host")
        return self._names, self._blocks

    # ---- HiCache's threads

    def exists(self, key: str) -> bool:
        """Tell whether somebody holds the page."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: object = None) -> int:
        """Return how many leading pages somebody holds, by the mirror of the directory; no I/O."""
        names, blocks = self._attached()
        return blocks.match(names.keys(keys))

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: object = None) -> list[bool]:
        """Fill pages of the host cache; for each, whether it is there now."""
        names, blocks = self._attached()
        return blocks.load(names.keys(keys), self._locate(len(keys), host_indices))

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: object = None) -> list[bool]:
        """Save pages that nobody holds; for each, whether somebody holds it now."""
        names, blocks = self._attached()
        return blocks.save(names.keys(keys), self._locate(len(keys), host_indices))

    def close(self) -> None:
        """Leave the cell. Idempotent."""
        if self._client is not None:
            self._client.close()

    # ---- the interface that copies; SGLang uses it only with interface_v1 off, which the constructor refuses

    def get(self, key: str, target_location: object = None, target_sizes: object = None) -> None:
        """Return nothing: see ``batch_get_v1``."""

    def batch_get(self, keys: list[str], target_locations: object = None, target_sizes: object = None) -> list[None]:
        """Return nothing: see ``batch_get_v1``."""
        return [None] * len(keys)

    def set(self, key: str, value: object = None, target_location: object = None,
            target_sizes: object = None) -> bool:
        """Store nothing: see ``batch_set_v1``."""
        return False

    def batch_set(self, keys: list[str], values: object = None, target_locations: object = None,
                  target_sizes: object = None) -> bool:
        """Store nothing: see ``batch_set_v1``."""
        return False

    # ---- inside

    def _locate(self, num_pages: int, host_indices: torch.Tensor) -> Locate:
        def locate(positions: list[int]) -> list[Scatter]:
            addresses, lengths = self.mem_pool_host.get_page_buffer_meta(host_indices)
            pieces = len(addresses) // num_pages
            address_rows = np.array(addresses, np.uint64).reshape(num_pages, pieces)
            length_rows = np.array(lengths, np.uint64).reshape(num_pages, pieces)
            return [Scatter(address_rows[i], length_rows[i]) for i in positions]
        return locate
