"""Be SGLang's transfer backend: the manager of one scheduler process.

Architecture::

    scheduler thread   PullSender / PullReceiver -> PullManager   (never waits for a peer)
      WorkerEndpoint   transfer/endpoint.py: its threads publish, pull, and watch peers

SGLang's own backends push: the decode engine announces pages, the prefill engine writes into them. Here the decode
engine reads. A prefill needs nothing from a decode engine to begin; it publishes each chunk when it is final, and keeps
its pages until the reader is through, its lease ends, or its process does. Of SGLang's common classes we keep the
bootstrap registry, the rank mapping, the health check and the book of statuses.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, CommonKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_parallel

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.engines.sglang import compat, describe
from mooncake_connector.engines.sglang.counters import process_metrics
from mooncake_connector.engines.sglang.rows import MetadataRows
from mooncake_connector.transfer.endpoint import WorkerEndpoint
from mooncake_connector.transfer.steps import Announced, Expected, Finished, HandoffLoad, PrefillStep, StepPlan
from mooncake_store.config import load_config
from mooncake_store.errors import RemoteProtocolError
from mooncake_store.log import set_up_logging

if TYPE_CHECKING:
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

COLLECT_EVERY_NS = 200_000
"""Asking the endpoint costs some 10 us; with a hundred requests in flight, SGLang's loop would do little else."""


@dataclasses.dataclass(slots=True)
class Outgoing:
    """One request that a decode engine fetches from us: its pages so far, and whether these are all."""

    page_ids: list[int] = dataclasses.field(default_factory=list)
    num_published: int = 0
    is_whole: bool = False


