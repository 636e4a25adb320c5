"""Wrap a transport so that it misbehaves as networks do, from a seed, the same way every time.

Put it around a medium in ``Media.of`` to see what a caller does with lost, late, cut, wrong and broken reads.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from typing import NamedTuple

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
        slow: per read: the owner answers one request at a time, ``slow_s`` apart; what is not there at the deadline
            fails.
        slow_s: seconds.
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
    slow: float = 0.0
    slow_s: float = 0.002
    reset: float = 0.0
    death_after_reads: int = -1


class _Luck(NamedTuple):
    """One read's draw, 0 to 1: per request, and for the read; ``where`` is the request at which it would break off."""

    requests: npt.NDArray[np.float64]
    delay: float
    slow: float
    reset: float
    where: int


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

    def draw(self, count: int) -> _Luck:
        """Draw the luck of a read of ``count`` requests."""
        with self._lock:
            self._num_reads += 1
            delay, slow, reset = self._random.random(3).tolist()
            return _Luck(self._random.random(count), delay, slow, reset, int(self._random.integers(count)))

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
        luck = self._transport.draw(count)
        if luck.delay < plan.delay:
            note("delay")
            _sleep(plan.delay_s, deadline_ns)
            if time.monotonic_ns() >= deadline_ns:
                return ReadResult.failed(batch, past_deadline(self.medium, 0, count))
        dropped = luck.requests < plan.drop
        truncated = ~dropped & (luck.requests < plan.drop + plan.truncate)
        corrupted = ~dropped & ~truncated & (luck.requests < plan.drop + plan.truncate + plan.corrupt)
        if luck.reset < plan.reset:
            note("reset")
            dropped[luck.where:], truncated[luck.where:], corrupted[luck.where:] = True, False, False
        is_slow = luck.slow < plan.slow
        note("slow", int(is_slow))
        note("drop", int(dropped.sum()))
        note("truncate", int(truncated.sum()))
        lengths = np.where(truncated, batch.lengths // np.uint64(2), batch.lengths)
        asked = np.flatnonzero(~dropped & (lengths > 0))
        ok = np.zeros(count, np.bool_)
        error: MooncakeError | None = None
        if len(asked):
            part = ReadBatch(batch.remote_offsets[asked], batch.local_addresses[asked], lengths[asked],
                             batch.is_verified_later)
            result = (self._trickle if is_slow else self._inner.read)(part, deadline_ns=deadline_ns)
            ok[asked], error = result.ok, result.error
        ok &= ~truncated
        self._corrupt(batch, corrupted & ok)
        if plan.detects_corruption:
            ok &= ~corrupted
        if error is None and not ok.all():
            error = TransferFailed("injected: requests were lost, cut or corrupted", where=self.medium)
        return ReadResult.of(batch, ok, error)

    def _trickle(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Read one request at a time, with a pause before each."""
        count = len(batch.lengths)
        ok = np.zeros(count, np.bool_)
        error: MooncakeError | None = None
        for index in range(count):
            _sleep(self._transport.plan.slow_s, deadline_ns)
            if time.monotonic_ns() >= deadline_ns:
                error = error or past_deadline(self.medium, index, count)
                break
            one = slice(index, index + 1)
            result = self._inner.read(ReadBatch(batch.remote_offsets[one], batch.local_addresses[one],
                                                batch.lengths[one], batch.is_verified_later), deadline_ns=deadline_ns)
            ok[index] = result.ok[0]
            error = error or result.error
        return ReadResult.of(batch, ok, error)

    def _corrupt(self, batch: ReadBatch, corrupted: npt.NDArray[np.bool_]) -> None:
        for index in np.flatnonzero(corrupted).tolist():
            middle = int(batch.local_addresses[index]) + int(batch.lengths[index]) // 2
            ctypes.c_uint8.from_address(middle).value ^= 0x5A
        self._transport.note("corrupt", int(corrupted.sum()))

    def close(self) -> None:
        """Close ``inner``."""
        self._inner.close()


def _sleep(seconds: float, deadline_ns: int) -> None:
    time.sleep(max(0.0, min(seconds, (deadline_ns - time.monotonic_ns()) / 1e9)))
