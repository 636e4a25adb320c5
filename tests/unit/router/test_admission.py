"""Admission and scheduler, one rule at a time."""

from __future__ import annotations

import pytest

from mooncake_connector.router import tally
from mooncake_connector.router.admission import (
    RETRY_MAX_S,
    AdmissionQueue,
    Hints,
    Outlook,
    Rejected,
    ServiceClass,
    Waiting,
)
from mooncake_connector.router.engines import EngineEvent, EngineTable, Introduction
from mooncake_connector.router.messages import Place, Refused
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import make_policy
from mooncake_connector.router.predictor import Predictor
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_connector.router.scheduler import POLL_S, Dispatched, Scheduler, Submission
from mooncake_connector.router.tally import Inflow, TokenLedger
from mooncake_store.errors import LocalProtocolError

IDLE = Outlook(0.0, (0.0,))
PLAIN = {"safety_s": 0.0, "safety_errors": 0.0, "overtaking_errors": 0.0}


def queue_of(**classes: ServiceClass) -> AdmissionQueue:
    return AdmissionQueue({"": ServiceClass(ttft_s=1000.0), **classes}, **PLAIN)


def offer(queue: AdmissionQueue, name: str, *, work_s: float = 1.0, outlook: Outlook = IDLE, **more) -> Waiting:
    taken = queue.offer(name, outlook=outlook, work_s=work_s, num_tokens=1000, **more)
    assert isinstance(taken, Waiting)
    return taken


def refused(queue: AdmissionQueue, outlook: Outlook = IDLE) -> set[str]:
    return {each.request_id for each in queue.drop_infeasible(outlook)}


class TestHints:
    def test_a_deadline_of_its_own_counts_only_when_it_is_earlier(self) -> None:
        queue = queue_of(fast=ServiceClass(ttft_s=10.0))
        assert offer(queue, "a", class_name="fast", hints=Hints(ttft_s=3.0)).deadline_s == 3.0
        assert offer(queue, "b", class_name="fast", hints=Hints(ttft_s=99.0)).deadline_s == 10.0
        assert offer(queue, "c", class_name="fast", hints=Hints(ttft_s=-5.0)).deadline_s == 0.0
        assert offer(queue, "d", class_name="no such class").deadline_s == 1000.0

    @pytest.mark.parametrize("hints", [Hints(priority=1), Hints(num_reuses=3), Hints(priority=100)])
    def test_priority_and_expected_reuse_decide_who_is_refused(self, hints: Hints) -> None:
        queue = queue_of(slo=ServiceClass(ttft_s=1.5))
        offer(queue, "other", class_name="slo")
        offer(queue, "hinted", class_name="slo", hints=hints)
        assert refused(queue) == {"other"}

    def test_no_hint_makes_a_request_worth_more_than_it_may(self) -> None:
        queue = queue_of()
        most = offer(queue, "a", hints=Hints(priority=10**9, num_reuses=10**9)).value
        least = offer(queue, "b", hints=Hints(priority=-(10**9), num_reuses=-(10**9))).value
        assert 0 < least < 1 < most < 1e6


