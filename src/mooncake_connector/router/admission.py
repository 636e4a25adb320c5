"""Decide who is served, in which order, and who is told no.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

Requests wait here until an engine is about to be free: what waits can still be put in order, or refused. The requests
that wait are planned by deadline onto the prefill engines. When one cannot finish in time, the one is dropped, among
all that are due by then, that frees the most time per unit of value. From the rest the shortest goes first, as long as
every request that is due earlier keeps its margin: nobody starves.
"""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec

from mooncake_connector.router.tally import Inflow, TokenLedger
from mooncake_store.errors import LocalProtocolError

WAITING_MAX = 65_536
PRIORITY_MAX = 8
REUSES_MAX = 16
REPLAN_S = 0.1
ALWAYS_PLANNED = 32
SLACK_SHARE = 0.45
CALM_SHARE = 0.1
RETRY_MIN_S = 1
RETRY_MAX_S = 600

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class ServiceClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one class of requests is promised.

    Attributes:
        ttft_s: longest time to the first token.
        tbt_s: longest mean time between tokens.
        weight: how many requests of weight 1 one of these is worth when not all can be served.
        share: part of the served tokens below which the class counts as much as the most valuable one.
    """

    ttft_s: Seconds = 30.0
    tbt_s: Seconds = 0.1
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0


class Hints(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may say about its request; all optional.

    Attributes:
        ttft_s: a deadline of its own; only one that is earlier than its class's counts.
        priority: each step doubles or halves the request's weight.
        num_output_tokens: expected length of the answer.
        num_reuses: requests to come that will begin with this one's prompt; it is worth as much more, because each of
            them costs its work otherwise.
    """

    ttft_s: float = math.inf
    priority: int = 0
    num_output_tokens: int = 0
    num_reuses: int = 0


NO_HINTS = Hints()


class Waiting(msgspec.Struct):
    """A request that waits.

    Attributes:
        arrived_s, deadline_s: when it came, and when its first token is due.
        work_s: predicted seconds of prefill; may be corrected while it waits.
        held_token_s: KV memory while it decodes, times how long.
        num_tokens: prompt and expected answer; what its tenant is charged.
        value: how much it is worth among those that wait; changes with what its class and tenant were served.
    """

    request_id: str
    class_name: str
    tenant: str
    arrived_s: float
    deadline_s: float
    weight: float
    work_s: float
    held_token_s: float
    num_tokens: int
    value: float = 1.0

    @property
    def price(self) -> float:
        """Return the seconds of prefill per unit of value."""
        return self.work_s / self.value


Reason = Literal["infeasible", "displaced", "full", "rule", "late"]
"""Cannot be in time; costs more than can be afforded; no place to wait; the operator's rule; took longer than said."""


REASONS: dict[Reason, str] = {
    "infeasible": "the first token cannot come in the time that this request was promised",
    "displaced": "there is more to do than can be done in time, and this request costs most of it",
    "full": "too many requests wait",
    "rule": "the operator's admission rule says no",
    "late": "the first token did not come in time",
}


class Rejected(NamedTuple):
    """A request that is told no."""

    request_id: str
    reason: Reason
    retry_after_s: int


class Outlook(NamedTuple):
    """What admission knows of the engines.

    Attributes:
        queues_s: per prefill engine, the predicted seconds until it could begin another request.
        error: recent relative error of the prefill predictions.
        decode_tokens: KV memory of all decode engines; 0 when unknown.
    """

    now_s: float
    queues_s: tuple[float, ...]
    error: float = 0.0
    decode_tokens: int = 0


Rule = Callable[[Waiting, Outlook], bool]
"""An operator's own rule: whether a request may wait at all."""


class Planned(NamedTuple):
    """A waiting request in the plan by deadline; ``margin_s`` is how much later it could finish."""

    waiting: Waiting
    margin_s: float


_DEADLINE = operator.attrgetter("deadline_s")


def _cheapness(waiting: Waiting) -> tuple[float, float, str]:
    return (waiting.price, waiting.arrived_s, waiting.request_id)


