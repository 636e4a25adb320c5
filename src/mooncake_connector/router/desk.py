"""Answer placement messages, wherever they come from.

Pure but for what it is given: the placer and the two functions that start and stop watching an engine.
"""

from __future__ import annotations

from collections.abc import Callable

from mooncake_connector.router.engines import Introduction
from mooncake_connector.router.messages import (
    Accepted,
    Answer,
    Finished,
    LoadReport,
    Place,
    Question,
    Refused,
    Register,
    Unregister,
)
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.watch import EngineWatch
from mooncake_store.errors import CapacityExceeded


class PlacementDesk:
    """Turns each question into its answer.

    Args:
        watch: the engines, and through it the placer.
        new_transfer_id: returns a fresh id.
    """

    def __init__(self, watch: EngineWatch, *, new_transfer_id: Callable[[], str]) -> None:
        self._watch = watch
        self._placer: Placer = watch.placer
        self._new_transfer_id = new_transfer_id

    def answer(self, question: Question, *, now_ns: int) -> Answer:
        """Return the answer to one question; changes the table or the open placements accordingly."""
        match question:
            case Place():
                return self._placer.place(question, self._new_transfer_id(), now_ns=now_ns)
            case Finished(transfer_id=transfer_id, leg=leg):
                if self._placer.finish(transfer_id, leg):
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

    def _register(self, question: Register) -> Answer:
        try:
            self._watch.add(question.url, question.role)
        except CapacityExceeded as error:
            return Refused(question.url, "full", error.message)
        if question.model and question.engine_id and question.addresses:
            introduction = Introduction((question.model,), question.engine_id, question.addresses)
            self._placer.introduce(question.url, introduction)
        return Accepted(question.url)
