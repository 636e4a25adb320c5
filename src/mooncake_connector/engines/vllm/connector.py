"""Be vLLM's KV connector: one class for hand-over and pool, a thin face over scheduler.py and worker.py.

Ref: vllm distributed/kv_transfer/kv_connector/v1/base.py (0.32). vLLM makes one instance with role SCHEDULER in the
engine core and one with role WORKER in each worker; class methods are also called in the front-end.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.engines.vllm import compat, describe
from mooncake_connector.engines.vllm.scheduler import SchedulerSide
from mooncake_connector.engines.vllm.stats import MooncakePromMetrics, MooncakeStats, StatsSource
from mooncake_connector.engines.vllm.worker import WorkerSide
from mooncake_connector.transfer.prefix import PoolView
from mooncake_connector.transfer.steps import StepPlan
from mooncake_store.config import load_config
from mooncake_store.directory.open import open_directory
from mooncake_store.errors import LocalProtocolError
from mooncake_store.log import set_up_logging
from mooncake_store.metrics import Metrics

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Carries one step's plan to the workers."""

    plan: StepPlan


@dataclass
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """Tells the scheduler where decode engines reach this worker."""

    address: str


class MooncakeKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands KV from prefill to decode engines and pools it between all of them."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.require_supported()
        set_up_logging()
        compat.Calm.install()
        describe.require_supported_parallelism(vllm_config)
        transfer = self._kv_transfer_config
        config = load_config(ConnectorConfig, dict(transfer.kv_connector_extra_config or {}))
        set_up_logging(config.log_level)
        engine_id = str(transfer.engine_id)
        self._directory = None
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._stats: StatsSource | None = None
        if role == KVConnectorRole.WORKER:
            self._worker = WorkerSide(config, vllm_config, kv_cache_config, engine_id=engine_id)
            return
        marks = describe.fingerprint(vllm_config, kv_cache_config)
        pool = None
        if config.pool:
            self._directory = open_directory(config, Metrics())
            pool = PoolView(self._directory, min_blocks=config.load_min_blocks)
        self._scheduler = SchedulerSide(
            config, engine_id=engine_id, is_producer=transfer.is_kv_producer, is_consumer=transfer.is_kv_consumer,
            pool=pool, namespace=marks.namespace(), num_parts=marks.tensor_parallel, block_size=marks.block_size,
        )
        self._stats = StatsSource("scheduler", has_gauges=False)
        if transfer.kv_load_failure_policy == "fail":
            logger.info("kv_load_failure_policy is 'fail': a request that loses a block gets an error; "
                        "with 'recompute' it is computed here instead")

    # ---- class-level

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Prefer a layout in which a head's part of a block is contiguous; MLA has one head."""
        return None if vllm_config.model_config.use_mla else "LBHNC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layer hooks do not run inside full graphs."""
        return bool(extra_config.get("publish", "layer") == "layer")

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MooncakeStats:
        """Rebuild statistics in the front-end."""
        return MooncakeStats(data=data) if data else MooncakeStats(data={"counters": {}, "gauges": {}})

    @classmethod
    def build_prom_metrics(cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str],
                           per_engine_labelvalues: dict[int, list[object]]) -> MooncakePromMetrics:
        """Show our metrics on vLLM's page."""
        return MooncakePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- scheduler

    @property
    def scheduler(self) -> SchedulerSide:
        """Return the scheduler's half."""
        if self._scheduler is None:
            raise LocalProtocolError("vLLM called a scheduler hook on a worker's connector")
        return self._scheduler

    def on_new_request(self, request: Request) -> None:
        """See SchedulerSide.on_new_request."""
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See SchedulerSide.match."""
        return self.scheduler.match(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """Name the groups that a load fills, so that vLLM does not zero them meanwhile."""
        return tuple(self._kv_cache_config.transfer_group_ids)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See SchedulerSide.allocated."""
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See SchedulerSide.build."""
        return StepMetadata(self.scheduler.build(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See SchedulerSide.update."""
        self.scheduler.update(connector_output.finished_sending or set(), connector_output.finished_recving or set())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See SchedulerSide.finished."""
        return self.scheduler.finished(request, len(block_ids))

    def request_finished_all_groups(self, request: Request,
                                    block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """See SchedulerSide.finished."""
        return self.scheduler.finished(request, sum(map(len, block_ids)))

    def has_pending_push_work(self) -> bool:
        """Ask for one more step while the workers do not know of an end yet."""
        return self.scheduler.has_unsent

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Learn the workers' addresses; other connectors' metadata (MultiConnector) is ignored."""
        ours = {rank: item.address for (_, rank), item in metadata.items() if isinstance(item, WorkerHandshake)}
        self.scheduler.addresses = [ours[rank] for rank in sorted(ours)]

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Learn the workers' addresses."""
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): item for rank, item in metadata.items()})

    def reset_cache(self) -> bool | None:
        """Refuse: blocks in the pool belong to every engine of the cell, not to this one."""
        logger.warning("reset_external asked for: the pool is shared, nothing was dropped")
        return False

    # ---- worker

    @property
    def worker(self) -> WorkerSide:
        """Return the worker's half."""
        if self._worker is None:
            raise LocalProtocolError("vLLM called a worker hook on the scheduler's connector")
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See WorkerSide.register."""
        self.worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Return our address for the scheduler."""
        return WorkerHandshake(self.worker.endpoint.address)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Run the first hook of a step: before vLLM zeroes and reuses blocks."""
        self.worker.before_step(_plan(kv_connector_metadata))

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Run the second hook: before the forward pass."""
        super().bind_connector_metadata(connector_metadata)
        self.worker.begin_step(_plan(connector_metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do nothing: loads began in bind_connector_metadata; vLLM calls this after the forward pass."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request runs only after its loads are complete."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """See WorkerSide.finish_layer. On CPU the layer's KV is final when its attention returns."""
        self.worker.finish_layer(layer_name)

    def wait_for_save(self) -> None:
        """See WorkerSide.finish_step. Does not wait: what is being read is held."""
        self.worker.finish_step()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Report each finished request once."""
        results = self.worker.take_results()
        return KVConnectorTransferResults(finished_sending=results.sent, finished_recving=results.received)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Report each finished request once; for engines without get_transfer_results."""
        results = self.worker.take_results()
        return results.sent or None, results.received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Report blocks, not requests: the part of a prompt that arrived is kept."""
        return self.worker.take_bad_blocks()

    def get_kv_connector_stats(self) -> MooncakeStats | None:
        """Return what changed since the last report."""
        if self._worker is not None:
            return self._worker.take_stats()
        if self._stats is not None and self._stats.is_due(time.monotonic()):
            return self._stats.take(self.scheduler.metrics.snapshot())
        return None

    # ---- both

    def shutdown(self) -> None:
        """Stop everything we started. Idempotent, bounded."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
        if self._directory is not None:
            self._directory.close()


def _plan(metadata: KVConnectorMetadata) -> StepPlan:
    if not isinstance(metadata, StepMetadata):
        raise LocalProtocolError(f"vLLM handed over {type(metadata).__name__}, not our metadata")
    return metadata.plan
