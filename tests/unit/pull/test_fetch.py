"""The shortcut for small blocks: it succeeds whole or leaves no trace but a link given back."""

from __future__ import annotations

import numpy as np
import pytest

from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import GetOutcome, PeerAddress
from mooncake_store.pull.fetch import INLINE, WAIT_MAX_NS, Fetcher
from mooncake_store.pull.peers import Peers
from mooncake_store.pull.wire import FETCH_MAX_BYTES, KEYS_MAX, FetchedBlock, WireError
from mooncake_store.transport.checksum import checksum_of_bytes
from mooncake_store.types import BlockKey, HostIdentity, NodeId

HERE, ELSEWHERE = HostIdentity("here", 1), HostIdentity("elsewhere", 1)
IMAGES = {BlockKey(b"a"): bytes(range(100)), BlockKey(b"b"): bytes(range(50, 64))}
UNTOUCHED = 0xEE


class FakeLink:
    """An open link whose owner has IMAGES; says what it is told to."""

    def __init__(self, name: str = "owner", host: HostIdentity = HERE) -> None:
        self.peer = PeerAddress(NodeId(name), "tcp://127.0.0.1:1", host)
        self.asked: list[tuple[tuple[BlockKey, ...], int]] = []
        self.is_closed = False
        self.answer = self.all_of

    def fetch(self, keys, *, until_ns):
        self.asked.append((tuple(keys), until_ns))
        return self.answer(keys)

    def all_of(self, keys):
        return tuple(FetchedBlock(checksum_of_bytes(IMAGES[key]), IMAGES[key]) for key in keys)

    def lost_reason(self) -> str:
        return ""

    def close(self) -> None:
        self.is_closed = True


class Stage:
    """A fetcher, its idle links, and memory for two blocks in scattered pieces."""

    def __init__(self, *links: FakeLink, max_bytes: int = FETCH_MAX_BYTES, is_verifying: bool = True) -> None:
        made = iter(links)
        self.links = links
        self.peers = Peers(lambda address: next(made), inflight_max_bytes=1 << 20)
        for link in links:
            taken = self.peers.try_begin(link.peer, 0)
            assert taken is link
        for link in links:
            self.peers.end(link, 0, is_reusable=True)
        self.metrics = Metrics()
        self.fetcher = Fetcher(self.peers, own_host=HERE, max_bytes=max_bytes, is_verifying=is_verifying,
                               metrics=self.metrics)
        self.memory = np.full(1000, UNTOUCHED, np.uint8)
        start = self.memory.ctypes.data
        self.targets = [[(start, 60), (start + 100, 40)], [(start + 500, 14)]]

    def fetch(self, keys=tuple(IMAGES), holders=None, *, targets=None, now_ns=0, deadline_ns=10**12):
        self.memory[:] = UNTOUCHED
        holders = holders or [[link.peer.node_id for link in self.links]] * len(keys)
        fetched = self.fetcher.fetch(keys, self.targets if targets is None else targets, holders, now_ns=now_ns,
                                     deadline_ns=deadline_ns)
        assert self.peers._inflight_bytes == 0, "what was booked is given back"
        if fetched is None:
            assert (self.memory == UNTOUCHED).all()
        return fetched


def test_blocks_are_put_where_they_belong():
    stage = Stage(FakeLink())
    outcomes = [pulled.outcome for pulled in stage.fetch()]
    assert outcomes == [GetOutcome("ok", INLINE, 100, ""), GetOutcome("ok", INLINE, 14, "")]
    first, second = IMAGES.values()
    assert stage.memory[:60].tobytes() + stage.memory[100:140].tobytes() == first
    assert stage.memory[500:514].tobytes() == second
    assert (stage.memory == UNTOUCHED).sum() >= 1000 - 114
    assert stage.metrics.snapshot()['mooncake_pull_bytes_total{medium="inline"}'] == 114
    assert stage.peers.num_links() == 1 and not stage.links[0].is_closed


def test_the_wait_is_short_and_within_half_of_what_is_left():
    stage = Stage(FakeLink())
    stage.fetch(now_ns=5, deadline_ns=10**12)
    stage.fetch(now_ns=5, deadline_ns=1005)
    assert [until_ns for _, until_ns in stage.links[0].asked] == [5 + WAIT_MAX_NS, 505]


@pytest.mark.parametrize("case", ["large", "many", "late", "off", "nothing"])
def test_what_is_not_small_or_comes_too_late_is_not_asked_for(case):
    stage = Stage(FakeLink(), max_bytes=0 if case == "off" else FETCH_MAX_BYTES)
    arguments = {"large": {"targets": [[(1, FETCH_MAX_BYTES)], [(1, 1)]]},
                 "many": {"keys": [BlockKey(b"a")] * (KEYS_MAX + 1), "targets": [[(1, 1)]] * (KEYS_MAX + 1)},
                 "late": {"now_ns": 5, "deadline_ns": 5}, "off": {}, "nothing": {"keys": (), "targets": []}}[case]
    assert stage.fetch(**arguments) is None and stage.links[0].asked == []


@pytest.mark.parametrize("is_verifying", [True, False])
def test_an_answer_that_is_not_all_right_is_no_answer(is_verifying):
    whole = FakeLink().all_of(tuple(IMAGES))
    damaged = FetchedBlock(whole[0].checksum, b"x" + whole[0].data[1:])
    answers = [None, (), whole[:1], (whole[0], None), (None, None), (whole[1], whole[0]), (*whole, whole[0])]
    answers += [(damaged, whole[1])] if is_verifying else []
    link = FakeLink()
    stage = Stage(link, is_verifying=is_verifying)
    for answer in answers:
        link.answer = lambda keys, answer=answer: answer
        assert stage.fetch() is None, answer
        assert stage.peers.num_links() == 1, "the link is good: what it carried is for others to judge"


@pytest.mark.parametrize("error", [OSError("broken"), WireError("malformed", "garbage")])
def test_a_link_that_fails_is_closed(error):
    def fail(keys):
        raise error

    link = FakeLink()
    link.answer = fail
    stage = Stage(link)
    assert stage.fetch() is None and link.is_closed and stage.peers.num_links() == 0
    counted = stage.metrics.snapshot().get('mooncake_protocol_errors_total{reason="malformed"}', 0)
    assert counted == isinstance(error, WireError)


def test_one_owner_must_have_all_and_be_in_good_standing():
    far, near = FakeLink("far", ELSEWHERE), FakeLink("near")
    stage = Stage(far, near)
    assert stage.fetch(holders=[["far"], ["near"]]) is None
    assert stage.fetch(holders=[["far", "near"], ["far"]]) is not None and len(far.asked) == 1
    assert stage.fetch(holders=[["far", "near"], ["near", "far"]]) is not None and len(near.asked) == 1
    stage.peers.blame(NodeId("near"), "slow", 0)
    assert stage.fetch(holders=[["far", "near"]] * 2) is not None and len(far.asked) == 2
    assert stage.fetch(holders=[["near"]] * 2) is None
    assert stage.fetch(holders=[["stranger"]] * 2) is None
    stage.peers.close()
    assert far.is_closed and near.is_closed
    assert stage.fetch() is None
