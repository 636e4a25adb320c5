"""Be SGLang's sender: one request at the prefill side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVSender, KVTransferError

if TYPE_CHECKING:
    from mooncake_connector.engines.sglang.disagg import PullManager


class PullSender(CommonKVSender):
    """Publishes one request's chunks; succeeds when the decode engine has read them. Threads: the scheduler's."""

    kv_mgr: PullManager

    def __init__(self, mgr: PullManager, bootstrap_addr: str, bootstrap_room: int,
                 req_has_disagg_prefill_dp_rank: bool = False) -> None:
        self._is_duplicate = not mgr.expect(bootstrap_room)
        if self._is_duplicate:
            # The statuses are kept by room: the request that has it must not notice.
            self.bootstrap_room, self.kv_mgr, self.conclude_state = bootstrap_room, mgr, KVPoll.Failed
            return
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)
        # Nothing has to come from a decode engine before the prefill may begin.
        mgr.update_status(bootstrap_room, KVPoll.WaitingForInput)

    def pop_decode_prefix_len(self) -> int:
        """Publish the whole prompt: the decode engine reads only what it lacks."""
        return 0

    def poll(self) -> int:
        """Return the transfer's status; terminal ones stay."""
        if self.conclude_state is None:
            self.kv_mgr.collect()
        return int(self.conclude_state if self._is_duplicate else super().poll())

    def abort(self) -> None:
        """Give the request up; its pages may be reused when this returns."""
        if not self._is_duplicate:
            self.kv_mgr.withdraw(self.bootstrap_room)
            super().abort()

    def clear(self) -> None:
        """Forget the request; its pages may be reused when this returns."""
        if not self._is_duplicate:
            self.kv_mgr.withdraw(self.bootstrap_room)
            super().clear()

    def failure_exception(self) -> NoReturn:
        """Raise with the reason; its pages may be reused then."""
        if self._is_duplicate:
            raise KVTransferError(self.bootstrap_room, f"bootstrap room {self.bootstrap_room} is in use here already; "
                                                       "every request needs a room of its own")
        super().failure_exception()
        raise AssertionError("SGLang's failure_exception always raises")
