"""The segment: two-phase writes, pins, verification, closing."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from mooncake_store.image import merge_adjacent
from mooncake_store.metrics import Metrics
from mooncake_store.pool import segment as segment_module
from mooncake_store.pool.segment import Segment
from mooncake_store.transport.checksum import checksum_of
from mooncake_store.transport.memory import map_memfd

PAGE = 4096


@pytest.fixture
def segment():
    made = Segment(map_memfd(8 * PAGE, "test-segment"), metrics=Metrics())
    yield made
    made.close(timeout_s=0)


def pieces(data: bytes, cuts: list[int]):
    """Keep copies of ``data`` cut at ``cuts`` and return (arrays, runs)."""
    arrays = [np.frombuffer(part, dtype=np.uint8).copy() for part in
              (data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))]
    return arrays, [(array.ctypes.data, array.nbytes) for array in arrays]


def test_a_block_is_stored_as_its_pieces_in_order_with_their_checksum(segment):
    data = bytes(range(256)) * 20
    keep, runs = pieces(data, [1, 100, 4000])
    stored = segment.store(b"key", runs)
    assert stored.result == "stored" and ctypes.string_at(segment.address_of(stored.block), len(data)) == data
    assert stored.block.checksum == checksum_of(np.array(runs, np.uint64))
    segment.unpin([stored.block])
    assert segment.verify(b"key") is True and segment.num_in_use() == (0, 0)


def test_an_exception_while_copying_revokes(segment, monkeypatch):
    def fail(runs, target):
        raise MemoryError("copy failed")

    monkeypatch.setattr(segment_module, "gather", fail)
    keep, runs = pieces(b"x" * PAGE, [])
    with pytest.raises(MemoryError):
        segment.store(b"key", runs)
    assert b"key" not in segment and segment.num_in_use() == (0, 0)
    segment.check()
    segment.report()
    assert segment._metrics.snapshot()["mooncake_segment_used_bytes"] == 0


def test_a_changed_byte_is_found_and_the_block_dropped(segment):
    keep, runs = pieces(b"q" * 5000, [])
    block = segment.store(b"key", runs).block
    segment.unpin([block])
    ctypes.memset(segment.address_of(block) + 4999, 0, 1)
    assert segment.verify(b"key") is False
    assert b"key" not in segment and segment.verify(b"key") is None
    assert segment._metrics.snapshot()["mooncake_segment_dropped_total"] == 1
    segment.check()


def test_outcomes_that_store_nothing(segment):
    keep, runs = pieces(b"d" * 9 * PAGE, [])
    assert segment.store(b"big", runs).result == "too_large"
    keep2, small = pieces(b"s", [])
    segment.unpin([segment.store(b"s", small).block])
    assert segment.store(b"s", small).result == "duplicate"
    segment.reserve(b"r", 1)
    assert segment.store(b"r", small).result == "busy"
    assert Segment(None, metrics=Metrics()).store(b"s", small).result == "too_large"


def test_close_waits_for_readers_and_never_unmaps_under_them(segment):
    keep, runs = pieces(b"abc", [])
    block = segment.store(b"key", runs).block
    assert segment.close(timeout_s=0.05) is False
    assert ctypes.string_at(segment.address_of(block), 3) == b"abc", "still mapped for the reader"
    assert segment.store(b"new", runs).result == "closed" and segment.pin([b"key"]) == [None]
    segment.unpin([block])


def test_pieces_that_are_neighbours_are_copied_as_one():
    assert merge_adjacent([100, 110, 130, 0], [10, 20, 5, 0]) == [(100, 35)]
    assert merge_adjacent([100, 90], [10, 10]) == [(100, 10), (90, 10)]
