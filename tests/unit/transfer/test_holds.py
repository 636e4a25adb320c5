"""Holds: exactly one report per kept request, after its last reason."""

from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.transfer.holds import Holds, Why


def test_both_reasons_must_end():
    holds = Holds()
    holds.add("r", Why.HANDOFF)
    holds.add("r", Why.SAVE)
    holds.keep("r", 5)
    assert holds.num_blocks == 5
    holds.drop("r", Why.SAVE)
    assert holds.take_ready() == set()
    holds.drop("r", Why.HANDOFF)
    assert holds.take_ready() == {"r"}
    assert holds.take_ready() == set()
    assert holds.num_blocks == 0


def test_reasons_that_end_before_the_request_does():
    holds = Holds()
    holds.add("r", Why.SAVE)
    holds.drop("r", Why.SAVE)
    assert holds.take_ready() == set()
    holds.keep("r", 1)
    assert holds.take_ready() == {"r"}


def test_a_request_that_is_not_kept_is_never_reported():
    holds = Holds()
    holds.add("r", Why.SAVE)
    holds.drop("r", Why.SAVE)
    holds.drop("r", Why.HANDOFF)
    assert holds.take_ready() == set()


@given(st.lists(st.sampled_from(["add_h", "add_s", "drop_h", "drop_s"]), max_size=10), st.integers(0, 10))
def test_any_order_reports_once(events, at):
    holds, reported = Holds(), []
    for i, event in enumerate([*events, "drop_h", "drop_s"]):
        if i == min(at, len(events)):
            holds.keep("r", 2)
        kind, why = event.split("_")
        if kind == "add" and i >= min(at, len(events)):
            continue  # the engine issues nothing for a finished request
        getattr(holds, kind)("r", Why.HANDOFF if why == "h" else Why.SAVE)
        reported += holds.take_ready()
    assert reported == ["r"]
    assert holds.num_blocks == 0
