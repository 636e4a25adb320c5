"""Pull from one prefill worker, in a thread of its own.

The thread greets the worker, keeps its leases alive, copies whatever becomes ready while the rest is computed, checks
the epoch after each copy, and says once per request how it ended. Whatever goes wrong ends as blocks that were not
filled.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np
import zmq

from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.plan import PagePlan
from mooncake_connector.transfer.cache import AttachedCache
from mooncake_connector.transfer.epochs import WORD_BYTES
from mooncake_connector.transfer.lifecycle import PullEvent, PullStep
from mooncake_connector.transfer.memory import PageReader
from mooncake_connector.transfer.messages import (
    MESSAGE_MAX_BYTES,
    Abort,
    Done,
    Heartbeat,
    Hello,
    Ready,
    Refused,
    Subscribe,
    ToPrefill,
    VerifyReply,
    VerifyRequest,
    Welcome,
    decode_to_decode,
    encode,
)
from mooncake_connector.transfer.pulls import PullTransfer
from mooncake_connector.transfer.steps import Announced, HandoffLoad, Received
from mooncake_connector.transfer.watch import Watch
from mooncake_store.errors import MooncakeError, RemoteProtocolError
from mooncake_store.metrics import Metrics
from mooncake_store.transport.base import ReadBatch
from mooncake_store.transport.media import Media, MediaAttachment

logger = logging.getLogger(__name__)

PEER_IDLE_S = 60.0
WELCOME_S = 10.0
MESSAGES_MAX = 1024


class Cancel(msgspec.Struct, frozen=True):
    """The engine dropped the request."""

    request_id: str


class PeerContext(msgspec.Struct, frozen=True):
    """What every peer thread shares.

    Attributes:
        report: called from the peer thread, exactly once per parked request.
    """

    media: Media
    fingerprint: Fingerprint
    pages: PageReader
    metrics: Metrics
    report: Callable[[Received], None]
    lease_s: float
    timeout_s: float
    pull_timeout_s: float
    verify: bool


class PrefillPeer:
    """One prefill worker. Threads: the public methods any, everything else our own."""

    def __init__(self, address: str, context: PeerContext) -> None:
        self._address = address
        self._c = context
        self._commands: queue.SimpleQueue[Announced | HandoffLoad | Cancel] = queue.SimpleQueue()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES)
        self._watch = Watch(self._socket)
        self._pulls: dict[str, PullTransfer] = {}
        self._welcome: Welcome | None = None
        self._cache: AttachedCache | None = None
        self._epochs: MediaAttachment | None = None
        self._word = np.zeros(1, np.uint64)
        self._heard_ns = time.monotonic_ns()
        self._beat_ns = 0
        self._stopping = False
        self._lost = ""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"mooncake-pull-{address}")
        self._thread.start()

    def send(self, command: Announced | HandoffLoad | Cancel) -> None:
        """Hand over a command. Returns at once."""
        with self._lock:
            ended = not self._thread.is_alive() or self._stopping
            if not ended:
                self._commands.put(command)
        if ended:
            self._fail_command(command, "the link to the prefill worker has ended")
        else:
            self._watch.ring()

    @property
    def is_alive(self) -> bool:
        """Return whether the thread still takes commands."""
        return self._thread.is_alive() and not self._stopping

    @property
    def num_active(self) -> int:
        """Return the transfers that are not over."""
        return len(self._pulls)

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stopping = True
        self._watch.ring()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout_s)

    # ---- thread

    def _run(self) -> None:
        try:
            self._socket.connect(self._address)
            self._send(Hello(self._c.fingerprint, self._c.media.identity(), os.getpid()))
            self._loop()
        except Exception as error:
            logger.exception("the link to the prefill worker at %s ended", self._address)
            self._c.metrics.add("mooncake_protocol_errors_total", reason="peer_thread")
            self._lost = f"internal error: {error}"
        finally:
            self._end()

    def _loop(self) -> None:
        idle_since_ns = time.monotonic_ns()
        while not self._stopping and not self._lost:
            events = self._watch.wait(min(250, int(self._c.lease_s * 250)))
            if events.readable:
                self._receive_all()
            self._run_commands()
            if events.dead_pids:
                self._lost = "the prefill worker's process is gone"
            self._pull_ready()
            now_ns = time.monotonic_ns()
            self._keep_time(now_ns)
            if self._pulls:
                idle_since_ns = now_ns
            elif now_ns - idle_since_ns > PEER_IDLE_S * 1e9:
                with self._lock:
                    self._stopping = self._commands.empty()

    def _end(self) -> None:
        with self._lock:
            self._stopping = True
        reason = self._lost or "shutting down"
        for transfer in list(self._pulls.values()):
            self._lose(transfer, reason)
        while True:
            try:
                self._fail_command(self._commands.get_nowait(), reason)
            except queue.Empty:
                break
        for attachment in (self._cache, self._epochs):
            if attachment is not None:
                attachment.close()
        self._socket.close()
        self._watch.close()

    def _fail_command(self, command: Announced | HandoffLoad | Cancel, reason: str) -> None:
        if isinstance(command, HandoffLoad):
            logger.warning("transfer %s: %s", command.transfer_id, reason)
            self._c.metrics.add("mooncake_transfers_total", role="decode", result="lost")
            if command.first_block < len(command.block_ids) or command.wants_note:
                self._c.report(Received(request_id=command.request_id, reason=reason,
                                        bad_blocks=command.block_ids[command.first_block:]))

    def _run_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, Cancel):
                for transfer in [t for t in self._pulls.values() if t.request_id == command.request_id]:
                    self._settle(transfer, transfer.take(PullEvent.CANCELLED), "cancelled")
            elif isinstance(command, Announced):
                self._open(command.transfer_id, command.request_id)
            else:
                self._start(command)

    def _open(self, transfer_id: str, request_id: str) -> PullTransfer:
        transfer = self._pulls.get(transfer_id)
        if transfer is None:
            transfer = self._pulls[transfer_id] = PullTransfer(transfer_id, request_id, time.monotonic_ns())
            self._send(Subscribe(transfer_id))
        return transfer

    def _start(self, load: HandoffLoad) -> None:
        if load.first_block >= len(load.block_ids) and not load.wants_note:
            # Everything is here already: nothing is parked, so nothing is reported; the prefill may free.
            self._pulls.pop(load.transfer_id, None)
            self._send(Done(load.transfer_id))
            return
        transfer = self._open(load.transfer_id, load.request_id)
        step = transfer.start(load, self._c.pages.layout.num_layers, time.monotonic_ns())
        self._settle(transfer, step, "lost")

    def _receive_all(self) -> None:
        for _ in range(MESSAGES_MAX):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._heard_ns = time.monotonic_ns()
            try:
                self._handle(decode_to_decode(data))
            except RemoteProtocolError as error:
                self._c.metrics.add("mooncake_protocol_errors_total", reason="malformed")
                self._lost = error.message
                return

    def _handle(self, message: object) -> None:
        if isinstance(message, Welcome):
            if self._welcome is None:
                self._attach(message)
        elif isinstance(message, Refused):
            self._c.metrics.add("mooncake_handoff_refused_total", reason="by_prefill")
            self._lost = f"refused by the prefill worker at {self._address}: {message.reason}"
        elif isinstance(message, Ready):
            transfer = self._pulls.get(message.transfer_id)
            if transfer is not None:
                if transfer.ready is None or transfer.ready.progress != message.progress:
                    transfer.progress_ns = self._heard_ns
                transfer.update(message)
        elif isinstance(message, Abort):
            transfer = self._pulls.get(message.transfer_id)
            if transfer is not None:
                self._lose(transfer, message.reason)
        elif isinstance(message, VerifyReply):
            self._compare(message)

    def _attach(self, welcome: Welcome) -> None:
        deadline_ns = time.monotonic_ns() + int(self._c.pull_timeout_s * 1e9)
        try:
            self._cache = AttachedCache(self._c.media, welcome.cache, deadline_ns=deadline_ns)
            self._epochs = self._c.media.attach(welcome.epochs, deadline_ns=deadline_ns)
        except MooncakeError as error:
            self._lost = f"cannot read the prefill worker's memory: {error.message}"
            return
        self._welcome = welcome
        logger.info("prefill worker %s: medium %s (%s)", self._address, self._cache.medium, self._cache.reason)
        if welcome.host == self._c.media.identity() and not self._watch.watch_pid(welcome.pid):
            self._lost = "the prefill worker's process is gone"

    # ---- copying

    def _pull_ready(self) -> None:
        if self._welcome is None or self._lost:
            return
        for transfer in list(self._pulls.values()):
            try:
                item = transfer.plan(self._welcome.layout, self._c.pages.layout)
            except (ValueError, IndexError) as error:
                self._lose(transfer, f"the prefill worker named unusable blocks: {error}")
                continue
            if item is not None and not self._copy(transfer, *item):
                continue
            if transfer.is_complete and not transfer.is_verifying:
                self._complete(transfer)

    def _copy(self, transfer: PullTransfer, plan: PagePlan, ready: np.ndarray) -> bool:
        # _pull_ready runs only after _attach
        assert self._cache is not None and self._epochs is not None and transfer.ready is not None
        if transfer.ready.epoch_slot >= self._epochs.region.size_bytes // WORD_BYTES:
            self._lose(transfer, f"the prefill worker named epoch word {transfer.ready.epoch_slot}, which is not there")
            return False
        batch = ReadBatch(plan.source_offsets, self._c.pages.addresses(plan.target_offsets),
                          np.full(len(plan), plan.page_bytes, np.uint64))
        deadline_ns = time.monotonic_ns() + int(self._c.pull_timeout_s * 1e9)
        result = self._cache.read(batch, deadline_ns=deadline_ns)
        if result.error is not None or not bool(result.ok.all()):
            self._lose(transfer, f"copy failed on {self._cache.medium}: {result.error and result.error.message}")
            return False
        epoch = self._read_epoch(transfer.ready.epoch_slot, deadline_ns)
        if epoch != transfer.ready.epoch:
            # The owner gave the blocks up during the copy. Not progress; its next message says what follows.
            self._c.metrics.add("mooncake_handoff_stale_total")
            transfer.ready = None
            return epoch is not None
        transfer.advance(ready)
        transfer.progress_ns = time.monotonic_ns()
        self._c.metrics.add("mooncake_handoff_bytes_total", plan.size_bytes, medium=self._cache.medium)
        if not transfer.is_complete:
            transfer.take(PullEvent.PROGRESS)
        return True

    def _read_epoch(self, slot: int, deadline_ns: int) -> int | None:
        assert self._epochs is not None
        batch = ReadBatch(np.array([slot * WORD_BYTES], np.uint64), np.array([self._word.ctypes.data], np.uint64),
                          np.array([WORD_BYTES], np.uint64))
        result = self._epochs.read(batch, deadline_ns=deadline_ns)
        return int(self._word[0]) if bool(result.ok.all()) else None

    def _complete(self, transfer: PullTransfer) -> None:
        if self._c.verify:
            transfer.is_verifying = True
            self._send(VerifyRequest(transfer.transfer_id, transfer.num_blocks))
            return
        self._settle(transfer, transfer.take(PullEvent.COMPLETE), "complete")

    def _compare(self, message: VerifyReply) -> None:
        transfer = self._pulls.get(message.transfer_id)
        if transfer is None or transfer.load is None:
            return
        first = transfer.load.first_block
        ours = self._c.pages.checksums(transfer.load.block_ids)[first:]
        for mine, theirs in zip(ours, message.checksums[first:], strict=False):
            self._c.metrics.add("mooncake_verify_blocks_total", result="equal" if mine == theirs else "different")
        self._settle(transfer, transfer.take(PullEvent.COMPLETE), "complete")

    # ---- ends

    def _lose(self, transfer: PullTransfer, reason: str) -> None:
        transfer.reason = reason
        self._settle(transfer, transfer.take(PullEvent.LOST), "lost")

    def _settle(self, transfer: PullTransfer, step: PullStep, result: str) -> None:
        if step.releases:
            self._send(Done(transfer.transfer_id))
            self._pulls.pop(transfer.transfer_id, None)
        if not step.reports:
            return
        is_filled = result == "complete"
        bad_blocks = [] if is_filled else transfer.bad_blocks()
        self._c.metrics.add("mooncake_transfers_total", role="decode", result=result)
        if is_filled:
            self._c.metrics.observe("mooncake_handoff_seconds", (time.monotonic_ns() - transfer.started_ns) / 1e9)
        else:
            logger.warning("transfer %s %s: %s; %d blocks not filled", transfer.transfer_id, result,
                           transfer.reason or result, len(bad_blocks))
        self._c.report(Received(request_id=transfer.request_id, bad_blocks=bad_blocks, note=transfer.note,
                                reason="" if is_filled else transfer.reason or result))

    def _keep_time(self, now_ns: int) -> None:
        lease_ns = int(self._c.lease_s * 1e9)
        if not self._pulls:
            self._heard_ns = now_ns
            return
        if now_ns - self._beat_ns >= lease_ns // 4:
            self._beat_ns = now_ns
            self._send(Heartbeat(list(self._pulls)))
        silent_ns = now_ns - self._heard_ns
        if self._welcome is None and silent_ns > WELCOME_S * 1e9:
            self._lost = f"no answer from the prefill worker at {self._address} in {WELCOME_S:.0f} s"
        elif silent_ns > lease_ns:
            self._lost = f"the prefill worker at {self._address} is silent for {silent_ns / 1e9:.0f} s"
        for transfer in list(self._pulls.values()):
            if now_ns - transfer.progress_ns > self._c.timeout_s * 1e9:
                self._lose(transfer, f"no progress in {self._c.timeout_s:.0f} s")

    def _send(self, message: ToPrefill) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.debug("could not send to the prefill worker at %s: %s", self._address, error)
