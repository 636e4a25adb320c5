"""Addresses, rails, chains and messages of the rdma medium hold for any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.errors import RemoteProtocolError
from mooncake_store.transport.rdma import wire
from mooncake_store.transport.rdma.backend import Queue
from mooncake_store.transport.rdma.chains import (
    BOUNCED,
    CHAIN_READS_MAX,
    CHAINS_PER_QUEUE_MAX,
    Ledger,
    LocalRanges,
    divide,
)
from mooncake_store.transport.rdma.gids import Gid, choose_gids, common_prefix_bits, gid_text, offerable, parse_gid
from mooncake_store.transport.rdma.rails import Place, Rail, RailEnd, choose_rails, distance, pair_rails


def v4(text, index=1, kind="roce2"):
    return Gid(index, kind, bytes(10) + b"\xff\xff" + bytes(int(part) for part in text.split(".")))


LOCAL = Gid(0, "roce2", b"\xfe\x80" + bytes(13) + b"\x01")
GLOBAL6 = Gid(2, "roce2", b"\x20\x01" + bytes(13) + b"\x01")
INFINIBAND = Gid(0, "ib", b"\xfe\x80" + bytes(5) + b"\x07" + bytes(8))
OTHER_SUBNET = Gid(0, "ib", b"\xfe\x80" + bytes(5) + b"\x08" + bytes(8))


def anywhere(own, peer):
    return True


@pytest.mark.parametrize(("own", "peer", "expected"), [
    ((LOCAL, v4("10.0.0.1")), (LOCAL, v4("10.0.0.2")), (1, 1)),
    ((v4("10.0.0.1", 0, "roce1"), v4("10.0.0.1", 1)), (v4("10.0.0.2", 0, "roce1"), v4("10.0.0.2", 5)), (1, 5)),
    ((GLOBAL6, v4("10.0.0.1")), (GLOBAL6,), (2, 2)),
    ((v4("10.0.0.1", 1), v4("192.168.0.1", 3)), (v4("192.168.0.7", 9),), (3, 9)),
    ((LOCAL,), (LOCAL,), (0, 0)),
    ((LOCAL,), (v4("10.0.0.2"),), None),
    ((v4("10.0.0.1", 0, "roce1"),), (v4("10.0.0.2"),), None),
    ((INFINIBAND,), (v4("10.0.0.2"),), None),
    ((), (LOCAL,), None),
])
def test_the_best_common_address_is_chosen(own, peer, expected):
    pair = choose_gids(own, peer, anywhere)
    assert (pair and (pair.own.table_index, pair.peer.table_index)) == expected


def test_an_address_without_a_route_is_passed_over():
    own, peer = (v4("10.0.0.1"), GLOBAL6), (v4("172.16.0.1"), GLOBAL6)
    assert choose_gids(own, peer, lambda ours, theirs: ours == GLOBAL6).own == GLOBAL6
    assert choose_gids(own[:1], peer, lambda ours, theirs: False) is None


def test_one_infiniband_subnet_needs_no_global_header():
    assert not choose_gids((INFINIBAND,), (INFINIBAND,), anywhere).is_global
    assert choose_gids((INFINIBAND,), (OTHER_SUBNET,), anywhere).is_global


def test_an_index_that_the_user_insists_on_is_the_only_one_offered():
    table = (LOCAL, v4("10.0.0.1"), Gid(2, "roce2", bytes(16)))
    assert [gid.table_index for gid in offerable(table)] == [0, 1]
    assert [gid.table_index for gid in offerable(table, 1)] == [1]
    assert offerable(table, 7) == ()


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
def test_gids_come_back_and_prefixes_are_counted(one, other):
    assert parse_gid(gid_text(one)) == one
    bits = common_prefix_bits(one, other)
    text = [bin(int.from_bytes(raw, "big"))[2:].zfill(128) for raw in (one, other)]
    assert text[0][:bits] == text[1][:bits] and (bits == 128 or text[0][bits] != text[1][bits])


def rail(name, numa=-1, rate=100.0, pci="", gids=()):
    return Rail(name, 1, "ethernet", numa, pci, rate, 0, tuple(gids))


rails = st.lists(st.builds(rail, st.sampled_from("abcdefgh"), st.integers(-1, 2), st.sampled_from([0.0, 25.0, 200.0]),
                           st.sampled_from(["", "/pci0/a/b", "/pci0/a/c", "/pci1/a"])), max_size=8,
                 unique_by=lambda one: one.device)


places = st.builds(Place, st.integers(-1, 2), st.sampled_from(["", "/pci0/a/gpu", "/pci1/gpu"]))


@given(rails, places, st.integers(1, 4))
def test_the_rails_chosen_are_the_nearest_sorted_and_bounded(all_rails, near, most):
    chosen = choose_rails(all_rails, near, rails_max=most)
    assert len(chosen) <= most and bool(chosen) == bool(all_rails)
    assert [one.device for one in chosen] == sorted(one.device for one in chosen)
    nearest = min((distance(one, near) for one in all_rails), default=None)
    assert all(distance(one, near) == nearest for one in chosen)
    left_out = [one for one in all_rails if one not in chosen and distance(one, near) == nearest]
    fastest = max((one.rate_gbps for one in chosen), default=0)
    assert all(len(chosen) == most or one.rate_gbps < fastest / 2 for one in left_out)


def test_a_gpu_takes_the_device_behind_its_own_switch():
    switch = "/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
    near = rail("mlx5_1", 0, pci=f"{switch}/0000:02:00.0/nic")
    far = rail("mlx5_0", 0, pci="/sys/devices/pci0000:80/nic")
    gpu = Place(0, f"{switch}/0000:02:00.0/gpu")
    assert choose_rails([near, far], gpu) == [near]
    assert choose_rails([near, far], gpu, devices=("mlx5_0",)) == [far]


@given(st.integers(1, 4), st.integers(1, 4), st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_rails_are_paired_by_position_where_a_route_exists(num_own, num_peer, routes):
    own = [RailEnd("ethernet", (v4(f"10.0.{i}.1"),)) for i in range(num_own)]
    peer = [RailEnd("ethernet", (v4(f"10.0.{i}.2"),)) for i in range(num_peer)]
    pairs = pair_rails(own, peer, lambda ours, theirs: (ours.raw[14], theirs.raw[14]) in routes)
    assert len({pair.peer for pair in pairs}) == len(pairs)
    for j in range(num_peer):
        reachable = [i for i in range(num_own) if (i, j) in routes]
        got = [pair.own for pair in pairs if pair.peer == j]
        assert got == ([j] if j in reachable else reachable[:1])


def test_a_cable_of_another_kind_is_not_paired():
    assert pair_rails([RailEnd("infiniband", (INFINIBAND,))], [RailEnd("ethernet", (v4("10.0.0.2"),))], anywhere) == []


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), max_size=6),
       st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40)), min_size=1, max_size=20))
def test_a_target_is_found_only_where_all_of_it_is_registered(gaps, targets):
    ranges, at = [], 0
    for gap, size in gaps:
        ranges.append((at + gap, size))
        at += gap + size
    addresses, lengths = (np.array(column, np.uint64) for column in zip(*targets, strict=True))
    for (address, length), position in zip(targets, LocalRanges(ranges[::-1]).find(addresses, lengths), strict=True):
        holding = [i for i, (start, size) in enumerate(ranges[::-1]) if start <= address and
                   address + length <= start + size]
        assert position == (holding[0] if holding else BOUNCED)


@st.composite
def plans(draw):
    count = draw(st.integers(1, 700))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    lengths = rng.integers(1, draw(st.sampled_from([100, 1 << 20])), count).astype(np.uint64)
    positions = rng.integers(-1, draw(st.integers(0, 3)), count).astype(np.int64)
    return divide(lengths, positions, num_queues=draw(st.integers(1, 6)), bounced_max_bytes=1 << 20), lengths, positions


@given(plans(), st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_piece_is_read_once_within_the_bounds_and_failures_name_what_is_done(plan, num_queues, num_slots, rng):
    chains, lengths, positions = plan
    assert sorted(np.concatenate([chain.pieces for chain in chains]).tolist()) == list(range(len(lengths)))
    for chain in chains:
        assert len(chain.pieces) <= CHAIN_READS_MAX and chain.num_bytes == int(lengths[chain.pieces].sum())
        assert (positions[chain.pieces] == chain.range_position).all()
        assert chain.range_position != BOUNCED or chain.num_bytes < 2 << 20
    first = rng.randrange(1 << 40)
    ledger = Ledger(chains, num_queues=num_queues, num_slots=num_slots, first_number=first)
    queues = [[] for _ in range(num_queues)]
    num_done = {}
    while not ledger.is_finished:
        start = ledger.start_next()
        if start is not None:
            queues[start.queue].append(start)
            slots = [item.slot for queue in queues for item in queue if item.slot >= 0]
            assert len(set(slots)) == len(slots) and max(map(len, queues)) <= CHAINS_PER_QUEUE_MAX
            if rng.random() < 0.6:
                continue
        busy = [queue for queue in queues if queue]
        assert busy, "nothing is under way, and nothing starts"
        item = rng.choice(busy).pop(0)
        size = len(item.chain.pieces)
        failed = rng.randrange(size) if rng.random() < 0.3 else size
        ends = [ledger.settle(item.first_wr_id + place, is_ok=False) for place in range(failed, size)]
        if failed == size:
            ends = [ledger.settle(item.first_wr_id + size - 1, is_ok=True)]
        assert ends[-1].chain is item.chain and ends[-1].num_done == failed and ends[-1].slot == item.slot
        assert not any(ends[:-1])
        assert not ledger.is_active(item.first_wr_id) and item.first_wr_id >= first * CHAIN_READS_MAX
        num_done[id(item.chain)] = failed
    assert len(num_done) == len(chains) and ledger.num_active == 0


def test_a_short_batch_reaches_every_queue():
    lengths = np.full(1024, 4096, np.uint64)
    chains = divide(lengths, np.zeros(1024, np.int64), num_queues=4, bounced_max_bytes=1)
    ledger = Ledger(chains, num_queues=4, num_slots=0)
    assert sorted(ledger.start_next().queue for _ in range(4)) == [0, 1, 2, 3]


OPEN = wire.Open(7, (wire.ReaderRail("ethernet", 0, 5, 16, wire.pack_gids((v4("10.0.0.1"), LOCAL)),
                                     wire.pack_queues((Queue(17, 5), Queue(18, 6)))),))
OPENED = wire.Opened(1 << 33, (wire.OwnerRail(0, 1, bytes(16), 0, True, 5, 16, 1 << 40, 77,
                                              wire.pack_queues((Queue(3, 4),))),))


def unpack(data):
    length = wire.unpack_header(data[:wire.HEADER.size])
    assert len(data) == wire.HEADER.size + length
    return wire.unpack_body(data[wire.HEADER.size:])


@pytest.mark.parametrize("message", [OPEN, OPENED, wire.Refused(True, "gone")])
def test_messages_come_back(message):
    assert unpack(wire.pack(message)) == message


def test_what_a_table_says_comes_back():
    assert OPEN.rails[0].end().gids == (v4("10.0.0.1"), LOCAL)
    assert wire.unpack_gids(wire.pack_gids((INFINIBAND,)), "infiniband") == (INFINIBAND,)
    assert wire.unpack_queues(OPEN.rails[0].queues) == (Queue(17, 5), Queue(18, 6))


@given(st.binary(max_size=200) | st.builds(
    lambda at, value: bytes(byte if i != at else value for i, byte in enumerate(wire.pack(OPENED)[wire.HEADER.size:])),
    st.integers(0, 60), st.integers(0, 255)))
@settings(max_examples=300, deadline=None)
def test_any_body_is_decoded_or_refused_with_a_reason(body):
    try:
        message = wire.unpack_body(body)
    except RemoteProtocolError as error:
        assert error.message
    else:
        assert isinstance(message, wire.Message)


@given(st.binary(min_size=12, max_size=12) | st.builds(
    lambda version, length: wire.HEADER.pack(wire.MAGIC, version, 0, length), st.integers(0, 3),
    st.integers(0, 2**32 - 1)))
def test_any_header_is_bounded_or_refused_with_a_reason(header):
    try:
        length = wire.unpack_header(header)
    except RemoteProtocolError as error:
        assert error.message
    else:
        assert 0 < length <= wire.BODY_MAX_BYTES


def test_an_answer_that_names_a_rail_twice_is_refused():
    twice = wire.Opened(1, OPENED.rails * 2)
    with pytest.raises(RemoteProtocolError, match="twice"):
        unpack(wire.pack(twice))
