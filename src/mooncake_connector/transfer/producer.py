"""Serve the prefill side of hand-overs: publish what is ready, keep blocks until the peer is through.

Architecture::

    model thread   before_step / begin_step / finish_layer / finish_step / take_sent   (never waits for a peer)
    control thread ROUTER socket, pidfds of peers on this machine, lease clock
      both share     HeldTransfers (pure) and Epochs, under one lock held for microseconds

Bytes never pass through here: peers read the cache themselves. The epoch word of a transfer is bumped in
``before_step``, the engine's first hook, because the engine zeroes reused blocks before later hooks (vLLM
gpu_model_runner.py).
"""

from __future__ import annotations

import logging
import threading
import time

import zmq

from mooncake_connector.kv.fingerprint import Fingerprint, describe
from mooncake_connector.kv.layout import KVLayout
from mooncake_connector.transfer.epochs import Epochs
from mooncake_connector.transfer.held import HeldTransfers, Instruction, Lose, Publish, Report, Revoke, TellAbort
from mooncake_connector.transfer.holds import Holds, Why
from mooncake_connector.transfer.memory import PageReader
from mooncake_connector.transfer.messages import (
    Abort,
    Alive,
    CachePart,
    Done,
    Heartbeat,
    Hello,
    Refused,
    Subscribe,
    ToDecode,
    VerifyReply,
    VerifyRequest,
    Welcome,
    decode_to_prefill,
    encode,
)
from mooncake_connector.transfer.steps import StepPlan
from mooncake_connector.transfer.watch import Watch
from mooncake_store.errors import RemoteProtocolError
from mooncake_store.metrics import Metrics
from mooncake_store.types import HostIdentity

logger = logging.getLogger(__name__)

PEERS_MAX = 1024
POLL_MS = 250


