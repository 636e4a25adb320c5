"""Answer placement messages, wherever they come from.

Threads: one asyncio loop. Only :class:`Admit` waits: for its turn.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import msgspec

from mooncake_connector.router.admission import REASONS, Hints, Rejected
from mooncake_connector.router.dispatcher import Dispatcher
from mooncake_connector.router.engines import Introduction
from mooncake_connector.router.messages import (
    Accepted,
    Admit,
    Answer,
    Busy,
    Finished,
    LoadReport,
    Place,
    Question,
    Refused,
    Register,
    Unregister,
)
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.scheduler import Submission
from mooncake_connector.router.watch import EngineWatch
from mooncake_store.errors import CapacityExceeded

RETRY_AFTER_S = 1


class PlacementDesk:
    """Turns each question into its answer.

    Args:
        watch: the engines, and through it the placer.
        dispatcher: who waits.
        new_transfer_id: returns a fresh id.
    """

    def __init__(self, watch: EngineWatch, dispatcher: Dispatcher, *, new_transfer_id: Callable[[], str]) -> None:
        self._watch = watch
        self._dispatcher = dispatcher
        self._placer: Placer = watch.placer
        self._new_transfer_id = new_transfer_id

    def answer(self, question: Question, *, now_ns: int) -> Answer:
        """Return the answer to one question; changes the table or the open placements accordingly."""
        match question:
            case Place():
                return self._placer.place(question, self._new_transfer_id(), now_ns=now_ns)
            case Admit():
                return Refused(question.place.request_id, "malformed", "this question has to wait: ask admit()")
            case Finished(transfer_id=transfer_id, leg=leg):
                if self._dispatcher.finish(transfer_id, leg):
                    return Accepted(transfer_id)
                return Refused(transfer_id, "unknown", "no such transfer is open: finished before, or expired")
            case LoadReport(url=url):
                num_prefill, num_decode = question.prefill_tokens, question.decode_tokens
                queue_s = self._placer.predictor.prefill_s(num_prefill, 0, url) if num_prefill else 0.0
                if self._placer.table.report(
                    url, tokens=num_prefill + num_decode, queue_s=queue_s, context_tokens=num_decode, now_ns=now_ns
                ):
                    return Accepted(url)
                return Refused(url, "unknown", "no such engine is registered")
            case Register():
                return self._register(question)
            case Unregister(url=url):
                if self._watch.remove(url):
                    return Accepted(url)
                return Refused(url, "unknown", "no such engine is registered")

    async def admit(self, question: Admit) -> Answer:
        """Return where a request goes once it is its turn, or why it goes nowhere."""
        request_id = question.place.request_id
        hints = Hints(
            ttft_s=question.ttft_ms / 1e3 if question.ttft_ms else math.inf,
            priority=question.priority,
            num_output_tokens=question.place.num_output_tokens,
            num_reuses=question.num_reuses,
        )
        # The client's name for it need not be unique; ours is, and becomes the transfer's.
        place = msgspec.structs.replace(question.place, request_id=self._new_transfer_id())
        submission = Submission(place, question.service_class, question.tenant, hints)
        try:
            async with asyncio.timeout(question.wait_ms / 1e3):
                seat = await self._dispatcher.place(submission)
        except TimeoutError:
            return Busy(request_id, f"it was not its turn within {question.wait_ms} ms", RETRY_AFTER_S)
        if isinstance(seat, Rejected):
            return Busy(request_id, REASONS[seat.reason], seat.retry_after_s)
        if isinstance(seat, Refused):
            return msgspec.structs.replace(seat, subject=request_id)
        return msgspec.structs.replace(seat.placed, request_id=request_id)

    def _register(self, question: Register) -> Answer:
        try:
            self._watch.add(question.url, question.role)
        except CapacityExceeded as error:
            return Refused(question.url, "full", error.message)
        if question.model and question.engine_id and question.addresses:
            introduction = Introduction((question.model,), question.engine_id, question.addresses)
            self._placer.introduce(question.url, introduction)
        return Accepted(question.url)
