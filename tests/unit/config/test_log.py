"""Show our log lines where nobody else would, and keep repeated ones rare."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mooncake_store.log import TOPICS_MAX, Throttle, set_up_logging

SHOW = """
import logging, sys
{before}
from mooncake_store.log import set_up_logging
set_up_logging()
set_up_logging({level!r})
{after}
logging.getLogger("mooncake_store.pull.server").info("hello %d", 7)
logging.getLogger("mooncake_connector.engines").debug("details")
logging.getLogger("somebody.else").info("not ours")
"""


def lines(*, before: str = "", after: str = "", level: str = "info") -> list[str]:
    """Return what a fresh process writes to standard error."""
    code = SHOW.format(before=before, after=after, level=level)
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"], check=True,
                          capture_output=True, text=True, timeout=60)
    return done.stderr.splitlines()


def test_info_is_shown_once_with_our_mark_where_logging_is_not_configured() -> None:
    (line,) = lines()
    assert line.startswith("[mooncake] INFO ")
    assert line.endswith("mooncake_store.pull.server: hello 7")


def test_a_root_handler_that_comes_later_does_not_double_lines() -> None:
    assert len(lines(after="logging.basicConfig(level='INFO')")) == 2  # ours once, and somebody else's


def test_an_application_that_configured_logging_keeps_its_format() -> None:
    shown = lines(before="logging.basicConfig(level='INFO', format='APP %(message)s')")
    assert shown == ["APP hello 7", "APP not ours"]


def test_level() -> None:
    assert lines(level="warning") == []
    assert [line.rsplit(": ")[-1] for line in lines(level="debug")] == ["hello 7", "details"]


def test_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="chatty"):
        set_up_logging("chatty")


class Clock:
    """Seconds that pass when told."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Iterator[Throttle]:
    yield Throttle(logging.getLogger("test.throttle"), interval_s=10.0, clock=clock)


def test_repeated_line_is_shown_once_per_interval_with_a_count(
    throttle: Throttle, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    assert throttle.warning("peer", "no answer from %s", "a")
    assert not throttle.warning("peer", "no answer from %s", "b")
    assert not throttle.warning("peer", "no answer from %s", "c")
    clock.now_s += 10.0
    assert throttle.warning("peer", "no answer from %s", "d")
    clock.now_s += 10.0
    assert throttle.warning("peer", "no answer from %s", "e")
    assert [record.getMessage() for record in caplog.records] == [
        "no answer from a", "no answer from d (and 2 more like this since)", "no answer from e"]


def test_topics_do_not_hide_each_other(throttle: Throttle) -> None:
    assert throttle.warning("a", "x")
    assert throttle.warning("b", "x")


def test_topics_are_bounded(throttle: Throttle) -> None:
    for topic in range(TOPICS_MAX + 1):
        throttle.log(logging.DEBUG, str(topic), "x")
    assert throttle.warning("0", "forgotten, so shown again")
    assert not throttle.warning(str(TOPICS_MAX), "remembered")
