"""Carry out one pull plan in the caller's thread, serving all its peers at the same time.

While one peer's slice is copied the others' answers queue up in their sockets; between two slices they are served and
leases are renewed. Threading model: one round, one thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import zmq

from mooncake_store.errors import MooncakeError
from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import GetOutcome, PeerAddress, Pulled
from mooncake_store.pull.link import Attacher, PeerLink
from mooncake_store.pull.peers import Peers
from mooncake_store.pull.planner import Batch
from mooncake_store.pull.session import Attach, Drop, Finish, Instruction, Read, Send, Settle, Verdict
from mooncake_store.pull.wire import WireError
from mooncake_store.transport.base import ReadBatch
from mooncake_store.transport.checksum import checksum_of, is_comparable
from mooncake_store.types import BlockKey, NodeId

POLL_MAX_MS = 50
MESSAGES_PER_POLL_MAX = 16


class Target(NamedTuple):
    """Where one block goes: (address, length) runs in image order."""

    runs: tuple[tuple[int, int], ...]
    num_bytes: int


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
        targets: by position.
        deadline_ns: CLOCK_MONOTONIC.
        is_verifying: compare checksums.
        closing: set when the process wants this to end.
    """

    def __init__(self, peers: Peers, media: Attacher, targets: Sequence[Target], *, deadline_ns: int, metrics: Metrics,
                 is_verifying: bool, closing: threading.Event) -> None:
        self._peers = peers
        self._media = media
        self._targets = targets
        self._deadline_ns = deadline_ns
        self._metrics = metrics
        self._is_verifying = is_verifying
        self._closing = closing
        self._poller = zmq.Poller()
        self._active: dict[NodeId, _Active] = {}
        self._result = RoundResult({}, [])

    def run(self, batches: Sequence[Batch], addresses: Mapping[NodeId, PeerAddress]) -> RoundResult:
        """Pull every batch; returns when each of their blocks is settled."""
        waiting: dict[NodeId, deque[Batch]] = {}
        for batch in batches:
            waiting.setdefault(batch.peer, deque()).append(batch)
        try:
            while waiting or self._active:
                now_ns = time.monotonic_ns()
                if self._closing.is_set():
                    break
                if now_ns >= self._deadline_ns:
                    # What is under way ends by itself: its waits and reads have this deadline too.
                    self._give_up_all(waiting, "the deadline passed")
                self._start(waiting, addresses)
                if self._active:
                    self._step(waiting)
                elif waiting:
                    self._peers.wait(min(0.05, max(0.0, (self._deadline_ns - now_ns) / 1e9)))
        finally:
            for active in list(self._active.values()):
                self._carry_out(active, active.link.session.abandon("the store is closing"), waiting)
            self._give_up_all(waiting, "the store is closing")
        return self._result

    def _start(self, waiting: dict[NodeId, deque[Batch]], addresses: Mapping[NodeId, PeerAddress]) -> None:
        for node_id in list(waiting):
            if node_id in self._active:
                continue
            batch = waiting[node_id][0]
            try:
                link = self._peers.try_begin(addresses[node_id], batch.num_bytes)
            except zmq.ZMQError as error:
                self._give_up(waiting.pop(node_id), node_id, f"cannot connect to {addresses[node_id].control}: {error}")
                continue
            if link is None:
                continue
            waiting[node_id].popleft()
            if not waiting[node_id]:
                del waiting[node_id]
            self._active[node_id] = active = _Active(batch, link)
            self._poller.register(link.socket, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)
            now_ns = time.monotonic_ns()
            self._carry_out(active, link.session.begin(batch, now_ns, deadline_ns=self._deadline_ns), waiting)

    def _step(self, waiting: dict[NodeId, deque[Batch]]) -> None:
        """Wait for what comes next, take it in, then read at most one slice per peer."""
        ready = dict(self._poller.poll(self._poll_timeout_ms()))
        for active in list(self._active.values()):
            link = active.link
            if link.socket in ready:
                self._take_messages(active, waiting)
            # A link that was given back may already be another thread's.
            if self._is_active(active) and link.monitor in ready and (reason := link.lost_reason()):
                self._carry_out(active, link.session.on_lost(reason), waiting)
            if self._is_active(active):
                self._carry_out(active, link.session.on_tick(time.monotonic_ns()), waiting)
        for active in list(self._active.values()):
            read, active.read = active.read, None
            if read is not None:
                verdicts = self._read(active.link, read)
                self._carry_out(active, active.link.session.on_slice(verdicts, time.monotonic_ns()), waiting)

    def _poll_timeout_ms(self) -> int:
        if any(active.read is not None for active in self._active.values()):
            return 0
        wakes = [active.link.session.wake_ns for active in self._active.values()]
        soonest_ns = min([wake for wake in wakes if wake is not None] + [self._deadline_ns])
        # round up: a millisecond early would spin until it is time
        return max(0, min(POLL_MAX_MS, -(-(soonest_ns - time.monotonic_ns()) // 1_000_000)))

    def _take_messages(self, active: _Active, waiting: dict[NodeId, deque[Batch]]) -> None:
        for _ in range(MESSAGES_PER_POLL_MAX):
            if not self._is_active(active):
                return
            try:
                message = active.link.receive()
            except WireError as error:
                self._metrics.add("mooncake_protocol_errors_total", reason=error.reason)
                self._carry_out(active, active.link.session.on_invalid(error.message), waiting)
                return
            if message is None:
                return
            self._carry_out(active, active.link.session.on_message(message, time.monotonic_ns()), waiting)

    def _carry_out(self, active: _Active, instructions: Sequence[Instruction],
                   waiting: dict[NodeId, deque[Batch]]) -> None:
        link, node_id = active.link, active.link.peer.node_id
        todo = deque(instructions)
        while todo:
            instruction = todo.popleft()
            match instruction:
                case Send(message):
                    link.send(message)
                case Settle(want, pulled, is_stale):
                    self._result.pulled[want.position] = pulled
                    if is_stale:
                        self._result.stale.append((node_id, want.key))
                case Read():
                    active.read = instruction
                case Attach(region, deadline_ns):
                    error = link.attach(self._media, region, deadline_ns=deadline_ns)
                    todo.extend(link.session.on_attached(error, time.monotonic_ns()))
                case Finish():
                    self._end(active, is_reusable=True)
                case Drop(reason, is_blamed):
                    active.read = None
                    self._end(active, is_reusable=False)
                    if is_blamed:
                        self._peers.blame(node_id, reason, time.monotonic_ns())
                        self._give_up(waiting.pop(node_id, deque()), node_id, reason)

    def _read(self, link: PeerLink, read: Read) -> tuple[Verdict, ...]:
        """Move and verify one slice."""
        attachment = link.attachment
        if attachment is None:
            return tuple(Verdict("failed", "", "the region is not open") for _ in read.items)
        runs = [self._targets[item.want.position].runs for item in read.items]
        addresses = np.array([address for run in runs for address, _ in run], dtype=np.uint64)
        lengths = np.array([length for run in runs for _, length in run], dtype=np.uint64)
        offsets = np.concatenate([_offsets(item.entry.offset, run) for item, run in zip(read.items, runs, strict=True)])
        try:
            result = attachment.read(ReadBatch(offsets, addresses, lengths), deadline_ns=read.deadline_ns)
        except MooncakeError as error:
            return tuple(Verdict("failed", "", f"cannot read: {error.message}") for _ in read.items)
        medium = attachment.medium
        reason = result.error.message if result.error is not None else "the read did not complete"
        verdicts: list[Verdict] = []
        start = 0
        for item, run in zip(read.items, runs, strict=True):
            end = start + len(run)
            if not bool(result.ok[start:end].all()):
                verdicts.append(Verdict("failed", medium, reason))
            elif not self._is_verifying:
                verdicts.append(Verdict("ok", medium))
            elif not is_comparable(item.entry.checksum):
                verdicts.append(Verdict("failed", medium, "the owner's checksum is of another kind than ours"))
            elif checksum_of(np.array(run, np.uint64)) == item.entry.checksum:
                verdicts.append(Verdict("ok", medium, is_verified=True))
            else:
                verdicts.append(Verdict("corrupt", medium, "the bytes do not have the owner's checksum"))
            start = end
        return tuple(verdicts)

    def _is_active(self, active: _Active) -> bool:
        return self._active.get(active.link.peer.node_id) is active

    def _fail(self, position: int, reason: str, node_id: NodeId) -> None:
        if position not in self._result.pulled:
            self._result.pulled[position] = Pulled(GetOutcome("failed", "", 0, reason), 0, node_id)

    def _give_up(self, batches: Sequence[Batch], node_id: NodeId, reason: str) -> None:
        for batch in batches:
            for want in batch.wants:
                self._fail(want.position, reason, node_id)

    def _give_up_all(self, waiting: dict[NodeId, deque[Batch]], reason: str) -> None:
        for node_id in list(waiting):
            self._give_up(waiting.pop(node_id), node_id, reason)

    def _end(self, active: _Active, *, is_reusable: bool) -> None:
        link = active.link
        del self._active[link.peer.node_id]
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        self._peers.end(link, active.batch.num_bytes, is_reusable=is_reusable)


def _offsets(start: int, runs: Sequence[tuple[int, int]]) -> np.ndarray:
    lengths = [length for _, length in runs]
    return np.cumsum(np.array([start, *lengths[:-1]], dtype=np.uint64), dtype=np.uint64)
