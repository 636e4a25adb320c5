"""One session, scripted: the roads that matter, one test each."""

from __future__ import annotations

import pytest

from mooncake_store.errors import LocalProtocolError
from mooncake_store.pull.session import BLAME_AFTER_NS, SLICE_MAX_BYTES, State
from mooncake_store.pull.wire import BlockEntry, Denied, Granted, Release, Renew, Report
from mooncake_store.testing.session import ANSWER_TIMEOUT_NS, BLOCK_BYTES, LEASE_TTL_MS, SessionModel

MS = 1_000_000


def ready(num_blocks=2, held=(True,)):
    model = SessionModel()
    model.begin(num_blocks)
    model.answer()
    model.finish_attach()
    model.answer(held)
    return model


def results(model):
    return [model.outcomes[position].result for position in sorted(model.outcomes)]


def test_a_batch_is_read_slice_by_slice_and_the_lease_given_back():
    model = ready(6)
    slices = 0
    while model.read:
        assert sum(item.entry.length for item in model.read.items) <= SLICE_MAX_BYTES
        slices += 1
        model.finish_read(["ok"])
    assert slices == -(-6 * BLOCK_BYTES // SLICE_MAX_BYTES) and results(model) == ["ok"] * 6
    model.check_over()
    model.begin(1)
    assert model.session.state is State.ACQUIRING, "a known peer is not greeted again"


def test_what_the_owner_lacks_is_a_stale_miss_and_the_rest_is_read():
    model = ready(4, held=(True, False))
    model.finish_read(["ok"])
    assert results(model) == ["ok", "miss", "ok", "miss"]


def test_a_corrupt_block_is_reported_and_the_others_stand():
    model = SessionModel()
    sent = []
    original = model._on_send
    model._on_send = lambda message: (sent.append(message), original(message))
    model.begin(2)
    model.answer()
    model.finish_attach()
    model.answer((True,))
    model.finish_read(["ok", "corrupt"])
    assert results(model) == ["ok", "corrupt"]
    assert [message for message in sent if isinstance(message, Report)] == [Report(b"1", 1)]
    assert sum(isinstance(message, Release) for message in sent) == 1


def test_leases_are_renewed_while_a_long_pull_runs():
    model = ready(9)
    for _ in range(3):
        model.pass_time(LEASE_TTL_MS * MS // 2)
        model.finish_read(["ok"])
        while model.questions:
            assert isinstance(model.questions[0], Renew)
            model.answer()
    while model.read:
        model.finish_read(["ok"], is_verified=False)
    assert results(model) == ["ok"] * 9 and model.now_ns > LEASE_TTL_MS * MS


@pytest.mark.parametrize(("is_verified", "expected"), [(True, "ok"), (False, "failed")])
def test_bytes_that_arrive_after_the_lease_count_only_when_their_checksum_was_compared(is_verified, expected):
    model = ready(1)
    model.pass_time(LEASE_TTL_MS * MS + 1)
    model.finish_read(["ok"], is_verified=is_verified)
    assert results(model) == [expected]


def test_a_read_never_outlasts_its_lease():
    model = ready(1)
    assert model.read.deadline_ns == LEASE_TTL_MS * MS


def test_a_silent_peer_is_given_up_and_blamed():
    model = SessionModel()
    model.begin(2)
    model.pass_time(ANSWER_TIMEOUT_NS)
    assert results(model) == ["failed", "failed"] and model.is_dropped and model.is_blamed
    assert "no answer" in model.outcomes[0].reason


def test_a_peer_is_not_blamed_for_our_own_short_deadline():
    model = SessionModel()
    model.begin(1, timeout_ns=BLAME_AFTER_NS // 2)
    model.pass_time(BLAME_AFTER_NS // 2)
    assert model.is_dropped and not model.is_blamed


def test_another_process_at_the_address_is_refused():
    model = SessionModel()
    model.begin(1)
    model.answer(node_id="somebody-else")
    assert model.is_dropped and "somebody-else answers" in model.outcomes[0].reason


def test_a_version_the_peer_cannot_read_ends_the_session_with_the_reason():
    model = SessionModel()
    model.begin(1)
    model.deliver(Denied(0, "version", "speaks 2"))
    assert model.is_dropped and "speaks 2" in model.outcomes[0].reason


def test_a_peer_that_dies_while_we_read_costs_nothing_that_was_already_granted():
    model = ready(6)
    model.lose()
    while model.read:
        model.finish_read(["ok"])
    assert results(model) == ["ok"] * 6 and model.is_dropped, "finished, then never asked again"


def test_a_medium_that_fails_ends_the_batch_at_once():
    model = ready(6)
    model.finish_read(["failed"])
    assert results(model) == ["failed"] * 6 and model.is_dropped and model.is_blamed


def test_a_refusal_keeps_the_session():
    model = SessionModel()
    model.begin(1)
    model.answer()
    model.finish_attach()
    model.answer(denial="too_many_leases")
    assert results(model) == ["failed"] and model.can_begin


def test_extents_outside_the_region_or_of_another_size_are_never_read():
    model = SessionModel()
    model.begin(2)
    model.answer()
    model.finish_attach()
    question = model.questions.pop()
    entries = (BlockEntry(1 << 50, BLOCK_BYTES, 0), BlockEntry(0, BLOCK_BYTES - 1, 0))
    model.deliver(Granted(question.request_id, 1, 1000, entries))
    assert results(model) == ["failed"] * 2 and model.read is None and model.can_begin


def test_a_grant_of_the_wrong_length_is_a_protocol_error():
    model = SessionModel()
    model.begin(2)
    model.answer()
    model.finish_attach()
    model.deliver(Granted(model.questions.pop().request_id, 1, 1000, (None,)))
    assert model.is_dropped


def test_an_event_out_of_order_is_our_bug():
    model = ready(1)
    with pytest.raises(LocalProtocolError, match="begun in session state reading"):
        model.begin(1)
