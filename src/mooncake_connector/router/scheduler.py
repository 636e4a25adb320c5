"""Join placing and admission: what happens to a request from its arrival to its last token.

Pure: no sockets, threads or clocks. Not thread-safe; one owner. The simulator drives it with simulated time.
"""

from __future__ import annotations

import heapq
import math
from typing import Literal, NamedTuple

from mooncake_connector.router.admission import REPLAN_S, AdmissionQueue, Hints, Outlook, Rejected, Waiting
from mooncake_connector.router.messages import Place, Placed, Refused
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import Choice

Mode = Literal["none", "early", "queue"]
"""Place at once; place or reject at once; or hold until an engine is about to be free."""

DISPATCH_BELOW_S = 0.5
TRIES_MAX = 8
POLL_S = 0.5
POLL_MIN_S = 0.01
MEAN_RATE = 0.01


class Submission(NamedTuple):
    """A request as it arrives; ``place.request_id`` names it, and is unique.

    With a ``colocated_reason`` it must run whole on one engine.
    """

    place: Place
    class_name: str = ""
    tenant: str = ""
    hints: Hints = Hints()
    colocated_reason: str = ""


class Dispatched(NamedTuple):
    """A request that was given to engines; ``placed`` says what to send them."""

    request_id: str
    choice: Choice
    placed: Placed | Refused


Action = Dispatched | Rejected | Refused
"""Send it; tell it no because of its promise; tell it no because there is no engine for it (``subject`` names it)."""