class Producer:
    """The prefill side of one worker.

    Args:
        cache: the regions that hold the KV cache.
        pages: reads our own pages, for checksums.
        holds: shared with the saver; guarded by ``lock``.
        lock: guards ``holds`` and our book.
    """

    def __init__(
        self,
        *,
        host: str,
        identity: HostIdentity,
        pid: int,
        fingerprint: Fingerprint,
        layout: KVLayout,
        cache: tuple[CachePart, ...],
        pages: PageReader,
        epochs: Epochs,
        holds: Holds,
        lock: threading.Lock,
        lease_s: float,
        metrics: Metrics,
    ) -> None:
        self._fingerprint = fingerprint
        self._welcome = Welcome(layout, cache, epochs.region, identity, pid)
        self._pages = pages
        self._epochs = epochs
        self._holds = holds
        self._lock = lock
        self._metrics = metrics
        self._book = HeldTransfers(lease_ns=int(lease_s * 1e9))
        self._peers: dict[bytes, Hello] = {}
        self._dirty: set[str] = set()
        self._outbox: list[TellAbort] = []
        self._lost: dict[str, str] = {}
        self._running: list[str] = []
        self._idle_since_ns: int | None = time.monotonic_ns()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
        self.address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        self._watch = Watch(self._socket)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="mooncake-producer")
        self._thread.start()

    # ---- model thread

    def before_step(self, plan: StepPlan) -> None:
        """Apply what ended and what was preempted; must run before any block can be reused."""
        if not (plan.expected or plan.finished or plan.preempted):
            return
        now_ns = time.monotonic_ns()
        with self._lock:
            for item in plan.expected:
                self._execute(self._book.expect(item, now_ns))
            for ended in plan.finished:
                if ended.delivered:
                    self._holds.add(ended.request_id, Why.HANDOFF)
                if ended.held:
                    self._holds.keep(ended.request_id, ended.num_blocks)
                if ended.transfer_id:
                    self._execute(self._book.finish(ended, now_ns))
            for request_id in plan.preempted:
                self._execute(self._book.preempt(request_id, now_ns))
        self._watch.ring()

    def begin_step(self, plan: StepPlan) -> None:
        """Publish what earlier steps and caches provide, and note what this step will add."""
        now_ns = time.monotonic_ns()
        with self._lock:
            if not plan.is_empty:
                self._idle_since_ns = None
            self._running = [step.transfer_id for step in plan.prefills]
            for step in plan.prefills:
                self._execute(self._book.schedule(step, now_ns))
        if plan.prefills:
            self._watch.ring()

    def finish_layer(self, num_layers: int) -> None:
        """Say that this step's KV is final in the first ``num_layers`` layers."""
        if self._running:
            with self._lock:
                wanted = {tid for tid in self._running if self._book.complete_layers(tid, num_layers)}
                self._dirty |= wanted
            if wanted:
                self._watch.ring()

    def finish_step(self) -> None:
        """Say that this step's KV is final in every layer."""
        running, self._running = self._running, []
        with self._lock:
            wanted = {tid for tid in running if self._book.complete_step(tid)}
            self._dirty |= wanted
            self._idle_since_ns = time.monotonic_ns()
        if wanted:
            self._watch.ring()

    def take_sent(self) -> set[str]:
        """Return requests whose blocks the engine may free, each exactly once."""
        with self._lock:
            return self._holds.take_ready()

    def take_lost(self) -> dict[str, str]:
        """Return requests that nobody will fetch any more, and why. Call it after ``take_sent``."""
        with self._lock:
            lost, self._lost = self._lost, {}
        return lost

    def close(self) -> None:
        """Stop answering. Idempotent, bounded."""
        self._stopping = True
        self._watch.ring()
        self._thread.join(timeout=2.0)

    # ---- lock held

    def _execute(self, instructions: list[Instruction]) -> None:
        for item in instructions:
            if isinstance(item, Revoke):
                self._epochs.bump(item.slot)
            elif isinstance(item, Report):
                self._holds.drop(item.request_id, Why.HANDOFF)
            elif isinstance(item, Lose):
                self._lost[item.request_id] = item.reason
            elif isinstance(item, Publish):
                self._dirty.add(item.transfer_id)
            else:
                self._outbox.append(item)

    # ---- control thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                events = self._watch.wait(POLL_MS)
                for pid in events.dead_pids:
                    self._lose_pid(pid)
                if events.readable:
                    self._receive_all()
                self._expire()
                self._flush()
        except Exception:
            # A bug here must not look like a slow peer: say so loudly; peers fall back when their waits end.
            logger.exception("hand-over control thread ended; decode engines will compute by themselves")
            self._metrics.add("mooncake_protocol_errors_total", reason="producer_thread")
        finally:
            self._socket.close(0)
            self._watch.close()

    def _receive_all(self) -> None:
        for _ in range(PEERS_MAX):
            try:
                peer, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                self._metrics.add("mooncake_protocol_errors_total", reason="frames")
                continue
            try:
                self._handle(peer, decode_to_prefill(data))
            except RemoteProtocolError as error:
                self._metrics.add("mooncake_protocol_errors_total", reason="malformed")
                logger.warning("rejected a hand-over message: %s", error.message)

    def _handle(self, peer: bytes, message: object) -> None:
        if isinstance(message, Hello):
            self._greet(peer, message)
            return
        if peer not in self._peers:
            self._send(peer, Refused("send Hello first"))
            return
        now_ns = time.monotonic_ns()
        with self._lock:
            if isinstance(message, Subscribe):
                self._execute(self._book.subscribe(message.transfer_id, peer, now_ns))
            elif isinstance(message, Heartbeat):
                self._execute(self._book.heartbeat(message.transfer_ids, peer, now_ns))
            elif isinstance(message, Done):
                self._execute(self._book.done(message.transfer_id, now_ns))
        if isinstance(message, Heartbeat):
            self._send(peer, Alive())
        elif isinstance(message, VerifyRequest):
            with self._lock:
                blocks = list(self._book.block_ids(message.transfer_id)[: message.num_blocks])
            self._send(peer, VerifyReply(message.transfer_id, self._pages.checksums(blocks)))

    def _greet(self, peer: bytes, hello: Hello) -> None:
        found = self._fingerprint.differences(hello.fingerprint)
        if found:
            reason = describe(found, len(Fingerprint.__struct_fields__))
            logger.warning("refused decode worker pid %d: %s", hello.pid, reason)
            self._metrics.add("mooncake_handoff_refused_total", reason="fingerprint")
            self._send(peer, Refused(reason))
        elif len(self._peers) >= PEERS_MAX and peer not in self._peers:
            self._metrics.add("mooncake_handoff_refused_total", reason="peers")
            self._send(peer, Refused(f"{PEERS_MAX} decode workers are connected"))
        else:
            self._peers[peer] = hello
            if hello.host == self._welcome.host and not self._watch.watch_pid(hello.pid):
                self._lose_pid(hello.pid)
                return
            self._send(peer, self._welcome)

    def _lose_pid(self, pid: int) -> None:
        gone = [peer for peer, hello in self._peers.items() if hello.pid == pid and hello.host == self._welcome.host]
        for peer in gone:
            del self._peers[peer]
            with self._lock:
                self._execute(self._book.lose_peer(peer, time.monotonic_ns()))
        if gone:
            logger.warning("decode worker pid %d is gone; its transfers end", pid)

    def _expire(self) -> None:
        with self._lock:
            self._execute(self._book.expire(time.monotonic_ns(), idle_since_ns=self._idle_since_ns))
            num_active, num_blocks = self._book.num_active, self._holds.num_blocks
        self._metrics.set("mooncake_transfers_active", num_active, role="prefill")
        self._metrics.set("mooncake_blocks_held", num_blocks)

    def _flush(self) -> None:
        messages: list[tuple[bytes, ToDecode]] = []
        with self._lock:
            for transfer_id in self._dirty:
                item = self._book.ready(transfer_id, self._epochs.words)
                if item is not None:
                    messages.append(item)
            self._dirty.clear()
            outbox, self._outbox = self._outbox, []
        for peer, message in messages:
            self._send(peer, message)
        for told in outbox:
            logger.info("transfer %s ends: %s", told.transfer_id, told.reason)
            self._metrics.add("mooncake_transfers_total", role="prefill", result="aborted")
            self._send(told.peer, Abort(told.transfer_id, told.reason))

    def _send(self, peer: bytes, message: ToDecode) -> None:
        try:
            self._socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # The peer's heartbeat asks again; its own deadlines bound the wait.
            logger.debug("could not send to a decode worker: %s", error)
