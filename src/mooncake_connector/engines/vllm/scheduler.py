"""Translate vLLM's scheduler hooks into step plans. One instance lives in the engine core process.

Threads: vLLM calls every hook on its main thread. Nothing here does I/O or waits, but for one bounded wait in a step
that computes nothing (see transfer/doorbell.py).
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.engines.vllm.compat import Calm
from mooncake_connector.engines.vllm.params import TransferParams, answer, read_params
from mooncake_connector.kv.keys import PromptKeys
from mooncake_connector.metrics import CONNECTOR_METRICS
from mooncake_connector.transfer.doorbell import Doorbell
from mooncake_connector.transfer.prefix import PoolView
from mooncake_connector.transfer.steps import (
    Announced,
    Expected,
    Finished,
    HandoffLoad,
    PoolLoad,
    PoolSave,
    PrefillStep,
    StepPlan,
)
from mooncake_store.errors import RemoteProtocolError
from mooncake_store.metrics import Metrics

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

NEWS_WAIT_S = 0.020
"""Longest wait in a step that computes nothing: also the longest that a new request waits for it."""

COMPLETE_STATUSES = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")
"""Of vllm v1/request.py RequestStatus. STOPPED: the first token ended the text; the KV is complete all the same."""


@dataclasses.dataclass(slots=True)
class Tracked:
    """What we know of one request.

    Attributes:
        keys: its pool keys; None when it must not use the pool.
        first_block: where the last pool match began.
        num_saved: leading blocks that are saved, were skipped, or came from the pool.
        has_saves: whether any save was issued.
        may_load: False after one load: a stale entry must not be matched for ever.
    """

    request: Request
    params: TransferParams
    keys: PromptKeys | None
    first_block: int = 0
    num_saved: int = 0
    has_saves: bool = False
    may_load: bool = True
    is_remote: bool = False


class SchedulerSide:
    """The scheduler's half of the connector.

    Args:
        pool: None when the pool is off.
        namespace: prefix of our pool keys.
        num_parts: workers that each hold a part of a block.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        engine_id: str,
        is_producer: bool,
        is_consumer: bool,
        pool: PoolView | None,
        namespace: bytes,
        num_parts: int,
        block_size: int,
    ) -> None:
        self._config = config
        self._engine_id = engine_id
        self._is_producer = is_producer
        self._is_consumer = is_consumer
        self._pool = pool
        self._namespace = namespace
        self._num_parts = num_parts
        self._block_size = block_size
        self._bell = Doorbell(engine_id)
        self._plan = StepPlan()
        self._tracked: dict[str, Tracked] = {}
        self._transfers: dict[str, str] = {}
        self._parked: set[str] = set()
        self._held: set[str] = set()
        self.addresses: list[str] = []
        self.metrics = Metrics(CONNECTOR_METRICS)

    # ---- arrival

    def on_new_request(self, request: Request) -> None:
        """Track a request; subscribe ahead for one that will pull, announce one that will be pulled."""
        params = self._read(request)
        uses_pool = self._pool is not None and not getattr(request, "pooling_params", None)
        keys = PromptKeys(self._namespace, self._num_parts) if uses_pool else None
        tracked = Tracked(request, params, keys)
        self._tracked[request.request_id] = tracked
        if params.do_remote_prefill:
            tracked.is_remote = True
            self._plan.announced.append(
                Announced(request.request_id, params.transfer_id, list(params.remote_addresses)))
        elif params.do_remote_decode:
            self._transfers[params.transfer_id] = request.request_id
            self._plan.expected.append(Expected(request.request_id, params.transfer_id))

    def _read(self, request: Request) -> TransferParams:
        """Return usable parameters: a request whose parameters are not is served without a hand-over."""
        try:
            params = read_params(request.kv_transfer_params)
        except RemoteProtocolError as error:
            logger.warning("request %s is served without a hand-over: %s", request.request_id, error.message)
            return TransferParams()
        problem = ""
        if params.do_remote_prefill and not self._is_consumer:
            problem = "this engine's kv_role does not decode for others"
        elif params.do_remote_decode and not self._is_producer:
            problem = "this engine's kv_role does not prefill for others"
        elif params.do_remote_decode and params.transfer_id in self._transfers:
            problem = f"transfer {params.transfer_id} is under way already"
        if problem:
            logger.warning("request %s is served without a hand-over: %s", request.request_id, problem)
            return TransferParams()
        return params

    # ---- admission

    def match(self, request: Request, num_computed: int) -> tuple[int, bool]:
        """Return how many tokens we can provide beyond ``num_computed``, and that they come asynchronously.

        May be called repeatedly and changes nothing that matters.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0, False
        if tracked.is_remote:
            num_tokens = request.num_tokens - 1 - num_computed
            return (num_tokens, True) if num_tokens > 0 else (0, False)
        if tracked.keys is None or self._pool is None or not tracked.may_load:
            return 0, False
        tracked.keys.extend(request.block_hashes)
        tracked.first_block = num_computed // self._block_size
        last = min((request.num_tokens - 1) // self._block_size, len(tracked.keys))
        found = self._pool.match(tracked.keys, tracked.first_block, last)
        return found * self._block_size, found > 0

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Order what fills the blocks that vLLM allocated."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        if tracked.is_remote:
            tracked.is_remote = False
            self._order_handoff(tracked, blocks, num_external)
        elif num_external > 0 and tracked.may_load:
            self._order_load(tracked, blocks, num_external)
        elif tracked.keys is not None and tracked.may_load and request.num_computed_tokens == 0:
            tracked.may_load = False
            self.metrics.add("mooncake_prefix_lookups_total", result="miss")

    def _order_handoff(self, tracked: Tracked, blocks: KVCacheBlocks, num_external: int) -> None:
        request, params = tracked.request, tracked.params
        needed = request.num_tokens - 1
        block_ids: list[int] = []
        if num_external > 0:
            block_ids = list(blocks.get_block_ids()[0][: -(-needed // self._block_size)])
            self._parked.add(request.request_id)
            # The prefill engine saves these; saving them here as well would only double the work.
            tracked.num_saved = needed // self._block_size
        self._plan.handoffs.append(HandoffLoad(
            request.request_id, params.transfer_id, list(params.remote_addresses), block_ids,
            (needed - num_external) // self._block_size if block_ids else 0, needed))

    def _order_load(self, tracked: Tracked, blocks: KVCacheBlocks, num_external: int) -> None:
        assert tracked.keys is not None and self._pool is not None  # match() found something
        first, last = tracked.first_block, tracked.first_block + num_external // self._block_size
        tracked.may_load = False
        tracked.num_saved = last
        self.metrics.add("mooncake_prefix_lookups_total", result="hit")
        self.metrics.add("mooncake_prefix_hit_tokens_total", num_external)
        self._parked.add(tracked.request.request_id)
        self._plan.pool_loads.append(PoolLoad(
            tracked.request.request_id, [tracked.keys.part(p, first, last) for p in range(self._num_parts)],
            list(blocks.get_block_ids()[0][first:last]), self._pool.revision))

    # ---- step

    def build(self, output: SchedulerOutput) -> StepPlan:
        """Return the plan of one step; waits a bounded time in a step that computes nothing."""
        plan, self._plan = self._plan, StepPlan()
        plan.is_empty = output.total_num_scheduled_tokens == 0
        for request_id in output.preempted_req_ids or ():
            if request_id in self._tracked:
                plan.preempted.append(request_id)
                # Its queued saves are dropped; what they would have saved is looked at again.
                self._tracked[request_id].num_saved = 0
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None:
                self._plan_request(plan, tracked, num_tokens, output)
        if plan.prefills and len(output.num_scheduled_tokens) > 1:
            self._withhold_unwritten(plan, output)
        has_news = bool(plan.handoffs or plan.pool_loads or plan.announced or plan.finished or plan.cancelled)
        Calm.active = plan.is_empty
        if plan.is_empty and not has_news and (self._parked or self._held):
            self._bell.wait(NEWS_WAIT_S)
        return plan

    def _plan_request(self, plan: StepPlan, tracked: Tracked, num_tokens: int, output: SchedulerOutput) -> None:
        request, params = tracked.request, tracked.params
        before = request.num_computed_tokens
        after = min(before + num_tokens, request.num_tokens)
        is_prefill = params.do_remote_decode and before <= request.num_prompt_tokens - 1
        last = after // self._block_size
        if not self._config.save_decode:
            last = min(last, request.num_prompt_tokens // self._block_size)
        saves = tracked.keys is not None and last > tracked.num_saved
        if not (is_prefill or saves):
            return
        state = output.kv_connector_block_state
        block_ids = state.get_block_ids(request.request_id) if state is not None else None
        if block_ids is None:
            return
        if is_prefill:
            publish = params.publish or self._config.publish
            plan.prefills.append(PrefillStep(request.request_id, params.transfer_id, list(block_ids[0]), before, after,
                                             request.num_prompt_tokens - 1, publish == "layer"))
        if saves:
            self._plan_save(plan, tracked, block_ids[0], last)

    def _withhold_unwritten(self, plan: StepPlan, output: SchedulerOutput) -> None:
        """Take back the readiness of prefix blocks that another request computes in this very step.

        vLLM caches a block when it is allocated, so a request can hit blocks that the same batch is about to write
        (v1/core/kv_cache_manager.py allocate_slots); to us they are ready only when the step, or its layer, is done.
        """
        state = output.kv_connector_block_state
        written: set[int] = set()
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            block_ids = state.get_block_ids(request_id) if state is not None and tracked is not None else None
            if tracked is not None and block_ids is not None:
                before = tracked.request.num_computed_tokens
                written.update(block_ids[0][before // self._block_size: -(-(before + num_tokens) // self._block_size)])
        for step in plan.prefills:
            prefix = step.block_ids[: step.tokens_before // self._block_size]
            unwritten = next((i for i, block_id in enumerate(prefix) if block_id in written), None)
            if unwritten is not None:
                step.tokens_before = unwritten * self._block_size

    def _plan_save(self, plan: StepPlan, tracked: Tracked, block_ids: list[int], last: int) -> None:
        assert tracked.keys is not None and self._pool is not None
        tracked.keys.extend(tracked.request.block_hashes)
        last = min(last, len(tracked.keys), len(block_ids))
        wanted = self._pool.missing(tracked.keys, tracked.num_saved, last)
        tracked.num_saved = max(tracked.num_saved, last)
        if wanted:
            tracked.has_saves = True
            parts = [tracked.keys.part(part) for part in range(self._num_parts)]
            plan.pool_saves.append(PoolSave(tracked.request.request_id, [[keys[i] for i in wanted] for keys in parts],
                                            [block_ids[i] for i in wanted]))

    # ---- end

    def finished(self, request: Request, num_blocks: int) -> tuple[bool, dict[str, Any] | None]:
        """Say whether the request's blocks must be kept, and what its response carries."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False, None
        params = tracked.params
        if request.request_id in self._parked:
            # The worker reports it when nothing writes into its blocks any more; vLLM keeps them until then.
            self._parked.discard(request.request_id)
            self._plan.cancelled.append(request.request_id)
            return False, None
        if tracked.is_remote:
            self._plan.cancelled.append(request.request_id)
        delivered = params.do_remote_decode and request.status.name in COMPLETE_STATUSES
        held = delivered or tracked.has_saves
        if held or params.do_remote_decode:
            self._plan.finished.append(Finished(
                request.request_id, params.transfer_id if params.do_remote_decode else "", delivered, held, num_blocks))
        if held:
            self._held.add(request.request_id)
        elif params.do_remote_decode:
            self._transfers.pop(params.transfer_id, None)
        if not (delivered or params.introduce):
            return held, None
        transfer_id = params.transfer_id if delivered else ""
        return held, answer(engine_id=self._engine_id, addresses=self.addresses, block_size=self._block_size,
                            transfer_id=transfer_id)

    def update(self, sent: set[str], received: set[str]) -> None:
        """Take over what the workers reported."""
        self._parked -= received
        if sent:
            self._held -= sent
            for transfer_id in [tid for tid, rid in self._transfers.items() if rid in sent]:
                del self._transfers[transfer_id]

    @property
    def has_unsent(self) -> bool:
        """Return whether the workers must be stepped once more although no request runs."""
        plan = self._plan
        return bool(plan.finished or plan.cancelled or plan.handoffs)

    def close(self) -> None:
        """Release the doorbell. Idempotent."""
        self._bell.close()
