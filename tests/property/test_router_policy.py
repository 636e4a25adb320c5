"""The joint policy takes the pair that costs least of all, though it does not look at all of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.router.policy import (
    POLICIES,
    Candidate,
    Demand,
    Joint,
    Start,
    choose_pair,
    make_policy,
)
from mooncake_connector.router.predictor import Predictor

PRICE, PRICE_MAX, PATIENCE_S = 0.3, 2.0, 0.5


@st.composite
def situations(draw) -> tuple[Predictor, Demand, list[Candidate]]:
    """Draw a cluster: engines of different speed, with queues, prefixes and busy links, and a request."""
    predictor = Predictor(link_bytes_per_s=draw(st.sampled_from([1e9, 10e9, 87e9])))
    size = draw(st.integers(1, 60_000))
    candidates = []
    for number in range(draw(st.integers(1, 7))):
        url = f"e{number}"
        candidates.append(
            Candidate(
                url,
                "both",
                num_open=draw(st.integers(0, 9)),
                num_placed=draw(st.integers(0, 3)),
                queue_s=draw(st.sampled_from([0.0, 0.0, 0.1, 0.6, 2.0, 20.0])),
                prefix_tokens=draw(st.sampled_from([0, 0, size // 3, size // 2, size])),
                context_tokens=draw(st.integers(0, 100_000)),
                capacity_tokens=draw(st.sampled_from([0, 50_000, 150_000])),
            )
        )
        for _ in range(draw(st.integers(0, 3))):
            predictor.observe_prefill(url, 8000, 0, draw(st.floats(0.1, 10)))
        predictor.links.book(url, draw(st.sampled_from(["e0", "e1"])), draw(st.floats(0, 1e11)), now_s=0.0)
    demand = Demand(size, draw(st.integers(0, 500)), draw(st.floats(0, 40)), draw(st.booleans()), 0.0,
                    draw(st.sampled_from([math.inf, 0.5])))
    return predictor, demand, candidates


def every_start(predictor: Predictor, demand: Demand, candidates: list[Candidate]) -> list[Start]:
    """Return every prefill that the policy may choose, priced the slow way."""
    size = demand.num_prompt_tokens
    longest = sorted((each.prefix_tokens for each in candidates), reverse=True)[:3][-1]
    starts = []
    for engine in candidates:
        own = engine.prefix_tokens
        starts.append(Start(engine, own, "", engine.queue_s, predictor.prefill_s(size, own, engine.url)))
        for holder in candidates if demand.can_fetch else []:
            best = holder.prefix_tokens
            if best > own and best >= longest and holder is not engine:
                fetch_s = predictor.transfer_s(holder.url, engine.url, best - own, now_s=0.0)
                starts.append(Start(engine, best, holder.url, max(engine.queue_s, fetch_s),
                                    predictor.prefill_s(size, best, engine.url)))
    return starts


@given(situations())
def test_no_start_costs_less_than_the_chosen_one(situation) -> None:
    predictor, demand, candidates = situation
    pay = 1 + min(PRICE + demand.backlog_s / 10.0, PRICE_MAX)

    def cost(start: Start) -> float:
        return start.ready_s + start.prefill_s * pay

    chosen = Joint(predictor).start(demand, candidates)
    starts = every_start(predictor, demand, candidates)
    # Which of several equal holders are asked is left open, so the chosen one may only be as good or better.
    assert any(start.engine is chosen.engine and start.source_url == chosen.source_url
               and start.prefix_tokens == chosen.prefix_tokens for start in starts)
    holders = sorted((each.prefix_tokens for each in candidates if each.prefix_tokens), reverse=True)
    if len(holders) > 3:
        starts = [each for each in starts if not each.source_url]
    least = min(map(cost, starts))
    is_open = [each for each in starts if each.engine.queue_s < demand.open_below_s]
    if is_open and min(map(cost, is_open)) <= least + PATIENCE_S - 1e-9:
        assert chosen.engine.queue_s < demand.open_below_s
        assert cost(chosen) <= min(map(cost, is_open)) + 1e-9
    else:
        assert cost(chosen) <= least + PATIENCE_S + 1e-9
    if demand.open_below_s == math.inf:
        assert cost(chosen) <= least + 1e-9


@given(situations())
def test_no_decode_engine_costs_less_than_the_chosen_one(situation) -> None:
    predictor, demand, candidates = situation
    start = Joint(predictor).start(demand, candidates)

    def cost(each: Candidate) -> tuple[bool, float]:
        needed = each.context_tokens + demand.num_prompt_tokens + demand.num_output_tokens
        is_full = bool(each.capacity_tokens) and needed > each.capacity_tokens
        arrives_s = predictor.transfer_s(start.engine.url, each.url, demand.num_prompt_tokens, now_s=0.0)
        return is_full, predictor.step_s(each.num_open + 1, needed) + max(arrives_s - start.ttft_s, 0.0)

    chosen, best = cost(Joint(predictor).decode(demand, candidates, start)), min(map(cost, candidates))
    assert chosen[0] == best[0] and chosen[1] == pytest.approx(best[1])
    without = Joint(predictor).decode(demand, candidates, None)
    assert without in candidates


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(situation=situations(), seed=st.integers(0, 3))
def test_every_policy_names_engines_that_are_there_and_decides_the_same_again(name, situation, seed) -> None:
    predictor, demand, candidates = situation
    one, two = make_policy(name, predictor, seed=seed), make_policy(name, predictor, seed=seed)
    for _ in range(3):
        choice = choose_pair(candidates, one, demand)
        assert choice == choose_pair(candidates, two, demand)
        assert choice is not None and choice.decode in candidates and choice.start is not None
        assert choice.prefill is None or choice.prefill.url != choice.decode.url
        assert 0 <= choice.start.prefix_tokens <= demand.num_prompt_tokens and choice.start.prefill_s > 0


def test_a_policy_that_nobody_wrote_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        make_policy("best", Predictor())


def test_turns_and_draws_reach_every_engine() -> None:
    predictor = Predictor()
    candidates = [Candidate(f"e{number}", "prefill") for number in range(4)]
    for name in ("round_robin", "random"):
        policy = make_policy(name, predictor)
        chosen = [policy.start(Demand(100), candidates).engine.url for _ in range(40)]
        assert set(chosen) == {each.url for each in candidates}
        if name == "round_robin":
            assert all(left != right for left, right in zip(chosen, chosen[1:], strict=False))


def test_the_paper_fetches_what_is_half_as_long_again_as_its_own() -> None:
    paper = make_policy("mooncake_paper", Predictor())
    holder = Candidate("holder", "prefill", prefix_tokens=15_000, queue_s=30.0)
    for own, source in ((10_001, ""), (9_999, "holder")):
        start = paper.start(Demand(20_000, can_fetch=True), [holder, Candidate("idle", "prefill", prefix_tokens=own)])
        assert (start.engine.url, start.source_url) == ("idle", source)
