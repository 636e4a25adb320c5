"""Keep the book of transfers at the prefill side.

Pure: events and the time come in, instructions go out; the tables of lifecycle.py decide. Bounded: TRANSFERS_MAX
entries, tombstones forgotten after TOMBSTONE_NS. Not thread-safe: the producer locks around it.
"""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_connector.kv.plan import Progress
from mooncake_connector.transfer.lifecycle import Action, Held, HeldEvent, held_step
from mooncake_connector.transfer.messages import Ready
from mooncake_connector.transfer.steps import Expected, Finished, PrefillStep

TRANSFERS_MAX = 4096
"""Transfers alive at once; also the number of epoch words. Beyond it a subscription is refused."""

TOMBSTONE_NS = 60 * 10**9

Peer = bytes
"""ZeroMQ routing id of a subscriber."""


class Publish(msgspec.Struct, frozen=True):
    """Send the current Ready of a transfer to its subscriber."""

    transfer_id: str


class Revoke(msgspec.Struct, frozen=True):
    """Bump this epoch word now, before any block can be reused."""

    slot: int


class Report(msgspec.Struct, frozen=True):
    """Tell the engine that it may free the request's blocks."""

    request_id: str


class Lose(msgspec.Struct, frozen=True):
    """Tell the engine that nobody will fetch the request's blocks."""

    request_id: str
    reason: str


class TellAbort(msgspec.Struct, frozen=True):
    """Tell a subscriber that nothing more will come."""

    peer: Peer
    transfer_id: str
    reason: str


Instruction = Publish | Revoke | Report | Lose | TellAbort


@dataclasses.dataclass(slots=True)
class HeldTransfer:
    """One transfer as the prefill side knows it.

    ``deadline_ns`` is when a silent peer loses it; 0 while there is nothing to lose. ``sent`` is what the peer knows.
    ``is_computed``: everything the peer needs was published.
    """

    transfer_id: str
    state: Held
    slot: int
    deadline_ns: int
    request_id: str = ""
    peer: Peer | None = None
    progress: Progress = Progress()
    block_ids: list[int] = dataclasses.field(default_factory=list)
    step: PrefillStep | None = None
    sent: tuple[int, Progress, bytes | None] | None = None
    num_sent_blocks: int = 0
    note: bytes | None = None
    is_computed: bool = False
    reason: str = ""


