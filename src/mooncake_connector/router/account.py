"""Keep account of one request: what was predicted and promised, what came of it, and what that teaches.

Threads: one asyncio loop; never waits.
"""

from __future__ import annotations

import asyncio

from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.bodies import Ask, cache_salt_of, token_ids_of
from mooncake_connector.router.callers import Caller
from mooncake_connector.router.dispatcher import Dispatcher, Seat
from mooncake_connector.router.legs import PrefillDone, WholeAnswer
from mooncake_connector.router.messages import Place, Placed
from mooncake_connector.router.receipt import Receipt
from mooncake_connector.router.relay import Passed
from mooncake_connector.router.scheduler import Submission
from mooncake_connector.router.usage import read_usage
from mooncake_store.metrics import Metrics

CLIENT_SLOW_SHARE = 0.05
"""A stream whose client took more than this part of its time to read tells nothing of the engine's pace."""


class Account:
    """One request's.

    Args:
        dispatcher: learns, and places.
        metrics: counts.
        ask: what the client wants.
        caller: who asks.
        promise: what the caller's class is promised; None when nothing is.
        request_id: the client's name for the request, or ours.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        ask: Ask,
        *,
        caller: Caller,
        promise: ServiceClass | None,
        request_id: str,
    ) -> None:
        self.promised_s = min(promise.ttft_s, caller.hints.ttft_s) if promise is not None else None
        self._dispatcher = dispatcher
        self._lessons = dispatcher.lessons
        self._metrics = metrics
        self._ask = ask
        self._caller = caller
        self._receipt = Receipt(request_id, caller.service_class)
        self._loop = asyncio.get_running_loop()
        self.start_s = self._placed_s = self._loop.time()
        self._seat: Seat | None = None

    def submission(self, transfer_id: str, excluded: tuple[str, ...]) -> Submission:
        """Return the request as the scheduler wants it."""
        ask, caller, lessons = self._ask, self._caller, self._lessons
        place = Place(
            request_id=transfer_id,
            num_prompt_tokens=lessons.prompt_tokens(ask.num_prompt_tokens),
            num_output_tokens=lessons.output_tokens(hinted=caller.hints.num_output_tokens, most=ask.num_output_tokens),
            model=ask.model,
            prefix_hashes=ask.prefix_hashes,
            excluded=excluded,
            token_ids=token_ids_of(ask) if self._dispatcher.placer.wants_tokens else b"",
            cache_salt=cache_salt_of(ask),
        )
        return Submission(place, caller.service_class, caller.tenant, caller.hints, ask.colocated_reason)

    def seated(self, seat: Seat) -> None:
        """Note where it was placed, and what is expected."""
        self._seat, self._placed_s = seat, self._loop.time()
        receipt = self._receipt
        receipt.waited_s = self._placed_s - self.start_s
        receipt.predicted_ttft_s = receipt.waited_s + seat.ttft_s if seat.ttft_s else 0.0
        receipt.num_reused = seat.prefix_tokens if seat.start is not None else -1

    def prefill_ended(self, done: PrefillDone) -> None:
        """Learn from a prefill leg that succeeded."""
        seat, counted, now_s = self._seat, done.usage.cached_tokens, self._loop.time()
        if seat is None or seat.start is None:
            return
        num_prefix = seat.prefix_tokens if done.url == seat.start.engine.url else 0
        if counted is not None:
            num_prefix = self._receipt.num_reused = counted
        self._lessons.prefill_ended(
            done.url,
            sent_s=now_s - done.duration_s,
            ended_s=now_s,
            num_estimated=self._ask.num_prompt_tokens,
            num_prompt=done.usage.prompt_tokens,
            num_prefix=num_prefix,
        )
        self._metrics.add("mooncake_router_prompt_tokens_total", num_prefix, source="reused")
        num_computed = (done.usage.prompt_tokens or self._ask.num_prompt_tokens) - num_prefix
        self._metrics.add("mooncake_router_prompt_tokens_total", max(num_computed, 0), source="computed")

    def first_byte(self, placed: Placed | None) -> None:
        """Compare the first byte of a stream with what was predicted and promised."""
        self._note_ttft("stream")
        seat, now_s = self._seat, self._loop.time()
        if seat is None or placed is None:
            return
        self._lessons.first_byte(seat.ttft_s, now_s - self._placed_s)
        if not seat.placed.prefill_url and seat.start is not None:
            self._dispatcher.finish(placed.transfer_id, "prefill")
            self._lessons.prefill_ended(
                placed.decode_url,
                sent_s=self._placed_s,
                ended_s=now_s,
                num_estimated=self._ask.num_prompt_tokens,
                num_prompt=0,
                num_prefix=seat.prefix_tokens,
            )

    def stream_ended(self, decode_url: str, passed: Passed) -> None:
        """Learn from a stream that ended well."""
        self._metrics.add("mooncake_router_output_tokens_total", passed.num_events)
        if passed.num_events < 2 or passed.blocked_s > CLIENT_SLOW_SHARE * passed.took_s:
            return
        self._metrics.observe("mooncake_router_token_seconds", passed.took_s / (passed.num_events - 1))
        num_requests, num_context = self._dispatcher.placer.decoding(decode_url)
        self._lessons.stream_ended(
            num_requests=num_requests, num_context=num_context, num_tokens=passed.num_events, took_s=passed.took_s
        )

    def whole_ended(self, answer: WholeAnswer, placed: Placed | None) -> None:
        """Learn from an answer that came all at once; an error teaches nothing."""
        self._note_ttft("whole")
        if answer.status >= 400:
            return
        usage, seat = read_usage(answer.body), self._seat
        if usage.completion_tokens:
            self._metrics.add("mooncake_router_output_tokens_total", usage.completion_tokens)
            self._lessons.answer_ended(usage.completion_tokens)
        if placed is None or placed.prefill_url or seat is None or seat.start is None:
            return
        if usage.cached_tokens is not None:
            self._receipt.num_reused = usage.cached_tokens
        if not seat.placed.prefill_url:
            self._lessons.whole_ended(
                placed.decode_url,
                sent_s=self._placed_s,
                ended_s=self._loop.time(),
                num_prompt=usage.prompt_tokens or self._ask.num_prompt_tokens,
                num_prefix=seat.prefix_tokens,
            )

    def headers(self, content_type: str, placed: Placed | None) -> dict[str, str]:
        """Return the headers of the answer."""
        receipt = self._receipt
        if placed is not None:
            receipt.prefill_url, receipt.decode_url = placed.prefill_url, placed.decode_url
            receipt.transfer_id = placed.transfer_id
        return receipt.headers(content_type)

    def _note_ttft(self, kind: str) -> None:
        ttft_s = self._receipt.ttft_s = self._loop.time() - self.start_s
        self._metrics.observe("mooncake_router_ttft_seconds", ttft_s, kind=kind)
        if self.promised_s is not None:
            kept = "yes" if ttft_s <= self.promised_s else "no"
            self._metrics.add("mooncake_router_class_requests_total", kept=kept, service=self._caller.service_class)
