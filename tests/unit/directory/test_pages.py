"""Where our entries go, and how many writes that costs."""

import pytest

from mooncake_store.directory.pages import PageTable
from mooncake_store.testing.directory import make_keys

KEYS = make_keys(2_000)


@pytest.fixture
def table():
    return PageTable(page_entries=256, unwritten_max=10_000)


def write_all(table):
    writes = table.take_dirty(10_000)
    table.written(writes)
    return {write.page: write.keys for write in writes}


def test_bulk_fills_whole_pages(table):
    table.add(KEYS[:1_000])
    assert [len(keys) for keys in write_all(table).values()] == [256, 256, 256, 232]
    assert table.num_dirty == table.num_unwritten == 0
    table.add(KEYS[:1_000])
    assert table.num_dirty == 0


def test_a_trickle_rewrites_one_page(table):
    for index in range(0, 100, 10):
        table.add(KEYS[index : index + 10])
        assert list(write_all(table)) == [0]


def test_withdrawals_touch_only_their_pages(table):
    table.add(KEYS[:1_024])
    write_all(table)
    assert table.remove([KEYS[0], KEYS[600], KEYS[1_999]]) == 2
    assert {page: len(keys) for page, keys in write_all(table).items()} == {0: 255, 2: 255}


def test_an_emptied_page_is_deleted(table):
    table.add(KEYS[:300])
    write_all(table)
    table.remove(KEYS[:256])
    assert write_all(table) == {0: ()}
    assert table.pages() == [1]
    assert not table.has_page(0)


def test_sparse_pages_are_filled_before_new_ones(table):
    table.add(KEYS[:1_024])
    table.remove(KEYS[:200])  # page 0 keeps 56
    table.remove(KEYS[256:406])  # page 1 keeps 106
    table.remove(KEYS[512:522])  # page 2 keeps 246: not worth a rewrite
    write_all(table)
    table.add(KEYS[1_024:1_374])  # 200 + 150 free slots
    assert {page: len(keys) for page, keys in write_all(table).items()} == {0: 256, 1: 256}
    table.add(KEYS[1_374:1_375])
    assert list(write_all(table)) == [4]


def test_churn_keeps_pages_half_full(table):
    for step in range(200):
        table.add(KEYS[(step * 10) % 2_000 : (step * 10) % 2_000 + 10])
        if step >= 50:
            old = ((step - 50) * 10) % 2_000
            table.remove(KEYS[old : old + 10 : 1 + step % 3])
        write_all(table)
    assert table.num_pages <= 2 * len(table) / 256 + 2


def test_the_oldest_unwritten_are_dropped():
    table = PageTable(unwritten_max=100)
    assert table.add(KEYS[:130]) == 30
    assert [table.page_of(key) is not None for key in KEYS[:131]] == [False] * 30 + [True] * 100 + [False]
    assert table.num_unwritten == 100
    write_all(table)
    assert table.add(KEYS[130:230]) == 0
    assert len(table) == 200


def test_a_failed_write_still_counts_as_unwritten():
    table = PageTable(unwritten_max=100)
    table.add(KEYS[:80])
    writes = table.take_dirty(10)
    table.mark_dirty(write.page for write in writes)
    assert table.num_unwritten == 80
    assert table.add(KEYS[80:120]) == 20


def test_writes_are_taken_oldest_first(table):
    table.add(KEYS[:1_024])
    assert [write.page for write in table.take_dirty(3)] == [0, 1, 2]
    table.remove([KEYS[0]])
    assert [write.page for write in table.take_dirty(3)] == [3, 0]


def test_mark_all_dirty_asks_for_every_page(table):
    table.add(KEYS[:600])
    table.remove(KEYS[:256])
    write_all(table)
    table.mark_all_dirty()
    assert set(write_all(table)) == {1, 2}
    table.mark_dirty([0])
    assert write_all(table) == {0: ()}
