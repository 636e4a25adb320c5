"""What is learned from legs: how long prompts are, how fast engines are, how far off the predictions were."""

from __future__ import annotations

import pytest

from mooncake_connector.router.lessons import Lessons
from mooncake_connector.router.policy import Candidate, Start
from mooncake_connector.router.predictor import Predictor


def prefill(lessons: Lessons, *, sent_s: float, ended_s: float, num_prompt: int = 1000, num_prefix: int = 0) -> None:
    lessons.prefill_ended("http://e", sent_s=sent_s, ended_s=ended_s, num_estimated=1000, num_prompt=num_prompt,
                          num_prefix=num_prefix)  # fmt: skip


def test_a_prefill_that_waited_for_its_turn_is_not_a_slow_one() -> None:
    predictor = Predictor()
    lessons = Lessons(predictor)
    for burst in range(20):
        begun_s = 100.0 * burst
        for number in range(10):  # ten at once, one second each, one after another
            prefill(lessons, sent_s=begun_s, ended_s=begun_s + number + 1.0)
    assert predictor.prefill_s(1000, 0, "http://e") == pytest.approx(1.0, rel=0.1)
    assert predictor.prefill_error.mean < 0.2


def test_an_engine_that_computes_prompts_together_is_known_by_its_rate() -> None:
    predictor = Predictor()
    lessons = Lessons(predictor)
    for burst in range(200):
        begun_s = 100.0 * burst
        for number in range(10):  # ten at once, all done after a second
            prefill(lessons, sent_s=begun_s, ended_s=begun_s + 1.0 + number / 1000)
    assert predictor.prefill_s(1000, 0, "http://e") < 0.4


def test_an_answer_that_comes_whole_can_only_show_that_an_engine_is_faster() -> None:
    predictor = Predictor()
    lessons = Lessons(predictor)
    before_s = predictor.prefill_s(1000, 0, "http://e")
    lessons.whole_ended("http://e", sent_s=0.0, ended_s=60.0, num_prompt=1000, num_prefix=0)
    assert predictor.prefill_s(1000, 0, "http://e") == before_s, "it was the answer that took so long"
    for number in range(50):
        lessons.whole_ended("http://e", sent_s=60.0, ended_s=60.0 + 0.01 * number, num_prompt=1000, num_prefix=0)
    assert predictor.prefill_s(1000, 0, "http://e") < before_s / 3


def test_the_length_of_prompts_is_learned_from_what_engines_count() -> None:
    lessons = Lessons(Predictor())
    assert lessons.prompt_tokens(1000) == 1000
    for number in range(200):
        prefill(lessons, sent_s=number, ended_s=number + 0.5, num_prompt=1500)
    assert lessons.prompt_tokens(1000) == pytest.approx(1500, rel=0.01)
    for number in range(200, 400):
        prefill(lessons, sent_s=number, ended_s=number + 0.5, num_prompt=0)
    assert lessons.prompt_tokens(1000) == pytest.approx(1500, rel=0.01), "an engine that does not say teaches nothing"


def test_an_answer_is_as_long_as_the_client_says_else_as_usual_and_never_more_than_it_allows() -> None:
    lessons = Lessons(Predictor())
    for _ in range(1000):
        lessons.answer_ended(100)
    assert lessons.output_tokens(hinted=0, most=0) == 100
    assert lessons.output_tokens(hinted=0, most=4096) == 100
    assert lessons.output_tokens(hinted=0, most=8) == 8
    assert lessons.output_tokens(hinted=500, most=4096) == 500


def test_what_no_model_knows_is_added_to_the_promise() -> None:
    lessons = Lessons(Predictor())
    start = Start(Candidate("http://e", "prefill"), 0, "", 0.0, 1.0)
    assert lessons.ttft_s(None) == 0.0
    for _ in range(300):
        lessons.first_byte(lessons.ttft_s(start), 1.4)
    assert lessons.ttft_s(start) == pytest.approx(1.4, rel=0.02)
    assert lessons.ttft_error.mean < 0.1


def test_the_pace_of_streams_is_learned() -> None:
    predictor = Predictor()
    lessons = Lessons(predictor)
    for _ in range(300):
        lessons.stream_ended(num_requests=4, num_context=4000, num_tokens=101, took_s=5.0)
    assert predictor.step_s(4, 4000) == pytest.approx(0.05, rel=0.1)
    assert predictor.mean_output_tokens == pytest.approx(101, rel=0.1)
