"""Decide which block leaves first.

Pure and not thread-safe. Least recently used, with two properties that matter for a prefix cache:

- A block in use (pinned by a lease or a copy) is *out of* the order, so choosing a victim never scans blocks that
  cannot leave, however many are leased.
- Blocks used together are ordered tail first: a chain is only as useful as its unbroken head, so when part of it has to
  go, the end goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mooncake_store.types import BlockKey


class EvictionOrder:
    """Orders the blocks that may be evicted; the caller says which are in use."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._order

    def offer(self, keys: Sequence[BlockKey]) -> None:
        """Make blocks evictable as the most recently used ones; of these the last leaves first."""
        for key in reversed(keys):
            self._order[key] = None
            self._order.move_to_end(key)

    def hold(self, key: BlockKey) -> None:
        """Take a block out of the order; unknown keys are ignored."""
        self._order.pop(key, None)

    def next_victim(self) -> BlockKey | None:
        """Return the block to evict next, None when every block is in use. Does not remove it."""
        return next(iter(self._order), None)
