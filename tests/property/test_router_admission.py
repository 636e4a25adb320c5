"""Whatever waits: what is kept can be served in time, as many as can be are, and nobody starves."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.router.admission import AdmissionQueue, Hints, Outlook, Rejected, ServiceClass, Waiting

SAFETY = {"safety_s": 0.0, "safety_errors": 0.0, "overtaking_errors": 0.0}
# Whole seconds, so that sums are exact.
works = st.integers(1, 40).map(float)
jobs = st.lists(st.tuples(works, st.integers(1, 80).map(float)), min_size=1, max_size=7)
queues = st.lists(st.integers(0, 30).map(float), min_size=1, max_size=4).map(tuple)


def filled(pairs, outlook: Outlook, **more) -> AdmissionQueue:
    queue = AdmissionQueue({"": ServiceClass(ttft_s=100.0)}, **{**SAFETY, **more})
    for number, (work_s, ttft_s) in enumerate(pairs):
        taken = queue.offer(str(number), outlook=outlook, work_s=work_s, num_tokens=1, hints=Hints(ttft_s=ttft_s))
        assert isinstance(taken, Waiting)
    return queue


@given(pairs=jobs, queues_s=queues)
def test_what_is_kept_can_be_served_in_time_in_order_of_deadlines(pairs, queues_s) -> None:
    outlook = Outlook(0.0, queues_s)
    planned, dropped = filled(pairs, outlook).plan(outlook)
    assert sorted(int(each.request_id) for each in [*(each.waiting for each in planned), *dropped]) == [
        *range(len(pairs))]
    assert all(margin_s >= -1e-9 for _, margin_s in planned)
    # The margins are those of a schedule that engines can follow: at no time is more promised than there are engines.
    ends = sorted(each.waiting.deadline_s - each.margin_s for each in planned)
    for end in ends:
        work = sum(each.waiting.work_s for each in planned if each.waiting.deadline_s - each.margin_s <= end + 1e-9)
        assert work <= sum(max(end - queue_s, 0.0) for queue_s in queues_s) + 1e-6


@given(pairs=jobs, queue_s=st.integers(0, 30).map(float))
def test_on_one_engine_as_many_are_kept_as_can_be(pairs, queue_s) -> None:
    outlook = Outlook(0.0, (queue_s,))
    planned, _ = filled(pairs, outlook).plan(outlook)

    def fits(chosen) -> bool:
        ends = itertools.accumulate(sorted(chosen, key=lambda pair: pair[1]), lambda at, pair: at + pair[0],
                                    initial=queue_s)
        return all(end <= pair[1] + 1e-9 for end, pair in zip(list(ends)[1:], sorted(chosen, key=lambda p: p[1]),
                                                              strict=True))

    most = max(size for size in range(len(pairs) + 1) if any(map(fits, itertools.combinations(pairs, size))))
    assert len(planned) == most


@given(pairs=jobs, queues_s=queues)
def test_whoever_goes_first_makes_nobody_late_who_is_due_before(pairs, queues_s) -> None:
    outlook = Outlook(0.0, queues_s)
    queue = filled(pairs, outlook)
    queue.drop_infeasible(outlook)
    margins = {each.waiting.request_id: each for each in queue.plan(outlook)[0]}
    allowed = queue.order(outlook)
    assert allowed or not margins, "the one that is due first may always go"
    for each in allowed:
        for other in margins.values():
            if other.waiting.deadline_s < each.deadline_s:
                assert each.work_s / len(queues_s) < other.margin_s + 1e-9
    assert [each.work_s for each in allowed] == sorted(each.work_s for each in allowed)


@settings(deadline=None, max_examples=30)
@given(long_s=st.integers(2, 20), short_s=st.integers(1, 10).map(lambda tenths: tenths / 10))
def test_a_long_request_is_served_though_short_ones_come_without_end(long_s, short_s) -> None:
    queue = AdmissionQueue({"": ServiceClass(ttft_s=30.0)})
    begun: dict[str, float] = {}
    free_s, numbers, next_short_s = 0.0, itertools.count(), 0.0
    for tick in range(400):
        now_s = tick / 10
        outlook = Outlook(now_s, (max(free_s - now_s, 0.0),))
        if tick == 0:
            queue.offer("long", outlook=outlook, work_s=float(long_s), num_tokens=1)
        # Together with the long one a little less than the engine can do.
        while next_short_s <= now_s:
            queue.offer(f"s{next(numbers)}", outlook=outlook, work_s=short_s, num_tokens=1)
            next_short_s += short_s / (1 - long_s / 30 - 0.15)
        assert not any(each.request_id == "long" for each in queue.drop_infeasible(outlook))
        if free_s <= now_s and (first := queue.order(outlook, 1)):
            queue.dispatch(first[0].request_id, now_s=now_s)
            begun[first[0].request_id] = now_s
            free_s = now_s + first[0].work_s
    assert begun["long"] + long_s <= 30.0 and len(begun) > 1


@given(num=st.integers(1, 60))
def test_where_all_cost_the_same_as_many_are_kept_as_fit(num) -> None:
    queue = AdmissionQueue({"": ServiceClass(ttft_s=10.0)}, **SAFETY)
    outlook = Outlook(0.0, (0.0,))
    for number in range(num):
        queue.offer(str(number), outlook=outlook, work_s=1.0, num_tokens=1)
        queue.drop_infeasible(outlook)
    assert len(queue) == min(num, 10)


@given(weights=st.lists(st.sampled_from([1.0, 2.0, 10.0]), min_size=2, max_size=8))
def test_of_equal_requests_those_that_count_less_are_refused(weights) -> None:
    classes = {f"{weight:g}": ServiceClass(ttft_s=4.5, weight=weight) for weight in weights}
    queue = AdmissionQueue({"": ServiceClass(ttft_s=100.0), **classes}, **SAFETY)
    outlook = Outlook(0.0, (0.0,))
    for number, weight in enumerate(weights):
        queue.offer(str(number), outlook=outlook, work_s=1.0, num_tokens=1, class_name=f"{weight:g}")
    refused = {int(each.request_id) for each in queue.drop_infeasible(outlook)}
    kept = set(range(len(weights))) - refused
    assert len(kept) == min(len(weights), 4)
    assert min(weights[each] for each in kept) >= max((weights[each] for each in refused), default=-math.inf)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.01, 40), st.floats(0, 1e9), st.sampled_from(["", "a", "b"]),
                          st.floats(0, 60), st.integers(-20, 20)), max_size=40),
       st.lists(st.floats(0, 40), max_size=4).map(tuple))
def test_every_request_leaves_once_and_nobody_waits_past_the_last_moment(arrivals, queues_s) -> None:
    queue = AdmissionQueue({"": ServiceClass(), "a": ServiceClass(ttft_s=5.0, weight=3.0)})
    now_s, open_ids = 0.0, set()
    for number, (gap_s, work_s, held, name, ttft_s, priority) in enumerate(arrivals):
        now_s += gap_s
        outlook = Outlook(now_s, queues_s, 0.15, 1_000_000)
        queue.offer(str(number), outlook=outlook, work_s=work_s, num_tokens=10, held_token_s=held, class_name=name,
                    tenant=name, hints=Hints(ttft_s=ttft_s, priority=priority))
        open_ids.add(str(number))
        for rejected in queue.drop_infeasible(outlook):
            assert isinstance(rejected, Rejected) and rejected.retry_after_s >= 1
            open_ids.remove(rejected.request_id)
        waiting = [queue.remove(each) for each in sorted(open_ids)]
        assert all(each is not None and each.deadline_s - each.work_s - min(queues_s) >= now_s for each in waiting)
        for each in waiting:
            assert each is not None
            queue.offer(each.request_id, outlook=outlook, work_s=each.work_s, num_tokens=10)
        assert len(queue) == len(open_ids)
