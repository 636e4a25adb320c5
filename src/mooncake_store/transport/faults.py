"""Wrap a transport so that it misbehaves as networks do, from a seed, the same way every time.

Put it around a medium in ``Media.of`` to see what a caller does with lost, late, cut, wrong and broken reads.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_store.errors import MooncakeError, PeerUnreachable, TransferFailed
from mooncake_store.transport.base import Attachment, LocalMemory, Offer, ReadBatch, ReadResult, RegionDescriptor
from mooncake_store.transport.copying import past_deadline
from mooncake_store.transport.media import ProbedTransport


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong, and how often (probabilities, 0 to 1).

    Attributes:
        seed: same seed and same calls, same faults.
        drop: per request: nothing is read, the request fails.
        truncate: per request: half of it is read, the request fails.
        corrupt: per request: one byte is wrong, and the request is reported as complete.
        detects_corruption: report corrupted requests as failed instead, as a medium with a checksum does.
        delay: per read: it starts ``delay_s`` late, or fails at its deadline.
        delay_s: seconds.
        reset: per read: it breaks off at some request, the rest fails.
        death_after_reads: after this many reads the owner is dead for good; -1 = never.
    """

    seed: int = 0
    drop: float = 0.0
    truncate: float = 0.0
    corrupt: float = 0.0
    detects_corruption: bool = False
    delay: float = 0.0
    delay_s: float = 0.01
    reset: float = 0.0
    death_after_reads: int = -1


class FaultyTransport:
    """Passes everything on to ``inner``, with the plan's faults in reads and, once dead, in attaching.

    Implements ``media.ProbedTransport``. Threads: as ``inner``; the order of faults follows the order of calls.

    Attributes:
        injected: how often each fault happened, by its name in the plan.
    """

    def __init__(self, inner: ProbedTransport, plan: FaultPlan) -> None:
        self.medium = inner.medium
        self.plan = plan
        self.injected: Counter[str] = Counter()
        self._inner = inner
        self._random = np.random.default_rng(plan.seed)
        self._lock = threading.Lock()
        self._num_reads = 0

    def probe(self) -> str:
        """Ask ``inner``."""
        return self._inner.probe()

    def serve(self, region_id: int, memory: LocalMemory) -> Offer | None:
        """Serve through ``inner``."""
        return self._inner.serve(region_id, memory)

    def withdraw(self, region_id: int) -> None:
        """Withdraw from ``inner``."""
        self._inner.withdraw(region_id)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> FaultyAttachment:
        """Attach through ``inner``; PeerUnreachable once the owner is dead."""
        if self.is_dead():
            raise PeerUnreachable("injected: the owner is dead", where=self.medium)
        return FaultyAttachment(self, self._inner.attach(region, deadline_ns=deadline_ns), region)

    def close(self) -> None:
        """Close ``inner``."""
        self._inner.close()

    def is_dead(self) -> bool:
        """Tell whether the owner is dead by now."""
        return 0 <= self.plan.death_after_reads <= self._num_reads

    def draw(self, count: int) -> tuple[npt.NDArray[np.float64], float, float, int]:
        """Draw one read's luck: per request, for delay, for reset, and where it would break off."""
        with self._lock:
            self._num_reads += 1
            return (self._random.random(count), float(self._random.random()), float(self._random.random()),
                    int(self._random.integers(count)))

    def note(self, fault: str, times: int = 1) -> None:
        """Count a fault."""
        if times:
            with self._lock:
                self.injected[fault] += times


class FaultyAttachment:
    """Reads through ``inner`` with faults. Implements ``base.Attachment``."""

    def __init__(self, transport: FaultyTransport, inner: Attachment, region: RegionDescriptor) -> None:
        self.medium = inner.medium
        self._transport = transport
        self._inner = inner
        self._region = region

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch, or some of it; see ``base.Attachment.read``."""
        batch.check(self._region.size_bytes)
        plan, note = self._transport.plan, self._transport.note
        if self._transport.is_dead():
            note("death_after_reads")
            return ReadResult.failed(batch, PeerUnreachable("injected: the owner is dead", where=self.medium))
        count = len(batch.lengths)
        luck, delay, reset, where = self._transport.draw(count)
        if delay < plan.delay:
            note("delay")
            time.sleep(max(0.0, min(plan.delay_s, (deadline_ns - time.monotonic_ns()) / 1e9)))
            if time.monotonic_ns() >= deadline_ns:
                return ReadResult.failed(batch, past_deadline(self.medium, 0, count))
        dropped = luck < plan.drop
        truncated = ~dropped & (luck < plan.drop + plan.truncate)
        corrupted = ~dropped & ~truncated & (luck < plan.drop + plan.truncate + plan.corrupt)
        if reset < plan.reset:
            note("reset")
            dropped[where:], truncated[where:], corrupted[where:] = True, False, False
        note("drop", int(dropped.sum()))
        note("truncate", int(truncated.sum()))
        note("corrupt", int(corrupted.sum()))
        return self._read(batch, dropped, truncated, corrupted, deadline_ns)

    def _read(self, batch: ReadBatch, dropped: npt.NDArray[np.bool_], truncated: npt.NDArray[np.bool_],
              corrupted: npt.NDArray[np.bool_], deadline_ns: int) -> ReadResult:
        lengths = np.where(truncated, batch.lengths // np.uint64(2), batch.lengths)
        asked = np.flatnonzero(~dropped & (lengths > 0))
        ok = np.zeros(len(lengths), np.bool_)
        error: MooncakeError | None = None
        if len(asked):
            result = self._inner.read(ReadBatch(batch.remote_offsets[asked], batch.local_addresses[asked],
                                                lengths[asked]), deadline_ns=deadline_ns)
            ok[asked], error = result.ok, result.error
        for index in np.flatnonzero(corrupted & ok).tolist():
            middle = int(batch.local_addresses[index]) + int(batch.lengths[index]) // 2
            ctypes.c_uint8.from_address(middle).value ^= 0x5A
        ok &= ~truncated
        if self._transport.plan.detects_corruption:
            ok &= ~corrupted
        if error is None and not ok.all():
            error = TransferFailed("injected: requests were lost, cut or corrupted", where=self.medium)
        return ReadResult.of(batch, ok, error)

    def close(self) -> None:
        """Close ``inner``."""
        self._inner.close()
