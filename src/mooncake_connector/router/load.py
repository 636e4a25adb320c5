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
        self._due_s = 0.0
        self._overdue_s = 0.0
        self._behind_s = 0.0

    def __len__(self) -> int:
        return len(self._predicted_s)

    def add(self, request_id: str, predicted_s: float, *, now_s: float) -> None:
        """Count a request that was just sent there. Modifies this."""
        is_first = not self._predicted_s
        self._predicted_s[request_id] = predicted_s
        self._behind_s += predicted_s
        if is_first:
            self._begin(now_s)

    def finish(self, request_id: str, *, now_s: float) -> bool:
        """Stop counting a request, finished or cancelled; False when it was not counted."""
        if request_id not in self._predicted_s:
            return False
        is_first = request_id == next(iter(self._predicted_s))
        predicted_s = self._predicted_s.pop(request_id)
        if not self._predicted_s:
            self._behind_s = 0.0
        elif is_first:
            self._begin(now_s)
        else:
            self._behind_s -= predicted_s
        return True

    def _begin(self, now_s: float) -> None:
        head_s = next(iter(self._predicted_s.values()))
        self._due_s = now_s + head_s
        self._overdue_s = OVERDUE_SHARE * head_s
        self._behind_s -= head_s

    def queue_s(self, now_s: float) -> float:
        """Return the predicted seconds until another request could begin."""
        if not self._predicted_s:
            return 0.0
        left_s = self._due_s - now_s
        # One that takes longer than predicted is still not over.
        return max(self._behind_s, 0.0) + (left_s if left_s > self._overdue_s else self._overdue_s)


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
