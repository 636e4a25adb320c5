"""Drive a :class:`~mooncake_store.pull.session.PeerSession` through any order of events and check what it promises.

:class:`SessionModel` plays both the peer and the puller, without I/O or clocks. It carries out instructions as the real
puller does and raises AssertionError as soon as one breaks a promise:

- every block of a batch is settled exactly once, and only while the batch is under way;
- nothing is read outside a granted lease, and no unverified bytes count as ``ok`` after it ended;
- every lease is given back exactly once, unless the connection is gone;
- no instruction follows ``Drop``.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooncake_store.pull.base import GetOutcome, PeerAddress
from mooncake_store.pull.planner import Batch, Want
from mooncake_store.pull.session import (
    Attach,
    Drop,
    Finish,
    Instruction,
    PeerSession,
    Read,
    Send,
    Settle,
    State,
    Verdict,
)
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
    Welcome,
)
from mooncake_store.transport.base import RegionDescriptor
from mooncake_store.types import BlockKey, HostIdentity, NodeId

HOST = HostIdentity("host", 1)
BLOCK_BYTES = 3 << 20
REGION_BYTES = 64 * BLOCK_BYTES
LEASE_TTL_MS = 1000
ANSWER_TIMEOUT_NS = 500_000_000


class SessionModel:
    """One session with a scripted peer; time is a number.

    Attributes:
        outcomes: what each position of the current batch was settled as.
        num_finished: batches that ended.
        questions: messages the peer has not answered yet.
    """

    def __init__(self, peer_id: str = "owner") -> None:
        self.now_ns = 0
        self.session = PeerSession(PeerAddress(NodeId(peer_id), "tcp://owner:1", HOST), node_id="reader", host=HOST,
                                   version="test", lease_ttl_ms=LEASE_TTL_MS, answer_timeout_ns=ANSWER_TIMEOUT_NS)
        self.outcomes: dict[int, GetOutcome] = {}
        self.questions: list[Message] = []
        self.attach: Attach | None = None
        self.read: Read | None = None
        self.num_finished = 0
        self.is_dropped = False
        self.is_blamed = False
        self._pending: dict[int, Want] = {}
        self._leases: dict[int, int] = {}  # lease id -> until when the owner keeps it
        self._last_lease = 0
        self._is_over = True
        self._is_lost = False

    @property
    def can_begin(self) -> bool:
        """Tell whether a batch may begin."""
        return self._is_over and not self.is_dropped

    def begin(self, num_blocks: int, *, timeout_ns: int = 10_000_000_000) -> None:
        """Begin a batch of ``num_blocks`` blocks."""
        wants = tuple(Want(position, BlockKey(b"%d" % position), BLOCK_BYTES) for position in range(num_blocks))
        self._pending = {want.position: want for want in wants}
        self.outcomes = {}
        self._is_over = False
        self.carry_out(self.session.begin(Batch(NodeId("owner"), wants), self.now_ns,
                                          deadline_ns=self.now_ns + timeout_ns))

    def pass_time(self, elapsed_ns: int) -> None:
        """Let time pass and the session notice; the owner forgets expired leases."""
        self.now_ns += elapsed_ns
        self._leases = {lease: until for lease, until in self._leases.items() if until > self.now_ns}
        self.carry_out(self.session.on_tick(self.now_ns))

    def answer(self, held: Sequence[bool] = (), *, denial: str = "", node_id: str = "owner") -> None:
        """Answer the oldest open question: granting the blocks that ``held`` says, or denying for a reason."""
        question = self.questions.pop(0)
        request_id = getattr(question, "request_id", 0)
        if denial:
            self.deliver(Denied(request_id, denial))
        elif isinstance(question, Hello):
            self.deliver(Welcome(request_id, node_id, HOST, "test", RegionDescriptor(1, REGION_BYTES, HOST, ())))
        elif isinstance(question, Acquire):
            self.deliver(self._grant(question, held))
        elif isinstance(question, Renew):
            if question.lease_id in self._leases:
                self._leases[question.lease_id] = self.now_ns + question.ttl_ms * 1_000_000
                self.deliver(Renewed(request_id, question.lease_id, question.ttl_ms))
            else:
                self.deliver(Denied(request_id, "no_such_lease"))

    def deliver(self, message: Message) -> None:
        """Let any message arrive."""
        self.carry_out(self.session.on_message(message, self.now_ns))

    def finish_attach(self, error: str = "") -> None:
        """Complete the attach under way."""
        assert self.attach is not None
        self.attach = None
        self.carry_out(self.session.on_attached(error, self.now_ns))

    def finish_read(self, results: Sequence[str], *, is_verified: bool = True) -> None:
        """Complete the read under way; ``results`` are ``ok``, ``corrupt`` or ``failed``, repeated as needed."""
        assert self.read is not None
        read, self.read = self.read, None
        verdicts = tuple(_verdict(results[index % len(results)], is_verified) for index in range(len(read.items)))
        has_promise = bool(self._leases) or self._is_lost  # the memory of the dead does not change
        settled_before = set(self.outcomes)
        self.carry_out(self.session.on_slice(verdicts, self.now_ns))
        if not is_verified and not has_promise:
            late_ok = [item for item in read.items if item.want.position not in settled_before
                       and self.outcomes[item.want.position].result == "ok"]
            assert not late_ok, "unverified bytes read without a lease count as ok"

    def lose(self) -> None:
        """Break the connection."""
        self._is_lost = True
        self._leases.clear()
        self.carry_out(self.session.on_lost("broken"))

    def carry_out(self, instructions: Sequence[Instruction]) -> None:
        """Carry out instructions, checking each."""
        for instruction in instructions:
            assert not self.is_dropped, f"{instruction} after Drop"
            match instruction:
                case Send(message):
                    self._on_send(message)
                case Settle(want, pulled, _):
                    assert want.position in self._pending, f"position {want.position} settled twice or not asked for"
                    del self._pending[want.position]
                    self.outcomes[want.position] = pulled.outcome
                case Attach():
                    self.attach = instruction
                case Read(items, deadline_ns):
                    assert items and deadline_ns > self.now_ns, "a read that cannot succeed"
                    self.read = instruction
                case Finish():
                    self._end_batch()
                    assert self.session.state is State.IDLE
                case Drop(_, is_blamed):
                    self._end_batch()
                    self.is_dropped, self.is_blamed = True, is_blamed
                    assert self.session.state is State.DEAD

    def check_over(self) -> None:
        """Check what must hold once nothing is under way."""
        assert self._is_over and not self._pending
        assert not self._leases or self.is_dropped, f"leases {list(self._leases)} were never given back"

    def _end_batch(self) -> None:
        assert not self._pending, f"positions {sorted(self._pending)} were never settled"
        self.num_finished += not self._is_over
        self._is_over = True
        self.attach = self.read = None

    def _on_send(self, message: Message) -> None:
        if isinstance(message, Release):
            self._leases.pop(message.lease_id, None)
        elif isinstance(message, Hello | Acquire | Renew):
            self.questions.append(message)

    def _grant(self, question: Acquire, held: Sequence[bool]) -> Granted:
        entries = tuple(BlockEntry(index * BLOCK_BYTES, BLOCK_BYTES, index)
                        if held and held[index % len(held)] else None for index in range(len(question.keys)))
        if not any(entries):
            return Granted(question.request_id, 0, question.ttl_ms, entries)
        self._last_lease += 1
        self._leases[self._last_lease] = self.now_ns + question.ttl_ms * 1_000_000
        return Granted(question.request_id, self._last_lease, question.ttl_ms, entries)


def _verdict(result: str, is_verified: bool) -> Verdict:
    if result == "ok":
        return Verdict("ok", "test", is_verified=is_verified)
    if result == "corrupt":
        return Verdict("corrupt", "test", "wrong bytes")
    return Verdict("failed", "test", "cannot read")
