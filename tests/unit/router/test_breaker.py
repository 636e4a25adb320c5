"""How long an engine that keeps failing is left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.router.breaker import HOLD_FACTOR_MAX, Breaker


def test_it_opens_after_failures_in_a_row_and_longer_each_time() -> None:
    breaker = Breaker(failures_max=3, hold_s=2.0)
    assert [breaker.fail(0.0) for _ in range(3)] == [False, False, True]
    assert breaker.is_open(1.9) and not breaker.is_open(2.0)
    assert breaker.fail(2.0), "what is tried after the pause must succeed"
    assert breaker.is_open(5.9) and not breaker.is_open(6.0)


def test_a_success_forgives() -> None:
    breaker = Breaker(failures_max=2, hold_s=1.0)
    for now_s in (0.0, 10.0, 20.0):
        breaker.fail(now_s)
        breaker.succeed()
    assert not breaker.is_open(20.0)
    breaker.fail(30.0)
    assert breaker.fail(30.0) and not breaker.is_open(31.0), "the pause is the first one again"


def test_failures_of_requests_under_way_do_not_make_it_longer() -> None:
    breaker = Breaker(failures_max=1, hold_s=1.0)
    assert breaker.fail(0.0)
    assert not any(breaker.fail(0.5) for _ in range(100))
    assert not breaker.is_open(1.0)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=200), st.integers(1, 5))
def test_it_is_never_open_for_longer_than_its_bound(steps: list[tuple[bool, float]], failures_max: int) -> None:
    breaker = Breaker(failures_max=failures_max, hold_s=1.0)
    now_s = 0.0
    for is_failure, pause_s in steps:
        now_s += pause_s
        if is_failure:
            breaker.fail(now_s)
        else:
            breaker.succeed()
            assert not breaker.is_open(now_s)
        assert not breaker.is_open(now_s + HOLD_FACTOR_MAX)
