"""Carry out one pull plan in the caller's thread, serving all its peers at the same time.

While one peer's slice is copied the others' answers queue up in their sockets; between two slices they are served and
leases are renewed. Threading model: one round, one thread.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import MooncakeError
from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import GetOutcome, PeerAddress, Pulled, Runs
from mooncake_store.pull.link import Attacher, PeerLink
from mooncake_store.pull.peers import Peers
from mooncake_store.pull.planner import Batch
from mooncake_store.pull.session import Attach, Drop, Finish, Instruction, Read, ReadItem, Send, Settle, Verdict
from mooncake_store.pull.wire import WireError
from mooncake_store.transport.base import ReadBatch
from mooncake_store.transport.checksum import checksum_of, is_comparable
from mooncake_store.types import BlockKey, NodeId

POLL_MAX_MS = 50


class RoundResult(NamedTuple):
    """What a round found out: the fate of every position of its plan, and which (peer, key) entries were stale."""

    pulled: dict[int, Pulled]
    stale: list[tuple[NodeId, BlockKey]]


class _Active:
    """One batch under way on one link."""

    __slots__ = ("batch", "link", "read")

    def __init__(self, batch: Batch, link: PeerLink) -> None:
        self.batch = batch
        self.link = link
        self.read: Read | None = None


class PullRound:
    """One round of one pull; use once.

    Args:
        targets: where each block goes, by position.
        deadline_ns: CLOCK_MONOTONIC.
        is_verifying: compare checksums.
        closing: set when the process wants this to end.
    """

    def __init__(self, peers: Peers, media: Attacher, targets: Sequence[Runs], *, deadline_ns: int, metrics: Metrics,
                 is_verifying: bool, closing: threading.Event) -> None:
        self._peers = peers
        self._media = media
        self._targets = targets
        self._deadline_ns = deadline_ns
        self._metrics = metrics
        self._is_verifying = is_verifying
        self._closing = closing
        self._waiting: dict[NodeId, deque[Batch]] = {}
        self._active: dict[int, _Active] = {}  # by the connection's descriptor; at most one of each peer
        self._busy: set[NodeId] = set()
        self._result = RoundResult({}, [])

    def run(self, batches: Sequence[Batch], addresses: Mapping[NodeId, PeerAddress]) -> RoundResult:
        """Pull every batch; returns when each of their blocks is settled."""
        for batch in batches:
            self._waiting.setdefault(batch.peer, deque()).append(batch)
        try:
            while self._waiting or self._active:
                now_ns = time.monotonic_ns()
                if self._closing.is_set():
                    break
                if now_ns >= self._deadline_ns:
                    # What is under way ends by itself: its waits and reads have this deadline too.
                    self._give_up_all("the deadline passed")
                if self._waiting:
                    self._start(addresses)
                if self._active:
                    self._step()
                elif self._waiting:
                    self._peers.wait(min(0.05, max(0.0, (self._deadline_ns - now_ns) / 1e9)))
        finally:
            for active in list(self._active.values()):
                self._carry_out(active, active.link.session.abandon("the store is closing"))
            self._give_up_all("the store is closing")
        return self._result

    def _start(self, addresses: Mapping[NodeId, PeerAddress]) -> None:
        for node_id in [node_id for node_id in self._waiting if node_id not in self._busy]:
            batches = self._waiting[node_id]
            try:
                link = self._peers.try_begin(addresses[node_id], batches[0].num_bytes)
            except MooncakeError as error:
                del self._waiting[node_id]
                self._peers.blame(node_id, error.message, time.monotonic_ns())
                self._give_up(batches, node_id, error.message)
                continue
            if link is None:
                continue
            active = self._active[link.channel.fd] = _Active(batches.popleft(), link)
            if not batches:
                del self._waiting[node_id]
            self._busy.add(node_id)
            now_ns = time.monotonic_ns()
            self._carry_out(active, link.session.begin(active.batch, now_ns, deadline_ns=self._deadline_ns))

    def _step(self) -> None:
        """Wait for what comes next, take it in, then read at most one slice per peer."""
        poller = select.poll()
        for fd, active in self._active.items():
            poller.register(fd, active.link.channel.events)
        for fd, _ in poller.poll(self._poll_timeout_ms()):
            self._take_messages(self._active[fd])
        now_ns = time.monotonic_ns()
        for active in list(self._active.values()):
            session = active.link.session
            wake_ns = session.wake_ns
            if wake_ns is not None and now_ns >= wake_ns:
                self._carry_out(active, session.on_tick(now_ns))
            read, active.read = active.read, None
            if read is not None:
                verdicts = self._read(active.link, read)
                self._carry_out(active, session.on_slice(verdicts, time.monotonic_ns()))

    def _poll_timeout_ms(self) -> int:
        soonest_ns = self._deadline_ns
        for active in self._active.values():
            if active.read is not None:
                return 0
            wake_ns = active.link.session.wake_ns
            if wake_ns is not None and wake_ns < soonest_ns:
                soonest_ns = wake_ns
        # round up: a millisecond early would spin until it is time
        return max(0, min(POLL_MAX_MS, -((time.monotonic_ns() - soonest_ns) // 1_000_000)))

    def _take_messages(self, active: _Active) -> None:
        link = active.link
        lost_reason = link.exchange()
        while self._is_active(active):  # a link that was given back may already be another thread's
            try:
                message = link.channel.take()
            except WireError as error:
                self._metrics.add("mooncake_protocol_errors_total", reason=error.reason)
                self._carry_out(active, link.session.on_invalid(error.message))
                return
            if message is None:
                break
            self._carry_out(active, link.session.on_message(message, time.monotonic_ns()))
        if lost_reason and self._is_active(active):
            self._carry_out(active, link.session.on_lost(lost_reason))

    def _carry_out(self, active: _Active, instructions: Sequence[Instruction]) -> None:
        link, node_id = active.link, active.link.peer.node_id
        for instruction in instructions:
            match instruction:
                case Settle(want, pulled, is_stale):
                    self._result.pulled[want.position] = pulled
                    if is_stale:
                        self._result.stale.append((node_id, want.key))
                case Send(message):
                    link.send(message)
                case Read():
                    active.read = instruction
                case Finish():
                    self._end(active, is_reusable=True)
                case Attach(region, deadline_ns):
                    error = link.attach(self._media, region, deadline_ns=deadline_ns)
                    self._carry_out(active, link.session.on_attached(error, time.monotonic_ns()))
                case Drop(reason, is_blamed):
                    self._end(active, is_reusable=False)
                    if is_blamed:
                        self._peers.blame(node_id, reason, time.monotonic_ns())
                        self._give_up(self._waiting.pop(node_id, deque()), node_id, reason)

    def _read(self, link: PeerLink, read: Read) -> tuple[Verdict, ...]:
        """Move and verify one slice."""
        runs = [self._targets[item.want.position] for item in read.items]
        ranges = np.array([piece for run in runs for piece in run], np.uint64)
        medium, reason, is_here = self._read_leased(link, read, runs, ranges)
        verdicts: list[Verdict] = []
        start = 0
        for item, run in zip(read.items, runs, strict=True):
            end = start + len(run)
            if all(is_here[start:end]):
                verdicts.append(self._judge(item, medium, ranges[start:end]))
            else:
                verdicts.append(Verdict("failed", medium, reason))
            start = end
        return tuple(verdicts)

    def _read_leased(self, link: PeerLink, read: Read, runs: Sequence[Runs],
                     ranges: npt.NDArray[np.uint64]) -> tuple[str, str, list[bool]]:
        """Read out of the owner's region; return the medium, the first failure, and what of the ranges arrived."""
        attachment = link.attachment
        if attachment is None:
            return "", "the region is not open", [False] * len(ranges)
        offsets = [offset for item, run in zip(read.items, runs, strict=True)
                   for offset in accumulate((length for _, length in run[:-1]), initial=item.entry.offset)]
        batch = ReadBatch(np.array(offsets, np.uint64), ranges[:, 0].copy(), ranges[:, 1].copy(),
                          is_verified_later=self._is_verifying)
        try:
            result = attachment.read(batch, deadline_ns=read.deadline_ns)
        except MooncakeError as error:
            return "", f"cannot read: {error.message}", [False] * len(ranges)
        reason = result.error.message if result.error is not None else "the read did not complete"
        return attachment.medium, reason, result.ok.tolist()

    def _judge(self, item: ReadItem, medium: str, ranges: npt.NDArray[np.uint64]) -> Verdict:
        """Say whether a block that has arrived is the one that was stored."""
        if not self._is_verifying:
            return Verdict("ok", medium)
        if not is_comparable(item.entry.checksum):
            return Verdict("failed", medium, "the owner's checksum is of another kind than ours")
        if checksum_of(ranges) != item.entry.checksum:
            return Verdict("corrupt", medium, "the bytes do not have the owner's checksum")
        return Verdict("ok", medium, is_verified=True)

    def _is_active(self, active: _Active) -> bool:
        return self._active.get(active.link.channel.fd) is active

    def _fail(self, position: int, reason: str, node_id: NodeId) -> None:
        if position not in self._result.pulled:
            self._result.pulled[position] = Pulled(GetOutcome("failed", "", 0, reason), 0, node_id)

    def _give_up(self, batches: Sequence[Batch], node_id: NodeId, reason: str) -> None:
        for batch in batches:
            for want in batch.wants:
                self._fail(want.position, reason, node_id)

    def _give_up_all(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for node_id, batches in waiting.items():
            self._give_up(batches, node_id, reason)

    def _end(self, active: _Active, *, is_reusable: bool) -> None:
        link = active.link
        del self._active[link.channel.fd]
        self._busy.remove(link.peer.node_id)
        active.read = None
        self._peers.end(link, active.batch.num_bytes, is_reusable=is_reusable)