class AdmissionQueue:
    """Holds requests until they can be served in time.

    Args:
        classes: by name; a request of an unknown class gets the class named ``""``, which must be there.
        safety_s: every deadline is planned to be met this much earlier.
        safety_errors: and earlier by this many times the error expected of the request's own prediction.
        overtaking_errors: where requests are refused, a shorter one may go first only if this many times that error is
            left besides.
        rule: an operator's own rule.
    """

    def __init__(
        self,
        classes: Mapping[str, ServiceClass],
        *,
        safety_s: float = 0.3,
        safety_errors: float = 2.0,
        overtaking_errors: float = 2.0,
        rule: Rule | None = None,
    ) -> None:
        self._safety_s = safety_s
        self._safety_errors = safety_errors
        self._overtaking_errors = overtaking_errors
        self._prefill_inflow = Inflow()
        self._decode_inflow = Inflow()
        self._waiting: dict[str, Waiting] = {}
        self._ranked: list[Waiting] = []
        self._ranked_s = -math.inf
        self.is_changed = False
        self._tenants = TokenLedger()
        self._served_classes = TokenLedger()
        self.reconfigure(classes, rule)

    def __len__(self) -> int:
        return len(self._waiting)

    def reconfigure(self, classes: Mapping[str, ServiceClass], rule: Rule | None) -> None:
        """Go on with other classes and another rule; who waits keeps the deadline it came with.

        Raises:
            LocalProtocolError: there is no class named ``""``.
        """
        if "" not in classes:
            raise LocalProtocolError("there must be a class named '' for requests that name none")
        self._classes = dict(classes)
        self._weight_max = max(each.weight for each in classes.values())
        self._rule = rule

    @property
    def work_s(self) -> float:
        """Return the predicted seconds of prefill that wait."""
        return sum(each.work_s for each in self._waiting.values())

    def service_class(self, name: str) -> ServiceClass:
        """Return a class by name, the default one for an unknown name."""
        return self._classes.get(name) or self._classes[""]

    def offer(
        self,
        request_id: str,
        *,
        outlook: Outlook,
        work_s: float,
        num_tokens: int,
        held_token_s: float = 0.0,
        class_name: str = "",
        tenant: str = "",
        hints: Hints = NO_HINTS,
    ) -> Waiting | Rejected:
        """Take in a request. Whether it can be served in time, :meth:`drop_infeasible` tells."""
        service = self.service_class(class_name)
        waiting = Waiting(
            request_id=request_id,
            class_name=class_name if class_name in self._classes else "",
            tenant=tenant,
            arrived_s=outlook.now_s,
            deadline_s=outlook.now_s + min(service.ttft_s, max(hints.ttft_s, 0.0)),
            weight=service.weight
            * 2.0 ** min(max(hints.priority, -PRIORITY_MAX), PRIORITY_MAX)
            * (1 + min(max(hints.num_reuses, 0), REUSES_MAX)),
            work_s=work_s,
            held_token_s=held_token_s,
            num_tokens=num_tokens,
        )
        if len(self._waiting) >= WAITING_MAX or request_id in self._waiting:
            return Rejected(request_id, "full", self.retry_after_s(waiting, outlook))
        if self._rule is not None and not self._rule(waiting, outlook):
            return Rejected(request_id, "rule", self.retry_after_s(waiting, outlook))
        self._waiting[request_id] = waiting
        self.is_changed = True
        waiting.value = self._value(waiting)
        self._prefill_inflow.add(waiting.price, work_s, now_s=outlook.now_s)
        self._decode_inflow.add(held_token_s / waiting.value, held_token_s, now_s=outlook.now_s)
        return waiting

    def remove(self, request_id: str) -> Waiting | None:
        """Take out a request whose client left; None when it does not wait."""
        self.is_changed = True
        return self._waiting.pop(request_id, None)

    def dispatch(self, request_id: str, *, now_s: float) -> Waiting:
        """Take out a request that was given to engines, and charge its tenant and class."""
        waiting = self._waiting.pop(request_id)
        self.is_changed = True
        self._tenants.add(waiting.tenant, waiting.num_tokens, now_s=now_s)
        self._served_classes.add(waiting.class_name, waiting.num_tokens, now_s=now_s)
        return waiting

    def is_welcome(self, waiting: Waiting, outlook: Outlook, *, ready_s: float) -> bool:
        """Tell whether a request that waits alone, and can begin in ``ready_s``, is in time and not too dear.

        It makes nobody else late, so a fair chance will do: no margin for the error of its prediction.
        """
        is_in_time = outlook.now_s + ready_s + waiting.work_s + self._safety_s <= waiting.deadline_s
        return is_in_time and not self._too_dear(outlook)

    def is_plan_due(self, now_s: float) -> bool:
        """Tell whether to plan anew: when something changed, but among many not more often than every ``REPLAN_S``."""
        age_s = now_s - self._ranked_s
        return age_s >= REPLAN_S or (len(self._waiting) <= ALWAYS_PLANNED and (self.is_changed or age_s > 0))

    def drop_infeasible(self, outlook: Outlook) -> list[Rejected]:
        """Take out the requests that make the rest late, and say when to come back."""
        for each in self._waiting.values():
            each.value = self._value(each)
        rejected = [self._reject(each, "displaced", outlook) for each in self._too_dear(outlook)]
        planned, late = self.plan(outlook)
        rejected += [self._reject(each, "infeasible", outlook) for each in late]
        self._rank(planned, [], outlook, self._overtaking_errors)
        return rejected

    def _too_dear(self, outlook: Outlook) -> list[Waiting]:
        """Return what costs more per unit of value than can be afforded, in prefill or in decode memory."""
        waiting, num_engines = self._waiting.values(), len(outlook.queues_s)
        ttft_s, prefill_max = self.service_class("").ttft_s, math.inf
        if self.work_s >= CALM_SHARE * ttft_s * num_engines:
            # What runs already leaves less time to those that wait.
            left_s = max(ttft_s - sum(outlook.queues_s) / max(num_engines, 1), 0.0)
            prefill_max = self._prefill_inflow.dearest(
                [(each.price, each.work_s) for each in waiting],
                capacity=num_engines,
                slack_s=SLACK_SHARE * left_s,
                now_s=outlook.now_s,
            )
        decode_max = self._decode_inflow.dearest(
            [(each.held_token_s / each.value, each.held_token_s) for each in waiting],
            capacity=outlook.decode_tokens,
            slack_s=SLACK_SHARE * ttft_s,
            now_s=outlook.now_s,
        )
        if math.isinf(prefill_max) and math.isinf(decode_max):
            return []
        return [
            each
            for each in waiting
            if each.work_s > prefill_max * each.value or each.held_token_s > decode_max * each.value
        ]

    def _reject(self, waiting: Waiting, reason: Reason, outlook: Outlook) -> Rejected:
        del self._waiting[waiting.request_id]
        return Rejected(waiting.request_id, reason, self.retry_after_s(waiting, outlook))

    def plan(self, outlook: Outlook) -> tuple[list[Planned], list[Waiting]]:
        """Return the largest-value set that can be served in time, by deadline, and those that cannot be.

        Each request is planned, in order of deadlines, onto the engine that is free first. Where one would be late, the
        one that costs most per unit of value among it and those planned before is dropped, until it is not (Moore and
        Hodgson's rule, for several engines).
        """
        due = sorted(self._waiting.values(), key=_DEADLINE)
        if not outlook.queues_s:
            return [], due
        free = [(queue_s, lane) for lane, queue_s in enumerate(outlook.queues_s)]
        heapq.heapify(free)
        lanes: dict[str, int] = {}
        dearest: list[tuple[float, str, float]] = []
        for each in due:
            name, price = each.request_id, each.price
            latest_s = each.deadline_s - outlook.now_s - self._own_s(each, outlook)
            while (begin_s := free[0][0]) > latest_s and dearest and dearest[0][:2] < (-price, name):
                _, dropped, work_s = heapq.heappop(dearest)
                gap = lanes.pop(dropped)
                free = [(until_s - work_s if lane == gap else until_s, lane) for until_s, lane in free]
                heapq.heapify(free)
            if begin_s <= latest_s:
                lane = free[0][1]
                heapq.heapreplace(free, (begin_s + each.work_s, lane))
                lanes[name] = lane
                heapq.heappush(dearest, (-price, name, each.work_s))
        return self._with_margins(due, lanes, outlook), [each for each in due if each.request_id not in lanes]

    def _with_margins(self, due: list[Waiting], lanes: Mapping[str, int], outlook: Outlook) -> list[Planned]:
        """Return the plan: every request that has a lane, behind those before it there."""
        free_s = list(outlook.queues_s)
        planned = []
        for each in due:
            lane = lanes.get(each.request_id)
            if lane is not None:
                margin_s = each.deadline_s - outlook.now_s - free_s[lane] - self._own_s(each, outlook)
                free_s[lane] += each.work_s
                planned.append(Planned(each, margin_s))
        return planned

    def order(self, outlook: Outlook, num_max: int = WAITING_MAX, *, is_refusing: bool = True) -> list[Waiting]:
        """Return what may be dispatched now, best first: shortest first among those that make nobody late.

        Those that are late already, where nothing is dropped, come last. Who came after the last plan comes with the
        next one, see :meth:`is_plan_due`.
        """
        if self.is_plan_due(outlook.now_s):
            for each in self._waiting.values():
                each.value = self._value(each)
            self._rank(*self.plan(outlook), outlook, self._overtaking_errors if is_refusing else 0.0)
        still = (each for each in self._ranked if self._waiting.get(each.request_id) is each)
        return list(itertools.islice(still, num_max))

    def _rank(self, planned: Sequence[Planned], late: Sequence[Waiting], outlook: Outlook, errors: float) -> None:
        num_engines = max(len(outlook.queues_s), 1)
        margin_s = math.inf
        allowed = []
        for waiting, own_margin_s in planned:
            if waiting.work_s / num_engines < margin_s:
                allowed.append(waiting)
            margin_s = min(margin_s, own_margin_s - waiting.work_s * errors * outlook.error)
        self._ranked = [*sorted(allowed, key=_cheapness), *sorted(late, key=_cheapness)]
        self._ranked_s, self.is_changed = outlook.now_s, False

    def retry_after_s(self, waiting: Waiting, outlook: Outlook) -> int:
        """Return after how many seconds a request like this one could be served in time, as predicted now."""
        num_engines = max(len(outlook.queues_s), 1)
        work_s = sum(outlook.queues_s) + self.work_s
        excess_s = work_s / num_engines + self._own_s(waiting, outlook) - (waiting.deadline_s - waiting.arrived_s)
        return min(max(math.ceil(excess_s), RETRY_MIN_S), RETRY_MAX_S)

    def _own_s(self, waiting: Waiting, outlook: Outlook) -> float:
        return waiting.work_s * (1.0 + self._safety_errors * outlook.error) + self._safety_s

    def _value(self, waiting: Waiting) -> float:
        weight = waiting.weight
        share = self.service_class(waiting.class_name).share
        if share and self._served_classes.share(waiting.class_name) < share:
            weight = max(weight, self._weight_max)
        return weight / self._tenants.over_share(waiting.tenant)
