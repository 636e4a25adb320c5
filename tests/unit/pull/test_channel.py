"""Both ends of a control connection: nobody waits for anybody, and whatever a peer begins ends in time."""

from __future__ import annotations

import socket
import time

import pytest

from contract.store_parts import wait_for
from mooncake_store.errors import PeerUnreachable
from mooncake_store.metrics import Metrics
from mooncake_store.pull import channel, listener, server, wire
from mooncake_store.pull.channel import Channel, join_address, split_address
from mooncake_store.pull.listener import Listener
from mooncake_store.pull.server import PullServer, ServerHooks
from mooncake_store.types import HostIdentity

HOST = HostIdentity("host", 1)
MANY = wire.StatusReply(1, {}, {str(number): "x" * 400 for number in range(2000)})
"""Nearly the largest message; the kernel queues about ten for one connection."""


@pytest.fixture
def listening():
    made = Listener("127.0.0.1")
    yield made
    made.close()


@pytest.fixture
def serving():
    class NoBlocks:
        def pin(self, keys):
            return [None] * len(keys)

        def unpin(self, blocks):
            assert not blocks

    hooks = ServerHooks(None, lambda key: None, lambda: ({}, MANY.info))
    made = PullServer(host="127.0.0.1", welcome=wire.Welcome(0, "n", HOST, "0", None), source=NoBlocks(),
                      lease_max_ms=1000, fetch_max_bytes=0, hooks=hooks, metrics=Metrics())
    made.start()
    yield made
    made.close()


def accept(listening: Listener, address: str) -> Channel:
    """Connect, and let the listener accept; what it then says to be ready is nothing."""
    opened = Channel.connect(address)
    assert listening.wait(1.0) == []
    return opened


def is_hung_up(opened: Channel) -> bool:
    try:
        while opened.wait(0.01):
            while opened.take() is not None:
                pass
    except OSError:
        return True
    return False


def exchange(opened: Channel, num_messages: int, timeout_s: float = 10.0) -> list[wire.Message]:
    messages: list[wire.Message] = []
    deadline = time.monotonic() + timeout_s
    while len(messages) < num_messages:
        assert time.monotonic() < deadline, f"{len(messages)} of {num_messages} messages came"
        while (message := opened.take()) is not None:
            messages.append(message)
        if len(messages) < num_messages:
            opened.wait(0.1)
    return messages


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 5), ("::1", 65_535), ("node-1.example", 80)])
def test_addresses(host, port):
    assert split_address(join_address(host, port)) == (host, port)


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "tcp://h", "tcp://:5", "tcp://h:0", "tcp://h:65536",
                                     "tcp://h:-1", "http://h:5", "tcp://h:x", "tcp://no such host:5"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(PeerUnreachable, match="cannot connect"):
        Channel.connect(address)


def test_an_address_that_cannot_be_bound_says_what_to_do():
    with pytest.raises(PeerUnreachable, match="cannot bind 192.0.2.1") as caught:
        Listener("192.0.2.1")
    assert "address of this machine" in caught.value.hint


def test_a_message_that_does_not_fit_the_connection_is_sent_as_room_comes(listening):
    reader = accept(listening, listening.address)
    num_sent = 0
    while not reader.unsent:
        reader.send(MANY)
        num_sent += 1
    assert reader.is_midway and num_sent < 50
    received: list[wire.Message] = []
    for _ in range(1000):
        for peer in listening.wait(0.1):
            peer.channel.receive()
            num_before = len(received)
            while (message := peer.channel.take()) is not None:
                received.append(message)
            listening.settle(peer, num_served=len(received) - num_before, has_more=False)
        if reader.unsent:
            reader.flush()
        if len(received) == num_sent:
            break
    assert received == [MANY] * num_sent and not reader.is_midway
    reader.close()


