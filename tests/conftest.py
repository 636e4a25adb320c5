"""Keep tests from changing each other."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest

from mooncake_store.log import PACKAGES


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start, also where a shell's ``&`` had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the fault tests run for longer than a change can wait."""
    parser.addoption("--pulls", type=int, default=2_500, help="pulls of the store that a fault test makes per medium")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """Undo what a command run inside a test does to the packages' loggers: the next test may look at log lines."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers
