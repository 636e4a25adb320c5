"""The simulator is deterministic and loses nobody, and the router's own policy is worth having in it."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.policy import POLICIES
from mooncake_connector.router.simulation.cluster import ClusterSpec, DecodeEngine
from mooncake_connector.router.simulation.loop import Outcome, RunSpec, Simulation
from mooncake_connector.router.simulation.report import Row, format_heading, format_row, summarise
from mooncake_connector.router.simulation.trace import TraceRequest, cut, draw_class
from unit.router.traffic import conversations

SMALL = ClusterSpec(num_prefill=3, num_decode=3)
CLASSES = {"": ServiceClass(), "paid": ServiceClass(weight=10.0)}


def outcomes(requests: list[TraceRequest], cluster: ClusterSpec = SMALL, **run) -> list[Outcome]:
    return Simulation(requests, cluster, RunSpec(**run)).run()


def row(requests: list[TraceRequest], policy: str, cluster: ClusterSpec = SMALL, classes=None, **run) -> Row:
    classes = classes or {"": ServiceClass()}
    mode = "queue" if policy == "joint" else "early"
    done = outcomes(requests, cluster, policy=policy, mode=mode, classes=classes, **run)
    return summarise(requests, done, classes, policy=policy, admission=mode, load=1.0, prefill_error=0.0).row


@functools.cache
def crowd() -> list[TraceRequest]:
    """Return a third more than three prefill engines can serve."""
    return conversations(num=700, rate=4.7, seed=7)


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    requests = crowd()[:200]
    first = outcomes(requests, seed=1)
    assert first == outcomes(requests, seed=1) != outcomes(requests, seed=2)


def test_more_is_answered_in_time_and_sooner_than_with_the_published_algorithm() -> None:
    ours, paper = row(crowd(), "joint"), row(crowd(), "mooncake_paper")
    assert ours.goodput >= paper.goodput + 0.04
    assert ours.ttft_mean_s <= paper.ttft_mean_s / 2
    assert ours.wasted_prefill <= 0.02 < paper.wasted_prefill


def test_with_little_to_do_everybody_is_answered() -> None:
    requests = cut(crowd(), begin=0, end=0.5, load=0.3)
    for policy in POLICIES:
        assert row(requests, policy).goodput == 1.0, policy


@pytest.mark.parametrize("cluster", [
    ClusterSpec(num_prefill=3, num_decode=3, link_bytes_per_s=10e9),
    ClusterSpec(num_prefill=3, num_decode=1),
    ClusterSpec(num_prefill=3, num_decode=3, has_pool=False),
    ClusterSpec(num_prefill=1, num_decode=1),
], ids=["slow links", "few decode engines", "no pool", "one pair"])  # fmt: skip
def test_scarce_links_memory_or_engines_do_not_turn_it_round(cluster: ClusterSpec) -> None:
    requests = cut(crowd(), begin=0, end=0.6, load=1.0 if cluster.num_prefill > 1 else 0.4)
    assert row(requests, "joint", cluster).goodput >= row(requests, "mooncake_paper", cluster).goodput


def test_the_class_that_counts_more_is_served_when_not_all_can_be() -> None:
    requests = draw_class(crowd(), "paid", share=0.3, seed=0)
    ours, paper = (row(requests, policy, classes=CLASSES) for policy in ("joint", "mooncake_paper"))
    assert ours.goodput_by_class["paid"] >= 0.97 > paper.goodput_by_class["paid"]


def test_equal_requests_are_served_as_far_as_the_engines_go() -> None:
    # Twice what one engine can do: half of them must be answered, whichever.
    requests = [TraceRequest(number, number * 0.5, 8000, 10, (number * 100,)) for number in range(240)]
    assert row(requests, "joint", ClusterSpec(num_prefill=1, num_decode=1, noise=0.0)).goodput >= 0.5


requests_of_few = st.lists(
    st.tuples(st.floats(0, 4), st.integers(1, 60_000), st.integers(0, 400), st.integers(0, 3),
              st.sampled_from(["", "paid"])),
    min_size=1, max_size=25)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(given_=requests_of_few, num_prefill=st.integers(1, 3), num_decode=st.integers(1, 2), has_pool=st.booleans(),
       decode_tokens=st.sampled_from([70_000, 1_300_000]), link=st.sampled_from([1e9, 87e9]),
       noise=st.sampled_from([0.0, 0.15]))  # fmt: skip
def test_everybody_is_answered_in_time_or_told_no_in_time(
    given_, num_prefill, num_decode, has_pool, decode_tokens, link, noise
) -> None:
    now_s, requests = 0.0, []
    for number, (gap_s, num_prompt, num_output, session, name) in enumerate(given_):
        now_s += gap_s
        chain = tuple(session * 1000 + block for block in range(num_prompt // 512))
        requests.append(TraceRequest(number, now_s, num_prompt, num_output, chain, name))
    cluster = ClusterSpec(num_prefill=num_prefill, num_decode=num_decode, has_pool=has_pool,
                          decode_tokens=decode_tokens, link_bytes_per_s=link, noise=noise)  # fmt: skip
    simulation = Simulation(requests, cluster, RunSpec(classes=CLASSES))
    for each in simulation.run():
        is_rejected = each.rejected_s >= 0
        assert is_rejected != (each.finished_s >= 0)
        if is_rejected:
            assert each.retry_after_s >= 1 and each.rejected_s <= each.arrived_s + 30.0 + 1.0
            assert each.dispatched_s < 0 or each.reason == "late"
        else:
            assert each.arrived_s <= each.dispatched_s <= each.prefilled_s <= each.handed_over_s <= each.finished_s
            assert each.prefilled_s <= each.arrived_s + 30.0 + 1e-6
        if noise == 0 and link == 87e9:
            # What is predicted exactly and sent is never late.
            assert each.reason != "late"
    placer = simulation.scheduler.placer
    assert placer.num_open == 0 and len(simulation.scheduler.queue) == 0 and simulation.scheduler.wake_s is None
    assert max(placer.backlog_s(now_ns=int(1e15))) == 0.0


class TestDecodeEngine:
    def test_a_batch_shares_the_time_and_the_next_waits_for_memory(self) -> None:
        spec = ClusterSpec(decode_tokens=1000, step=(0.02, 0.01, 1e-9))
        engine = DecodeEngine("d", spec)
        engine.join(1, 400, 100, now_s=0.0)
        engine.join(2, 400, 50, now_s=0.0)
        engine.join(3, 400, 10, now_s=0.0)
        assert engine.num_running == 2 and engine.step_s() == pytest.approx(0.04, rel=0.01)
        due_s = engine.next_finish_s()
        assert due_s == pytest.approx(50 * 0.04, rel=0.01)
        assert engine.finish(due_s) == 2 and engine.num_running == 2
        due_s = engine.next_finish_s()
        assert engine.finish(due_s) == 3 and engine.finish(engine.next_finish_s()) == 1
        assert engine.next_finish_s() is None and engine.num_context_tokens == 0

    def test_one_that_is_too_large_for_any_memory_runs_alone(self) -> None:
        engine = DecodeEngine("d", ClusterSpec(decode_tokens=10))
        engine.join(1, 400, 100, now_s=0.0)
        engine.join(2, 1, 1, now_s=0.0)
        assert engine.num_running == 1


def test_a_row_counts_refused_and_late_requests_as_not_answered() -> None:
    requests = [TraceRequest(number, 0.0, 1000, 10, ()) for number in range(4)]
    done = [
        Outcome(0.0, 0.0, 1.0, 1.0, 1.5, prefill_work_s=1.0, num_cached=500),
        Outcome(0.0, 0.0, 31.0, 31.0, 31.5, prefill_work_s=1.0),
        Outcome(0.0, 0.0, 2.0, 2.0, 9.0, prefill_work_s=2.0),
        Outcome(0.0, rejected_s=3.0, reason="infeasible"),
    ]
    got = summarise(requests, done, {"": ServiceClass()}, policy="p", admission="early", load=2.0, prefill_error=0.1)
    assert (got.row.goodput, got.row.rejected, got.row.within_10s) == (0.25, 0.25, 0.5)
    assert got.row.wasted_prefill == 0.75 and got.row.rejected_after_s == 3.0
    assert got.row.cached == pytest.approx(500 / 3000)
    assert len(format_row(got.row).split()) == len(format_heading().replace("<=10 s", "x").split())
