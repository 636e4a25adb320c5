"""After any sequence of events the view equals a naive model of the key-value state."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.directory.schema import MemberGone, MemberPut, PageGone, PagePath, PagePut
from mooncake_store.directory.view import DirectoryView
from mooncake_store.testing.directory import make_keys, make_member

KEYS = make_keys(12)
NODES = ("a", "b", "c")
MEMBERS = {node_id: make_member(node_id) for node_id in NODES}

nodes = st.sampled_from(NODES)
page_numbers = st.integers(0, 3)
events = st.one_of(
    nodes.map(lambda node_id: MemberPut(node_id, MEMBERS[node_id])),
    nodes.map(MemberGone),
    st.builds(PagePut, nodes, page_numbers, st.lists(st.sampled_from(KEYS), max_size=6).map(tuple)),
    st.builds(PageGone, nodes, page_numbers),
)


class Model:
    """The key-value state itself."""

    def __init__(self):
        self.members = {}
        self.pages = {}

    def apply(self, event):
        if isinstance(event, MemberPut):
            self.members[event.node_id] = event.member
        elif isinstance(event, MemberGone):
            self.members.pop(event.node_id, None)
        elif isinstance(event, PagePut):
            self.pages[PagePath(event.node_id, event.page)] = event.keys
        else:
            self.pages.pop(PagePath(event.node_id, event.page), None)

    def holders(self, key):
        return {path.node_id for path, keys in self.pages.items() if key in keys and path.node_id in self.members}


def check(view, model):
    located = view.locate(KEYS)
    assert [set(holders) for holders in located] == [model.holders(key) for key in KEYS]
    assert all(len(set(holders)) == len(holders) for holders in located)
    assert view.members() == model.members
    assert view.num_blocks == sum(1 for holders in located if holders)
    matched = view.match(KEYS)
    assert all(located[:matched]) and (matched == len(KEYS) or not located[matched])


@settings(max_examples=300, deadline=None)
@given(st.lists(events, max_size=40))
def test_view_equals_the_model(sequence):
    view, model = DirectoryView(), Model()
    for revision, event in enumerate(sequence):
        view.apply([event], revision)
        model.apply(event)
        check(view, model)


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=25), st.lists(events, max_size=25), st.randoms(use_true_random=False))
def test_a_listing_replaces_the_view_without_a_gap(before, after, rng):
    view, old, new = DirectoryView(), Model(), Model()
    view.apply(before, 1)
    for event in before:
        old.apply(event)
        new.apply(event)
    for event in after:
        new.apply(event)
    listing = [MemberPut(node_id, member) for node_id, member in new.members.items()]
    listing += [PagePut(path.node_id, path.page, keys) for path, keys in new.pages.items()]
    rng.shuffle(listing)
    shown = [
        {(path, key) for path, keys in model.pages.items() for key in keys if path.node_id in model.members}
        for model in (old, new)
    ]
    steady = sorted({key for _, key in shown[0] & shown[1]})
    view.begin_listing()
    for event in listing:
        view.apply([event], 2)
        assert all(view.locate(steady))
    view.sweep()
    check(view, new)


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=40))
def test_nothing_leaks(sequence):
    view = DirectoryView()
    view.apply(sequence, 1)
    for node_id in NODES:
        view.apply([PageGone(node_id, page) for page in range(4)] + [MemberGone(node_id)], 2)
    assert view._nodes == {} and view._holders == {} and view._members == {} and len(view._runs) == 0


LONG = make_keys(100, "long")
FOREIGN = make_keys(3, "foreign")


@st.composite
def stretches(draw):
    """A page as prompts make it: stretches of consecutive blocks, now and then with a gap or a stranger."""
    keys = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, 99))
        keys += LONG[start : start + draw(st.integers(1, 60))]
        if draw(st.booleans()):
            keys.append(draw(st.sampled_from(FOREIGN)))
    return tuple(keys)


long_events = st.one_of(
    nodes.map(lambda node_id: MemberPut(node_id, MEMBERS[node_id])),
    nodes.map(MemberGone),
    st.builds(PagePut, nodes, page_numbers, stretches()),
    st.builds(PageGone, nodes, page_numbers),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(long_events, max_size=25), st.lists(stretches(), min_size=1, max_size=4))
def test_match_by_runs_equals_match_by_blocks(sequence, prompts):
    view = DirectoryView()
    for event in [MemberPut("a", MEMBERS["a"]), MemberPut("b", MEMBERS["b"]), *sequence]:
        view.apply([event], 1)
    for prompt in [*prompts, tuple(LONG), LONG[3:]]:
        located = [*view.locate(prompt), ()]
        assert view.match(prompt) == located.index(())
