"""HeldTransfers: the prefill side's book, event by event."""

import numpy as np
import pytest

from mooncake_connector.kv.plan import Progress
from mooncake_connector.transfer import held
from mooncake_connector.transfer.held import HeldTransfers, Lose, Publish, Report, Revoke, TellAbort
from mooncake_connector.transfer.steps import Expected, Finished, PrefillStep

LEASE_NS = 1000
PEER, OTHER = b"peer", b"other"


@pytest.fixture
def book():
    return HeldTransfers(lease_ns=LEASE_NS)


@pytest.fixture
def epochs():
    return np.zeros(held.TRANSFERS_MAX, np.uint64)


def step(before=0, after=100, *, per_layer=True):
    return PrefillStep("r", "t", [4, 5], before, after, 150, per_layer)


def finished(*, delivered=True):
    return Finished("r", "t", delivered, delivered, 2)


def test_a_whole_hand_over(book, epochs):
    book.subscribe("t", PEER, 0)
    book.expect(Expected("r", "t"), 1)
    assert Publish("t") in book.schedule(step(), 2)
    assert book.complete_layers("t", 3)
    peer, ready = book.ready("t", epochs)
    assert (peer, ready.progress, ready.block_ids) == (PEER, Progress(0, 100, 3), [4, 5])
    assert book.ready("t", epochs) is None, "nothing new"
    assert book.complete_step("t")
    assert book.ready("t", epochs)[1].block_ids is None, "unchanged ids are not sent again"
    assert book.finish(finished(), 10) == []
    instructions = book.done("t", 11)
    assert Report("r") in instructions
    assert isinstance(instructions[0], Revoke), "copies are void before the engine may reuse the blocks"
    assert book.num_active == 0


def test_layers_of_a_step_mode_request_are_not_published(book, epochs):
    book.subscribe("t", PEER, 0)
    book.schedule(step(per_layer=False), 1)
    assert not book.complete_layers("t", 3)
    assert book.complete_step("t")


def test_the_locally_cached_prefix_is_ready_at_once(book, epochs):
    book.subscribe("t", PEER, 0)
    book.schedule(step(before=64), 1)
    assert book.ready("t", epochs)[1].progress == Progress(64, 64, 0)


def test_done_before_the_engine_knows_the_request_frees_it_when_it_ends(book):
    book.done("t", 0)
    book.schedule(step(), 1)
    assert book.finish(finished(), 2) == [Report("r")]


def test_a_held_request_is_freed_when_its_lease_ends_and_not_before(book):
    book.subscribe("t", PEER, 0)
    book.schedule(step(), 1)
    book.finish(finished(), 10)
    book.heartbeat(["t"], PEER, 500)
    assert book.expire(500 + LEASE_NS - 1, idle_since_ns=0) == []
    instructions = book.expire(500 + LEASE_NS, idle_since_ns=0)
    assert Report("r") in instructions
    assert TellAbort(PEER, "t", "the lease ended") in instructions
    assert any(isinstance(item, Revoke) for item in instructions)


def test_a_dead_peer_frees_at_once(book):
    book.subscribe("t", PEER, 0)
    book.schedule(step(), 1)
    book.finish(finished(), 2)
    assert Report("r") in book.lose_peer(PEER, 3)
    assert book.lose_peer(PEER, 4) == []


def test_a_peer_that_dies_in_mid_prefill_is_not_waited_for(book):
    book.subscribe("t", PEER, 0)
    book.schedule(step(), 1)
    book.lose_peer(PEER, 2)
    assert Report("r") in book.finish(finished(), 3)


def test_an_aborted_prefill_voids_copies_and_tells(book):
    book.subscribe("t", PEER, 0)
    book.schedule(step(), 1)
    instructions = book.finish(finished(delivered=False), 2)
    assert isinstance(instructions[0], Revoke)
    assert TellAbort(PEER, "t", "the prefill was aborted") in instructions
    assert not any(isinstance(item, Report) for item in instructions), "the engine frees an aborted request itself"
    assert TellAbort(OTHER, "t", "the prefill was aborted") in book.subscribe("t", OTHER, 3), "late comers are told too"


