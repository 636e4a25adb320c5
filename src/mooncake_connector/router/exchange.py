"""Serve one client request: place it, send its legs, survive one failure, relay the answer.

Threads: one asyncio loop. Cancelling :meth:`Exchange.run` (the client left) ends both legs at once.

The life of a request::

    place ─► prefill leg sent ─► decode leg sent ─► first byte ─► relay ─► finished
               │ unreachable        │ fails before its first byte
               ├► another prefill   └► place anew without that engine, once
               └► decode alone, or place anew where the engine cannot
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from aiohttp import web

from mooncake_connector.router.account import Account
from mooncake_connector.router.admission import REASONS, Rejected, ServiceClass
from mooncake_connector.router.answers import Problem, problem_event, problem_json
from mooncake_connector.router.bodies import Ask, hide_params
from mooncake_connector.router.callers import Caller
from mooncake_connector.router.dialects.select import dialect_of
from mooncake_connector.router.dispatcher import Dispatcher, Seat
from mooncake_connector.router.legs import JSON, LegFailure, Legs, PrefillDone, PrefillLeg, StreamedAnswer, WholeAnswer
from mooncake_connector.router.messages import Placed, Refused
from mooncake_connector.router.recovery import Patience, recovery_wait_s
from mooncake_connector.router.relay import end_late, pass_on
from mooncake_connector.router.watch import EngineWatch
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

DECODE_ATTEMPTS_MAX = 2
CLIENT_GONE = Problem(500, "the client closed the connection")
RETRY_AFTER_S = 1
RETRY_LATE_S = 1
LEGS_APART_S = 0.5
"""When one leg of a pair failed, how long the other may take to say why, or to answer all the same."""

Opened = StreamedAnswer | WholeAnswer | LegFailure


class Services(NamedTuple):
    """What every exchange of one router shares."""

    watch: EngineWatch
    legs: Legs
    dispatcher: Dispatcher
    metrics: Metrics
    patience: Patience
    total_timeout_s: float
    new_transfer_id: Callable[[], str]


class Exchange:
    """One client request from the first placement to the last byte.

    Args:
        services: what the router's exchanges share.
        ask: what the client wants.
        caller: who asks.
        promise: what the caller's class is promised; None when nothing is.
        request_id: goes to both engines and back to the client.
        headers: what both engines get.
    """

    def __init__(
        self,
        services: Services,
        ask: Ask,
        *,
        caller: Caller,
        promise: ServiceClass | None,
        request_id: str,
        headers: Mapping[str, str],
    ) -> None:
        self._services = services
        self._placer = services.watch.placer
        self._metrics = services.metrics
        self._ask = ask
        self._request_id = request_id
        self._headers = headers
        self._loop = asyncio.get_running_loop()
        self._account = Account(
            services.dispatcher, services.metrics, ask, caller=caller, promise=promise, request_id=request_id
        )
        self._placed: Placed | None = None
        self._prefill: PrefillLeg | None = None
        self.outcome = "ok"

    async def run(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer the client. Bounded by the total timeout; every failure becomes an OpenAI-style error."""
        response: web.StreamResponse | None = None
        opened: StreamedAnswer | WholeAnswer | Problem | None = None
        try:
            async with asyncio.timeout(self._services.total_timeout_s):
                opened = await self._open_in_time()
                if isinstance(opened, Problem):
                    return self._answer_problem(opened)
                if isinstance(opened, WholeAnswer):
                    return self._answer_whole(opened)
                self._account.first_byte(self._placed)
                response = web.StreamResponse(headers=self._account.headers(opened.content_type, self._placed))
                return await self._relay(request, response, opened)
        except TimeoutError:
            self.outcome = "timeout"
            problem = Problem(504, f"the request took more than {self._services.total_timeout_s:g} s")
            if response is None or not response.prepared or not isinstance(opened, StreamedAnswer):
                return self._answer_problem(problem)
            await end_late(request, response, problem_event(problem, tail=opened.tail))
            return response
        except asyncio.CancelledError:
            self._note_client_gone()
            raise
        except ConnectionResetError:
            self._note_client_gone()
            # Raised on, aiohttp would log a client that left as an error of ours, with a traceback.
            return self._answer_problem(CLIENT_GONE) if response is None else response
        finally:
            self._finish(is_prefill_kept=self.outcome == "ok")

    def _note_client_gone(self) -> None:
        self.outcome = "client_gone"
        self._metrics.add("mooncake_router_disconnects_total")

    async def _open_in_time(self) -> StreamedAnswer | WholeAnswer | Problem:
        """Get the first byte of an answer, or give up when the promise of a first token cannot be kept any more."""
        promised_s = self._account.promised_s
        if promised_s is None or not self._ask.is_stream:
            return await self._open()
        try:
            async with asyncio.timeout_at(self._account.start_s + promised_s) as deadline:
                return await self._open()
        except TimeoutError:
            if not deadline.expired():
                raise
            self.outcome = "rejected"
            self._metrics.add("mooncake_router_rejected_total", reason="late")
            return Problem(
                429,
                f"the first token did not come within {promised_s:g} s, which this request was promised",
                retry_after_s=RETRY_LATE_S,
            )

    async def _open(self) -> StreamedAnswer | WholeAnswer | Problem:
        """Get the first byte of an answer, from a second engine if need be."""
        excluded: tuple[str, ...] = ()
        failure: LegFailure | None = None
        for attempt in range(DECODE_ATTEMPTS_MAX):
            placed = await self._place(excluded)
            if not isinstance(placed, Placed):
                break
            if attempt:
                self._metrics.add("mooncake_router_retries_total", leg="decode")
            opened = await self._attempt(placed)
            if not isinstance(opened, LegFailure):
                return opened
            failure = opened
            excluded += (opened.url,)
            if opened.url == placed.decode_url:
                self._note_decode_failure(opened)
            if opened.kind == "timeout":
                break
            log.warning("request %s: %s failed: %s", self._request_id, opened.url, opened.message)
        else:
            placed = None
        if failure is not None:
            return self._decode_problem(failure, is_alone=placed is not None)
        assert isinstance(placed, Refused | Rejected)  # the loop ran, and nothing failed
        return self._refusal_problem(placed)

    async def _place(self, excluded: tuple[str, ...]) -> Placed | Refused | Rejected:
        dispatcher = self._services.dispatcher
        submission = self._account.submission(self._services.new_transfer_id(), excluded)
        seat = dispatcher.place_again(submission) if excluded else await dispatcher.place(submission)
        if not isinstance(seat, Seat):
            return seat
        self._placed = seat.placed
        self._account.seated(seat)
        if seat.start is not None and not seat.placed.prefill_url and not self._ask.is_stream:
            # Nothing is heard of it before its last token.
            dispatcher.expect_prefilled(seat.placed.transfer_id, after_s=seat.start.ttft_s)
        return seat.placed

    async def _attempt(self, placed: Placed) -> Opened:
        """Send the legs of one placement; a failure leaves nothing of it behind."""
        opened: Opened | None = None
        try:
            if placed.prefill_url:
                sent = await self._send_prefill(placed)
                if isinstance(sent, LegFailure):
                    opened = sent
                    return opened
                placed = sent
            if not placed.prefill_url:
                self._metrics.add("mooncake_router_colocated_total", reason=placed.reason)
            self._placed = placed
            opened = await self._send_decode(placed)
            return opened
        finally:
            if opened is None or isinstance(opened, LegFailure):
                self._finish(is_prefill_kept=False)

    async def _send_prefill(self, placed: Placed) -> Placed | LegFailure:
        """Send the prefill leg, to a second engine when the first cannot be reached; else give it up."""
        for _ in range(2):
            body = dialect_of(placed).prefill_body(self._ask, placed)
            leg = self._services.legs.start_prefill(placed.prefill_url, self._ask.route, body, self._headers)
            self._prefill = leg
            leg.task.add_done_callback(partial(self._prefill_over, leg, placed.transfer_id))
            if await leg.wait_sent():
                return placed
            self._prefill, failure = None, leg.outcome()
            again = self._placer.place_prefill_again(
                placed.transfer_id, excluded=placed.prefill_url, now_ns=int(self._loop.time() * 1e9)
            )
            if again is None:
                break
            self._metrics.add("mooncake_router_retries_total", leg="prefill")
            placed = again
        if not dialect_of(placed).recovers and isinstance(failure, LegFailure):
            return failure
        self._services.dispatcher.finish(placed.transfer_id, "prefill")
        return self._colocated(placed, "prefill_unreachable")

    def _colocated(self, placed: Placed, reason: str) -> Placed:
        return Placed(self._request_id, "", placed.decode_url, placed.transfer_id, reason=reason)

    async def _send_decode(self, placed: Placed) -> Opened:
        """Send the decode leg and wait for its first byte, with an eye on the prefill leg."""
        if self._prefill is None:
            return await self._open_decode(placed)
        decode = asyncio.create_task(self._open_decode(placed), name=f"decode {placed.decode_url}")
        try:
            if dialect_of(placed).recovers:
                opened = await self._watch_both(decode, self._prefill)
            else:
                opened = await self._need_both(decode, self._prefill)
        except asyncio.CancelledError:
            _abandon(decode)
            raise
        if opened is not None:
            if not decode.done():
                _abandon(decode)
            return opened
        _abandon(decode)
        log.warning("request %s: sent anew as a plain request to %s", self._request_id, placed.decode_url)
        self._metrics.add("mooncake_router_retries_total", leg="decode")
        self._metrics.add("mooncake_router_colocated_total", reason="prefill_failed")
        self._placed = self._colocated(placed, "prefill_failed")
        return await self._open_decode(self._placed)

    async def _open_decode(self, placed: Placed) -> Opened:
        dialect = dialect_of(placed)
        body = dialect.decode_body(self._ask, placed)
        return await self._services.legs.open_decode(
            placed.decode_url, self._ask.route, body, self._headers, dialect=dialect, is_stream=self._ask.is_stream
        )

    async def _watch_both(self, decode: asyncio.Task[Opened], prefill: PrefillLeg) -> Opened | None:
        """Return what the decode leg brought; None when it is better sent anew because its prefill leg failed."""
        waiting: set[asyncio.Task[Opened] | asyncio.Task[PrefillDone | LegFailure]] = {decode, prefill.task}
        wait_s: float | None = None
        while True:
            done, _ = await asyncio.wait(waiting, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if decode in done:
                return decode.result()
            if not done:
                return None
            waiting.discard(prefill.task)
            outcome = prefill.outcome()
            if isinstance(outcome, LegFailure):
                if outcome.complaint is not None:
                    return outcome.complaint  # the decode engine would only wait for a prefill that never comes
                wait_s = recovery_wait_s(
                    self._services.patience,
                    is_refusal=outcome.kind == "refused",
                    is_stream=self._ask.is_stream,
                    num_output_tokens=self._ask.num_output_tokens,
                )
                log.warning(
                    "request %s: prefill on %s failed: %s; waiting %.1f s for the decode engine to recover",
                    self._request_id, outcome.url, outcome.message, wait_s,
                )  # fmt: skip

    async def _need_both(self, decode: asyncio.Task[Opened], prefill: PrefillLeg) -> Opened:
        """Return what the decode leg brought, or why the prefill leg failed: the decode engine cannot do without it."""
        legs: set[asyncio.Task[Opened] | asyncio.Task[PrefillDone | LegFailure]] = {decode, prefill.task}
        await asyncio.wait(legs, return_when=asyncio.FIRST_COMPLETED)
        if isinstance(prefill.outcome(), LegFailure) or (decode.done() and isinstance(decode.result(), LegFailure)):
            await asyncio.wait(legs, timeout=LEGS_APART_S)
        outcome = prefill.outcome()
        has_answer = decode.done() and not isinstance(decode.result(), LegFailure)
        if isinstance(outcome, LegFailure) and not has_answer:
            return outcome.complaint or outcome
        return await decode

    def _prefill_over(self, leg: PrefillLeg, transfer_id: str, _task: object) -> None:
        """Account for a prefill leg that ended, whenever that is; it may outlive the exchange."""
        outcome = leg.outcome()
        if isinstance(outcome, PrefillDone):
            self._metrics.add("mooncake_router_legs_total", leg="prefill", result="ok")
            self._metrics.observe("mooncake_router_prefill_seconds", outcome.duration_s)
            self._services.watch.note_success(leg.url)
            self._services.watch.note_prefill_answer(outcome)
            self._account.prefill_ended(outcome)
        elif isinstance(outcome, LegFailure):
            self._metrics.add("mooncake_router_legs_total", leg="prefill", result=outcome.kind)
            if outcome.kind != "refused" or outcome.status >= 500:
                self._services.watch.note_failure(leg.url, outcome.message)
            if outcome.kind == "unsent":
                return  # the exchange moves the leg or gives it up
        else:
            self._metrics.add("mooncake_router_legs_total", leg="prefill", result="cancelled")
        self._services.dispatcher.finish(transfer_id, "prefill")

    def _finish(self, *, is_prefill_kept: bool) -> None:
        """Stop counting this placement. A prefill leg that is kept ends, and is accounted for, by itself."""
        leg, self._prefill = self._prefill, None
        if leg is not None and not is_prefill_kept:
            leg.task.cancel()
        placed, self._placed = self._placed, None
        if placed is not None:
            is_whole = leg is None
            self._services.dispatcher.finish(
                placed.transfer_id, "decode" if is_prefill_kept and not is_whole else "both"
            )

    def _note_decode_failure(self, failure: LegFailure) -> None:
        self._metrics.add("mooncake_router_legs_total", leg="decode", result=failure.kind)
        if failure.kind != "refused" or failure.status >= 500:
            self._services.watch.note_failure(failure.url, failure.message)

    async def _relay(
        self, request: web.BaseRequest, response: web.StreamResponse, opened: StreamedAnswer
    ) -> web.StreamResponse:
        """Pass the stream on, chunk by chunk as it comes; a stream that breaks ends with an error event."""
        decode_url = self._placed.decode_url if self._placed else ""
        try:
            await response.prepare(request)
            passed = await pass_on(response, opened)
            if passed.problem:
                self.outcome = "engine_error"
                self._note_decode_failure(LegFailure("lost", decode_url, passed.problem))
                problem = Problem(502, f"the decode engine {decode_url} broke off its answer: {passed.problem}")
                await response.write(problem_event(problem, tail=opened.tail))
            else:
                self._metrics.add("mooncake_router_legs_total", leg="decode", result="ok")
                self._services.watch.note_success(decode_url)
                self._account.stream_ended(decode_url, passed)
            await response.write_eof()
            return response
        finally:
            opened.close()

    def _answer_whole(self, answer: WholeAnswer) -> web.Response:
        if answer.status >= 400:
            self.outcome = "engine_refused"
        elif self._placed is not None:
            self._services.watch.note_success(self._placed.decode_url)
        self._metrics.add("mooncake_router_legs_total", leg="decode", result="ok" if answer.status < 400 else "refused")
        self._account.whole_ended(answer, self._placed)
        headers = self._account.headers(answer.content_type, self._placed)
        return web.Response(status=answer.status, body=hide_params(answer.body), headers=headers)

    def _answer_problem(self, problem: Problem) -> web.Response:
        headers = self._account.headers(JSON, self._placed)
        if problem.retry_after_s:
            headers["Retry-After"] = str(problem.retry_after_s)
        return web.Response(status=problem.status, body=problem_json(problem), headers=headers)

    def _decode_problem(self, failure: LegFailure, *, is_alone: bool) -> Problem:
        if failure.kind == "timeout":
            self.outcome = "timeout"
            return Problem(504, f"the engine {failure.url} gave {failure.message}")
        self.outcome = "engine_error"
        again = "no other engine could take the request" if is_alone else "so did the one before"
        return Problem(
            502, f"the engine {failure.url} failed: {failure.message}; {again}", retry_after_s=RETRY_AFTER_S
        )

    def _refusal_problem(self, refused: Refused | Rejected) -> Problem:
        if isinstance(refused, Rejected):
            self.outcome = "rejected"
            again_s = refused.retry_after_s
            return Problem(429, f"{REASONS[refused.reason]}; try again in {again_s} s", retry_after_s=again_s)
        self.outcome = "refused"
        if refused.code == "no_model":
            return Problem(404, refused.reason, param="model")
        return Problem(503, refused.reason, retry_after_s=RETRY_AFTER_S)


def _abandon(decode: asyncio.Task[Opened]) -> None:
    """End a decode leg whose answer nobody will read."""
    if not decode.done():
        decode.cancel()
    elif not decode.cancelled() and isinstance(decode.result(), StreamedAnswer):
        decode.result().close()  # type: ignore[union-attr]
