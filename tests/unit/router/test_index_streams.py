"""One stream: in order, with gaps, from a new process, and when nothing helps."""

from __future__ import annotations

import pytest

from mooncake_connector.router.index import streams
from mooncake_connector.router.index.streams import Apply, Ask, Sequencer, State

TIMEOUT_NS = 100


class Driver:
    """A sequencer of batches named by number and life, and what it said."""

    def __init__(self) -> None:
        self.sequencer: Sequencer[str] = Sequencer(fill_timeout_ns=TIMEOUT_NS)
        self.now_ns = 0

    def live(self, number: int, life: str = "a") -> list[object]:
        batch = f"{life}{number}"
        return self.said(self.sequencer.on_live(number, self.time_s(number, life), batch, now_ns=self.now_ns))

    def replayed(self, number: int, life: str = "a") -> list[object]:
        batch = f"{life}{number}"
        return self.said(self.sequencer.on_replayed(number, self.time_s(number, life), batch, now_ns=self.now_ns))

    def end(self) -> list[object]:
        return self.said(self.sequencer.on_replay_end(now_ns=self.now_ns))

    def connected(self) -> list[object]:
        return self.said(self.sequencer.on_connected(now_ns=self.now_ns))

    def wait(self, nanoseconds: int = TIMEOUT_NS) -> list[object]:
        self.now_ns += nanoseconds
        return self.said(self.sequencer.on_time(now_ns=self.now_ns))

    @staticmethod
    def time_s(number: int, life: str) -> float:
        return (ord(life) - 96) * 1e6 + number

    @staticmethod
    def said(steps: list[object]) -> list[object]:
        """Shorten what is to be done: a batch by its name, a question by its number."""
        return [
            step.batch if isinstance(step, Apply) else step.first if isinstance(step, Ask) else "clear"
            for step in steps
        ]

    def begin(self, last: int = 2) -> None:
        self.connected()
        self.end()
        for number in range(last + 1):
            assert self.live(number) == [f"a{number}"]
        assert self.sequencer.state is State.LIVE and not self.sequencer.is_stale


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_a_fresh_engine_is_known_from_its_first_batch(driver):
    assert driver.connected() == [0]
    assert driver.sequencer.is_stale
    assert driver.end() == [] and driver.sequencer.state is State.EMPTY
    assert driver.live(0) == ["a0"] and not driver.sequencer.is_stale


def test_what_was_before_is_replayed_while_new_ones_wait(driver):
    assert driver.connected() == [0]
    assert driver.live(3) == []
    assert driver.replayed(0) == ["a0"] and driver.replayed(1) == ["a1"]
    assert driver.replayed(2) == ["a2", "a3"] and driver.sequencer.is_stale
    assert driver.end() == [] and not driver.sequencer.is_stale


def test_what_is_kept_no_more_makes_it_stale_until_it_clears(driver):
    driver.connected()
    assert driver.replayed(7) == ["clear", "a7"]
    assert driver.end() == [] and driver.sequencer.state is State.LIVE and driver.sequencer.is_stale
    driver.sequencer.note_cleared()
    assert not driver.sequencer.is_stale


def test_a_gap_is_asked_for_once_and_filled(driver):
    driver.begin()
    assert driver.live(4) == [3] and driver.live(5) == []
    assert driver.sequencer.is_stale
    assert driver.replayed(3) == ["a3", "a4", "a5"] and not driver.sequencer.is_stale
    assert driver.replayed(4) == driver.end() == []


def test_a_late_batch_fills_the_gap_without_a_replay(driver):
    driver.begin()
    driver.live(4)
    assert driver.live(3) == ["a3", "a4"]
    assert not driver.sequencer.is_stale and driver.sequencer.deadline_ns == 0


def test_twice_is_once(driver):
    driver.begin()
    assert driver.live(2) == driver.live(0) == []
    driver.live(4)
    assert driver.live(4) == []


def test_a_gap_that_nobody_fills_is_given_up_in_time(driver):
    driver.begin()
    assert driver.live(5) == [3]
    assert driver.wait(TIMEOUT_NS - 1) == []
    assert driver.wait(1) == ["clear", "a5"]
    assert driver.sequencer.state is State.LIVE and driver.sequencer.is_stale and driver.sequencer.num_lost == 1


def test_two_gaps_are_given_up_one_after_the_other(driver):
    driver.begin()
    driver.live(5)
    driver.live(8)
    assert driver.wait() == ["clear", "a5"] and driver.sequencer.state is State.FILLING
    assert driver.wait() == ["clear", "a8"] and driver.sequencer.state is State.LIVE


def test_a_replay_that_ends_too_early_is_asked_again_while_it_helps(driver):
    driver.begin()
    driver.live(6)
    assert driver.replayed(3) == ["a3"]
    assert driver.end() == [3]
    assert driver.replayed(3) == []
    assert driver.end() == ["clear", "a6"]


def test_too_many_waiting_are_not_waited_for(driver, monkeypatch):
    monkeypatch.setattr(streams, "HELD_MAX", 3)
    driver.begin()
    for number in (4, 5, 6):
        driver.live(number)
    assert driver.live(7) == ["clear", "a4", "a5", "a6", "a7"]


@pytest.mark.parametrize("first", [0, 1, 2, 3, 9])
def test_a_new_process_is_seen_by_its_numbers_and_clock(driver, first):
    driver.begin()
    steps = driver.live(first, "b")
    if first == 0:
        assert steps == ["clear", "b0"] and not driver.sequencer.is_stale
    elif first < 3:
        assert steps == ["clear", 0] and driver.sequencer.is_stale
        assert driver.replayed(0, "b")[0] == "b0"
    else:
        # It could be the old one's next. A connection tells, or the batch after it.
        assert driver.sequencer.next_number in (3, 4)
        assert driver.connected()[-1] == driver.sequencer.next_number - 1
        assert "clear" in driver.replayed(0, "b") + driver.end()


def test_a_reconnection_finds_the_same_process(driver):
    driver.begin()
    assert driver.connected() == [2] and driver.sequencer.is_stale
    assert driver.replayed(2) == [] and driver.replayed(3) == ["a3"]
    assert driver.end() == [] and not driver.sequencer.is_stale


def test_a_reconnection_finds_another_process_with_the_same_numbers(driver):
    driver.begin()
    driver.connected()
    assert driver.replayed(2, "b") == ["clear", 0]
    assert driver.replayed(0, "b") == ["b0"] and driver.replayed(1, "b") == ["b1", "b2"]
    assert driver.end() == [] and not driver.sequencer.is_stale


def test_a_reconnection_finds_a_process_that_has_less(driver):
    driver.begin()
    driver.connected()
    assert driver.end() == ["clear", 0]
    assert driver.end() == [] and driver.sequencer.state is State.EMPTY


def test_a_reconnection_without_an_answer_proves_nothing(driver):
    driver.begin()
    driver.connected()
    assert driver.wait() == ["clear"] and driver.sequencer.is_stale
    assert driver.live(3) == ["a3"] and driver.sequencer.is_stale


def test_somebody_else_knows_that_it_is_new(driver):
    driver.begin()
    assert driver.said(driver.sequencer.on_renewed()) == ["clear"]
    assert driver.sequencer.state is State.EMPTY
    assert driver.live(0, "b") == ["b0"] and not driver.sequencer.is_stale


def test_an_unreadable_batch_is_a_lost_one(driver):
    driver.begin()
    assert driver.said(driver.sequencer.on_unreadable(3, now_ns=0)) == ["clear"]
    assert driver.sequencer.is_stale
    assert driver.live(2) == [] and driver.live(4) == ["a4"]
