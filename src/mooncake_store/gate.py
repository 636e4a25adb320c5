"""Count the calls inside an object and let nobody in once it closes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CallGate:
    """A gate that calls pass through. Threads: any."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def is_closed(self) -> bool:
        """Tell whether ``close`` was called."""
        with self._changed:
            return self._is_closed

    @contextmanager
    def enter(self) -> Iterator[bool]:
        """Count the caller as inside for the length of the block; yields False when the gate is closed."""
        with self._changed:
            is_open = not self._is_closed
            self._num_inside += is_open
        try:
            yield is_open
        finally:
            if is_open:
                with self._changed:
                    self._num_inside -= 1
                    self._changed.notify_all()

    def close(self) -> bool:
        """Let nobody in from now on; False when it was closed already."""
        with self._changed:
            was_open = not self._is_closed
            self._is_closed = True
            return was_open

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False on timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_inside, timeout_s)
