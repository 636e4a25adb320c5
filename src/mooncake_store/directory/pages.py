"""Lay our own block entries out in pages, and know which pages must be written [pure].

A page is the unit of an etcd write: adding one key rewrites the page it lands in. New keys go to the page being filled;
when it is full, one of the emptiest pages with at least half its slots free is taken, and only then a new one. So pages
stay at least half full on average however keys come and go, and a bulk publication costs one write per 256 keys.

The table is *desired state*: a write that failed or whose outcome is unknown is simply marked dirty again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from mooncake_store.directory.schema import PAGE_ENTRIES_MAX
from mooncake_store.types import BlockKey

CANDIDATES_MAX = 16
"""Pages with room that are compared when one is needed: after a mass eviction there are thousands."""


class PageWrite(NamedTuple):
    """Write page ``page`` so that it holds ``keys``; delete it when there are none."""

    page: int
    keys: tuple[BlockKey, ...]


class PageTable:
    """Maps each of our keys to a page.

    Args:
        page_entries: keys per page.
        unwritten_max: publications that may wait for a write; beyond it the oldest are dropped.
    """

    def __init__(self, *, page_entries: int = PAGE_ENTRIES_MAX, unwritten_max: int) -> None:
        self._page_entries = page_entries
        self._unwritten_max = unwritten_max
        self._page_of: dict[BlockKey, int] = {}
        self._pages: dict[int, dict[BlockKey, None]] = {}
        self._roomy: dict[int, None] = {}
        self._dirty: dict[int, None] = {}
        self._unwritten: dict[BlockKey, None] = {}
        self._filling = -1
        self._next_page = 0

    def __len__(self) -> int:
        return len(self._page_of)

    @property
    def num_dirty(self) -> int:
        """Return how many pages wait for a write."""
        return len(self._dirty)

    @property
    def num_unwritten(self) -> int:
        """Return how many publications wait for their first write."""
        return len(self._unwritten)

    @property
    def num_pages(self) -> int:
        """Return how many pages hold keys."""
        return len(self._pages)

    def has_page(self, page: int) -> bool:
        """Return whether this page holds keys."""
        return page in self._pages

    def page_of(self, key: BlockKey) -> int | None:
        """Return the page that lists this key, None if we do not hold it."""
        return self._page_of.get(key)

    def add(self, keys: Iterable[BlockKey]) -> int:
        """Add keys; known ones are left alone. Return how many of the oldest unwritten publications were dropped."""
        page_of, pages, unwritten = self._page_of, self._pages, self._unwritten
        num_dropped = 0
        for key in keys:
            if key in page_of:
                continue
            page = self._filling
            entries = pages.get(page)
            if entries is None or len(entries) >= self._page_entries:
                page = self._filling = self._page_with_room()
                entries = pages[page]
            entries[key] = None
            page_of[key] = page
            unwritten[key] = None
            self._dirty[page] = None
            if len(unwritten) > self._unwritten_max:
                self._remove(next(iter(unwritten)))
                num_dropped += 1
        return num_dropped

    def remove(self, keys: Iterable[BlockKey]) -> int:
        """Remove keys; unknown ones are ignored. Return how many were ours."""
        num_removed = 0
        for key in keys:
            if key in self._page_of:
                self._remove(key)
                num_removed += 1
        return num_removed

    def take_dirty(self, pages_max: int) -> list[PageWrite]:
        """Return up to ``pages_max`` writes, oldest first; answer each with ``written`` or ``mark_dirty``."""
        pages = list(itertools.islice(self._dirty, pages_max))
        for page in pages:
            del self._dirty[page]
        return [PageWrite(page, tuple(self._pages.get(page, ()))) for page in pages]

    def written(self, writes: Iterable[PageWrite]) -> None:
        """Take note that these writes reached the backing service."""
        if self._unwritten:
            for write in writes:
                for key in write.keys:
                    self._unwritten.pop(key, None)

    def mark_dirty(self, pages: Iterable[int]) -> None:
        """Ask for these pages to be written again, ours or not (a page without keys is deleted)."""
        for page in pages:
            self._dirty[page] = None

    def mark_all_dirty(self) -> None:
        """Ask for every page to be written: the backing service lost them."""
        for page in self._pages:
            self._dirty[page] = None

    def pages(self) -> list[int]:
        """Return the numbers of all pages that hold keys."""
        return list(self._pages)

    def _remove(self, key: BlockKey) -> None:
        page = self._page_of.pop(key)
        entries = self._pages[page]
        del entries[key]
        self._unwritten.pop(key, None)
        self._dirty[page] = None
        if not entries:
            del self._pages[page]
            self._roomy.pop(page, None)
        elif 2 * len(entries) <= self._page_entries and page != self._filling:
            self._roomy[page] = None

    def _page_with_room(self) -> int:
        if self._roomy:
            candidates = itertools.islice(self._roomy, CANDIDATES_MAX)
            page = min(candidates, key=lambda candidate: len(self._pages[candidate]))
            del self._roomy[page]
            return page
        page = self._next_page
        self._next_page += 1
        self._pages[page] = {}
        return page
