"""Which block leaves first."""

from __future__ import annotations

from mooncake_store.pool.eviction import EvictionOrder
from mooncake_store.pool.index import BlockIndex


def leaving(order):
    result = []
    while (key := order.next_victim()) is not None:
        result.append(key)
        order.hold(key)
    return result


def test_the_least_recently_used_chain_leaves_first_and_tail_first():
    order = EvictionOrder()
    order.offer([b"a1", b"a2", b"a3"])
    order.offer([b"b1", b"b2"])
    order.offer([b"a1", b"a2", b"a3"])  # used again
    assert leaving(order) == [b"b2", b"b1", b"a3", b"a2", b"a1"]


def test_held_blocks_are_never_looked_at():
    order = EvictionOrder()
    order.offer([b"x", b"y"])
    order.hold(b"y")
    order.hold(b"unknown")
    assert b"y" not in order and leaving(order) == [b"x"]


def test_a_put_makes_room_by_itself_and_keeps_the_head_of_a_chain():
    index = BlockIndex(4 * 4096)
    blocks = []
    for key in (b"1", b"2", b"3", b"4"):
        block = index.reserve(key, 4096).block
        index.commit(block, 0)
        blocks.append(block)
    assert index.reserve(b"5", 4096).result == "full", "everything is pinned by its writer"
    index.unpin(blocks)
    answer = index.reserve(b"5", 2 * 4096)
    assert answer.result == "reserved" and answer.evicted == (b"4", b"3")


def test_a_dropped_block_keeps_its_bytes_until_the_last_reader_is_done():
    index = BlockIndex(4096)
    block = index.reserve(b"a", 4096).block
    index.commit(block, 7)
    assert index.drop(b"a") and b"a" not in index and index.used_bytes == 4096
    assert index.reserve(b"b", 4096).result == "full"
    index.unpin([block])
    assert index.used_bytes == 0 and index.reserve(b"b", 4096).result == "reserved"
