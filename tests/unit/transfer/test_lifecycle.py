"""The tables: every state is reachable, every end is an end, the engine is told exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.transfer.lifecycle import (
    HELD_TABLE,
    PULL_TABLE,
    Action,
    Held,
    HeldEvent,
    Pull,
    PullEvent,
    held_step,
    pull_step,
)
from mooncake_store.errors import LocalProtocolError

# What the engine itself never does to a finished request.
FORBIDDEN_HELD = {(Held.HELD, event) for event in
                  (HeldEvent.SCHEDULED, HeldEvent.PREEMPTED, HeldEvent.FINISHED)}


def test_the_held_table_covers_everything_that_a_peer_or_engine_can_do():
    every = {(state, event) for state in Held for event in HeldEvent}
    assert every - set(HELD_TABLE) == FORBIDDEN_HELD


@pytest.mark.parametrize("pair", sorted(FORBIDDEN_HELD, key=str))
def test_a_forbidden_pair_is_our_bug_not_a_state(pair):
    with pytest.raises(LocalProtocolError):
        held_step(*pair)


def test_a_tombstone_stays_one():
    assert all(HELD_TABLE[Held.GONE, event].state is Held.GONE for event in HeldEvent)


ENGINE_LIVES = st.sampled_from([
    [HeldEvent.SCHEDULED, HeldEvent.FINISHED],
    [HeldEvent.SCHEDULED, HeldEvent.PREEMPTED, HeldEvent.SCHEDULED, HeldEvent.FINISHED],
    [HeldEvent.SCHEDULED, HeldEvent.SCHEDULED, HeldEvent.ENDED_BADLY],
    [HeldEvent.SCHEDULED, HeldEvent.PREEMPTED, HeldEvent.ENDED_BADLY],
])
PEER_EVENTS = st.lists(st.sampled_from([HeldEvent.SUBSCRIBED, HeldEvent.DONE, HeldEvent.EXPIRED]), max_size=6)


@given(ENGINE_LIVES, PEER_EVENTS, st.randoms(use_true_random=False))
def test_any_interleaving_reports_exactly_once_and_only_what_the_engine_keeps(life, peer, rng):
    events = sorted([(rng.random(), 1, e) for e in peer] + [(i / len(life), 0, e) for i, e in enumerate(life)],
                    key=lambda item: item[0])
    ordered = [event for _, _, event in events]
    # keep the engine's own order
    engine = iter(life)
    ordered = [next(engine) if event in life else event for event in ordered]
    state, reports, revoked_after_finish = Held.WANTED, 0, False
    has_finished = False
    for event in [*ordered, HeldEvent.EXPIRED]:
        step = held_step(state, event)
        has_finished = has_finished or event is HeldEvent.FINISHED
        for action in step.actions:
            if action is Action.REPORT:
                reports += 1
                assert has_finished, "reported before the engine kept the blocks"
            revoked_after_finish = revoked_after_finish or (action is Action.REVOKE and has_finished)
        state = step.state
    assert reports == (1 if HeldEvent.FINISHED in life else 0)
    assert state in (Held.GONE, Held.DRAINED)


@given(st.lists(st.sampled_from(list(PullEvent)), max_size=12))
def test_a_parked_request_is_reported_exactly_once_whatever_happens(events):
    state, reports, parked, done = Pull.ANNOUNCED, 0, False, False
    for event in [*events, PullEvent.LOST, PullEvent.CANCELLED]:
        if (state, event) not in PULL_TABLE:
            continue
        step = pull_step(state, event)
        parked = parked or event is PullEvent.STARTED
        reports += step.reports
        assert not (step.reports and not parked), "reported a request that is not parked"
        state = step.state
        done = done or step.releases
    assert reports == (1 if parked else 0)
    assert done, "the prefill was never told that we are through"
