"""Decide how long an engine that keeps failing is left alone.

Pure: no sockets, threads or clocks.

A health check does not see what requests see: an engine may answer checks and fail every request. After some failures
in a row the breaker opens for a while, twice as long each time it opens again; one success closes it for good.
"""

from __future__ import annotations

HOLD_FACTOR_MAX = 64


class Breaker:
    """One engine's.

    Args:
        failures_max: failures in a row that open it.
        hold_s: how long it stays open the first time.
    """

    def __init__(self, *, failures_max: int, hold_s: float) -> None:
        self._failures_max = failures_max
        self._hold_s = hold_s
        self._num_failures = 0
        self._num_opened = 0
        self._until_s = 0.0

    def fail(self, now_s: float) -> bool:
        """Count a failure; True when it opened just now."""
        self._num_failures += 1
        # While it is open, requests that were under way fail too: they are no news.
        if self._num_failures < self._failures_max or self.is_open(now_s):
            return False
        # What is tried after the pause must succeed the first time.
        self._num_failures = self._failures_max - 1
        self._until_s = now_s + self._hold_s * min(2**self._num_opened, HOLD_FACTOR_MAX)
        self._num_opened += 1
        return True

    def succeed(self) -> None:
        """Count a success: it is closed, and everything is forgotten."""
        self._num_failures = self._num_opened = 0
        self._until_s = 0.0

    def is_open(self, now_s: float) -> bool:
        """Tell whether the engine is to be left alone."""
        return now_s < self._until_s
