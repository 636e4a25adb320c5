"""Find 64-bit keys among millions, hundreds at a time: an open-addressing table in numpy arrays.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

Slots are grouped in buckets of eight, a cache line of keys. A key lies in its home slot, else anywhere in its bucket,
else in a bucket after it; each bucket counts the keys that went past it, so that a search knows where to stop and a
removal leaves no tombstone. Slots never move: the table does not grow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_connector.router.index.hashing import WORD_MASK, Words
from mooncake_store.errors import CapacityExceeded

Slots = npt.NDArray[np.intp]

LANES = 8
LANE_BITS = 3
LOAD_MAX = 0.75
_GOLDEN = 0x9E3779B97F4A7C15
_GOLDEN_WORD = np.uint64(_GOLDEN)
_ONE = np.uint32(1)


class KeyTable:
    """Maps 64-bit keys to numbers.

    Args:
        slots_log2: the table has ``2 ** slots_log2`` slots, at least eight. Its memory is taken at once, because a page
            that is touched for the first time costs as much as some hundred lookups.
        value_type: what belongs to a key, a numpy integer.

    Attributes:
        keys: the key in each slot; 0 in an empty one, so 0 is no key.
        values: what belongs to it; the caller may change it.
        num_keys: how many there are.
    """

    def __init__(self, slots_log2: int, value_type: type[np.integer[Any]] = np.int32) -> None:
        self.num_slots = 1 << slots_log2
        self.keys: Words = np.full(self.num_slots, 0, np.uint64)
        self.values: npt.NDArray[Any] = np.full(self.num_slots, 0, value_type)
        self.num_keys = 0
        self._rows = self.keys.reshape(-1, LANES)
        self._num_past: npt.NDArray[np.uint32] = np.zeros(self.num_slots >> LANE_BITS, np.uint32)
        self._bucket_mask = (self.num_slots >> LANE_BITS) - 1
        self._shift = 64 - slots_log2
        self._shift_word = np.uint64(self._shift)

    def find(self, keys: Words, *, is_likely: bool = True) -> Slots:
        """Return the slot of each key, -1 where it is not there; ``is_likely`` says which to prepare for."""
        slots = self._home(keys)
        missed = (self.keys.take(slots, mode="clip") != keys).nonzero()[0] if is_likely else np.arange(keys.size)
        if not missed.size:
            return slots
        buckets = slots[missed] >> LANE_BITS
        while True:
            found = self._rows.take(buckets, axis=0, mode="clip") == keys[missed][:, None]
            hits = found.ravel().nonzero()[0]
            if hits.size == missed.size:
                slots[missed] = (buckets << LANE_BITS) | (hits & (LANES - 1))
                return slots
            at = hits >> LANE_BITS
            slots[missed] = -1
            slots[missed[at]] = (buckets[at] << LANE_BITS) | (hits & (LANES - 1))
            goes_on = self._num_past.take(buckets, mode="clip") > 0
            goes_on[at] = False
            if not goes_on.any():
                return slots
            missed = missed[goes_on]
            buckets = (buckets[goes_on] + 1) & self._bucket_mask

    def find_one(self, key: int) -> int:
        """Return the slot of a key, -1 where it is not there; faster than :meth:`find` for up to ten keys."""
        home = (key * _GOLDEN & WORD_MASK) >> self._shift
        if self.keys.item(home) == key:
            return home
        bucket = home >> LANE_BITS
        while True:
            row = self._rows[bucket].tolist()
            if key in row:
                return (bucket << LANE_BITS) + int(row.index(key))
            if not self._num_past.item(bucket):
                return -1
            bucket = (bucket + 1) & self._bucket_mask

    def add(self, keys: Words, values: npt.NDArray[Any]) -> Slots:
        """Put keys that are not there, each given once, and return their slots.

        Raises:
            CapacityExceeded: when the table could become fuller than ``LOAD_MAX``; nothing was added then.
        """
        if self.num_keys + keys.size > self.num_slots * LOAD_MAX:
            raise CapacityExceeded(f"the index has {self.num_keys} keys, {keys.size} more do not fit")
        slots = self._home(keys)
        # Several keys may want one free slot: the last one written has it, and the others see that.
        free = (self.keys.take(slots, mode="clip") == 0).nonzero()[0]
        self.keys[slots[free]] = keys[free]
        left = (self.keys.take(slots, mode="clip") != keys).nonzero()[0]
        if left.size:
            self._add_displaced(keys, slots, left)
        self.values[slots] = values
        self.num_keys += keys.size
        return slots

    def _add_displaced(self, keys: Words, slots: Slots, left: Slots) -> None:
        """Put those keys whose home is taken, and write down where."""
        buckets = slots[left] >> LANE_BITS
        while left.size:
            wanted = keys[left]
            empty = self._rows.take(buckets, axis=0, mode="clip") == 0
            lanes = empty.argmax(axis=1)
            has_room = empty.ravel()[np.arange(0, left.size * LANES, LANES) + lanes]
            slots[left] = (buckets << LANE_BITS) | lanes
            chosen = left[has_room]
            self.keys[slots[chosen]] = keys[chosen]
            if chosen.size < left.size:
                np.add.at(self._num_past, buckets[~has_room], _ONE)
                buckets = np.where(has_room, buckets, (buckets + 1) & self._bucket_mask)
            lost = (self.keys.take(slots[left], mode="clip") != wanted).nonzero()[0]
            left, buckets = left[lost], buckets[lost]

    def drop(self, slots: Slots) -> None:
        """Empty slots; each must be taken and be given once."""
        homes = self._home(self.keys[slots]) >> LANE_BITS
        buckets = slots >> LANE_BITS
        is_past = homes != buckets
        for home, bucket in zip(homes[is_past].tolist(), buckets[is_past].tolist(), strict=True):
            while home != bucket:
                self._num_past[home] -= 1
                home = (home + 1) & self._bucket_mask
        self.keys[slots] = 0
        self.num_keys -= slots.size

    def _home(self, keys: Words) -> Slots:
        homes = keys * _GOLDEN_WORD
        homes >>= self._shift_word
        return homes.view(np.intp)
