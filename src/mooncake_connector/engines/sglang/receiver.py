"""Be SGLang's receiver: one request at the decode side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver, KVTransferError
from sglang.srt.utils.network import NetworkAddress

if TYPE_CHECKING:
    from mooncake_connector.engines.sglang.disagg import PullManager


class PullReceiver(CommonKVReceiver):
    """Fetches one request's pages and metadata row. Threads: the scheduler's."""

    kv_mgr: PullManager
    abort_notified: bool

    def __init__(self, mgr: PullManager, bootstrap_addr: str, bootstrap_room: int) -> None:
        is_duplicate = bootstrap_room in mgr.request_status
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        self._is_duplicate = is_duplicate
        self._address = ""
        if is_duplicate:
            # The statuses are kept by room: the request that has it must not notice.
            self._owns_bootstrap_room = False
            self.conclude_state = KVPoll.Failed

    def init(self, prefill_dp_rank: int) -> None:
        """Find the prefill rank that has our part, and tell it that we will come."""
        super().init(prefill_dp_rank)
        if self.conclude_state is not None:
            return
        if len(self.bootstrap_infos) != 1 or self.prefill_info.attn_tp_size != self.kv_mgr.attn_tp_size:
            self._fail(f"prefill attention TP is {self.prefill_info.attn_tp_size}, ours {self.kv_mgr.attn_tp_size}; "
                       "transfer backend mooncake_pull needs equal sizes")
            return
        info = self.bootstrap_infos[0]
        self._address = NetworkAddress(info["rank_ip"], int(info["rank_port"])).to_tcp()
        self.kv_mgr.announce(self.bootstrap_room, self._address)

    def _register_kv_args(self) -> bool:
        """Send nothing: who reads needs not tell where it writes."""
        return self.bootstrap_infos is not None

    def send_metadata(self, kv_indices: Sequence[int], aux_index: int | None = None, state_indices: object = None,
                      decode_prefix_len: int | None = None, destination: Any = None, **more: Any) -> None:
        """Begin to read: our pages are there. ``kv_indices`` are those behind the prefix that we have already."""
        if destination is not None and getattr(destination, "name", "DEVICE") != "DEVICE":
            raise NotImplementedError("host memory as the target of a hand-over is not supported")
        if aux_index is None or not self._address:
            self._fail("the prefill engine's address is not known")
            return
        first_page = (decode_prefix_len or 0) // self.kv_mgr.kv_args.page_size
        self.kv_mgr.fetch(self.bootstrap_room, self._address, [0] * first_page + [int(page) for page in kv_indices],
                          first_page=first_page, row_index=aux_index)

    def poll(self) -> int:
        """Return the transfer's status; terminal ones stay."""
        if self.conclude_state is None:
            self.kv_mgr.collect()
        status = int(super().poll())
        if status == KVPoll.Failed:
            # The prefill engine may have been restarted at another port.
            self.invalidate_cached_bootstrap_infos()
        return status

    def ensure_abort_notified(self, *, force_arm: bool = False) -> None:
        """Stop reading. SGLang keeps our pages until nothing writes into them, if it has to wait for that."""
        if self._is_duplicate or self.abort_notified:
            return
        self.kv_mgr.cancel(self.bootstrap_room)
        self.abort_notified = self.kv_mgr.is_fetching(self.bootstrap_room)

    def clear(self) -> None:
        """Forget the request."""
        if not self._is_duplicate:
            if self.conclude_state != KVPoll.Success:
                self.kv_mgr.cancel(self.bootstrap_room)
            super().clear()

    def failure_exception(self) -> NoReturn:
        """Raise with the reason."""
        if self._is_duplicate:
            raise KVTransferError(self.bootstrap_room, f"bootstrap room {self.bootstrap_room} is in use here already; "
                                                       "every request needs a room of its own")
        super().failure_exception()
        raise AssertionError("SGLang's failure_exception always raises")

    def _fail(self, reason: str) -> None:
        self.kv_mgr.record_failure(self.bootstrap_room, reason)
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        self.conclude_state = KVPoll.Failed
