"""Count why a finished request's blocks are still kept, so that the engine is told exactly once that it may free them.

Pure. A request may be held for a hand-over and for a save at the same time; the engine (vLLM scheduler.py
_update_from_kv_xfer_finished) asserts on a report that comes early, twice, or for a request it did not keep.
"""

from __future__ import annotations

import enum


class Why(enum.Flag):
    """Reasons to keep blocks."""

    NOTHING = 0
    HANDOFF = enum.auto()
    SAVE = enum.auto()


class Holds:
    """Keeps the reasons per request. Not thread-safe."""

    def __init__(self) -> None:
        self._reasons: dict[str, Why] = {}
        self._kept: dict[str, int] = {}
        self._ready: set[str] = set()

    def add(self, request_id: str, why: Why) -> None:
        """Note a reason; the request may still be running."""
        self._reasons[request_id] = self._reasons.get(request_id, Why.NOTHING) | why

    def keep(self, request_id: str, num_blocks: int) -> None:
        """The engine finished the request and keeps its blocks until we report it."""
        if self._reasons.get(request_id, Why.NOTHING):
            self._kept[request_id] = num_blocks
        else:
            self._reasons.pop(request_id, None)
            self._ready.add(request_id)

    def drop(self, request_id: str, why: Why) -> None:
        """A reason is over; unknown pairs are ignored."""
        left = self._reasons.get(request_id, Why.NOTHING) & ~why
        if left:
            self._reasons[request_id] = left
            return
        self._reasons.pop(request_id, None)
        if self._kept.pop(request_id, None) is not None:
            self._ready.add(request_id)

    def take_ready(self) -> set[str]:
        """Return the requests that may be freed, each once."""
        ready, self._ready = self._ready, set()
        return ready

    @property
    def num_blocks(self) -> int:
        """Return the blocks that are kept only for us."""
        return sum(self._kept.values())
