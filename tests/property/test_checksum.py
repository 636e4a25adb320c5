"""The checksum: one value however the bytes are cut and wherever they lie; every kind of damage changes it."""

import hashlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.testing.transport import pattern
from mooncake_store.transport.checksum import KIND, STRETCH_WORDS, checksum_of, checksum_of_bytes, is_comparable

SIZE = 3 << 20
PAGE = 4096
DATA = pattern(SIZE, 7)
SIZES = [1, 7, 8, 1024, 4096, 100_001, 262_144, 1 << 20, 2_500_000]


def of(data: np.ndarray) -> int:
    return checksum_of(np.array([[data.ctypes.data, len(data)]], np.uint64))


def reference(data: bytes) -> int:
    """The definition, written as slowly as it reads."""
    words = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
    digest = hashlib.sha256(len(data).to_bytes(8, "little"))
    for start in range(0, len(words), STRETCH_WORDS):
        digest.update(sum(words[start:start + STRETCH_WORDS].tolist()).to_bytes(16, "little")[:8])
    return KIND << 56 | int.from_bytes(digest.digest()[:7], "little")


# These values never change: a new definition is a new kind.
@pytest.mark.parametrize(("size", "value"), [
    (1, 0x2b81552cad8bb4c), (100_001, 0x212a2f8e3c30336), (2_500_000, 0x2d21476b0aef12b)])
def test_known_values(size, value):
    data = (np.arange(size, dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(13)).astype(np.uint8)
    assert of(data) == value


@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_the_definition_says(size):
    data = DATA[:size].copy()
    assert of(data) == reference(data.tobytes()) == checksum_of_bytes(data.tobytes())
    assert is_comparable(of(data)) and 0 <= of(data) < 1 << 63
    assert not is_comparable(of(data) ^ 1 << 56)


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from(SIZES), start=st.integers(0, 9), cuts=st.lists(st.integers(1, SIZE), max_size=12),
       is_aligned=st.booleans())
def test_how_the_bytes_are_cut_does_not_matter(size, start, cuts, is_aligned):
    data = DATA[start:start + size].copy()
    unit = 8 if is_aligned else 1
    ends = sorted({cut // unit * unit for cut in cuts if 0 < cut // unit * unit < size})
    keep, ranges = [], []
    for number, (begin, end) in enumerate(zip([0, *ends], [*ends, size], strict=True)):
        room = np.empty(end - begin + 16, np.uint8)  # elsewhere in memory, at any alignment
        skip = 0 if is_aligned else (start + number) % 8
        room[skip:skip + end - begin] = data[begin:end]
        keep.append(room)
        ranges.append((room.ctypes.data + skip, end - begin))
    assert checksum_of(np.array(ranges, np.uint64)) == of(data)


@pytest.mark.parametrize("longest", [1, 3000, 300_000])
def test_many_small_ranges(longest):
    rng = np.random.default_rng(longest)
    lengths = rng.integers(1, longest + 1, 1500 if longest < 5000 else 12)
    starts = rng.integers(0, SIZE - longest, len(lengths))
    ranges = np.column_stack((starts + DATA.ctypes.data, lengths)).astype(np.uint64)
    whole = np.concatenate([DATA[start:start + length] for start, length in zip(starts, lengths, strict=True)])
    assert checksum_of(ranges) == of(whole)


@settings(max_examples=150, deadline=None)
@given(size=st.sampled_from(SIZES), bit=st.integers(0, 8 * SIZE))
def test_every_flipped_bit_is_noticed(size, bit):
    data = DATA[:size].copy()
    before = of(data)
    data[bit // 8 % size] ^= 1 << bit % 8
    assert of(data) != before


@settings(max_examples=80, deadline=None)
@given(size=st.sampled_from(SIZES), cut=st.integers(1, SIZE), zeros=st.booleans())
def test_bytes_cut_off_or_added_are_noticed(size, cut, zeros):
    data = DATA[:size].copy()
    if zeros:
        data[:] = 0  # nothing but the length tells
    before = of(data)
    assert of(np.concatenate((data, np.zeros(cut % 64 + 1, np.uint8)))) != before
    if size > 1:
        assert of(data[:1 + cut % (size - 1)].copy()) != before or cut % (size - 1) == size - 2


@settings(max_examples=120, deadline=None)
@given(unit=st.sampled_from([8, 64, 512, PAGE, 16384]), length=st.integers(1, 8), places=st.tuples(
    st.integers(0, 1 << 20), st.integers(0, 1 << 20)))
def test_ranges_that_changed_places_are_noticed(unit, length, places):
    size, num_bytes = SIZE, unit * length
    first, second = sorted(place * unit % (size - num_bytes) // unit * unit for place in places)
    if second < first + num_bytes:
        return
    stretch = 8 * STRETCH_WORDS
    is_blind = first // stretch == (second + num_bytes - 1) // stretch  # places within one are not told apart
    data = DATA.copy()
    before = of(data)
    moved = data[first:first + num_bytes].copy()
    data[first:first + num_bytes] = data[second:second + num_bytes]
    data[second:second + num_bytes] = moved
    assert is_blind or of(data) != before


@pytest.mark.parametrize("page", range(0, SIZE // PAGE, 61))
def test_zeroed_stale_and_misplaced_pages_are_noticed(page):
    before = of(DATA)
    start = page * PAGE
    for content in (np.zeros(PAGE, np.uint8), pattern(PAGE, 8), np.roll(DATA[start:start + PAGE], 64)):
        data = DATA.copy()
        data[start:start + PAGE] = content
        assert of(data) != before
    for other in range(0, SIZE // PAGE, 17):  # another page's bytes, and the two exchanged
        if other == page:
            continue
        data = DATA.copy()
        data[start:start + PAGE] = DATA[other * PAGE:other * PAGE + PAGE]
        assert of(data) != before
        data[other * PAGE:other * PAGE + PAGE] = DATA[start:start + PAGE]
        assert of(data) != before


def test_threads_do_not_share_scratch():
    ranges = np.column_stack((np.arange(0, SIZE, 1000, dtype=np.uint64) + np.uint64(DATA.ctypes.data),
                              np.full(-(-SIZE // 1000), 576, np.uint64)))
    expected, wrong = checksum_of(ranges), []

    def work():
        wrong.extend(value for value in (checksum_of(ranges) for _ in range(20)) if value != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
