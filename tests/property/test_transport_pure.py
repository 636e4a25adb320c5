"""Coalescing, cursors, frames and selection hold for any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.errors import RemoteProtocolError
from mooncake_store.transport import tcp_wire
from mooncake_store.transport.base import CmaOffer, ReadBatch, RegionDescriptor, ShmOffer, TcpOffer
from mooncake_store.transport.coalesce import coalesce, groups
from mooncake_store.transport.cursor import WINDOW_RANGES, RangeCursor
from mooncake_store.transport.select import Choice, NoMedium, choose
from mooncake_store.types import HostIdentity

REGION = 400


@st.composite
def batches(draw):
    """Reads with disjoint targets, many of them neighbours at one end or at both."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=25))
    offset, target = draw(st.integers(0, 20)), 0
    offsets, targets = [], []
    for length in lengths:
        if draw(st.booleans()):
            offset = draw(st.integers(0, REGION - 12))
        if draw(st.booleans()):
            target += draw(st.integers(1, 5))
        offset = min(offset, REGION - length)
        offsets.append(offset)
        targets.append(target)
        offset, target = offset + length, target + length
    order = draw(st.permutations(range(len(lengths))))
    return ReadBatch(*(np.array([column[i] for i in order], np.uint64) for column in (offsets, targets, lengths)))


def carry_out(offsets, targets, lengths, source, size):
    out = np.full(size, -1)
    for offset, target, length in zip(offsets.tolist(), targets.tolist(), lengths.tolist(), strict=True):
        assert (out[target:target + length] == -1).all(), "a byte is copied twice"
        out[target:target + length] = source[offset:offset + length]
    return out


@given(batches(), st.integers(1, 40))
@settings(deadline=None)
def test_pieces_copy_the_same_bytes_as_the_batch(batch, piece_max_bytes):
    source = np.arange(REGION)
    size = int((batch.local_addresses + batch.lengths).max())
    pieces = coalesce(batch, piece_max_bytes=piece_max_bytes)
    assert np.array_equal(carry_out(*pieces[:3], source, size),
                          carry_out(batch.remote_offsets, batch.local_addresses, batch.lengths, source, size))
    assert int(pieces.lengths.max()) <= piece_max_bytes and int(pieces.lengths.min()) > 0
    ends = {(int(r + n), int(a + n)) for r, a, n in zip(*pieces[:3], strict=True)}
    starts = [(int(r), int(a)) for r, a, n in zip(*pieces[:3], strict=True)]
    if int(batch.lengths.sum()) <= piece_max_bytes:
        assert not any(start in ends for start in starts), "neighbours at both ends were left apart"


@given(batches(), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_a_request_is_complete_when_every_byte_of_it_is(batch, piece_max_bytes, data):
    pieces = coalesce(batch, piece_max_bytes=piece_max_bytes)
    done = np.array(data.draw(st.lists(st.booleans(), min_size=len(pieces.lengths), max_size=len(pieces.lengths))))
    arrived = set()
    for target, length, is_done in zip(pieces.local_addresses.tolist(), pieces.lengths.tolist(), done, strict=True):
        if is_done:
            arrived.update(range(target, target + length))
    expected = [set(range(target, target + length)) <= arrived
                for target, length in zip(batch.local_addresses.tolist(), batch.lengths.tolist(), strict=True)]
    assert pieces.outcome(done).tolist() == expected


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 120))
@settings(deadline=None)
def test_groups_cover_everything_once_within_their_limits(lengths, count_max, bytes_max):
    found = list(groups(np.array(lengths, np.uint64), count_max=count_max, bytes_max=bytes_max))
    assert [i for group in found for i in range(group.start, group.stop)] == list(range(len(lengths)))
    for group in found:
        assert group.num_bytes == sum(lengths[group.start:group.stop])
        assert 1 <= group.stop - group.start <= count_max
        assert group.num_bytes - lengths[group.stop - 1] < bytes_max


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 60)), min_size=1, max_size=20), st.data())
@settings(deadline=None)
def test_a_cursor_passes_every_byte_in_order(ranges, data):
    cursor = RangeCursor(np.array(ranges, np.uint64))
    seen = []
    while not cursor.is_done():
        window = [(int(start), int(length)) for start, length in cursor.window()]
        assert 1 <= len(window) <= WINDOW_RANGES
        bytes_offered = sum(length for _, length in window)
        taken = data.draw(st.integers(1, bytes_offered))
        cursor.advance(taken)
        for start, length in window:
            seen.append((start, min(length, taken)))
            taken -= min(length, taken)
    flat = [start + i for start, length in seen for i in range(length)]
    assert flat == [start + i for start, length in ranges for i in range(length)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=700), st.data())
