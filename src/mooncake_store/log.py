"""Make our log lines visible, and keep repeated ones rare.

vLLM configures only the logger ``vllm``, so the INFO lines of a plugin would vanish. Both packages log to loggers named
after their modules; :func:`set_up_logging` gives the two package loggers one handler when nobody else would show them.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

PACKAGES = ("mooncake_store", "mooncake_connector")
FORMAT = "[mooncake] %(levelname)s %(asctime)s %(name)s: %(message)s"
TIME_FORMAT = "%m-%d %H:%M:%S"
INTERVAL_S = 10.0
TOPICS_MAX = 256

_lock = threading.Lock()


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Ours, so that a second call finds it; writes to whatever sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


def set_up_logging(level: str = "info") -> None:
    """Show the lines of both packages from ``level`` on. Idempotent; a later call only changes the level.

    Installs a handler (standard error) only when the root logger has none: an application that configured logging keeps
    its own format. Threads: any.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.

    Raises:
        ValueError: for another level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is none of debug, info, warning, error")
    with _lock:
        for name in PACKAGES:
            logger = logging.getLogger(name)
            logger.setLevel(number)
            if logging.getLogger().handlers or any(isinstance(handler, _Handler) for handler in logger.handlers):
                continue
            handler = _Handler()
            handler.setFormatter(logging.Formatter(FORMAT, TIME_FORMAT))
            logger.addHandler(handler)
            # A root handler that appears later would show every line twice.
            logger.propagate = False


class _Topic(NamedTuple):
    shown_at_s: float
    num_hidden: int


class Throttle:
    """Logs a repeated line at most once per interval and topic, and tells how many it kept back.

    Bounded: TOPICS_MAX topics are remembered, the oldest is forgotten. Threads: any.

    Args:
        logger: where lines go.
        interval_s: shortest time between two lines of one topic.
        clock: monotonic seconds.
    """

    def __init__(
        self, logger: logging.Logger, *, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._topics: dict[str, _Topic] = {}

    def log(self, level: int, topic: str, message: str, *args: object) -> bool:
        """Log the line unless its topic had one within the interval; return whether it was logged.

        Args:
            level: as in ``logging``.
            topic: lines of one topic hide each other, whatever their arguments.
            message: as in ``logging``.
            *args: as in ``logging``.
        """
        now_s = self._clock()
        with self._lock:
            last = self._topics.pop(topic, None)
            if last is not None and now_s - last.shown_at_s < self._interval_s:
                self._topics[topic] = _Topic(last.shown_at_s, last.num_hidden + 1)
                return False
            self._topics[topic] = _Topic(now_s, 0)
            if len(self._topics) > TOPICS_MAX:
                del self._topics[next(iter(self._topics))]
        if last is not None and last.num_hidden:
            message, args = message + " (and %d more like this since)", (*args, last.num_hidden)
        self._logger.log(level, message, *args)
        return True

    def warning(self, topic: str, message: str, *args: object) -> bool:
        """Log a warning; see :meth:`log`."""
        return self.log(logging.WARNING, topic, message, *args)
