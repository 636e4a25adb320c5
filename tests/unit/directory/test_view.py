"""The mirror's data structure, case by case; random sequences are in tests/property."""

from mooncake_store.directory.schema import MemberGone, MemberPut, PageGone, PagePut
from mooncake_store.directory.view import DirectoryView
from mooncake_store.testing.directory import make_keys, make_member

KEYS = make_keys(10)


def joined(*node_ids):
    view = DirectoryView()
    view.apply([MemberPut(node_id, make_member(node_id)) for node_id in node_ids], 1)
    return view


def page(node_id, number, *indices):
    return PagePut(node_id, number, tuple(KEYS[index] for index in indices))


def test_a_page_update_changes_exactly_the_difference():
    view = joined("a", "b")
    view.apply([page("a", 0, 0, 1, 2), page("b", 0, 1), page("a", 0, 1, 3)], 2)
    assert view.locate(KEYS[:4]) == [(), ("a", "b"), (), ("a",)]
    assert view.num_blocks == 2
    assert view.revision == 2


def test_pages_without_their_member_are_hidden_until_it_appears():
    view = DirectoryView()
    view.apply([page("a", 0, 0, 1)], 1)
    assert view.match(KEYS) == 0
    view.apply([MemberPut("a", make_member("a"))], 2)
    assert view.match(KEYS) == 2
    view.apply([MemberGone("a")], 3)
    assert view.match(KEYS) == 0 and view.num_blocks == 0 and view.members() == {}
    view.apply([MemberPut("a", make_member("a"))], 4)
    assert view.match(KEYS) == 2


def test_a_key_on_two_pages_of_a_node_goes_with_the_last():
    view = joined("a")
    view.apply([page("a", 0, 0), page("a", 1, 0, 1), page("a", 2, 0)], 2)
    assert view.locate(KEYS[:2]) == [("a",), ("a",)]
    view.apply([PageGone("a", 0)], 3)
    view.apply([page("a", 1, 1)], 4)
    assert view.locate(KEYS[:1]) == [("a",)]
    view.apply([PageGone("a", 2)], 5)
    assert view.locate(KEYS[:2]) == [(), ("a",)]


def test_a_key_repeated_within_a_page_counts_once():
    view = joined("a")
    view.apply([page("a", 0, 0, 0, 1)], 2)
    view.apply([page("a", 0, 1)], 3)
    assert view.locate(KEYS[:2]) == [(), ("a",)]


def test_gone_twice_or_unknown_is_no_error():
    view = joined("a")
    view.apply([PageGone("a", 9), PageGone("x", 0), MemberGone("x"), MemberGone("a"), MemberGone("a")], 2)
    assert view.members() == {} and view.num_blocks == 0


def test_sweep_removes_only_what_the_listing_lacked():
    view = joined("a", "b")
    view.apply([page("a", 0, 0), page("a", 1, 1), page("b", 0, 2)], 2)
    view.begin_listing()
    assert view.num_unseen == 5
    assert view.match(KEYS) == 3
    view.apply([MemberPut("a", make_member("a")), page("a", 1, 1, 3), page("a", 2, 4)], 3)
    assert view.locate(KEYS[:5]) == [("a",), ("a",), ("b",), ("a",), ("a",)]
    assert view.sweep() == 3
    assert view.locate(KEYS[:5]) == [(), ("a",), (), ("a",), ("a",)]
    assert set(view.members()) == {"a"}
    assert view.sweep() == 0


def test_nothing_is_left_of_nodes_that_went():
    view = DirectoryView()
    for number in range(50):
        node_id = f"n{number}"
        view.apply([MemberPut(node_id, make_member(node_id)), page(node_id, 0, 0, 1)], number)
        view.apply([MemberGone(node_id), PageGone(node_id, 0)], number)
    assert view._nodes == {} and view._holders == {} and view._members == {} and len(view._runs) == 0
    assert len(view._groups) <= 4096


def test_holder_tuples_are_shared():
    view = joined("a", "b")
    view.apply([page("a", 0, *range(10)), page("b", 0, *range(10))], 2)
    assert len({id(holders) for holders in view.locate(KEYS)}) == 1
