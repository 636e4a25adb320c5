"""Decide what a reader says to one peer and reads from it: a state machine without I/O.

Pure. Feed it what happened (``begin``, ``on_message``, ``on_attached``, ``on_slice``, ``on_lost``, ``on_tick``) and
carry out the instructions that come back, in order. Every block of a begun batch is settled exactly once.

``TRANSITIONS`` is the whole life of a session; an event that is missing in a state's row is a bug here
(LocalProtocolError), except that a stray message from the peer is ignored: it answers a question we gave up on.

Why a lease is trusted only until ``sent + ttl``: the owner counts from when the question *arrived*, which is later, so
the owner's promise outlives ours whatever the clocks say.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal, NamedTuple

from mooncake_store.errors import LocalProtocolError
from mooncake_store.pull.base import GetOutcome, GetResult, PeerAddress, Pulled
from mooncake_store.pull.planner import Batch, Want
from mooncake_store.pull.wire import (
    Acquire,
    BlockEntry,
    Denied,
    Granted,
    Hello,
    Message,
    Release,
    Renew,
    Renewed,
    Report,
    Welcome,
)
from mooncake_store.transport.base import RegionDescriptor
from mooncake_store.types import HostIdentity

SLICE_MAX_BYTES = 8 << 20
"""Bytes read in one go; between two slices leases are renewed and other peers are served."""

BLAME_AFTER_NS = 250_000_000
"""A peer that kept us waiting less than this is not blamed: our own deadline was short."""


class State(Enum):
    """Where a session is."""

    __hash__ = object.__hash__  # Enum's own is written in Python, and each step looks two of these up

    NEW = "new"
    GREETING = "greeting"
    ATTACHING = "attaching"
    IDLE = "idle"
    ACQUIRING = "acquiring"
    READING = "reading"
    DRAINING = "draining"
    DEAD = "dead"


class Event(Enum):
    """What can happen to it."""

    __hash__ = object.__hash__

    BEGUN = "begun"
    WELCOMED = "welcomed"
    ATTACHED = "attached"
    ATTACH_FAILED = "attach_failed"
    GRANTED = "granted"
    GRANTED_NOTHING = "granted_nothing"
    DENIED = "denied"
    DISOWNED = "disowned"
    READ_SOME = "read_some"
    READ_ALL = "read_all"
    READ_FAILED = "read_failed"
    LOST = "lost"
    OVERDUE = "overdue"
    INVALID = "invalid"


_GIVE_UP = {Event.LOST: State.DEAD, Event.OVERDUE: State.DEAD, Event.INVALID: State.DEAD}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.NEW: {Event.BEGUN: State.GREETING, **_GIVE_UP},
    State.GREETING: {Event.WELCOMED: State.ATTACHING, Event.DENIED: State.DEAD, Event.DISOWNED: State.DEAD, **_GIVE_UP},
    State.ATTACHING: {Event.ATTACHED: State.ACQUIRING, Event.ATTACH_FAILED: State.DEAD, **_GIVE_UP},
    State.IDLE: {Event.BEGUN: State.ACQUIRING, **_GIVE_UP},
    State.ACQUIRING: {Event.GRANTED: State.READING, Event.GRANTED_NOTHING: State.IDLE, Event.DENIED: State.IDLE,
                      Event.DISOWNED: State.DEAD, **_GIVE_UP},
    State.READING: {Event.READ_SOME: State.READING, Event.READ_ALL: State.IDLE, Event.READ_FAILED: State.DEAD,
                    Event.INVALID: State.DEAD,
                    # A medium that maps the owner's memory still reads it after the owner's death, and the checksum
                    # tells: finish what was granted, then never ask again.
                    Event.LOST: State.DRAINING},
    State.DRAINING: {Event.READ_SOME: State.DRAINING, Event.READ_ALL: State.DEAD, Event.READ_FAILED: State.DEAD,
                     Event.LOST: State.DRAINING, Event.INVALID: State.DEAD},
    State.DEAD: {Event.LOST: State.DEAD, Event.INVALID: State.DEAD, Event.OVERDUE: State.DEAD},
}


class Send(NamedTuple):
    """Send a message to the peer."""

    message: Message


class Attach(NamedTuple):
    """Open the peer's region, then call ``on_attached``."""

    region: RegionDescriptor
    deadline_ns: int


