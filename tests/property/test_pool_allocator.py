"""The extent allocator never overlaps, never leaks, and joins what is freed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.errors import LocalProtocolError
from mooncake_store.pool.allocator import ExtentAllocator
from mooncake_store.types import Extent

UNIT = 4096


@settings(max_examples=150, deadline=None)
@given(size=st.integers(0, 64 * UNIT), steps=st.lists(st.tuples(st.booleans(), st.integers(1, 12 * UNIT)), max_size=80),
       seed=st.integers(0, 2**32))
def test_extents_are_disjoint_aligned_and_everything_comes_back(size, steps, seed):
    rng = random.Random(seed)
    allocator = ExtentAllocator(size)
    taken: list[Extent] = []
    for is_allocation, length in steps:
        if is_allocation or not taken:
            largest = allocator.largest_free_bytes
            extent = allocator.allocate(length)
            needed = -(-length // UNIT) * UNIT
            assert (extent is None) == (needed > largest), "refused although a run was long enough, or the reverse"
            if extent is not None:
                taken.append(extent)
        else:
            allocator.free(taken.pop(rng.randrange(len(taken))))
        occupied = sorted((e.offset, -(-e.length // UNIT) * UNIT) for e in taken)
        free = [(e.offset, e.length) for e in allocator.free_extents()]
        runs = sorted(occupied + free)
        position = 0
        for offset, run_length in runs:
            assert offset == position and offset % UNIT == 0
            position = offset + run_length
        assert position == allocator.size_bytes == size - size % UNIT
        assert all(a[0] + a[1] != b[0] for a, b in zip(free, free[1:], strict=False)), "free neighbours not joined"
        assert allocator.used_bytes == sum(run_length for _, run_length in occupied)
    for extent in taken:
        allocator.free(extent)
    whole = [Extent(0, allocator.size_bytes)] if allocator.size_bytes else []
    assert allocator.free_extents() == whole and allocator.num_extents == 0


def test_best_fit_leaves_the_long_run_whole():
    allocator = ExtentAllocator(10 * UNIT)
    first, _, _ = (allocator.allocate(length) for length in (2 * UNIT, UNIT, UNIT))
    allocator.free(first)
    assert allocator.allocate(2 * UNIT).offset == 0, "the freed run fits exactly"
    assert allocator.largest_free_bytes == 6 * UNIT


@pytest.mark.parametrize("bad", [Extent(0, UNIT), Extent(UNIT, UNIT), Extent(0, 3 * UNIT)])
def test_a_wrong_free_is_refused_and_changes_nothing(bad):
    allocator = ExtentAllocator(8 * UNIT)
    allocator.allocate(2 * UNIT)
    with pytest.raises(LocalProtocolError, match="not handed out"):
        allocator.free(bad)
    assert allocator.used_bytes == 2 * UNIT


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(LocalProtocolError):
        ExtentAllocator(UNIT).allocate(length)
