"""The session keeps its promises under every order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from mooncake_store.pull.session import TRANSITIONS, Event, State
from mooncake_store.pull.wire import Accepted, Denied, Granted, Renewed
from mooncake_store.testing.session import SessionModel

RESULTS = st.lists(st.sampled_from(["ok", "corrupt", "failed"]), min_size=1, max_size=4)


class SessionMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.model = SessionModel()

    @precondition(lambda self: self.model.can_begin)
    @rule(num_blocks=st.integers(1, 9), timeout_ms=st.integers(1, 5000))
    def begin(self, num_blocks, timeout_ms):
        self.model.begin(num_blocks, timeout_ns=timeout_ms * 1_000_000)

    @precondition(lambda self: self.model.questions and not self.model.is_dropped)
    @rule(held=st.lists(st.booleans(), max_size=4))
    def answer(self, held):
        self.model.answer(held)

    @precondition(lambda self: self.model.questions and not self.model.is_dropped)
    @rule(reason=st.sampled_from(["busy", "hello_first", "too_many_leases"]))
    def deny(self, reason):
        self.model.answer(denial=reason)

    @precondition(lambda self: self.model.attach and not self.model.is_dropped)
    @rule(error=st.sampled_from(["", "", "", "no way"]))
    def attach(self, error):
        self.model.finish_attach(error)

    @precondition(lambda self: self.model.read and not self.model.is_dropped)
    @rule(results=RESULTS, is_verified=st.booleans(), took_ms=st.sampled_from([0, 1, 300, 1100]))
    def read(self, results, is_verified, took_ms):
        self.model.pass_time(took_ms * 1_000_000)
        self.model.finish_read(results, is_verified=is_verified)

    @precondition(lambda self: not self.model.is_dropped)
    @rule(elapsed_ms=st.sampled_from([1, 100, 600, 2000]))
    def wait(self, elapsed_ms):
        self.model.pass_time(elapsed_ms * 1_000_000)

    @precondition(lambda self: not self.model.is_dropped)
    @rule(message=st.sampled_from([Renewed(99, 1, 5), Accepted(1, 1, 1), Denied(77, "busy"),
                                   Granted(99, 9, 5, (None,))]))
    def stray(self, message):
        self.model.deliver(message)

    @precondition(lambda self: self.model.is_dropped)
    @rule()
    def start_over(self):
        self.model.check_over()
        self.model = SessionModel()

    @precondition(lambda self: not self.model.is_dropped and self.model.session.state is not State.NEW)
    @rule()
    def lose(self):
        self.model.lose()

    def teardown(self):
        # Whatever happened, time alone (with reads that end) must bring every batch to an end.
        for _ in range(50):
            if self.model.can_begin or self.model.is_dropped:
                break
            if self.model.attach:
                self.model.finish_attach()
            elif self.model.read:
                self.model.finish_read(["ok"])
            else:
                self.model.pass_time(600_000_000)
        self.model.check_over()


SessionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSession = SessionMachine.TestCase


def test_the_table_names_every_state_and_only_dead_is_final():
    assert set(TRANSITIONS) == set(State)
    reached = {following for row in TRANSITIONS.values() for following in row.values()} | {State.NEW}
    assert reached == set(State)
    assert set(TRANSITIONS[State.DEAD].values()) == {State.DEAD}
    used = {event for row in TRANSITIONS.values() for event in row}
    assert used == set(Event)
    # whatever we wait for, losing the peer must end the wait
    for state in State:
        assert Event.LOST in TRANSITIONS[state] and Event.INVALID in TRANSITIONS[state]