class HeldTransfers:
    """Answers every event with instructions."""

    def __init__(self, *, lease_ns: int) -> None:
        self._lease_ns = lease_ns
        self._by_id: dict[str, HeldTransfer] = {}
        self._by_request: dict[str, HeldTransfer] = {}
        self._free_slots = list(range(TRANSFERS_MAX - 1, -1, -1))

    # ---- from the decode side

    def subscribe(self, transfer_id: str, peer: Peer, now_ns: int) -> list[Instruction]:
        """A peer wants a transfer; it may be one we have never heard of."""
        transfer = self._by_id.get(transfer_id)
        if transfer is None:
            transfer = self._open(transfer_id, Held.WANTED, now_ns)
            if transfer is None:
                return [TellAbort(peer, transfer_id, f"{TRANSFERS_MAX} transfers are under way here")]
        if transfer.peer != peer:
            transfer.peer, transfer.sent, transfer.num_sent_blocks = peer, None, 0
        self._renew(transfer, now_ns)
        return self._take(transfer, HeldEvent.SUBSCRIBED, now_ns)

    def heartbeat(self, transfer_ids: list[str], peer: Peer, now_ns: int) -> list[Instruction]:
        """Renew the peer's leases and say again what it may have missed."""
        instructions: list[Instruction] = []
        for transfer_id in transfer_ids:
            transfer = self._by_id.get(transfer_id)
            if transfer is None or transfer.peer != peer:
                instructions += self.subscribe(transfer_id, peer, now_ns)
            elif transfer.state is Held.GONE:
                instructions.append(TellAbort(peer, transfer_id, transfer.reason))
            else:
                self._renew(transfer, now_ns)
                transfer.sent, transfer.num_sent_blocks = None, 0
                instructions.append(Publish(transfer_id))
        return instructions

    def done(self, transfer_id: str, now_ns: int) -> list[Instruction]:
        """The peer is through, perhaps before we ever saw the request."""
        transfer = self._by_id.get(transfer_id) or self._open(transfer_id, Held.WANTED, now_ns)
        return self._take(transfer, HeldEvent.DONE, now_ns, "the decode side is through") if transfer else []

    def lose_peer(self, peer: Peer, now_ns: int) -> list[Instruction]:
        """The peer's process is gone."""
        return self._each([t for t in self._by_id.values() if t.peer == peer and t.state is not Held.GONE],
                          HeldEvent.EXPIRED, now_ns, "the decode worker is gone")

    # ---- from the engine

    def expect(self, item: Expected, now_ns: int) -> list[Instruction]:
        """The engine queued a request."""
        return self._admit(item.request_id, item.transfer_id, now_ns)

    def schedule(self, step: PrefillStep, now_ns: int) -> list[Instruction]:
        """A forward step over the request begins; what was computed before it is ready."""
        instructions = self._admit(step.request_id, step.transfer_id, now_ns)
        transfer = self._by_id.get(step.transfer_id)
        if transfer is not None:
            transfer.step = step
            transfer.block_ids = step.block_ids
            transfer.progress = Progress(step.tokens_before, step.tokens_before, 0)
        return instructions

    def complete_layers(self, transfer_id: str, num_layers: int) -> bool:
        """Record that the running step finished its first layers; True when somebody may want to know."""
        transfer = self._by_id.get(transfer_id)
        if transfer is None or transfer.step is None or not transfer.step.per_layer:
            return False
        transfer.progress = Progress(transfer.step.tokens_before, transfer.step.tokens_after, num_layers)
        return transfer.peer is not None

    def complete_step(self, transfer_id: str) -> bool:
        """Record that the running step finished; True when somebody may want to know."""
        transfer = self._by_id.get(transfer_id)
        if transfer is None or transfer.step is None:
            return False
        transfer.progress = Progress(transfer.step.tokens_after, transfer.step.tokens_after, 0)
        transfer.note = transfer.step.note
        transfer.is_computed = transfer.step.tokens_after >= transfer.step.tokens_needed
        transfer.step = None
        return transfer.peer is not None

    def preempt(self, request_id: str, now_ns: int) -> list[Instruction]:
        """The engine is about to reuse the request's blocks; it will compute it again."""
        transfer = self._by_request.get(request_id)
        if transfer is None:
            return []
        transfer.block_ids, transfer.progress, transfer.step = [], Progress(), None
        transfer.num_sent_blocks, transfer.note, transfer.is_computed = 0, None, False
        return self._take(transfer, HeldEvent.PREEMPTED, now_ns)

    def finish(self, item: Finished, now_ns: int) -> list[Instruction]:
        """The request ended; ``delivered`` says whether its KV is worth reading."""
        transfer = self._by_id.get(item.transfer_id) or self._open(item.transfer_id, Held.WANTED, now_ns)
        if transfer is None:
            return [Report(item.request_id)] if item.delivered else []
        transfer.request_id = item.request_id
        self._by_request.pop(item.request_id, None)
        self._renew(transfer, now_ns)
        event = HeldEvent.FINISHED if item.delivered else HeldEvent.ENDED_BADLY
        return self._take(transfer, event, now_ns, "the prefill was aborted")

    # ---- time

    def expire(self, now_ns: int, *, idle_since_ns: int | None) -> list[Instruction]:
        """End leases that ran out and forget old tombstones.

        Args:
            now_ns: the time.
            idle_since_ns: when the engine last finished a step, None in the middle of one: the engine cannot have shown
                us a new request since then, so a wish for an unknown transfer does not age meanwhile.
        """
        ended: list[HeldTransfer] = []
        for transfer in list(self._by_id.values()):
            if transfer.state is Held.GONE:
                if transfer.deadline_ns <= now_ns:
                    self._forget(transfer)
                continue
            deadline_ns = transfer.deadline_ns
            if transfer.state is Held.WANTED and idle_since_ns is not None:
                deadline_ns = max(deadline_ns, idle_since_ns + self._lease_ns // 2)
            elif transfer.state is not Held.HELD:
                continue
            if deadline_ns <= now_ns:
                ended.append(transfer)
        return self._each(ended, HeldEvent.EXPIRED, now_ns, "the lease ended")

    # ---- what to say

    def ready(self, transfer_id: str, epochs: npt.NDArray[np.uint64]) -> tuple[Peer, Ready] | None:
        """Return the message that brings the subscriber up to date; None when it is, or when there is nobody."""
        transfer = self._by_id.get(transfer_id)
        if transfer is None or transfer.peer is None or transfer.state is Held.GONE:
            return None
        epoch = int(epochs[transfer.slot])
        news = (epoch, transfer.progress, transfer.note)
        if transfer.sent == news:
            return None
        transfer.sent = news
        block_ids = None
        if len(transfer.block_ids) != transfer.num_sent_blocks:
            block_ids, transfer.num_sent_blocks = transfer.block_ids, len(transfer.block_ids)
        return transfer.peer, Ready(transfer_id, transfer.slot, epoch, transfer.progress, block_ids, transfer.note)

    def block_ids(self, transfer_id: str) -> list[int]:
        """Return the blocks of a transfer that may still be read; empty when it is gone."""
        transfer = self._by_id.get(transfer_id)
        return [] if transfer is None or transfer.state is Held.GONE else transfer.block_ids

    @property
    def num_active(self) -> int:
        """Return the number of transfers that are not over."""
        return sum(t.state is not Held.GONE for t in self._by_id.values())

    # ---- inside

    def _admit(self, request_id: str, transfer_id: str, now_ns: int) -> list[Instruction]:
        transfer = self._by_id.get(transfer_id)
        if transfer is None:
            transfer = self._open(transfer_id, Held.WANTED, now_ns)
            if transfer is None:
                return []
        if transfer.request_id != request_id:
            transfer.request_id = request_id
            self._by_request[request_id] = transfer
        if transfer.state is Held.GONE:
            return [Lose(request_id, transfer.reason)]
        return self._take(transfer, HeldEvent.SCHEDULED, now_ns)

    def _open(self, transfer_id: str, state: Held, now_ns: int) -> HeldTransfer | None:
        if not self._free_slots:
            return None
        transfer = HeldTransfer(transfer_id, state, self._free_slots.pop(), now_ns + self._lease_ns)
        self._by_id[transfer_id] = transfer
        return transfer

    def _renew(self, transfer: HeldTransfer, now_ns: int) -> None:
        if transfer.state in (Held.COMPUTING, Held.HELD, Held.DRAINED):
            transfer.deadline_ns = now_ns + self._lease_ns

    def _each(self, transfers: list[HeldTransfer], event: HeldEvent, now_ns: int, reason: str) -> list[Instruction]:
        return [item for transfer in transfers for item in self._take(transfer, event, now_ns, reason)]

    def _take(self, transfer: HeldTransfer, event: HeldEvent, now_ns: int, reason: str = "") -> list[Instruction]:
        step = held_step(transfer.state, event)
        is_unread = event is HeldEvent.EXPIRED or (event is HeldEvent.DONE and not transfer.is_computed)
        is_lost = is_unread and bool(transfer.request_id) and transfer.state is not Held.GONE
        if step.state is Held.GONE and transfer.state is not Held.GONE:
            transfer.reason = reason
            transfer.deadline_ns = now_ns + TOMBSTONE_NS
            self._by_request.pop(transfer.request_id, None)
        if step.state is Held.HELD:
            transfer.deadline_ns = now_ns + self._lease_ns
        transfer.state = step.state
        instructions = [item for action in step.actions if (item := self._instruct(action, transfer)) is not None]
        return [*instructions, Lose(transfer.request_id, reason)] if is_lost else instructions

    def _instruct(self, action: Action, transfer: HeldTransfer) -> Instruction | None:
        if action is Action.PUBLISH:
            return Publish(transfer.transfer_id)
        if action is Action.REVOKE:
            return Revoke(transfer.slot)
        if action is Action.REPORT:
            return Report(transfer.request_id)
        return None if transfer.peer is None else TellAbort(transfer.peer, transfer.transfer_id, transfer.reason)

    def _forget(self, transfer: HeldTransfer) -> None:
        del self._by_id[transfer.transfer_id]
        self._by_request.pop(transfer.request_id, None)
        self._free_slots.append(transfer.slot)