class TestFairness:
    def test_who_was_served_more_than_others_is_refused_first(self) -> None:
        queue = queue_of(slo=ServiceClass(ttft_s=1.5))
        for number in range(20):
            offer(queue, str(number), tenant="greedy")
            queue.dispatch(str(number), now_s=0.0)
        offer(queue, "m", tenant="modest")
        queue.dispatch("m", now_s=0.0)
        offer(queue, "greedy", tenant="greedy", class_name="slo")
        offer(queue, "modest", tenant="modest", class_name="slo")
        assert refused(queue) == {"greedy"}

    def test_two_tenants_that_ask_for_more_than_there_is_get_equal_tokens(self) -> None:
        # One asks three times as often as the other; either alone is more than the engine can do.
        queue = queue_of(slo=ServiceClass(ttft_s=5.0))
        served = {"often": 0, "seldom": 0}
        free_s = 0.0
        for tick in range(4000):
            now_s = tick / 10
            outlook = Outlook(now_s, (max(free_s - now_s, 0.0),))
            for tenant, every in (("often", 2), ("seldom", 6)):
                if tick % every == 0:
                    offer(queue, f"{tenant}{tick}", tenant=tenant, class_name="slo", outlook=outlook)
            queue.drop_infeasible(outlook)
            if free_s <= now_s and (first := queue.order(outlook, 1)):
                queue.dispatch(first[0].request_id, now_s=now_s)
                served[first[0].tenant] += 1
                free_s = now_s + 1.0
        assert sum(served.values()) > 350 and 0.7 < served["often"] / served["seldom"] < 1.5

    def test_a_class_below_its_share_counts_as_much_as_the_best(self) -> None:
        queue = queue_of(paid=ServiceClass(ttft_s=1.5, weight=10.0), free=ServiceClass(ttft_s=1.5, share=0.2))
        offer(queue, "old")
        queue.dispatch("old", now_s=0.0)
        offer(queue, "paid", class_name="paid", work_s=1.0)
        offer(queue, "free", class_name="free", work_s=0.9)
        assert refused(queue) == {"paid"}
        offer(queue, "more free", class_name="free")
        queue.dispatch("free", now_s=0.0)
        queue.remove("more free")
        offer(queue, "paid", class_name="paid", work_s=1.0)
        offer(queue, "free", class_name="free", work_s=0.9)
        assert refused(queue) == {"free"}


class TestRefusals:
    def test_the_operators_rule_is_asked_and_told_what_there_is(self) -> None:
        asked: list[tuple[str, float]] = []

        def rule(waiting: Waiting, outlook: Outlook) -> bool:
            asked.append((waiting.tenant, outlook.now_s))
            return waiting.tenant != "banned"

        queue = AdmissionQueue({"": ServiceClass()}, rule=rule)
        offer(queue, "a", tenant="good")
        told = queue.offer("b", outlook=IDLE, work_s=1.0, num_tokens=1, tenant="banned")
        assert isinstance(told, Rejected) and told.reason == "rule" and len(queue) == 1
        assert asked == [("good", 0.0), ("banned", 0.0)]

    def test_a_name_that_waits_already_and_a_full_queue_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        queue = queue_of()
        offer(queue, "a")
        again = queue.offer("a", outlook=IDLE, work_s=1.0, num_tokens=1)
        assert isinstance(again, Rejected) and again.reason == "full"
        monkeypatch.setattr("mooncake_connector.router.admission.WAITING_MAX", 1)
        full = queue.offer("b", outlook=IDLE, work_s=1.0, num_tokens=1)
        assert isinstance(full, Rejected) and full.reason == "full" and len(queue) == 1

    def test_retry_after_is_when_the_backlog_will_have_drained(self) -> None:
        queue = queue_of(slo=ServiceClass(ttft_s=5.0))
        busy = Outlook(0.0, (60.0, 40.0))
        offer(queue, "a", class_name="slo", outlook=busy)
        (told,) = queue.drop_infeasible(busy)
        assert (told.reason, told.retry_after_s) == ("infeasible", 46)
        endless = Outlook(0.0, (1e9,))
        offer(queue, "b", class_name="slo", outlook=endless)
        assert queue.drop_infeasible(endless)[0].retry_after_s == RETRY_MAX_S

    def test_without_a_default_class_there_is_no_queue(self) -> None:
        with pytest.raises(LocalProtocolError, match="named ''"):
            AdmissionQueue({"paid": ServiceClass()})

    def test_what_costs_more_than_can_be_afforded_is_displaced_in_a_lasting_crowd_only(self) -> None:
        queue = AdmissionQueue({"": ServiceClass(ttft_s=30.0)}, **PLAIN)
        reasons: dict[str, set[str]] = {"dear": set(), "middle": set(), "cheap": set()}
        for second in range(300):
            # Three seconds of work come each second.
            outlook = Outlook(float(second), (0.3,))
            for name, work_s in (("cheap", 1), ("middle", 4), ("dear", 16)):
                if second % work_s == 0:
                    offer(queue, f"{name} {second}", work_s=float(work_s), outlook=outlook)
            for each in queue.drop_infeasible(outlook):
                reasons[each.request_id.split()[0]].add(each.reason)
            if first := queue.order(outlook, 1):
                queue.dispatch(first[0].request_id, now_s=float(second))
            if second == 2:
                assert not any(reasons.values())
        assert "displaced" in reasons["dear"] and not reasons["cheap"]