def test_a_preemption_voids_copies_and_starts_over(book, epochs):
    book.subscribe("t", PEER, 0)
    book.schedule(step(), 1)
    book.complete_step("t")
    assert [type(item) for item in book.preempt("r", 2)] == [Revoke]
    book.schedule(PrefillStep("r", "t", [7, 8], 0, 150, 150, True), 3)
    book.complete_step("t")
    assert book.ready("t", epochs)[1].block_ids == [7, 8]


def test_a_wish_for_an_unknown_transfer_does_not_age_while_the_engine_computes(book):
    book.subscribe("t", PEER, 0)
    assert book.expire(10 * LEASE_NS, idle_since_ns=None) == []
    assert book.expire(10 * LEASE_NS, idle_since_ns=10 * LEASE_NS - 1) == []
    assert book.expire(10 * LEASE_NS, idle_since_ns=0) == [TellAbort(PEER, "t", "the lease ended")]


def test_tombstones_are_forgotten_and_their_slots_used_again(book):
    for i in range(held.TRANSFERS_MAX):
        book.done(f"t{i}", 0)
    assert book.subscribe("late", PEER, 1) == [
        TellAbort(PEER, "late", f"{held.TRANSFERS_MAX} transfers are under way here")]
    book.expire(held.TOMBSTONE_NS, idle_since_ns=0)
    assert book.subscribe("late", PEER, held.TOMBSTONE_NS) == [Publish("late")]


def test_a_heartbeat_repeats_what_may_have_been_lost(book, epochs):
    book.subscribe("t", PEER, 0)
    book.schedule(step(), 1)
    book.complete_step("t")
    assert book.ready("t", epochs) is not None
    assert book.ready("t", epochs) is None
    assert book.heartbeat(["t"], PEER, 2) == [Publish("t")]
    assert book.ready("t", epochs)[1].block_ids == [4, 5]


def noted(before=0, after=150):
    return PrefillStep("r", "t", [4, 5], before, after, 150, False, b"row")


def test_the_note_goes_out_with_the_last_block_and_again_when_asked(book, epochs):
    book.subscribe("t", PEER, 0)
    book.schedule(noted(), 1)
    assert book.ready("t", epochs)[1].note is None, "the step has not run"
    book.complete_step("t")
    assert book.ready("t", epochs)[1].note == b"row"
    book.heartbeat(["t"], PEER, 2)
    assert book.ready("t", epochs)[1].note == b"row"
    book.preempt("r", 3)
    assert book.ready("t", epochs)[1].note is None, "it is computed again"


def test_a_peer_that_leaves_before_the_end_loses_the_request(book):
    book.subscribe("t", PEER, 0)
    book.schedule(step(), 1)
    book.complete_step("t")
    assert book.done("t", 2) == [Lose("r", "the decode side is through")]


def test_a_peer_that_has_everything_before_the_engine_finishes_loses_nothing(book):
    book.subscribe("t", PEER, 0)
    book.schedule(noted(), 1)
    book.complete_step("t")
    assert book.done("t", 2) == []
    assert Report("r") in book.finish(finished(), 3)


def test_a_peer_that_left_before_the_request_came_loses_it_at_once(book):
    book.done("t", 0)
    assert book.expect(Expected("r", "t"), 1) == [Lose("r", "the decode side is through")]


def test_blocks_that_nobody_fetched_are_freed_and_the_request_is_lost(book):
    book.schedule(noted(), 0)
    book.complete_step("t")
    book.finish(finished(), 1)
    ended = book.expire(2 + LEASE_NS, idle_since_ns=0)
    assert Report("r") in ended and Lose("r", "the lease ended") in ended


def test_a_note_alone_is_news(book, epochs):
    book.subscribe("t", PEER, 0)
    book.schedule(PrefillStep("r", "t", [4, 5], 0, 150, 151, False), 1)
    book.complete_step("t")
    assert book.ready("t", epochs)[1].note is None
    book.schedule(noted(150, 150), 2)
    book.complete_step("t")
    assert book.ready("t", epochs)[1].note == b"row"


def test_an_engine_may_take_back_what_it_finished(book):
    book.subscribe("t", PEER, 0)
    book.schedule(noted(), 1)
    book.complete_step("t")
    book.finish(finished(), 2)
    ended = book.finish(finished(delivered=False), 3)
    assert isinstance(ended[0], Revoke) and Report("r") in ended
    assert TellAbort(PEER, "t", "the prefill was aborted") in ended
