"""Offer placement over ZeroMQ to gateways that are not ours.

Threads: one asyncio loop. One ROUTER socket; DEALER clients send ``[frame]``, REQ clients ``[b"", frame]``, and each is
answered the same way. Bounds: ``FRAME_MAX_BYTES`` per frame, ``QUEUE_MAX`` messages per client and direction.
"""

from __future__ import annotations

import asyncio
import logging

import zmq
import zmq.asyncio

from mooncake_connector.router.desk import RETRY_AFTER_S, PlacementDesk
from mooncake_connector.router.messages import FRAME_MAX_BYTES, Admit, Answer, Busy, Refused, decode_question, encode
from mooncake_connector.router.placer import Placer
from mooncake_store.errors import ConfigError, RemoteProtocolError
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

QUEUE_MAX = 10_000
EXPIRE_EVERY_S = 1.0
GARBAGE_LOG_EVERY = 1000


class PlacementService:
    """The ZeroMQ side of one router.

    Args:
        address: where to listen, e.g. ``tcp://127.0.0.1:8001``; port 0 or ``*`` takes a free one.
        desk: answers the questions.
        placer: its late placements are expired here.
        metrics: counts messages and garbage.

    Raises:
        ConfigError: when the address cannot be used.
    """

    def __init__(self, address: str, *, desk: PlacementDesk, placer: Placer, metrics: Metrics) -> None:
        self._desk = desk
        self._placer = placer
        self._metrics = metrics
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, FRAME_MAX_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_MAX)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
        self._num_garbage = 0
        self._waiting: set[asyncio.Task[None]] = set()
        try:
            self._socket.bind(address)
        except (zmq.ZMQError, ValueError) as error:
            self._socket.close()
            self._context.term()
            raise ConfigError(
                f"cannot listen for placement on {address}: {error}",
                where="--placement",
                hint="give a free address such as tcp://127.0.0.1:8001, or '' to turn the service off",
            ) from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def run(self) -> None:
        """Answer until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._answer_all())
            group.create_task(self._expire_all())

    def close(self) -> None:
        """Close the socket; who still waits is not answered. Idempotent."""
        for task in self._waiting:
            task.cancel()
        self._socket.close()
        self._context.term()

    async def _answer_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            parts: list[bytes] = await self._socket.recv_multipart()
            sender, envelope, frame = parts[0], parts[1:-1], parts[-1]
            answer = self._answer(envelope, frame, now_ns=int(loop.time() * 1e9))
            if isinstance(answer, Admit):
                self._admit_later(answer, [sender, *envelope[:1]])
            else:
                await self._send([sender, *envelope[:1]], answer)

    async def _send(self, envelope: list[bytes], answer: Answer) -> None:
        try:
            # Never waits: a client that does not read loses answers, not the router.
            await self._socket.send_multipart([*envelope, encode(answer)], flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            log.debug("a placement answer was dropped: %s", error)

    def _admit_later(self, question: Admit, envelope: list[bytes]) -> None:
        task = asyncio.create_task(self._admit(question, envelope), name="admit")
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _admit(self, question: Admit, envelope: list[bytes]) -> None:
        request_id = question.place.request_id
        try:
            if len(self._waiting) > QUEUE_MAX:
                answer: Answer = Busy(request_id, f"{QUEUE_MAX} requests wait already", RETRY_AFTER_S)
            else:
                answer = await self._desk.admit(question)
        except Exception:  # the border of a client's question: one must not end the service for all
            log.exception("placement: a question failed inside the router")
            self._metrics.add("mooncake_router_garbage_total", reason="failed")
            answer = Refused(request_id, "malformed", "the router failed on this question; its log says why")
        await self._send(envelope, answer)

    def _answer(self, envelope: list[bytes], frame: bytes, *, now_ns: int) -> Answer | Admit:
        try:
            if envelope not in ([], [b""]):
                raise RemoteProtocolError(f"message has {len(envelope) + 1} parts, not one")
            question = decode_question(frame)
        except RemoteProtocolError as error:
            self._note_garbage(error)
            return Refused("", "malformed", error.message[:500])
        self._metrics.add("mooncake_router_messages_total", kind=type(question).__name__.lower())
        return question if isinstance(question, Admit) else self._desk.answer(question, now_ns=now_ns)

    def _note_garbage(self, error: RemoteProtocolError) -> None:
        self._metrics.add("mooncake_router_garbage_total", reason=error.message.split()[0])
        if self._num_garbage % GARBAGE_LOG_EVERY == 0:
            log.warning("placement: rejected a frame (%d so far): %s", self._num_garbage + 1, error.message[:200])
        self._num_garbage += 1

    async def _expire_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            late = self._placer.expire(int(loop.time() * 1e9))
            if late:
                self._metrics.add("mooncake_router_expired_total", len(late))
                log.warning("%d placements were never finished, e.g. %s", len(late), late[0])
