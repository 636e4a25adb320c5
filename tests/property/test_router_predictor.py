"""Predictions are positive whatever was seen, and right after little of it; links carry what was booked, in order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.router.predictor import ENGINE_FACTOR_MAX, LinearModel, Links, PredictionError, Predictor

odd = st.floats(allow_nan=True, allow_infinity=True)
tokens = st.integers(0, 2_000_000)


@given(st.lists(st.tuples(tokens, tokens, odd), max_size=30), tokens, tokens)
def test_no_measurement_makes_a_prediction_negative_or_not_a_number(seen, num_prompt, num_prefix) -> None:
    predictor = Predictor()
    for prompt, prefix, actual_s in seen:
        predictor.observe_prefill("e", prompt, prefix, actual_s)
        predictor.observe_step(prompt % 100, prefix, actual_s)
        predictor.observe_output(prompt)
    for seconds in (predictor.prefill_s(num_prompt, num_prefix, "e"), predictor.step_s(1, num_prompt)):
        assert 0 < seconds < float("inf")
    assert predictor.reserved_tokens() >= predictor.output_tokens() >= 1 and predictor.output_tokens(7) == 7
    assert predictor.prefill_error.mean >= 0


@settings(deadline=None, max_examples=20)
@given(factors=st.tuples(*[st.floats(0.2, 5)] * 3), seed=st.integers(0, 1000))
def test_a_few_dozen_prefills_teach_another_machine(factors, seed) -> None:
    rng, predictor = random.Random(seed), Predictor()
    once, per_token, per_pair = (prior * factor for prior, factor in zip((0.03, 1.08e-4, 7.7e-10), factors,
                                                                       strict=True))

    def truth(n: int, p: int) -> float:
        return once + per_token * (n - p) + per_pair * (n * n - p * p) + p * 2.5e-6

    for _ in range(80):
        n = int(2 ** rng.uniform(7, 16))
        p = rng.choice((0, n // 2))
        predictor.observe_prefill("e", n, p, truth(n, p) * rng.lognormvariate(0, 0.05))
    for n, p in ((500, 0), (4_000, 0), (30_000, 15_000), (60_000, 0)):
        assert predictor.prefill_s(n, p, "e") == pytest.approx(truth(n, p), rel=0.25)
    assert predictor.prefill_error.mean < 0.3


@settings(deadline=None, max_examples=10)
@given(slow=st.floats(1.5, 10))
def test_one_slow_engine_is_known_as_one(slow) -> None:
    predictor = Predictor()
    for _ in range(80):
        for engine, factor in (("fast", 1.0), ("fast2", 1.0), ("fast3", 1.0), ("slow", slow)):
            predictor.observe_prefill(engine, 8000, 0, Predictor().prefill_s(8000, 0) * factor)
    assert predictor.prefill_s(8000, 0, "slow") / predictor.prefill_s(8000, 0, "fast") == pytest.approx(slow, rel=0.2)
    predictor.forget("slow")
    assert predictor.factor("slow") == 1.0 <= ENGINE_FACTOR_MAX


def test_one_absurd_measurement_does_not_move_the_model_for_long() -> None:
    model = LinearModel((1.0,))
    for _ in range(20):
        model.observe((1.0,), 1.0)
    model.observe((1.0,), 1e9)
    assert model.coefficients[0] < 1.6
    for _ in range(200):
        model.observe((1.0,), 1.0)
    assert model.coefficients[0] == pytest.approx(1.0, rel=0.05)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=50))
def test_more_memory_is_set_aside_than_the_mean_answer_needs(lengths) -> None:
    predictor = Predictor()
    for each in lengths:
        predictor.observe_output(each)
    assert predictor.reserved_tokens() >= predictor.output_tokens()


class TestLinks:
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.integers(1, 1000), st.floats(0, 2)),
                    max_size=30))
    def test_a_link_carries_one_transfer_after_the_other(self, transfers) -> None:
        links, now_s = Links(100.0), 0.0
        sent: dict[tuple[str, str], float] = {}
        for source, target, size, gap_s in transfers:
            now_s += gap_s
            told_s = links.transfer_s(source, target, size, now_s=now_s)
            assert links.book(source, target, size, now_s=now_s) == pytest.approx(told_s)
            for end in ((source, "out"), (target, "in")):
                sent[end] = max(sent.get(end, 0.0), now_s) + size / 100.0
            assert now_s + told_s == pytest.approx(max(sent[source, "out"], sent[target, "in"]))
            assert links.egress_wait_s(source, now_s=now_s) == pytest.approx(sent[source, "out"] - now_s)
            assert links.ingress_wait_s(target, now_s=now_s) == pytest.approx(sent[target, "in"] - now_s)
            assert links.backlog_s(source, now_s=now_s) >= links.egress_wait_s(source, now_s=now_s)
        links.forget("a")
        assert links.backlog_s("a", now_s=now_s) == 0.0

    def test_the_bandwidth_is_learned_from_what_arrived(self) -> None:
        links = Links(100.0)
        for _ in range(200):
            links.observe(1000, 2.0)
        links.observe(0, 1.0)
        links.observe(1000, float("nan"))
        assert links.bytes_per_s == pytest.approx(500.0, rel=0.01) and links.error.mean < 0.2


@given(st.lists(st.tuples(odd, odd), max_size=20))
def test_the_error_stays_a_number(pairs) -> None:
    error = PredictionError()
    for predicted, actual in pairs:
        error.observe(predicted, actual)
    assert 0 <= error.mean <= 3 and -1 <= error.bias <= 3
