"""The planner: every block goes to exactly one usable peer or is said to be unavailable; preferences hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.pull.planner import BATCH_BLOCKS_MAX, PeerFacts, StaleEntries, Want, plan_pull
from mooncake_store.pull.replication import rendezvous

NODES = ["n0", "n1", "n2", "n3"]
FACTS = st.dictionaries(st.sampled_from(NODES), st.builds(PeerFacts, st.booleans(), st.integers(0, 1 << 30),
                                                          st.sampled_from(["", "", "left alone"])))


@settings(max_examples=120, deadline=None)
@given(blocks=st.lists(st.tuples(st.integers(1, 10 << 20), st.sets(st.sampled_from(NODES))), max_size=40), facts=FACTS,
       batch_max=st.integers(1, 32 << 20))
def test_every_block_is_planned_once(blocks, facts, batch_max):
    wants = [Want(index, b"k%d" % index, size) for index, (size, _) in enumerate(blocks)]
    holders = [sorted(nodes) for _, nodes in blocks]
    plan = plan_pull(wants, holders, facts, batch_max_bytes=batch_max)
    planned = [want.position for batch in plan.batches for want in batch.wants]
    unavailable = [position for position, _ in plan.unavailable]
    assert sorted(planned + unavailable) == list(range(len(blocks)))
    for batch in plan.batches:
        assert len(batch.wants) == 1 or batch.num_bytes <= batch_max
        assert len(batch.wants) <= BATCH_BLOCKS_MAX
        for want in batch.wants:
            usable = [node for node in holders[want.position] if node in facts and not facts[node].blocked_reason]
            assert batch.peer in usable
            assert facts[batch.peer].is_same_host or not any(facts[node].is_same_host for node in usable)
    for position, reason in plan.unavailable:
        assert reason and not [n for n in holders[position] if n in facts and not facts[n].blocked_reason]


def test_the_least_loaded_replica_is_chosen_and_large_pulls_are_spread():
    wants = [Want(index, b"k%d" % index, 16 << 20) for index in range(8)]
    facts = {"a": PeerFacts(True, 64 << 20), "b": PeerFacts(True, 0), "c": PeerFacts(False, 0)}
    plan = plan_pull(wants, [["a", "b", "c"]] * 8, facts, batch_max_bytes=1 << 30)
    assert {batch.peer: len(batch.wants) for batch in plan.batches} == {"b": 6, "a": 2}
    small = plan_pull(wants[:1], [["a", "c"]], facts, batch_max_bytes=1 << 30)
    assert small.batches[0].peer == "a", "our own host first, however loaded"


def test_stale_entries_are_remembered_for_a_while_and_bounded():
    stale = StaleEntries(lifetime_ns=10, max_entries=2)
    stale.add("n", b"1", 0)
    assert stale.holds("n", b"1", 9) and not stale.holds("m", b"1", 9) and not stale.holds("n", b"1", 10)
    for key in (b"1", b"2", b"3"):
        stale.add("n", key, 0)
    assert len(stale) == 2 and not stale.holds("n", b"1", 5)


def test_rendezvous_moves_only_the_keys_of_a_node_that_left():
    keys = [b"key%d" % number for number in range(300)]
    before = {key: rendezvous(key, NODES) for key in keys}
    after = {key: rendezvous(key, NODES[:-1]) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != NODES[-1])
    assert all(40 < list(before.values()).count(node) < 120 for node in NODES), "roughly even"