class TestTally:
    def test_half_of_what_was_served_is_forgotten(self) -> None:
        ledger = TokenLedger()
        ledger.add("a", 1000, now_s=0.0)
        ledger.add("b", 1000, now_s=tally.HALF_LIFE_S)
        assert ledger.share("a") == pytest.approx(1 / 3, rel=0.01) and ledger.over_share("a") == 1.0
        assert ledger.over_share("b") == pytest.approx(4 / 3, rel=0.01) and ledger.share("nobody") == 0.0

    def test_names_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tally, "TENANTS_MAX", 10)
        ledger = TokenLedger()
        for number in range(100):
            ledger.add(str(number), 1000 + number, now_s=0.0)
        assert len(ledger._tokens) <= 10 and ledger.share("99") > 0

    def test_everything_can_be_afforded_until_more_comes_than_is_done(self) -> None:
        inflow = Inflow()
        for second in range(600):
            inflow.add(0.5, 0.5, now_s=float(second))
            inflow.add(4.0, 0.4, now_s=float(second))
        assert inflow.dearest([], capacity=1.0, slack_s=5.0, now_s=600.0) == float("inf")
        assert 0.5 < inflow.dearest([], capacity=0.7, slack_s=5.0, now_s=600.0) < 6.0
        assert inflow.dearest([], capacity=0.3, slack_s=5.0, now_s=600.0) < 1.0
        assert inflow.dearest([], capacity=0.0, slack_s=5.0, now_s=600.0) == float("inf")


# ---- scheduler


def scheduler_of(num_prefill: int = 1, *, mode: str = "queue", is_rejecting: bool = True, capacity_tokens: int = 0,
                 **classes: ServiceClass) -> Scheduler:
    predictor, table = Predictor(), EngineTable()
    placer = Placer(table, PrefixIndex(), ttl_ns=10**15, predictor=predictor, policy=make_policy("joint", predictor))
    for number in range(num_prefill):
        table.add(f"http://p{number}", "prefill")
    table.add("http://d", "decode").capacity_tokens = capacity_tokens
    for engine in table:
        placer.introduce(engine.url, Introduction(("m",), engine.url, ("tcp://0",)))
        table.observe(engine.url, EngineEvent.HEALTHY)
    return Scheduler(placer, AdmissionQueue({"": ServiceClass(), **classes}), mode=mode, is_rejecting=is_rejecting)  # type: ignore[arg-type]


def ask(name: str, num_prompt: int = 8000, **more) -> Submission:
    return Submission(Place(name, num_prompt, 100), **more)


