"""Say who a bit of a mask stands for, and which names are old.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_connector.router.index.hashing import Words
from mooncake_store.errors import CapacityExceeded

STREAMS_MAX = 4096
COLUMNS_MAX = 4096
WORD_BITS = 64
ERAS = 8
_KEPT_ERAS = 4 * ERAS


class Tier(enum.IntEnum):
    """Where a block lies, nearest first. POOL is reachable for every engine, the others for their own."""

    # An enum's own hash costs more than the rest of a lookup.
    __hash__ = int.__hash__

    DEVICE = 0
    HOST = 1
    DISK = 2
    POOL = 3


class Column(NamedTuple):
    """One bit of the masks: one KV cache group of one stream, with one block size.

    Attributes:
        window_tokens: how much before a position the engine needs to go on from there; 0 for all of it.
    """

    number: int
    stream: int
    group: int
    block_tokens: int
    window_tokens: int

    @property
    def word(self) -> int:
        """Return which mask it is in."""
        return self.number // WORD_BITS

    @property
    def bit(self) -> int:
        """Return its place in that mask, as a number with one bit set."""
        return 1 << self.number % WORD_BITS


class Layout(NamedTuple):
    """The open columns, ordered for lookups.

    Attributes:
        full: tokens per block -> mask -> the bits of columns that need every block.
        windowed: stream -> its columns that need only the last tokens.
        grouped: stream -> its columns that need every block, for streams with more than one column.
        stream_of: column -> its stream, for the only columns of streams that have one.
    """

    full: dict[int, dict[int, int]]
    windowed: dict[int, list[Column]]
    grouped: dict[int, list[Column]]
    stream_of: dict[int, int]


class Columns:
    """Hands out streams and columns, and keeps closed ones until nothing refers to them.

    Attributes:
        is_open: per stream, whether it counts.
        stream_bits: per mask and stream, the bits of the stream's columns, closed ones included.
    """

    def __init__(self) -> None:
        self.is_open: npt.NDArray[np.bool_] = np.zeros(STREAMS_MAX, np.bool_)
        self.stream_bits: list[Words] = []
        self._of_stream: dict[int, list[Column]] = {}
        self._free_streams = list(range(STREAMS_MAX - 1, -1, -1))
        self._free_columns: list[int] = []
        self._num_columns = 0
        self._num_open = 0
        self._closed: list[int] = []
        self._leaving: list[int] = []
        self._layout: Layout | None = None

    @property
    def has_closed(self) -> bool:
        """Tell whether a closed stream may still be referred to."""
        return bool(self._closed or self._leaving)

    @property
    def has_spare(self) -> bool:
        """Tell whether another column may be opened before closed ones are cleaned up, which takes a while."""
        return bool(self._free_columns) or not self.has_closed or self._num_columns < max(WORD_BITS, 2 * self._num_open)

    def open_stream(self) -> int:
        """Return the number of a new stream.

        Raises:
            CapacityExceeded: when there are too many.
        """
        if not self._free_streams:
            raise CapacityExceeded(f"{STREAMS_MAX} event streams are followed")
        stream = self._free_streams.pop()
        self.is_open[stream] = True
        self._of_stream[stream] = []
        return stream

    def open(self, stream: int, group: int, block_tokens: int, window_tokens: int) -> Column:
        """Return a new column of a stream.

        Raises:
            CapacityExceeded: when there are too many.
        """
        if self._free_columns:
            number = self._free_columns.pop()
        elif self._num_columns < COLUMNS_MAX:
            number = self._num_columns
            self._num_columns += 1
        else:
            raise CapacityExceeded(f"{COLUMNS_MAX} columns are in use")
        column = Column(number, stream, group, block_tokens, window_tokens)
        while column.word >= len(self.stream_bits):
            self.stream_bits.append(np.zeros(STREAMS_MAX, np.uint64))
        self.stream_bits[column.word][stream] |= np.uint64(column.bit)
        self._of_stream[stream].append(column)
        self._num_open += 1
        self._layout = None
        return column

    def layout(self) -> Layout:
        """Return the open columns, ordered for lookups."""
        if self._layout is None:
            layout = self._layout = Layout({}, {}, {}, {})
            for stream, columns in self._of_stream.items():
                if self.is_open[stream]:
                    _lay_out(layout, stream, columns)
        return self._layout

    def close(self, stream: int) -> None:
        """Let a stream count no more."""
        self.is_open[stream] = False
        self._num_open -= len(self._of_stream[stream])
        self._closed.append(stream)
        self._layout = None

    def begin_round(self) -> None:
        """Everything will be looked at from now on: what is closed before will not be referred to afterwards."""
        self._leaving, self._closed = self._closed, []

    def end_round(self) -> None:
        """Everything was looked at since :meth:`begin_round`."""
        for stream in self._leaving:
            for column in self._of_stream.pop(stream):
                self.stream_bits[column.word][stream] = 0
                self._free_columns.append(column.number)
            self._free_streams.append(stream)
        self._free_columns.sort(reverse=True)
        self._leaving = []


def _lay_out(layout: Layout, stream: int, columns: list[Column]) -> None:
    if not columns:
        return
    full = [column for column in columns if not column.window_tokens]
    for column in full:
        by_word = layout.full.setdefault(column.block_tokens, {})
        by_word[column.word] = by_word.get(column.word, 0) | column.bit
    if len(columns) == len(full) == 1:
        layout.stream_of[full[0].number] = stream
        return
    layout.grouped[stream] = full
    if len(full) < len(columns):
        layout.windowed[stream] = [column for column in columns if column.window_tokens]


class Aging:
    """Decides which names are the oldest, by eras: an era ends after a share of the capacity was stored.

    Attributes:
        era: the present one.
        cutoff: names of earlier eras are to be forgotten; 0 for none.
    """

    def __init__(self, capacity: int) -> None:
        self.era = 1
        self.cutoff = 0
        self.num_evicted = 0
        self._oldest = 0
        self._num_per_era = max(1, capacity // ERAS)
        self._num_left = self._num_per_era
        self._evicted: set[int] = set()

    def count(self, num_stored: int) -> None:
        """Note that names were stored."""
        self._num_left -= num_stored
        if self._num_left <= 0:
            self.era += 1
            self._num_left = self._num_per_era

    def begin_round(self, is_full: bool) -> None:
        """Choose what to forget while everything is looked at once."""
        self.cutoff = 0
        if is_full:
            self._oldest = self.cutoff = min(max(self._oldest + 1, self.era - _KEPT_ERAS), self.era)

    def note_evicted(self, streams: npt.NDArray[np.uint16]) -> None:
        """Note whose names were forgotten."""
        if streams.size:
            self.num_evicted += streams.size
            self._evicted.update(np.unique(streams).tolist())

    def take_evicted(self) -> set[int]:
        """Return the streams that lost names since the last call."""
        evicted, self._evicted = self._evicted, set()
        return evicted
