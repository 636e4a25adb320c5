"""Count what came and what was served, and forget it slowly.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

TENANTS_MAX = 4096
HALF_LIFE_S = 60.0
OVER_SHARE_MAX = 16.0
MEMORY_S = 180.0
DOUBT_S = 2.0
AHEAD_S = 60.0
PRICE_MIN = 1e-4
PRICE_STEP = 1.2
PRICES = 192


class Inflow:
    """Remembers how much work came lately, by how much one request costs per unit of its value.

    With it the dearest request can be told that the cluster can afford if the near future is like the near past. What
    is dearer would be served at the cost of several cheaper ones that are still to come.
    """

    def __init__(self) -> None:
        self._work = [0.0] * PRICES
        self._total = 0.0
        self._begun_s: float | None = None
        self._now_s = 0.0

    def add(self, price: float, work: float, *, now_s: float) -> None:
        """Count a request that arrived. Modifies this."""
        if self._begun_s is None:
            self._begun_s = self._now_s = now_s
        factor = math.exp((self._now_s - now_s) / MEMORY_S)
        if factor < 0.99:
            self._work = [each * factor for each in self._work]
            self._total *= factor
            self._now_s = now_s
        self._work[_bin(price)] += work
        self._total += work

    def dearest(
        self, waiting: Sequence[tuple[float, float]], *, capacity: float, slack_s: float, now_s: float
    ) -> float:
        """Return the highest price that can be afforded; infinite when all can.

        Args:
            waiting: price and work of what is there already.
            capacity: work done per second.
            slack_s: how long work may wait on average.
            now_s: for how long the past is known.
        """
        if self._begun_s is None or capacity <= 0:
            return math.inf
        # No further ahead than the past is known. What came at once with nothing before it says little.
        known_s = MEMORY_S * (1.0 - math.exp(-max(now_s - self._begun_s, 0.0) / MEMORY_S))
        ahead_s = min(known_s, AHEAD_S)
        fade = math.exp((self._now_s - now_s) / MEMORY_S) * ahead_s / (known_s + DOUBT_S)
        left = capacity * (ahead_s + slack_s)
        if self._total * fade + sum(work for _, work in waiting) <= left:
            return math.inf
        totals = [each * fade for each in self._work]
        for price, work in waiting:
            totals[_bin(price)] += work
        for number, total in enumerate(totals):
            left -= total
            if left < 0:
                # All of about this price, because nothing tells which: where all cost the same, none is too dear.
                return float(PRICE_MIN * PRICE_STEP ** (number + 1))
        return math.inf


def _bin(price: float) -> int:
    return min(max(int(math.log(max(price, PRICE_MIN) / PRICE_MIN, PRICE_STEP)), 0), PRICES - 1)


class TokenLedger:
    """Counts tokens served per name, forgetting half of them every ``HALF_LIFE_S``."""

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._total = 0.0
        self._now_s = 0.0

    def add(self, name: str, num_tokens: int, *, now_s: float) -> None:
        """Charge a name. Modifies the ledger; beyond ``TENANTS_MAX`` names the least charged half is forgotten."""
        self._decay(now_s)
        self._tokens[name] = self._tokens.get(name, 0.0) + num_tokens
        self._total += num_tokens
        if len(self._tokens) > TENANTS_MAX:
            kept = heapq.nlargest(TENANTS_MAX // 2, self._tokens.items(), key=lambda each: each[1])
            self._tokens = dict(kept)
            self._total = sum(self._tokens.values())

    def share(self, name: str) -> float:
        """Return a name's part of what was served lately."""
        return self._tokens.get(name, 0.0) / self._total if self._total else 0.0

    def over_share(self, name: str) -> float:
        """Return how many times its equal share a name was served lately, between 1 and ``OVER_SHARE_MAX``."""
        # Somebody who was not served yet is one more to share with.
        num_names = max(len(self._tokens), 2 if name else 1)
        return min(max(self.share(name) * num_names, 1.0), OVER_SHARE_MAX)

    def _decay(self, now_s: float) -> None:
        # In steps, because every name is touched.
        if now_s - self._now_s < HALF_LIFE_S / 16:
            return
        factor = 0.5 ** ((now_s - self._now_s) / HALF_LIFE_S)
        self._tokens = {name: left for name, tokens in self._tokens.items() if (left := tokens * factor) >= 1.0}
        self._total = sum(self._tokens.values())
        self._now_s = now_s