class ReadItem(NamedTuple):
    """One leased block and where it is."""

    want: Want
    entry: BlockEntry


class Read(NamedTuple):
    """Read and verify these blocks, then call ``on_slice``."""

    items: tuple[ReadItem, ...]
    deadline_ns: int


class Settle(NamedTuple):
    """The fate of one block is known; ``is_stale`` when the peer does not have what the directory says it has."""

    want: Want
    pulled: Pulled
    is_stale: bool = False


class Finish(NamedTuple):
    """Every block of the batch is settled and the session can begin another."""


class Drop(NamedTuple):
    """Close the link; every block is settled. ``is_blamed`` when the peer should not be asked again for a while."""

    reason: str
    is_blamed: bool


Instruction = Send | Attach | Read | Settle | Finish | Drop


class Verdict(NamedTuple):
    """What the medium and the checksum said of one block; ``is_verified`` when its checksum was compared."""

    result: Literal["ok", "corrupt", "failed"]
    medium: str
    reason: str = ""
    is_verified: bool = False


class PeerSession:
    """One reader's conversation with one life of one peer.

    Args:
        peer: whom we believe to talk to; another identity in the answer ends the session.
        node_id, host, version: what we say of ourselves.
        lease_ttl_ms: what we ask for.
        answer_timeout_ns: longest wait for an answer.
    """

    def __init__(self, peer: PeerAddress, *, node_id: str, host: HostIdentity, version: str, lease_ttl_ms: int,
                 answer_timeout_ns: int) -> None:
        self.state = State.NEW
        self._peer = peer
        self._hello = (node_id, host, version)
        self._lease_ttl_ms = lease_ttl_ms
        self._answer_timeout_ns = answer_timeout_ns
        self._region: RegionDescriptor | None = None
        self._open: dict[int, Want] = {}  # position -> block not settled yet
        self._deadline_ns = 0
        self._request_id = 0
        self._asked_ns = 0
        self._answer_due_ns = 0
        self._lease_id = 0
        self._lease_until_ns = 0
        self._renewal: tuple[int, int] = (0, 0)  # request id (0: none under way), when sent
        self._renewed_ns = 0
        self._unread: list[ReadItem] = []
        self._reading: tuple[ReadItem, ...] = ()

    def begin(self, batch: Batch, now_ns: int, *, deadline_ns: int) -> list[Instruction]:
        """Start on a batch; allowed in NEW and IDLE."""
        is_new = self.state is State.NEW
        self._go(Event.BEGUN)
        self._open, self._deadline_ns = {want.position: want for want in batch.wants}, deadline_ns
        if not is_new:
            return self._acquire(now_ns)
        node_id, host, version = self._hello
        return [self._ask(Hello(self._next_id(), node_id, host, version), now_ns)]

    def on_message(self, message: Message, now_ns: int) -> list[Instruction]:
        """Take a message of the peer."""
        request_id = getattr(message, "request_id", -1)
        if self._renewal[0] and request_id == self._renewal[0] and isinstance(message, Renewed | Denied):
            return self._on_renewal(message)
        if isinstance(message, Denied) and request_id == 0:
            return self._end(Event.INVALID, f"peer cannot read us: {message.reason} {message.detail}".strip())
        if request_id != self._request_id or self.state not in (State.GREETING, State.ACQUIRING):
            return []
        if isinstance(message, Denied):
            return self._on_denied(message)
        if isinstance(message, Welcome) and self.state is State.GREETING:
            return self._on_welcome(message, now_ns)
        if isinstance(message, Granted) and self.state is State.ACQUIRING:
            return self._on_granted(message, now_ns)
        return self._end(Event.INVALID, f"peer answered with {type(message).__name__} in state {self.state.value}")

    def on_attached(self, error: str, now_ns: int) -> list[Instruction]:
        """Say whether the region could be opened; ``error`` is empty when it could."""
        if error:
            return self._end(Event.ATTACH_FAILED, error)
        self._go(Event.ATTACHED)
        return self._acquire(now_ns)

    def on_slice(self, verdicts: tuple[Verdict, ...], now_ns: int) -> list[Instruction]:
        """Take the verdicts on the blocks of the last ``Read``, in its order."""
        if len(verdicts) != len(self._reading):
            raise LocalProtocolError(f"{len(verdicts)} verdicts on {len(self._reading)} blocks")
        items, self._reading = self._reading, ()
        instructions: list[Instruction] = []
        is_over = now_ns > self._lease_until_ns
        for item, verdict in zip(items, verdicts, strict=True):
            if verdict.result == "ok" and is_over and not verdict.is_verified:
                verdict = Verdict("failed", verdict.medium, "the lease ended before the bytes had arrived")
            if verdict.result == "corrupt":
                instructions.append(Send(Report(item.want.key, item.entry.checksum)))
            instructions.append(self._settle(item.want, verdict, item.entry.checksum))
        is_all_failed = all(verdict.result == "failed" for verdict in verdicts)
        if is_all_failed and now_ns < self._deadline_ns and not is_over:
            instructions.append(Send(Release(self._lease_id)))
            return instructions + self._end(Event.READ_FAILED, verdicts[0].reason)
        return instructions + self._read_on(now_ns)

    def on_lost(self, reason: str) -> list[Instruction]:
        """Take notice that the connection broke."""
        if self.state in (State.READING, State.DRAINING):
            self._go(Event.LOST)
            return []
        return self._end(Event.LOST, reason)

    def on_invalid(self, reason: str) -> list[Instruction]:
        """Take notice that the peer sent what cannot be decoded."""
        return self._end(Event.INVALID, reason)

    def abandon(self, reason: str) -> list[Instruction]:
        """Give up on the batch and the link, telling the owner; allowed in every state."""
        is_holding = self.state in (State.READING, State.DRAINING)
        release: list[Instruction] = [Send(Release(self._lease_id))] if is_holding else []
        return release + self._end(Event.INVALID, reason, is_blamed=False)

    def on_tick(self, now_ns: int) -> list[Instruction]:
        """Let time pass; call at ``wake_ns``."""
        if self.state in (State.GREETING, State.ACQUIRING) and now_ns >= self._answer_due_ns:
            waited_ns = now_ns - self._asked_ns
            reason = f"no answer within {waited_ns / 1e9:.2f} s while {self.state.value}"
            return self._end(Event.OVERDUE, reason, is_blamed=waited_ns >= BLAME_AFTER_NS)
        return []

    @property
    def wake_ns(self) -> int | None:
        """When ``on_tick`` is due; None while no answer is awaited."""
        return self._answer_due_ns if self.state in (State.GREETING, State.ACQUIRING) else None

    def _go(self, event: Event) -> None:
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            raise LocalProtocolError(f"event {event.value} in session state {self.state.value}")
        self.state = following

    def _next_id(self) -> int:
        self._request_id = max(self._request_id, self._renewal[0]) + 1
        return self._request_id

    def _ask(self, message: Hello | Acquire, now_ns: int) -> Instruction:
        # At most half of what is left, so that another replica can still be tried.
        self._asked_ns = now_ns
        self._answer_due_ns = now_ns + max(1, min(self._answer_timeout_ns, (self._deadline_ns - now_ns) // 2))
        return Send(message)

    def _acquire(self, now_ns: int) -> list[Instruction]:
        keys = tuple(want.key for want in self._open.values())
        return [self._ask(Acquire(self._next_id(), keys, self._lease_ttl_ms), now_ns)]

    def _on_welcome(self, message: Welcome, now_ns: int) -> list[Instruction]:
        if message.node_id != self._peer.node_id:
            return self._end(Event.INVALID, f"{message.node_id} answers at the address of {self._peer.node_id}")
        if message.region is None:
            return self._end(Event.INVALID, "the peer lends no memory")
        self._region = message.region
        self._go(Event.WELCOMED)
        return [Attach(message.region, min(self._deadline_ns, now_ns + self._answer_timeout_ns))]

    def _on_denied(self, message: Denied) -> list[Instruction]:
        reason = f"denied: {message.reason} {message.detail}".strip()
        if self.state is State.GREETING or message.reason == "hello_first":
            return self._end(Event.DISOWNED, reason, is_blamed=message.reason != "hello_first")
        self._go(Event.DENIED)
        return [*self._settle_rest("failed", reason), Finish()]

    def _on_granted(self, message: Granted, now_ns: int) -> list[Instruction]:
        region_bytes = self._region.size_bytes if self._region is not None else 0
        wants = list(self._open.values())
        if len(message.entries) != len(wants):
            return self._end(Event.INVALID, f"{len(message.entries)} entries for {len(wants)} keys")
        instructions: list[Instruction] = []
        found: list[ReadItem] = []
        for want, entry in zip(wants, message.entries, strict=True):
            if entry is None:
                instructions.append(self._settle_reason(want, "miss", "the owner no longer has it", is_stale=True))
            elif entry.length != want.num_bytes:
                instructions.append(self._settle_reason(
                    want, "failed", f"the block has {entry.length} bytes, the target {want.num_bytes}"))
            elif entry.offset + entry.length > region_bytes:
                instructions.append(self._settle_reason(want, "failed", "the owner names bytes outside its region"))
            else:
                found.append(ReadItem(want, entry))
        self._lease_id = message.lease_id
        self._unread = found
        if not found:
            self._go(Event.GRANTED_NOTHING)
            release: list[Instruction] = [Send(Release(message.lease_id))] if message.lease_id else []
            return [*instructions, *release, Finish()]
        self._go(Event.GRANTED)
        self._lease_until_ns = self._asked_ns + message.ttl_ms * 1_000_000
        self._renewed_ns = self._asked_ns
        return instructions + self._read_on(now_ns)

    def _on_renewal(self, message: Renewed | Denied) -> list[Instruction]:
        sent_ns = self._renewal[1]
        self._renewal = (0, 0)
        if isinstance(message, Renewed) and message.lease_id == self._lease_id:
            self._lease_until_ns = max(self._lease_until_ns, sent_ns + message.ttl_ms * 1_000_000)
        return []

    def _read_on(self, now_ns: int) -> list[Instruction]:
        """Read the next slice, renewing in time, or finish."""
        if self._unread and now_ns >= self._deadline_ns:
            return self._stop_reading("failed", "the deadline passed before it was read")
        if self._unread and now_ns >= self._lease_until_ns:
            return self._stop_reading("failed", "the lease ended before it was read")
        if not self._unread:
            return self._stop_reading("failed", "")
        instructions: list[Instruction] = []
        is_due = now_ns - self._renewed_ns >= self._lease_ttl_ms * 1_000_000 // 3
        if is_due and self.state is State.READING:
            self._renewed_ns = now_ns
            self._renewal = (self._next_id(), now_ns)
            instructions.append(Send(Renew(self._renewal[0], self._lease_id, self._lease_ttl_ms)))
        size_bytes, count = 0, 0
        for item in self._unread:
            if count and size_bytes + item.entry.length > SLICE_MAX_BYTES:
                break
            size_bytes += item.entry.length
            count += 1
        self._reading, self._unread = tuple(self._unread[:count]), self._unread[count:]
        self._go(Event.READ_SOME)
        return [*instructions, Read(self._reading, min(self._deadline_ns, self._lease_until_ns))]

    def _stop_reading(self, result: GetResult, reason: str) -> list[Instruction]:
        is_lost = self.state is State.DRAINING
        self._go(Event.READ_ALL)
        instructions = self._settle_rest(result, reason)
        self._unread = []
        if is_lost:
            return [*instructions, Drop("the peer is gone", True)]
        return [*instructions, Send(Release(self._lease_id)), Finish()]

    def _end(self, event: Event, reason: str, *, is_blamed: bool = True) -> list[Instruction]:
        was_dead = self.state is State.DEAD
        self._go(event)
        if was_dead:
            return []
        self._unread, self._reading = [], ()
        return [*self._settle_rest("failed", reason), Drop(reason, is_blamed)]

    def _settle(self, want: Want, verdict: Verdict, checksum: int) -> Settle:
        del self._open[want.position]
        num_bytes = want.num_bytes if verdict.result == "ok" else 0
        outcome = GetOutcome(verdict.result, verdict.medium if verdict.result != "failed" else "", num_bytes,
                             verdict.reason)
        return Settle(want, Pulled(outcome, checksum, self._peer.node_id))

    def _settle_reason(self, want: Want, result: GetResult, reason: str, *, is_stale: bool = False) -> Settle:
        self._open.pop(want.position, None)
        return Settle(want, Pulled(GetOutcome(result, "", 0, reason), 0, self._peer.node_id), is_stale)

    def _settle_rest(self, result: GetResult, reason: str) -> list[Instruction]:
        return [self._settle_reason(want, result, reason) for want in list(self._open.values())]
