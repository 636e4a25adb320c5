"""Define what an engine's scheduler tells its workers for one step, and what they tell it back.

Pure and engine-neutral: an adapter fills a StepPlan from its scheduler and hands it to Producer, Consumer and Prefix.
Structs because they cross a process each step and must stay small and picklable.
"""

from __future__ import annotations

import msgspec

from mooncake_store.types import BlockKey


class PrefillStep(msgspec.Struct, array_like=True):
    """One forward step over a request that a decode engine waits for.

    Attributes:
        block_ids: the request's block table, from the prompt's first block.
        tokens_before: tokens whose KV is final before the step; the locally or pool-cached prefix counts.
        tokens_after: the same after it.
        tokens_needed: prompt tokens but the last: the decode engine computes that one itself.
        per_layer: publish after each layer, not only after the step.
        note: what the decode engine is told along with the step's last block; None when it is told nothing.
    """

    request_id: str
    transfer_id: str
    block_ids: list[int]
    tokens_before: int
    tokens_after: int
    tokens_needed: int
    per_layer: bool
    note: bytes | None = None


class Expected(msgspec.Struct, array_like=True):
    """A request with this transfer was queued; it may run much later."""

    request_id: str
    transfer_id: str


class Finished(msgspec.Struct, array_like=True):
    """A request ended.

    Attributes:
        transfer_id: its transfer, empty when no decode engine waits for it.
        delivered: the prefill is complete and worth reading.
        held: the engine keeps its blocks until the worker reports the request.
        num_blocks: blocks kept.
    """

    request_id: str
    transfer_id: str
    delivered: bool
    held: bool
    num_blocks: int


class HandoffLoad(msgspec.Struct, array_like=True):
    """Fill these blocks from a prefill worker.

    Attributes:
        addresses: control address of each of the prefill engine's workers, by TP rank.
        block_ids: our block table, from the prompt's first block.
        first_block: blocks before it are already here.
        tokens_needed: prompt tokens but the last.
        wants_note: the prefill engine's note is needed too.
    """

    request_id: str
    transfer_id: str
    addresses: list[str]
    block_ids: list[int]
    first_block: int
    tokens_needed: int
    wants_note: bool = False


class Announced(msgspec.Struct, array_like=True):
    """A request that will ask for this transfer has arrived: subscribe ahead, keep the lease alive."""

    request_id: str
    transfer_id: str
    addresses: list[str]


class PoolLoad(msgspec.Struct, array_like=True):
    """Fill these blocks from the pool; ``revision`` is what the scheduler's view had seen when it matched."""

    request_id: str
    keys: list[list[BlockKey]]
    block_ids: list[int]
    revision: int


class PoolSave(msgspec.Struct, array_like=True):
    """Save these blocks once the step is over; ``keys`` by TP rank."""

    request_id: str
    keys: list[list[BlockKey]]
    block_ids: list[int]


class StepPlan(msgspec.Struct, kw_only=True):
    """Everything for one step. ``is_empty``: the engine computes nothing in it."""

    expected: list[Expected] = []
    prefills: list[PrefillStep] = []
    finished: list[Finished] = []
    preempted: list[str] = []
    announced: list[Announced] = []
    handoffs: list[HandoffLoad] = []
    cancelled: list[str] = []
    pool_loads: list[PoolLoad] = []
    pool_saves: list[PoolSave] = []
    is_empty: bool = False


class StepResults(msgspec.Struct, kw_only=True):
    """What finished since the last step; each request is named once.

    Attributes:
        sent: requests whose held blocks may be freed.
        received: parked requests whose wait is over, good or bad.
        bad_blocks: blocks of ``received`` requests that were not filled.
        notes: what the prefill engine had to say, by ``received`` request.
        lost: why, by request: a ``received`` one that was not filled, or one of ours that nobody will fetch any more.
    """

    sent: set[str] = msgspec.field(default_factory=set)
    received: set[str] = msgspec.field(default_factory=set)
    bad_blocks: set[int] = msgspec.field(default_factory=set)
    notes: dict[str, bytes] = msgspec.field(default_factory=dict)
    lost: dict[str, str] = msgspec.field(default_factory=dict)


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """How the wait of one parked request ended. ``reason``: why it was not filled, empty when it was."""

    request_id: str
    bad_blocks: list[int] = []
    note: bytes | None = None
    reason: str = ""
