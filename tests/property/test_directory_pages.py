"""Whatever is added, removed, written and lost: in the end the pages in etcd hold exactly our keys."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.directory.pages import PageTable
from mooncake_store.testing.directory import make_keys

KEYS = make_keys(40)
some_keys = st.lists(st.sampled_from(KEYS), max_size=15)
steps = st.one_of(
    st.tuples(st.just("add"), some_keys),
    st.tuples(st.just("remove"), some_keys),
    st.tuples(st.just("write"), st.integers(1, 4)),
    st.tuples(st.just("fail"), st.integers(1, 4)),
    st.tuples(st.just("unknown"), st.integers(1, 4)),
    st.tuples(st.just("lose"), st.none()),
)


def run(table, sequence):
    """Return (what we hold, what etcd holds) after the steps and a final drain."""
    held, stored = {}, {}

    def write(pages_max):
        writes = table.take_dirty(pages_max)
        for page, keys in writes:
            if keys:
                stored[page] = keys
            else:
                stored.pop(page, None)
        return writes

    for step, argument in sequence:
        if step == "add":
            table.add(argument)
            held.update(dict.fromkeys(argument))
        elif step == "remove":
            table.remove(argument)
            for key in argument:
                held.pop(key, None)
        elif step == "write":
            table.written(write(argument))
        elif step == "fail":
            table.mark_dirty(page for page, _ in table.take_dirty(argument))
        elif step == "unknown":
            table.mark_dirty(page for page, _ in write(argument))
        else:
            stored.clear()
            table.mark_all_dirty()
    while table.num_dirty:
        table.written(write(3))
    return set(held), stored


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=40), st.integers(1, 8))
def test_pages_hold_exactly_our_keys(sequence, page_entries):
    table = PageTable(page_entries=page_entries, unwritten_max=1_000)
    held, stored = run(table, sequence)
    entries = [key for keys in stored.values() for key in keys]
    assert set(entries) == held
    assert len(entries) == len(held), "a key is on two pages"
    assert all(0 < len(keys) <= page_entries for keys in stored.values())
    assert len(table) == len(held)
    assert table.num_unwritten == 0
    assert set(table.pages()) == set(stored)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=40), st.integers(1, 10))
def test_the_bound_holds(sequence, unwritten_max):
    table = PageTable(page_entries=4, unwritten_max=unwritten_max)
    for end in range(len(sequence)):
        step, argument = sequence[end]
        if step == "add":
            before = table.num_unwritten
            known = {key for key in argument if table.page_of(key) is not None}
            num_dropped = table.add(argument)
            assert num_dropped >= before + len(set(argument) - known) - unwritten_max
        elif step == "remove":
            table.remove(argument)
        elif step in ("fail", "unknown"):
            table.mark_dirty(page for page, _ in table.take_dirty(argument))
        elif step == "write":
            table.written(table.take_dirty(argument))
        assert table.num_unwritten <= unwritten_max