class TestScheduler:
    def test_one_is_sent_at_once_and_the_next_when_the_engine_is_about_to_be_free(self) -> None:
        scheduler = scheduler_of()
        (sent,) = scheduler.submit(ask("a"), now_s=0.0)
        assert isinstance(sent, Dispatched) and sent.choice.start is not None
        assert scheduler.submit(ask("b"), now_s=0.1) == [] and scheduler.wake_s is not None
        assert scheduler.poll(now_s=0.2) == []
        ends_s = sent.choice.start.ttft_s
        assert scheduler.wake_s <= ends_s
        (sent,) = scheduler.poll(now_s=ends_s - 0.3)
        assert isinstance(sent, Dispatched) and sent.request_id == "b"

    def test_the_shorter_goes_first(self) -> None:
        scheduler = scheduler_of()
        scheduler.submit(ask("a"), now_s=0.0)
        for name, num_prompt in (("long", 30_000), ("short", 500)):
            assert scheduler.submit(ask(name, num_prompt), now_s=0.1) == []
        assert [each.request_id for each in scheduler.poll(now_s=0.9)][:1] == ["short"]  # type: ignore[union-attr]

    def test_what_cannot_be_in_time_is_refused_within_a_tenth_of_a_second(self) -> None:
        scheduler = scheduler_of(tight=ServiceClass(ttft_s=0.5))
        scheduler.submit(ask("a"), now_s=0.0)
        told = scheduler.submit(ask("b", class_name="tight"), now_s=0.0)
        assert [(type(each), each.reason) for each in told] == [(Rejected, "infeasible")]  # type: ignore[union-attr]

    def test_a_request_that_was_sent_and_is_late_is_told_of_once(self) -> None:
        scheduler = scheduler_of(tight=ServiceClass(ttft_s=2.0))
        scheduler.submit(ask("a", class_name="tight"), now_s=0.0)
        scheduler.submit(ask("ended", 10, class_name="tight"), now_s=0.9)
        assert scheduler.placer.finish("ended", "prefill", now_ns=1)
        assert scheduler.poll(now_s=1.9) == [] and scheduler.wake_s == 2.0
        assert scheduler.poll(now_s=2.0) == [Rejected("a", "late", 1)]
        assert scheduler.placer.num_open == 2 and scheduler.poll(now_s=2.9) == [] and scheduler.wake_s is None
        scheduler.cancel("a", now_s=2.2)
        assert scheduler.placer.backlog_s(now_ns=0) == (0.0,)

    def test_a_client_that_left_is_forgotten_wherever_its_request_is(self) -> None:
        scheduler = scheduler_of()
        scheduler.submit(ask("a"), now_s=0.0)
        scheduler.submit(ask("b"), now_s=0.0)
        for name in ("a", "b", "b", "unknown"):
            scheduler.cancel(name, now_s=0.1)
        assert len(scheduler.queue) == 0 == scheduler.placer.num_open
        (sent,) = scheduler.submit(ask("c"), now_s=0.2)
        assert isinstance(sent, Dispatched)

    @pytest.mark.parametrize(("mode", "reasons"), [("early", ["infeasible"]), ("none", [])])
    def test_without_holding_everything_is_decided_at_once(self, mode: str, reasons: list[str]) -> None:
        scheduler = scheduler_of(mode=mode, tight=ServiceClass(ttft_s=0.5))
        scheduler.submit(ask("a"), now_s=0.0)
        told = scheduler.submit(ask("b", class_name="tight"), now_s=0.0)
        assert [each.reason for each in told if isinstance(each, Rejected)] == reasons
        assert len(told) == 1 and len(scheduler.queue) == 0

    def test_where_nothing_is_refused_the_late_are_served_last(self) -> None:
        scheduler = scheduler_of(is_rejecting=False, tight=ServiceClass(ttft_s=0.1))
        scheduler.submit(ask("a"), now_s=0.0)
        scheduler.submit(ask("late", 500, class_name="tight"), now_s=0.0)
        scheduler.submit(ask("in time", 9000), now_s=0.0)
        order = []
        for tick in range(100):
            for each in scheduler.poll(now_s=tick / 10):
                assert isinstance(each, Dispatched)
                order.append(each.request_id)
                scheduler.placer.finish("a" if not order[1:] else order[-2], now_ns=int(tick * 1e8))
        assert order == ["in time", "late"]

    def test_memory_for_decoding_is_waited_for(self) -> None:
        scheduler = scheduler_of(2, capacity_tokens=20_000)
        (sent,) = scheduler.submit(ask("a", 15_000), now_s=0.0)
        assert isinstance(sent, Dispatched)
        assert scheduler.submit(ask("b", 15_000), now_s=0.0) == []
        scheduler.prefilled("a", now_s=2.0, engine="http://p0", num_prompt=15_000, num_prefix=0, took_s=2.0)
        assert scheduler.poll(now_s=2.0) == []
        scheduler.finished("a", now_s=3.0, num_output=100)
        assert [type(each) for each in scheduler.poll(now_s=3.0 + POLL_S)] == [Dispatched]

    def test_without_engines_it_says_so(self) -> None:
        scheduler = scheduler_of()
        for url in ("http://p0", "http://d"):
            scheduler.placer.remove(url)
        (told,) = scheduler.submit(ask("a"), now_s=0.0)
        assert isinstance(told, Refused) and told.code == "no_engine"

    def test_one_whose_engines_went_away_while_it_waited_is_told(self) -> None:
        scheduler = scheduler_of()
        scheduler.submit(ask("a"), now_s=0.0)
        assert scheduler.submit(ask("b"), now_s=0.0) == []
        for url in ("http://p0", "http://d"):
            scheduler.placer.remove(url)
        (told,) = scheduler.poll(now_s=0.2)
        assert getattr(told, "request_id", getattr(told, "subject", "")) == "b" and not isinstance(told, Dispatched)
        assert scheduler.wake_s is None or scheduler.wake_s > 1.0
