"""Turn the events of many streams into few large steps of the index.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

A step on the tables costs some hundred microseconds however few blocks it is for, so events are gathered until somebody
calls :meth:`Intake.flush`. Stores are gathered apart from removals; whenever the order of two events matters (both are
about the same block), what was gathered is carried out in between.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mooncake_connector.router.index.blocks import Blocks
from mooncake_connector.router.index.columns import Column, Tier
from mooncake_connector.router.index.events import ANY_GROUP, Removed, Stored
from mooncake_connector.router.index.hashing import DEPTH_MAX, WORD_MASK, TokenHash, Words

FLUSH_BLOCKS = 2048
COLUMNS_PER_STREAM_MAX = 64
_ODD = 0xD6E8FEB86659FD93
_ODD_WORD = np.uint64(_ODD)


class _Kind(NamedTuple):
    """What stores must have in common to be carried out in one step."""

    block_tokens: int
    tier: Tier
    group: int
    word: int


class Life:
    """One life of one stream: from a start with an empty cache until it is cleared.

    Attributes:
        stream: its number in the index.
    """

    def __init__(self, stream: int, salt: int) -> None:
        self.stream = stream
        self.salt = salt
        self.columns: dict[tuple[int, int], Column] = {}
        self.lanes: dict[tuple[Tier, int, int], tuple[_Kind, int]] = {}
        # What is gathered and not yet carried out, by the engine's hashes.
        self.told: list[Sequence[int]] = []
        self.tails: dict[_Kind, dict[int, tuple[int, int]]] = {}
        self.linked: set[int] = set()
        self.removed: set[int] = set()
        self._stored: set[int] = set()

    def name(self, value: int) -> int:
        """Return the name of a block in the index, from the engine's hash."""
        return (value * _ODD + self.salt & WORD_MASK) or 1

    def stored(self) -> set[int]:
        """Return the blocks of which a store is gathered. Seldom asked, so it is not kept ready."""
        if self.told:
            self._stored.update(*self.told)
            self.told.clear()
        return self._stored

    def is_busy_with(self, values: Sequence[int]) -> bool:
        """Tell whether anything about any of these blocks is gathered."""
        return any(each and not each.isdisjoint(values) for each in (self.stored(), self.linked, self.removed))

    def forget_gathered(self) -> None:
        """What was gathered is carried out."""
        self.told.clear()
        self.tails.clear()
        self.linked.clear()
        self.removed.clear()
        self._stored.clear()


class _Stores:
    """Gathered stores of one kind; ``runs`` lists are per event."""

    def __init__(self) -> None:
        self.hashes = array.array("Q")
        self.tokens = array.array("I")
        self.starts: list[int] = []
        self.depths: list[int] = []
        self.lengths: list[int] = []
        self.lives: list[Life] = []
        self.bits: list[int] = []
        self.contents: list[tuple[int, int]] = []


class _Removals:
    """Gathered removals from one medium and mask; ``lengths``, ``lives`` and ``bits`` are per event."""

    def __init__(self) -> None:
        self.hashes = array.array("Q")
        self.lengths: list[int] = []
        self.lives: list[Life] = []
        self.bits: list[int] = []


