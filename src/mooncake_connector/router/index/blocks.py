"""Keep which engine holds which token block on which medium: a million blocks in numpy arrays, in bounded memory.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

Three things, each an array or a table of arrays::

    block     a prefix of tokens, known by its hash; a row number. Per medium 64-bit masks say which columns hold it.
    column    one bit of the masks: one KV cache group of one stream, with one block size.
    name      what a stream calls a block (the engine's own hash) -> row. Needed for removals and for parents.

Rows are handed out in order, so the blocks of one prompt lie side by side, and a lookup reads them as one slice instead
of probing for each. A stream that starts over is *closed*: its columns count no more at once; its names and bits are
cleaned up a piece at a time by :meth:`Blocks.sweep`. So are names of removed blocks (kept for a while, because a child
may still name them as its parent) and, when there are too many, the oldest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mooncake_connector.router.index.columns import ERAS, Aging, Column, Columns, Tier
from mooncake_connector.router.index.hashing import Words
from mooncake_connector.router.index.table import KeyTable, Slots
from mooncake_store.errors import CapacityExceeded

SWEEP_SLOTS = 1 << 14
SWEEP_SLOTS_PER_BLOCK = 32
HOPS_MAX = 4
LIVE_SHARE_MAX = 0.85

_ROW_MASK_INT = (1 << 28) - 1
_ROW_MASK = np.uint64(_ROW_MASK_INT)
_STREAM_SHIFT = np.uint64(28)
_STREAM_MASK = np.uint64((1 << 12) - 1)
_ERA_BITS_AT = 40
_LIVE_INT = 1 << 63
_LIVE = np.uint64(_LIVE_INT)
"""What belongs to a name, in one word: row, stream, era (23 bits), whether the stream holds the block."""

CAPACITY_MAX = 100_000_000
Rows = npt.NDArray[np.intp]
Depths = npt.NDArray[np.intp]


class Blocks:
    """Holds blocks, names and columns.

    Args:
        capacity: how many blocks, and how many names, are kept at most. Memory is some 90 bytes for each, 8 more for
            each medium besides the device, and grows with use up to that.
    """

    def __init__(self, capacity: int) -> None:
        # Room for names that nobody holds any more, and for a step's blocks before older ones make room.
        self.num_wanted = capacity
        capacity += capacity // 4 + 64
        self.capacity = capacity
        slots_log2 = max(6, (capacity * 8 // 5 - 1).bit_length())
        # blocks, by row
        self.hashes: Words = np.full(capacity, 0, np.uint64)
        self.depths: npt.NDArray[np.uint32] = np.full(capacity, 0, np.uint32)
        self._by_hash = KeyTable(slots_log2)
        self._num_names: npt.NDArray[np.uint16] = np.full(capacity, 0, np.uint16)
        self._free: npt.NDArray[np.int32] = np.full(capacity, 0, np.int32)
        self._num_free = 0
        self._num_rows_used = 0
        self.masks: list[list[Words | None]] = []
        # names, by slot
        self._names = KeyTable(slots_log2, np.uint64)
        self.num_live = 0
        self.columns = Columns()
        self._aging = Aging(capacity)
        self._hand = 0

    @property
    def num_blocks(self) -> int:
        """Return how many different blocks there are; those that nobody holds any more count while they have a name."""
        return self._by_hash.num_keys

    @property
    def num_evicted(self) -> int:
        """Return how many names of held blocks were forgotten because there were too many."""
        return self._aging.num_evicted

    def row_of(self, name: int) -> int:
        """Return the row that one name stands for, -1 where it is not known."""
        slot = self._names.find_one(name)
        return -1 if slot < 0 else int(self._names.values.item(slot)) & _ROW_MASK_INT

    def store(
        self, names: Words, hashes: Words, depths: Depths, streams: Words, bits: Words,
        *, word: int, tier: Tier,
    ) -> Rows:  # fmt: skip
        """Note that columns hold blocks, and return their rows.

        Args:
            names: what the streams call the blocks, salted; each once.
            hashes: of the prefixes that end with the blocks; may repeat.
            depths: tokens up to the end of each block.
            streams: whose names they are.
            bits: the column of each, as one bit of mask ``word``.
            word: which mask.
            tier: the medium.

        Raises:
            CapacityExceeded: when more come at once than can be made room for.
        """
        self._make_room(len(names))
        slots = self._names.find(names, is_likely=False)
        known = (slots >= 0).nonzero()[0]
        if known.size:
            known = known[self._confirm(slots[known], hashes[known])]
        base = streams << _STREAM_SHIFT
        base |= np.uint64(self._aging.era << _ERA_BITS_AT | _LIVE_INT)
        if known.size == names.size:
            values = self._names.values.take(slots) & _ROW_MASK
            rows = values.view(np.intp)
            self._names.values[slots] = values | base
        elif not known.size:
            rows = self._name(names, hashes, depths, base)
        else:
            rows = np.empty(names.size, np.intp)
            is_fresh = np.ones(names.size, np.bool_)
            is_fresh[known] = False
            values = self._names.values.take(slots[known]) & _ROW_MASK
            rows[known] = values.view(np.intp)
            self._names.values[slots[known]] = values | base[known]
            fresh = is_fresh.nonzero()[0]
            rows[fresh] = self._name(names[fresh], hashes[fresh], depths[fresh], base[fresh])
        mask = self._mask(word, tier)
        if (bits == bits[0]).all():
            mask[rows] |= bits[0]
        else:
            np.bitwise_or.at(mask, rows, bits)
        self._aging.count(names.size)
        return rows

    def _name(self, names: Words, hashes: Words, depths: Depths, base: Words) -> Rows:
        """Take up names that are not known, and return their rows."""
        rows = self._rows_for(hashes, depths)
        self._names.add(names, rows.view(np.uint64) | base)
        np.add.at(self._num_names, rows, _ONE)
        self.num_live += names.size
        return rows

    def _confirm(self, slots: Slots, hashes: Words) -> npt.NDArray[np.bool_]:
        """Tell which names still mean the same block; forget the others, and count those that were not held."""
        values = self._names.values.take(slots)
        is_same: npt.NDArray[np.bool_] = self.hashes.take((values & _ROW_MASK).view(np.intp)) == hashes
        self.num_live += int(np.count_nonzero(values < _LIVE))
        if not is_same.all():
            # The engine gave an old name to another block: it no longer means the old one by it.
            self.num_live -= int(np.count_nonzero((values < _LIVE) & ~is_same))
            self._drop_names(slots[~is_same])
        return is_same

    def remove(self, names: Words, streams: Words, bits: Words, *, word: int, tier: Tier) -> int:
        """Note that columns no longer hold blocks, and return how many of the names were not known.

        Arguments as for :meth:`store`; ``bits`` may have several bits set.
        """
        slots = self._names.find(names)
        known = (slots >= 0).nonzero()[0]
        if known.size:
            slots, streams, bits = slots[known], streams[known], bits[known]
            values = self._names.values.take(slots)
            rows = (values & _ROW_MASK).view(np.intp)
            mask = self.masks[word][tier] if word < len(self.masks) else None
            if mask is not None:
                np.bitwise_and.at(mask, rows, ~bits)
            ended = ((values >= _LIVE) & ~self._is_held(rows, streams)).nonzero()[0]
            self._names.values[slots[ended]] = values[ended] & ~_LIVE
            self.num_live -= ended.size
        return int(names.size - known.size)

    def link(self, names: Words, column: Column, tier: Tier, *, is_only_column: bool) -> int:
        """Note that a column holds blocks on one more medium, and return how many of the names were not known.

        Of several columns of a group, it is the one that holds the block already.
        """
        slots = self._names.find(names)
        slots = slots[slots >= 0]
        values = self._names.values.take(slots)
        rows = (values & _ROW_MASK).view(np.intp)
        if not is_only_column:
            held: Words = np.zeros(rows.size, np.uint64)
            for mask in self.masks[column.word]:
                if mask is not None:
                    held |= mask[rows]
            slots, rows, values = (each[(held & np.uint64(column.bit)) != 0] for each in (slots, rows, values))
        self._mask(column.word, tier)[rows] |= np.uint64(column.bit)
        self.num_live += int(np.count_nonzero(values < _LIVE))
        self._names.values[slots] = values | _LIVE
        return int(names.size - slots.size)

    def held(self, rows: slice | Rows, word: int, tier: Tier) -> Words | None:
        """Return one mask of some rows; None when nothing was ever held on that medium."""
        mask = self.masks[word][tier] if word < len(self.masks) else None
        return None if mask is None else mask[rows]

    # ------------------------------------------------------------------ finding a prompt

    def leading(self, hashes: Words) -> slice | Rows:
        """Return the rows of a prompt's leading blocks, up to the first that nobody has."""
        num_blocks = hashes.size
        parts: list[slice] = []
        position = 0
        while position < num_blocks:
            slot = self._by_hash.find_one(hashes.item(position))
            if slot < 0:
                break
            if len(parts) == HOPS_MAX:
                return self._gather(parts, hashes[position:])
            row = self._by_hash.values.item(slot)
            there = self.hashes[row : row + num_blocks - position]
            is_same = there == hashes[position : position + there.size]
            length = int(is_same.argmin())
            if length == 0:  # all are the same: the first one is, by the way that it was found
                length = there.size
            parts.append(slice(row, row + length))
            position += length
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.arange(each.start, each.stop, dtype=np.intp) for each in parts] or [_NO_ROWS])

    def all_rows(self, hashes: Words) -> Rows:
        """Return the row of each block of a prompt, -1 for those that nobody has."""
        slots = self._by_hash.find(hashes)
        return np.where(slots >= 0, self._by_hash.values.take(slots, mode="clip"), -1)

    def _gather(self, parts: list[slice], hashes: Words) -> Rows:
        rows = self.all_rows(hashes)
        absent = (rows < 0).nonzero()[0]
        if absent.size:
            rows = rows[: absent[0]]
        return np.concatenate([*(np.arange(each.start, each.stop, dtype=np.intp) for each in parts), rows])

    # ------------------------------------------------------------------ streams

    def open_column(self, stream: int, group: int, block_tokens: int, window_tokens: int) -> Column:
        """Return a new column.

        Raises:
            CapacityExceeded: when there are too many.
        """
        if not self.columns.has_spare:
            self.sweep_all()
        column = self.columns.open(stream, group, block_tokens, window_tokens)
        while column.word >= len(self.masks):
            self.masks.append([None] * len(Tier))
        return column

    def close_stream(self, stream: int) -> None:
        """Forget all that a stream holds, and its name; the number may be given out anew later."""
        self.columns.close(stream)

    def open_stream(self) -> int:
        """Return a new stream.

        Raises:
            CapacityExceeded: when there are too many.
        """
        return self.columns.open_stream()

    # ------------------------------------------------------------------ cleaning up

    @property
    def is_sweeping(self) -> bool:
        """Tell whether there is something to clean up."""
        return self.columns.has_closed or self._names.num_keys > self.capacity * LIVE_SHARE_MAX

    def sweep(self, num_slots: int = SWEEP_SLOTS) -> None:
        """Clean up the next ``num_slots`` names, in slices that take some 0.1 ms each."""
        while num_slots > 0 and self.is_sweeping:
            self._sweep_slice()
            num_slots -= SWEEP_SLOTS

    def sweep_all(self) -> None:
        """Clean up every name once: some milliseconds."""
        for _ in range(-(-self._names.num_slots // SWEEP_SLOTS) * 2):
            self._sweep_slice()

    def _sweep_slice(self) -> None:
        aging = self._aging
        start = self._hand
        stop = min(start + SWEEP_SLOTS, self._names.num_slots)
        if start == 0:
            aging.begin_round(self.num_live > self.capacity * LIVE_SHARE_MAX)
            self.columns.begin_round()
        values = self._names.values[start:stop]
        streams = (values >> _STREAM_SHIFT) & _STREAM_MASK
        is_gone = ~self.columns.is_open[streams.view(np.intp)]
        if self._names.num_keys > self.capacity * LIVE_SHARE_MAX:
            is_gone |= values < _LIVE
        if aging.cutoff:
            is_old = ((values & ~_LIVE) >> np.uint64(_ERA_BITS_AT)) < np.uint64(aging.cutoff)
            is_old &= values >= _LIVE
            is_old &= self._names.keys[start:stop] != 0
            aging.note_evicted(streams[is_old & ~is_gone])
            is_gone |= is_old
        is_gone &= self._names.keys[start:stop] != 0
        self._drop_names(is_gone.nonzero()[0] + start)
        self._hand = stop % self._names.num_slots
        if self._hand == 0:
            self.columns.end_round()

    def take_evicted(self) -> set[int]:
        """Return the streams that lost names to eviction since the last call."""
        return self._aging.take_evicted()

    def _drop_names(self, slots: Slots) -> None:
        """Forget names, and with them what their streams hold of those blocks."""
        if not slots.size:
            return
        values = self._names.values[slots]
        rows = (values & _ROW_MASK).view(np.intp)
        streams = (values >> _STREAM_SHIFT) & _STREAM_MASK
        self.num_live -= int(np.count_nonzero(values >= _LIVE))
        self._names.values[slots] = 0
        for word, tiers in enumerate(self.masks):
            bits = ~self.columns.stream_bits[word][streams.view(np.intp)]
            for mask in tiers:
                if mask is not None:
                    np.bitwise_and.at(mask, rows, bits)
        self._names.drop(slots)
        np.subtract.at(self._num_names, rows, _ONE)
        empty = np.unique(rows[self._num_names[rows] == 0])
        if empty.size:
            self._by_hash.drop(self._by_hash.find(self.hashes[empty]))
            self.hashes[empty] = 0
            for tiers in self.masks:
                for mask in tiers:
                    if mask is not None:
                        mask[empty] = 0
            self._give_back(empty)

    def _is_held(self, rows: Rows, streams: Words) -> npt.NDArray[np.bool_]:
        """Tell for each row whether its stream holds it anywhere, in any group and on any medium."""
        held: Words = np.zeros(rows.size, np.uint64)
        for word, tiers in enumerate(self.masks):
            bits = self.columns.stream_bits[word][streams.view(np.intp)]
            for mask in tiers:
                if mask is not None:
                    held |= mask[rows] & bits
        is_held: npt.NDArray[np.bool_] = held != 0
        return is_held

    # ------------------------------------------------------------------ rows

    def _mask(self, word: int, tier: Tier) -> Words:
        mask = self.masks[word][tier]
        if mask is None:
            mask = self.masks[word][tier] = np.full(self.capacity, 0, np.uint64)
        return mask

    def _rows_for(self, hashes: Words, depths: Depths) -> Rows:
        slots = self._by_hash.find(hashes, is_likely=False)
        missing = (slots < 0).nonzero()[0]
        if missing.size:
            fresh, firsts = (hashes, missing) if missing.size == hashes.size else (hashes[missing], missing)
            ordered = np.sort(fresh)
            if (ordered[1:] == ordered[:-1]).any():  # two engines stored the same
                fresh, indices = np.unique(fresh, return_index=True)
                firsts = missing[np.sort(indices)]
                fresh = hashes[firsts]
            rows = self._take(firsts.size)
            self._by_hash.add(fresh, rows)
            self.hashes[rows] = fresh
            self.depths[rows] = depths[firsts]
            if firsts.size == hashes.size:
                return rows
            slots = self._by_hash.find(hashes)
        return self._by_hash.values.take(slots).astype(np.intp)

    def _take(self, count: int) -> Rows:
        """Return free rows: freed ones in the order of prompts, then unused ones."""
        recycled = min(count, self._num_free)
        self._num_free -= recycled
        rows = self._free[self._num_free : self._num_free + recycled][::-1]
        if recycled == count:
            return rows.astype(np.intp)
        fresh = np.arange(self._num_rows_used, self._num_rows_used + count - recycled, dtype=np.intp)
        self._num_rows_used += fresh.size
        return np.concatenate([rows, fresh])

    def _give_back(self, rows: Rows) -> None:
        self._free[self._num_free : self._num_free + rows.size] = np.sort(rows)[::-1]
        self._num_free += rows.size

    def _make_room(self, count: int) -> None:
        """See that ``count`` names and rows can be added."""
        if self.is_sweeping:
            self.sweep(count * SWEEP_SLOTS_PER_BLOCK)
        for _ in range(2 * ERAS):
            num_rows_left = self._num_free + self.capacity - self._num_rows_used
            if min(num_rows_left, self.capacity - self._names.num_keys) >= count:
                return
            self.sweep_all()
        raise CapacityExceeded(f"{count} blocks do not fit in an index of {self.capacity}", hint="raise its capacity")


_ONE = np.uint16(1)
"""Of the counts' own type: numpy adds any other twenty times slower."""
_NO_ROWS: Rows = np.zeros(0, np.intp)