class PullManager(CommonKVManager):
    """Keeps both sides' transfers of one scheduler process. Threads: the scheduler's, but for SGLang's health check.

    Raises:
        ConfigError: a model, parallel layout or release that we cannot serve; SGLang's start ends with it.
    """

    supports_deferred_decode_kv_release = True
    reports_transfer_latency = True

    def __init__(self, args: KVArgs, disaggregation_mode: DisaggregationMode, server_args: ServerArgs,
                 is_mla_backend: bool = False) -> None:
        compat.require_features()
        compat.skip_early_send()
        set_up_logging()
        config = load_config(ConnectorConfig)
        set_up_logging(config.log_level)
        describe.require_supported(args, server_args, is_mla=bool(is_mla_backend))
        cache = describe.cache_memory(describe.Buffers.of_transfer(args), server_args,
                                      tensor_parallel=get_parallel().attn_tp_size)
        self._page_size = int(args.page_size)
        self._rows = MetadataRows(args)
        self._outgoing: dict[int, Outgoing] = {}
        self._incoming: dict[int, int] = {}
        self._collected_ns = 0
        self._endpoint = WorkerEndpoint(msgspec.structs.replace(config, pool=False),
                                        engine_id=f"sglang-{os.getpid()}", rank=0, cache=cache,
                                        metrics=process_metrics())
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        if disaggregation_mode == DisaggregationMode.DECODE:
            self._start_heartbeat_checker_thread()

    def register_to_bootstrap(self) -> None:
        """Register our endpoint as this rank's address, in place of the push backends' socket."""
        host, _, port = self._endpoint.address.removeprefix("tcp://").rpartition(":")
        self.local_ip, self.rank_port = host.strip("[]"), int(port)
        super().register_to_bootstrap()

    # ---- prefill side

    def expect(self, room: int) -> bool:
        """Say that a request with this room has arrived; False when there is one already."""
        if room in self._outgoing:
            return False
        self._outgoing[room] = Outgoing()
        self._step(StepPlan(expected=[Expected(str(room), str(room))]))
        return True

    def add_transfer_request(self, bootstrap_room: int, kv_indices: Sequence[int], index_slice: slice,
                             is_last_chunk: bool, *, aux_index: int | None = None, **more: Any) -> None:
        """Publish a chunk whose KV is final; with the last one, the metadata row."""
        sent = self._outgoing.get(bootstrap_room)
        if sent is None or sent.is_whole:
            return
        sent.page_ids += [int(page) for page in kv_indices]
        sent.is_whole = is_last_chunk
        before, sent.num_published = sent.num_published, len(sent.page_ids)
        name, size = str(bootstrap_room), self._page_size
        note = None if aux_index is None else self._rows.read(aux_index)
        # Until the last chunk nobody may think that it is the last.
        needed = sent.num_published * size + (0 if is_last_chunk else 1)
        self.update_status(bootstrap_room, KVPoll.Transferring)
        self._step(StepPlan(prefills=[PrefillStep(name, name, list(sent.page_ids), before * size,
                                                  sent.num_published * size, needed, False, note)]))
        if is_last_chunk:
            self._step(StepPlan(finished=[Finished(name, name, True, True, sent.num_published)]))

    def withdraw(self, room: int) -> None:
        """Give the request's pages up: once this returns, no copy of them can count. Idempotent."""
        if self._outgoing.pop(room, None) is not None:
            self._step(StepPlan(finished=[Finished(str(room), str(room), False, False, 0)]))

    # ---- decode side

    def announce(self, room: int, address: str) -> None:
        """Say that a request has arrived that will fetch this room: its prefill must not give up meanwhile."""
        self._step(StepPlan(announced=[Announced(str(room), str(room), [address])]))

    def fetch(self, room: int, address: str, page_ids: list[int], *, first_page: int, row_index: int) -> None:
        """Fill our pages from ``first_page`` on, and the metadata row."""
        self._incoming[room] = row_index
        self._step(StepPlan(handoffs=[HandoffLoad(str(room), str(room), [address], page_ids, first_page,
                                                  len(page_ids) * self._page_size, wants_note=True)]))

    def cancel(self, room: int) -> None:
        """Stop fetching; ``is_fetching`` says when nothing is written any more. Idempotent."""
        self._step(StepPlan(cancelled=[str(room)]))

    def is_fetching(self, room: int) -> bool:
        """Tell whether something may still write into the request's pages or row."""
        self.collect()
        return room in self._incoming

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """Tell SGLang that an aborted request's pages may be used for something else."""
        return not self.is_fetching(bootstrap_room)

    # ---- both

    def collect(self) -> None:
        """Take over what the endpoint's threads reported. SGLang asks for every request in every round of its loop."""
        now_ns = time.monotonic_ns()
        if now_ns - self._collected_ns < COLLECT_EVERY_NS:
            return
        self._collected_ns = now_ns
        results = self._endpoint.take_results()
        for name in results.received:
            self._conclude_fetch(int(name), results.notes.get(name), results.lost.get(name, ""))
        for name, reason in results.lost.items():
            if int(name) in self._outgoing:
                self._fail(int(name), f"nobody fetched the prefill: {reason}")
        for name in results.sent:
            if name not in results.lost and self._outgoing.pop(int(name), None) is not None:
                self.update_status(int(name), KVPoll.Success)

    def _conclude_fetch(self, room: int, row: bytes | None, reason: str) -> None:
        index = self._incoming.pop(room, None)
        if index is None or self.request_status.get(room) in (None, KVPoll.Failed):
            return
        if row is None:
            self._fail(room, f"the prefill was not handed over: {reason}")
            return
        try:
            self._rows.write(index, row)
        except RemoteProtocolError as error:
            self._fail(room, error.message)
        else:
            self.update_status(room, KVPoll.Success)

    def _fail(self, room: int, reason: str) -> None:
        self.record_failure(room, reason)
        self.update_status(room, KVPoll.Failed)

    def _step(self, plan: StepPlan) -> None:
        self._endpoint.before_step(plan)
        self._endpoint.begin_step(plan)
        self._endpoint.finish_step()


class PullBootstrapServer(CommonKVBootstrapServer):
    """SGLang's registry of prefill ranks, unchanged."""