class Intake:
    """Carries events out on the index.

    Args:
        blocks: the index.
        token_hash: how prefixes are hashed.

    Attributes:
        num_unknown: blocks that were removed, or told of without their tokens, and that the index did not know.
    """

    def __init__(self, blocks: Blocks, token_hash: TokenHash) -> None:
        self._blocks = blocks
        self._hash = token_hash
        self._stores: dict[_Kind, _Stores] = {}
        self._links: dict[tuple[Life, Tier, int], list[int]] = {}
        self._removals: dict[tuple[Tier, int], _Removals] = {}
        self._busy: set[Life] = set()
        self._num_gathered = 0
        self._num_opened = 0
        self.num_unknown = 0

    @property
    def num_gathered(self) -> int:
        """Return how many blocks wait for :meth:`flush`."""
        return self._num_gathered

    def open(self) -> Life:
        """Return a new life of some stream: its cache is empty.

        Raises:
            CapacityExceeded: when too many streams are open.
        """
        self._num_opened += 1
        return Life(self._blocks.open_stream(), self._hash.word(f"stream {self._num_opened}".encode()))

    def close(self, life: Life) -> None:
        """Forget all that a stream holds; its life is over."""
        self.flush()
        self._blocks.close_stream(life.stream)

    def store(self, life: Life, event: Stored) -> bool:
        """Gather a store; False when it goes on from a block that is not known, and so cannot be placed.

        Raises:
            CapacityExceeded: when the stream has a group or block size for which no column is left.
        """
        hashes = event.hashes
        if not hashes:
            return True
        if life.removed and not life.removed.isdisjoint(hashes):
            self.flush()
        if not event.tokens:
            self._gather_links(life, event)
            return True
        kind, bit = life.lanes.get((event.tier, event.group, event.block_tokens)) or self._lane(life, event)
        start = self._start(life, event, kind)
        if start is None:
            return False
        before, depth = start
        end = depth + len(event.tokens)
        if end >= DEPTH_MAX:
            return False
        stores = self._stores.get(kind)
        if stores is None:
            stores = self._stores[kind] = _Stores()
        if event.contents is not None:
            first = len(stores.hashes)
            stores.contents += [
                (first + at, self._hash.word(content)) for at, content in enumerate(event.contents) if content
            ]
        stores.hashes.extend(array.array("Q", hashes))
        stores.tokens.extend(event.tokens)
        stores.starts.append(before)
        stores.depths.append(depth)
        stores.lengths.append(len(hashes))
        stores.lives.append(life)
        stores.bits.append(bit)
        life.told.append(hashes)
        tails = life.tails.get(kind)
        if tails is None:
            tails = life.tails[kind] = {}
        tails[hashes[-1]] = (-len(stores.starts), end)
        self._note(life, len(hashes))
        return True

    def remove(self, life: Life, event: Removed) -> None:
        """Gather a removal."""
        hashes = event.hashes
        if life.is_busy_with(hashes):
            self.flush()
        num_noted = len(life.removed)
        life.removed.update(hashes)
        if len(life.removed) < num_noted + len(hashes):
            hashes = list(dict.fromkeys(hashes))
        words: dict[int, int] = {}
        for column in life.columns.values():
            if event.group in (ANY_GROUP, column.group):
                words[column.word] = words.get(column.word, 0) | column.bit
        if not words:
            self.num_unknown += len(hashes)
        for word, bits in words.items():
            removals = self._removals.get((event.tier, word))
            if removals is None:
                removals = self._removals[event.tier, word] = _Removals()
            removals.hashes.extend(array.array("Q", hashes))
            removals.lengths.append(len(hashes))
            removals.lives.append(life)
            removals.bits.append(bits)
        self._note(life, len(hashes))

    def flush(self) -> None:
        """Carry out what was gathered."""
        for kind, stores in self._stores.items():
            self._flush_stores(kind, stores)
        for (life, tier, group), values in self._links.items():
            self._flush_links(life, tier, group, values)
        for (tier, word), removals in self._removals.items():
            self._flush_removals(tier, word, removals)
        for life in self._busy:
            life.forget_gathered()
        self._stores.clear()
        self._links.clear()
        self._removals.clear()
        self._busy.clear()
        self._num_gathered = 0

    # ------------------------------------------------------------------ gathering

    def _note(self, life: Life, num_blocks: int) -> None:
        self._busy.add(life)
        self._num_gathered += num_blocks
        if self._num_gathered >= FLUSH_BLOCKS:
            self.flush()

    def _lane(self, life: Life, event: Stored) -> tuple[_Kind, int]:
        """Return what an event's stores have in common with others, and the bit of its column, opened if need be."""
        key = event.group, event.block_tokens
        column = life.columns.get(key)
        if column is None:
            column = life.columns[key] = self._blocks.open_column(
                life.stream, event.group, event.block_tokens, event.window_tokens
            )
        kind = _Kind(event.block_tokens, event.tier, event.group, column.word)
        lane = life.lanes[event.tier, event.group, event.block_tokens] = kind, column.bit
        return lane

    def _start(self, life: Life, event: Stored, kind: _Kind) -> tuple[int, int] | None:
        """Return the hash of what comes before an event's blocks (or the run that ends there), and its length."""
        if event.parent is None:
            return self._hash.scope(event.lora, event.salt), 0
        tails = life.tails.get(kind)
        tail = tails.get(event.parent) if tails else None
        if tail is not None:
            return tail
        name = life.name(event.parent)
        row = self._blocks.row_of(name)
        if row < 0 and event.parent in life.stored():
            self.flush()
            row = self._blocks.row_of(name)
        return None if row < 0 else (self._blocks.hashes.item(row), self._blocks.depths.item(row))

    def _gather_links(self, life: Life, event: Stored) -> None:
        self._links.setdefault((life, event.tier, event.group), []).extend(event.hashes)
        life.linked.update(event.hashes)
        self._note(life, len(event.hashes))

    # ------------------------------------------------------------------ carrying out

    def _flush_stores(self, kind: _Kind, stores: _Stores) -> None:
        counts = np.array(stores.lengths, np.intp)
        extras = None
        if stores.contents:
            extras = np.zeros(len(stores.hashes), np.uint64)
            for at, content in stores.contents:
                extras[at] = content
        hashes, depths = self._hash.runs(
            stores.starts, stores.depths, stores.lengths, np.frombuffer(stores.tokens, np.uint32), kind.block_tokens,
            extras,
        )  # fmt: skip
        names, streams, bits = _per_block(stores.hashes, stores.lives, stores.bits, counts)
        ordered = np.sort(names)
        if (ordered[1:] == ordered[:-1]).any():
            # Some name came twice; what it meant last counts.
            _, lasts = np.unique(names[::-1], return_index=True)
            kept = np.sort(names.size - 1 - lasts)
            names, hashes, streams, bits = names[kept], hashes[kept], streams[kept], bits[kept]
            depths = depths[kept]
        size = max(1, self._blocks.capacity // 8)
        for at in range(0, hashes.size, size):
            part = slice(at, at + size)
            self._blocks.store(
                names[part], hashes[part], depths[part], streams[part], bits[part],
                word=kind.word, tier=kind.tier,
            )  # fmt: skip

    def _flush_links(self, life: Life, tier: Tier, group: int, values: list[int]) -> None:
        names = np.array([life.name(value) for value in values], np.uint64)
        columns = [column for column in life.columns.values() if column.group == group]
        missed = [self._blocks.link(names, each, tier, is_only_column=len(columns) == 1) for each in columns]
        self.num_unknown += min(missed, default=len(values))

    def _flush_removals(self, tier: Tier, word: int, removals: _Removals) -> None:
        counts = np.array(removals.lengths, np.intp)
        names, streams, bits = _per_block(removals.hashes, removals.lives, removals.bits, counts)
        self.num_unknown += self._blocks.remove(names, streams, bits, word=word, tier=tier)


def _per_block(
    hashes: array.array[int], lives: list[Life], bits: list[int], counts: np.ndarray[tuple[int], np.dtype[np.intp]]
) -> tuple[Words, Words, Words]:
    """Return name, stream and bits of each block, from what is known per event."""
    names = np.frombuffer(hashes, np.uint64) * _ODD_WORD
    names += np.repeat(np.array([life.salt for life in lives], np.uint64), counts)
    np.maximum(names, np.uint64(1), out=names)
    streams = np.repeat(np.array([life.stream for life in lives], np.uint64), counts)
    return names, streams, np.repeat(np.array(bits, np.uint64), counts)
