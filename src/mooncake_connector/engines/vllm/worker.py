"""Translate vLLM's worker hooks into endpoint calls. One instance lives in each worker process."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.engines.vllm import describe
from mooncake_connector.engines.vllm.compat import Calm
from mooncake_connector.engines.vllm.stats import MooncakeStats, StatsSource
from mooncake_connector.transfer.endpoint import WorkerEndpoint
from mooncake_connector.transfer.steps import StepPlan, StepResults
from mooncake_store.errors import LocalProtocolError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class WorkerSide:
    """The worker's half of the connector. Threads: one, vLLM's model thread."""

    def __init__(self, config: ConnectorConfig, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *,
                 engine_id: str) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._engine_id = engine_id
        self._layer_order = describe.layer_order(kv_cache_config)
        self._next_layer = 0
        self._is_bound = False
        self._results = StepResults()
        self._rank = 0
        self._stats: StatsSource | None = None
        self._endpoint: WorkerEndpoint | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Start serving and filling these caches."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        marks = describe.fingerprint(self._vllm_config, self._kv_cache_config)
        cache = describe.cache_memory(kv_caches, self._kv_cache_config, marks)
        self._rank = get_tensor_model_parallel_rank()
        self._endpoint = WorkerEndpoint(self._config, engine_id=self._engine_id, rank=self._rank, cache=cache)
        self._stats = StatsSource(str(self._rank))

    @property
    def endpoint(self) -> WorkerEndpoint:
        """Return the endpoint. Raises: LocalProtocolError before ``register``."""
        if self._endpoint is None:
            raise LocalProtocolError("vLLM called a worker hook before register_kv_caches")
        return self._endpoint

    def before_step(self, plan: StepPlan) -> None:
        """First hook of a step: blocks may be reused or zeroed right after it."""
        Calm.active = plan.is_empty
        self.endpoint.before_step(plan)

    def begin_step(self, plan: StepPlan) -> None:
        """Second hook: after zeroing, before the forward pass."""
        self._next_layer = 0
        self._is_bound = True
        self.endpoint.begin_step(plan)

    def finish_layer(self, layer_name: str) -> None:
        """Note that a layer's KV is final; layers count only in the layout's order."""
        if self._layer_order.get(layer_name) == self._next_layer:
            self._next_layer += 1
            self.endpoint.finish_layer(self._next_layer)

    def finish_step(self) -> None:
        """Note that the step's KV is final."""
        if self._is_bound:
            self._is_bound = False
            self.endpoint.finish_step()

    def take_results(self) -> StepResults:
        """Return what finished; its bad blocks are kept for ``take_bad_blocks`` of the same step."""
        self._results = self.endpoint.take_results()
        return self._results

    def take_bad_blocks(self) -> set[int]:
        """Return the blocks that were not filled, of the requests just reported."""
        bad_blocks, self._results.bad_blocks = self._results.bad_blocks, set()
        return bad_blocks

    def take_stats(self) -> MooncakeStats | None:
        """Return what changed since the last time, at most once a second."""
        if self._stats is None or not self._stats.is_due(time.monotonic()):
            return None
        return self._stats.take(self.endpoint.samples())

    def close(self) -> None:
        """Stop everything. Idempotent."""
        if self._endpoint is not None:
            self._endpoint.close()
