"""Keep the state of pulls at the decode side.

Pure: no sockets, threads or clocks; lifecycle.PULL_TABLE decides. Not thread-safe: one peer thread owns its pulls.
"""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from mooncake_connector.kv.layout import U64, KVLayout
from mooncake_connector.kv.plan import PagePlan, plan_pull, ready_per_layer
from mooncake_connector.transfer.lifecycle import Pull, PullEvent, PullStep, pull_step
from mooncake_connector.transfer.messages import Ready
from mooncake_connector.transfer.steps import HandoffLoad


@dataclasses.dataclass(slots=True)
class PullTransfer:
    """One transfer as the decode side knows it.

    Attributes:
        load: what the engine asked for; None while only announced.
        ready: the newest Ready, with the block ids of an earlier one where it named none.
        pulled: leading blocks that are here, per layer; None before ``load``.
        progress_ns: when it last came further; waits are bounded from here.
        started_ns: when the engine gave us blocks.
        reason: why it was lost.
    """

    transfer_id: str
    request_id: str
    progress_ns: int
    state: Pull = Pull.ANNOUNCED
    load: HandoffLoad | None = None
    ready: Ready | None = None
    pulled: U64 | None = None
    started_ns: int = 0
    is_verifying: bool = False
    reason: str = ""

    def start(self, load: HandoffLoad, num_layers: int, now_ns: int) -> PullStep:
        """The engine gave us blocks to fill."""
        self.load, self.started_ns, self.progress_ns = load, now_ns, now_ns
        self.pulled = np.full(num_layers, load.first_block, np.uint64)
        return self.take(PullEvent.STARTED)

    def update(self, message: Ready) -> None:
        """Take over what the prefill says; an older list of block ids stays valid until a new one comes."""
        block_ids = message.block_ids
        if block_ids is None:
            block_ids = self.ready.block_ids if self.ready and self.ready.block_ids else []
        self.ready = msgspec.structs.replace(message, block_ids=block_ids)

    def plan(self, source: KVLayout, target: KVLayout) -> tuple[PagePlan, U64] | None:
        """Return what can be copied now and how far it brings us; None when there is nothing new."""
        if self.load is None or self.pulled is None or self.ready is None:
            return None
        if self.state not in (Pull.WAITING, Pull.READING):
            return None
        ready = ready_per_layer(self.ready.progress, self.load.tokens_needed, target)
        plan = plan_pull(source=source, target=target, source_blocks=self.ready.block_ids or [],
                         target_blocks=self.load.block_ids, pulled=self.pulled, ready=ready)
        return (plan, ready) if len(plan) else None

    def advance(self, ready: U64) -> None:
        """A copy up to ``ready`` arrived and its epoch still held."""
        if self.pulled is not None:
            self.pulled = np.maximum(self.pulled, ready)

    @property
    def is_complete(self) -> bool:
        """Return whether every needed block is here in every layer, and the note where one is needed."""
        if self.load is None or self.pulled is None or (self.load.wants_note and self.note is None):
            return False
        return int(self.pulled.min()) >= self.num_blocks

    @property
    def note(self) -> bytes | None:
        """Return what the prefill engine said along with its last block."""
        return self.ready.note if self.ready else None

    @property
    def num_blocks(self) -> int:
        """Return how many leading blocks are needed, the tail included; computed from what the engine gave us."""
        return len(self.load.block_ids) if self.load else 0

    def bad_blocks(self) -> list[int]:
        """Return our block ids that were not filled; the pulled prefix is kept."""
        if self.load is None or self.pulled is None:
            return []
        return self.load.block_ids[int(self.pulled.min()): self.num_blocks]

    def take(self, event: PullEvent) -> PullStep:
        """Apply an event. Raises: LocalProtocolError where the table forbids it."""
        step = pull_step(self.state, event)
        self.state = step.state
        return step