@settings(deadline=None)
def test_a_cursor_stops_where_it_must_and_goes_on_later(lengths, data):
    starts = 1000 * np.arange(len(lengths))
    cursor = RangeCursor(np.column_stack((starts, lengths)).astype(np.uint64))
    for stop in [*sorted(data.draw(st.sets(st.integers(1, len(lengths)), max_size=4))), len(lengths)]:
        cursor.stop = stop
        while not cursor.is_done():
            offered = int(cursor.window()[:, 1].sum())
            taken = data.draw(st.integers(1, offered))
            assert cursor.advance(taken) == (taken == offered)
        assert cursor.position == sum(lengths[:stop])
    assert cursor.position == cursor.total


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=40))
def test_checksums_travel_behind_their_chunks(lengths):
    reads = np.column_stack((1 << 30 | np.arange(len(lengths)) << 20, lengths)).astype(np.uint64)
    header = np.array([[7, tcp_wire.HEADER_BYTES]], np.uint64)
    chunks = list(tcp_wire.chunks(reads[:, 1]))
    rows = tcp_wire.lay_out(header, reads, [chunk.stop for chunk in chunks], 64).tolist()
    assert rows.pop(0) == [7, tcp_wire.HEADER_BYTES]
    for number, chunk in enumerate(chunks):
        count = chunk.stop - chunk.start
        assert rows[:count] == reads[chunk.start:chunk.stop].tolist()
        assert rows[count] == [64 + 8 * number, 8]
        del rows[:count + 1]
        assert chunk.num_bytes < tcp_wire.CHUNK_BYTES + 300_000
    assert rows == []
    assert tcp_wire.lay_out(header, reads, (), 64).tolist() == [[7, tcp_wire.HEADER_BYTES], *reads.tolist()]


@given(st.binary(min_size=tcp_wire.HEADER_BYTES, max_size=tcp_wire.HEADER_BYTES))
@settings(max_examples=300, deadline=None)
def test_any_header_is_a_bounded_request_or_refused(data):
    for prefix in (b"", tcp_wire.MAGIC, tcp_wire.MAGIC + b"\1\0", tcp_wire.MAGIC + b"\1\0\1\0"):
        try:
            request = tcp_wire.unpack_request(prefix + data[len(prefix):])
        except RemoteProtocolError as error:
            assert error.message
        else:
            assert request.num_reads <= tcp_wire.FRAME_READS_MAX


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)) | st.tuples(
    st.integers(0, 5000), st.integers(0, 5000)), min_size=1, max_size=8), st.integers(1, 6000))
@settings(max_examples=60, deadline=None)
def test_the_owner_serves_only_reads_inside_the_region(reads, size):
    status = tcp_wire.check_reads(np.array(reads, np.uint64), size)
    if status == tcp_wire.OK:
        assert all(length > 0 and offset + length <= size for offset, length in reads)
    else:
        assert any(length == 0 or length > tcp_wire.FRAME_MAX_BYTES or offset + length > size
                   for offset, length in reads)


def test_wire_bytes_do_not_change():
    request = tcp_wire.pack_request(tcp_wire.Request(tcp_wire.WANT_CHECKSUM, 7, 1, 0x0102030405060708),
                                    np.array([[16, 32]], np.uint64))
    assert request.hex() == ("4d5443500300010007000000010000000807060504030201" "1000000000000000" "2000000000000000")
    response = tcp_wire.pack_response(tcp_wire.Response(tcp_wire.UNKNOWN_REGION, 7, 1, 0))
    assert response.hex() == "4d54435003000100070000000100000000" + "00" * 7
    with pytest.raises(RemoteProtocolError, match="version 1"):
        tcp_wire.unpack_request(request[:4] + b"\1\0" + request[6:tcp_wire.HEADER_BYTES])


HERE, OTHER_PIDS, ELSEWHERE = HostIdentity("a", 1), HostIdentity("a", 2), HostIdentity("b", 1)
OFFERS = {"shm": ShmOffer("s"), "cma": CmaOffer(1, 2, 3, 4), "tcp": TcpOffer("h", 5)}


@pytest.mark.parametrize(("host", "offered", "allowed", "cooling", "expected"), [
    (HERE, "shm cma tcp", "shm cma tcp", "", "shm"),
    (HERE, "cma tcp", "shm cma tcp", "", "cma"),
    (HERE, "shm cma tcp", "tcp shm", "", "tcp"),
    (HERE, "shm cma tcp", "shm cma tcp", "shm", "cma"),
    (OTHER_PIDS, "shm cma tcp", "shm cma tcp", "", "shm"),
    (OTHER_PIDS, "cma tcp", "shm cma tcp", "", "tcp"),
    (ELSEWHERE, "shm cma tcp", "shm cma tcp", "", "tcp"),
    (ELSEWHERE, "shm cma tcp", "shm cma", "", None),
    (HERE, "shm", "shm", "shm", None),
    (HERE, "tcp", "warp", "", None),
])
def test_the_first_medium_that_reaches_is_chosen(host, offered, allowed, cooling, expected):
    region = RegionDescriptor(1, 10, host, tuple(OFFERS[name] for name in offered.split()))
    choice = choose(HERE, region, allowed.split(), frozenset(cooling.split()))
    if expected is None:
        assert isinstance(choice, NoMedium) and len(choice.reasons) == len(allowed.split())
    else:
        assert isinstance(choice, Choice)
        assert (choice.medium, choice.offer) == (expected, OFFERS[expected])
        for passed in allowed.split()[:allowed.split().index(expected)]:
            assert f"{passed}: " in choice.reason
