"""Keep account of the work that one engine was given and has not finished.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.
"""

from __future__ import annotations

from collections import OrderedDict

OVERDUE_SHARE = 0.05


class PrefillLoad:
    """Work of an engine that prefills one request after another, in the order they were given.

    The engine does not say when it begins a request: it begins the first when it gets it, and each other one when the
    one before is finished.
    """

    def __init__(self) -> None:
        # Ordered: finding the first of a plain dict is slow after many were taken from its front.
        self._predicted_s: OrderedDict[str, float] = OrderedDict()
        self._total_s = 0.0
        self._begun_s = 0.0

    def __len__(self) -> int:
        return len(self._predicted_s)

    @property
    def is_busy(self) -> bool:
        """Tell whether there is anything to do."""
        return bool(self._predicted_s)

    def add(self, request_id: str, predicted_s: float, *, now_s: float) -> None:
        """Count a request that was just sent there. Modifies this."""
        if not self._predicted_s:
            self._begun_s = now_s
            self._total_s = 0.0
        self._predicted_s[request_id] = predicted_s
        self._total_s += predicted_s

    def finish(self, request_id: str, *, now_s: float) -> bool:
        """Stop counting a request, finished or cancelled; False when it was not counted."""
        predicted_s = self._predicted_s.get(request_id)
        if predicted_s is None:
            return False
        if request_id == next(iter(self._predicted_s)):
            self._begun_s = now_s
        del self._predicted_s[request_id]
        self._total_s -= predicted_s
        return True

    def queue_s(self, now_s: float) -> float:
        """Return the predicted seconds until another request could begin."""
        if not self._predicted_s:
            return 0.0
        head_s = next(iter(self._predicted_s.values()))
        # One that takes longer than predicted is still not over.
        left_s = max(head_s - (now_s - self._begun_s), OVERDUE_SHARE * head_s)
        return max(self._total_s - head_s, 0.0) + left_s


class DecodeLoad:
    """Memory and requests of an engine that decodes, from the moment a request was placed there."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, request_id: str, num_tokens: int) -> None:
        """Reserve a request's KV memory. Modifies this."""
        self._tokens[request_id] = num_tokens
        self.num_tokens += num_tokens

    def finish(self, request_id: str) -> bool:
        """Release a request's memory; False when it has none."""
        num_tokens = self._tokens.pop(request_id, None)
        if num_tokens is None:
            return False
        self.num_tokens -= num_tokens
        return True