def test_what_the_other_end_does_not_take_is_bounded(listening):
    reader = accept(listening, listening.address)
    with pytest.raises(OSError, match="does not take"):
        for _ in range(50):
            reader.send(MANY)
    assert len(reader.unsent) <= channel.UNSENT_MAX_BYTES + wire.MESSAGE_MAX_BYTES
    reader.close()


def test_half_a_message_is_waited_for_only_so_long(listening, monkeypatch):
    monkeypatch.setattr(listener, "STEP_MAX_S", 0.05)
    monkeypatch.setattr(listener, "SWEEP_S", 0.01)
    with socket.create_connection(split_address(listening.address)) as raw:
        listening.wait(1.0)
        raw.sendall(wire.frame(wire.Release(1))[:-1])
        (peer,) = listening.wait(1.0)
        peer.channel.receive()
        assert peer.channel.take() is None
        listening.settle(peer, num_served=0, has_more=False)
        wait_for(lambda: listening.wait(0.02) or not listening._peers)
        raw.settimeout(5)
        assert raw.recv(1) == b""


def test_a_peer_that_says_nothing_and_one_that_is_silent_for_long_are_hung_up_on(listening, monkeypatch):
    monkeypatch.setattr(listener, "STEP_MAX_S", 0.05)
    monkeypatch.setattr(listener, "IDLE_MAX_S", 0.2)
    monkeypatch.setattr(listener, "SWEEP_S", 0.01)
    mute, talker = accept(listening, listening.address), accept(listening, listening.address)
    talker.send(wire.Release(1))
    (peer,) = listening.wait(1.0)
    peer.channel.receive()
    peer.channel.take()
    listening.settle(peer, num_served=1, has_more=False)
    wait_for(lambda: listening.wait(0.01) or is_hung_up(mute))
    assert len(listening._peers) == 1, "the one that spoke has more time"
    wait_for(lambda: listening.wait(0.01) or is_hung_up(talker))
    mute.close()
    talker.close()


def test_peers_are_bounded(listening, monkeypatch):
    monkeypatch.setattr(listener, "PEERS_MAX", 1)
    first = accept(listening, listening.address)
    second = accept(listening, listening.address)
    assert is_hung_up(second) and not is_hung_up(first)
    first.close()
    second.close()


def test_a_flood_of_questions_is_answered_in_order_and_keeps_nobody_out(serving):
    num_questions = 40 * server.MESSAGES_PER_TURN_MAX
    flood, other = Channel.connect(serving.address), Channel.connect(serving.address)
    for number in range(1, num_questions + 1):
        flood.send(wire.Renew(number, 1, 5))
    other.send(wire.Hello(7, "other", HOST, "0"))
    assert exchange(other, 1)[0].request_id == 7
    answers = exchange(flood, num_questions)
    assert answers == [wire.Denied(number, "no_such_lease") for number in range(1, num_questions + 1)]
    flood.close()
    other.close()


def test_a_peer_that_takes_no_answers_is_not_listened_to_and_costs_the_others_nothing(serving, monkeypatch):
    deaf, other = Channel.connect(serving.address), Channel.connect(serving.address)
    for number in range(1, 21):
        deaf.send(wire.StatusRequest(number))
    for number in range(1, 51):
        other.send(wire.Hello(number, "other", HOST, "0"))
    assert len(exchange(other, 50)) == 50

    def with_answers_lying():
        return [peer for peer in serving._listener._peers.values() if peer.channel.unsent]

    wait_for(lambda: len(with_answers_lying()) == 1, what="all answers to the other sent and accounted for")
    (slow,) = with_answers_lying()
    assert not slow.is_heard and len(slow.channel.unsent) <= wire.MESSAGE_MAX_BYTES + wire.LENGTH_BYTES
    replies = exchange(deaf, 20)
    assert [reply.request_id for reply in replies] == list(range(1, 21)), "once it listens, it gets them all"
    deaf.close()
    other.close()
    wait_for(lambda: not serving._listener._peers, what="hung up")