class Scheduler:
    """Takes requests in and says when each is to be sent where, or refused.

    Args:
        placer: the engines and the policy.
        queue: classes and who waits.
        mode: what to do with a request on arrival.
        is_rejecting: in mode ``queue``, whether requests that cannot be served in time are refused or served last.
        dispatch_below_s: a prefill engine gets its next request when it has less work than this.
    """

    def __init__(
        self,
        placer: Placer,
        queue: AdmissionQueue,
        *,
        mode: Mode = "queue",
        is_rejecting: bool = True,
        dispatch_below_s: float = DISPATCH_BELOW_S,
    ) -> None:
        self.placer = placer
        self.queue = queue
        self._mode = mode
        self._is_rejecting = is_rejecting
        self._dispatch_below_s = dispatch_below_s
        self._submissions: dict[str, Submission] = {}
        self._promised: list[tuple[float, str]] = []
        self._mean_tokens = 8192.0
        self._wake_s = 0.0

    def reconfigure(self, *, mode: Mode, is_rejecting: bool, dispatch_below_s: float) -> None:
        """Go on with other settings; what waits is dispatched by them."""
        self._mode, self._is_rejecting, self._dispatch_below_s = mode, is_rejecting, dispatch_below_s

    def submit(self, submission: Submission, *, now_s: float) -> list[Action]:
        """Take in a request and return what is to be done now, for this and for other requests."""
        return [*self._late(now_s), *self._submit(submission, now_s)]

    def _submit(self, submission: Submission, now_s: float) -> list[Action]:
        place, now_ns = submission.place, int(now_s * 1e9)
        outlook = self._outlook(now_s)
        open_below_s = self._dispatch_below_s if self._mode == "queue" else math.inf
        choice = self._propose(submission, now_ns, self._backlog_s(outlook), open_below_s)
        if isinstance(choice, Refused):
            return [choice]
        work_s = choice.start.prefill_s if choice.start else 0.0
        num_tokens = place.num_prompt_tokens + self.placer.predictor.output_tokens(place.num_output_tokens)
        taken = self.queue.offer(
            place.request_id,
            outlook=outlook,
            work_s=work_s,
            num_tokens=num_tokens,
            held_token_s=self._held_token_s(place, outlook),
            class_name=submission.class_name,
            tenant=submission.tenant,
            hints=submission.hints,
        )
        if isinstance(taken, Rejected):
            return [taken]
        if self._mode != "queue":
            if self._mode == "early" and not self._is_in_time(choice, taken, place, now_s):
                self.queue.remove(place.request_id)
                return [Rejected(place.request_id, "infeasible", self.queue.retry_after_s(taken, outlook))]
            return [self._dispatch(submission, choice, now_s)]
        if self._is_open_for(choice, taken, place, outlook):
            return [self._dispatch(submission, choice, now_s)]
        self._submissions[place.request_id] = submission
        return self._poll(now_s, outlook, (place.request_id, choice))

    def _propose(
        self, submission: Submission, now_ns: int, backlog_s: float, open_below_s: float = math.inf
    ) -> Choice | Refused:
        return self.placer.propose(
            submission.place,
            now_ns=now_ns,
            colocated_reason=submission.colocated_reason,
            backlog_s=backlog_s,
            open_below_s=open_below_s,
        )

    def _is_open_for(self, choice: Choice, waiting: Waiting, place: Place, outlook: Outlook) -> bool:
        """Tell whether a request that just came can be sent without asking who else waits.

        So can one that runs whole where others only decode: no queue of prefills stands before it.
        """
        start = choice.start
        if start is None or (choice.prefill is None and start.engine.role == "decode"):
            return True
        if self._submissions or start.engine.queue_s >= self._dispatch_below_s:
            return False
        is_welcome = not self._is_rejecting or self.queue.is_welcome(waiting, outlook, ready_s=start.ready_s)
        return is_welcome and self._has_room(choice, waiting, place)

    def poll(self, *, now_s: float) -> list[Action]:
        """Return what is to be done now: call it whenever something finished, and at :meth:`wake_s`."""
        late = self._late(now_s)
        return [*late, *self._poll(now_s, self._outlook(now_s))] if self._submissions else late

    def _late(self, now_s: float) -> list[Action]:
        """Return those that were sent and could not be computed by their deadline: what they still use is for others.

        They are open until whoever stopped them says so, see :meth:`cancel`.
        """
        late: list[Action] = []
        while self._promised and self._promised[0][0] <= now_s:
            _, request_id = heapq.heappop(self._promised)
            if self.placer.is_prefilling(request_id):
                late.append(Rejected(request_id, "late", 1))
        return late

    def _poll(self, now_s: float, outlook: Outlook, known: tuple[str, Choice] | None = None) -> list[Action]:
        """Drop and dispatch; ``known`` is what the placer has just proposed, and for which request."""
        actions: list[Action] = []
        if self._is_rejecting and self.queue.is_plan_due(now_s):
            for rejected in self.queue.drop_infeasible(outlook):
                del self._submissions[rejected.request_id]
                actions.append(rejected)
        while self._submissions and min(outlook.queues_s, default=0.0) < self._dispatch_below_s:
            dispatched = self._dispatch_next(outlook, known)
            known = None
            if dispatched is None:
                break
            actions.append(dispatched)
            outlook = self._outlook(now_s)
        below_s = self._dispatch_below_s
        opening_s = min((each - below_s for each in outlook.queues_s if each >= below_s), default=POLL_S)
        self._wake_s = now_s + min(max(opening_s, POLL_MIN_S), REPLAN_S if self.queue.is_changed else POLL_S)
        return actions

    @property
    def wake_s(self) -> float | None:
        """Return when to poll again if nothing happens before; None when nothing is waited for."""
        waits_s = [self._wake_s] if self._submissions else []
        return min(waits_s + [due_s for due_s, _ in self._promised[:1]], default=None)

    def cancel(self, request_id: str, *, now_s: float) -> None:
        """Forget a request whose client left or whose time is up, wherever it is."""
        if self._submissions.pop(request_id, None) is not None:
            self.queue.remove(request_id)
        self.placer.finish(request_id, now_ns=int(now_s * 1e9))

    def prefilled(
        self, request_id: str, *, now_s: float, engine: str, num_prompt: int, num_prefix: int, took_s: float
    ) -> None:
        """Learn from a finished prefill that computed for ``took_s``."""
        self.placer.predictor.observe_prefill(engine, num_prompt, num_prefix, took_s)
        self.placer.finish(request_id, "prefill", now_ns=int(now_s * 1e9))

    def finished(self, request_id: str, *, now_s: float, num_output: int) -> None:
        """Learn from a finished answer."""
        self.placer.predictor.observe_output(num_output)
        self.placer.finish(request_id, now_ns=int(now_s * 1e9))

    def _dispatch_next(self, outlook: Outlook, known: tuple[str, Choice] | None = None) -> Dispatched | Refused | None:
        now_ns = int(outlook.now_s * 1e9)
        backlog_s = self._backlog_s(outlook)
        for waiting in self.queue.order(outlook, TRIES_MAX, is_refusing=self._is_rejecting):
            submission = self._submissions[waiting.request_id]
            choice: Choice | Refused
            if known is not None and known[0] == waiting.request_id:
                choice = known[1]
            else:
                choice = self._propose(submission, now_ns, backlog_s, self._dispatch_below_s)
            known = None  # of two proposals only the last holds
            if isinstance(choice, Refused):
                # Every engine that could take it went away while it waited.
                del self._submissions[waiting.request_id]
                self.queue.remove(waiting.request_id)
                return choice
            if choice.start is None:
                continue
            waiting.work_s = choice.start.prefill_s
            if choice.start.engine.queue_s >= self._dispatch_below_s:
                continue
            if not self._has_room(choice, waiting, submission.place):
                continue
            del self._submissions[waiting.request_id]
            return self._dispatch(submission, choice, outlook.now_s)
        return None

    def _dispatch(self, submission: Submission, choice: Choice, now_s: float) -> Dispatched:
        request_id = submission.place.request_id
        waiting = self.queue.dispatch(request_id, now_s=now_s)
        if self._is_rejecting and self._mode == "queue":
            heapq.heappush(self._promised, (max(waiting.deadline_s, now_s), request_id))
        placed = self.placer.commit(submission.place, request_id, choice, now_ns=int(now_s * 1e9))
        return Dispatched(request_id, choice, placed)

    def _is_in_time(self, choice: Choice, waiting: Waiting, place: Place, now_s: float) -> bool:
        if choice.start is not None and now_s + choice.start.ttft_s > waiting.deadline_s:
            return False
        return self._has_room(choice, waiting, place)

    def _has_room(self, choice: Choice, waiting: Waiting, place: Place) -> bool:
        """Tell whether the decode engine has memory for it, and stays fast enough with it."""
        decode = choice.decode
        needed = decode.context_tokens + self._memory_tokens(place)
        if decode.capacity_tokens and decode.num_open and needed > decode.capacity_tokens:
            return False
        tbt_s = self.queue.service_class(waiting.class_name).tbt_s
        return not decode.num_open or self.placer.predictor.step_s(decode.num_open + 1, needed) <= tbt_s

    def _memory_tokens(self, place: Place) -> int:
        return place.num_prompt_tokens + self.placer.predictor.reserved_tokens(place.num_output_tokens)

    def _held_token_s(self, place: Place, outlook: Outlook) -> float:
        """Return KV memory times the time that it is held for, on a decode engine that is full of such requests."""
        predictor = self.placer.predictor
        engine_tokens = outlook.decode_tokens / max(self.placer.num_decoding, 1)
        if not engine_tokens:
            return 0.0
        num_tokens = self._memory_tokens(place)
        self._mean_tokens += MEAN_RATE * (num_tokens - self._mean_tokens)
        step_s = predictor.step_s(round(engine_tokens / max(self._mean_tokens, 1.0)), engine_tokens)
        return num_tokens * step_s * predictor.output_tokens(place.num_output_tokens)

    def _outlook(self, now_s: float) -> Outlook:
        queues_s = tuple(self.placer.backlog_s(now_ns=int(now_s * 1e9)))
        return Outlook(now_s, queues_s, self.placer.predictor.prefill_error.mean, self.placer.decode_tokens)

    def _backlog_s(self, outlook: Outlook) -> float:
        """Return seconds of unfinished and waiting work per prefill engine."""
        return (sum(outlook.queues_s) + self.queue.work_s) / max(len(outlook.queues_s), 1)
