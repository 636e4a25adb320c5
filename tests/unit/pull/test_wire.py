"""The wire: golden bytes, round trips, and garbage that must be rejected with a reason."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_store.errors import LocalProtocolError
from mooncake_store.pull import wire
from mooncake_store.transport.base import CmaOffer, RegionDescriptor, ShmOffer, TcpOffer
from mooncake_store.types import HostIdentity

HOST = HostIdentity("boot", 7)
REGION = RegionDescriptor(5, 4096, HOST, (ShmOffer("sock"), CmaOffer(1, 2, 3, 4), TcpOffer("h", 9)))

# These bytes are what every released version speaks: changing one means a new WIRE_VERSION.
GOLDEN = [
    (wire.Hello(1, "n", HOST, "0.1"), "0395a568656c6c6f01a16e92a4626f6f7407a3302e31"),
    (wire.Welcome(1, "n", HOST, "0.1", None), "0396a777656c636f6d6501a16e92a4626f6f7407a3302e31c0"),
    (wire.Acquire(2, (b"k", b"l"), 5000), "0394a7616371756972650292c4016bc4016ccd1388"),
    (wire.Granted(2, 3, 5000, (wire.BlockEntry(4096, 10, 99), None)),
     "0395a76772616e7465640203cd13889293cd10000a63c0"),
    (wire.Fetch(2, (b"k", b"l")), "0393a566657463680292c4016bc4016c"),
    (wire.Fetched(2, (wire.FetchedBlock(99, b"ab"), None)), "0393a76665746368656402929263c4026162c0"),
    (wire.Denied(2, "busy"), "0394a664656e69656402a462757379a0"),
    (wire.Renew(3, 3, 5000), "0394a572656e65770303cd1388"),
    (wire.Renewed(3, 3, 5000), "0394a772656e657765640303cd1388"),
    (wire.Release(3), "0392a772656c6561736503"),
    (wire.Report(b"k", 1), "0393a67265706f7274c4016b01"),
    (wire.Offer(4, "n", "tcp://h:1", HOST, (b"k",), (10,)),
     "0397a56f6666657204a16ea97463703a2f2f683a3192a4626f6f740791c4016b910a"),
    (wire.Accepted(4, 1, 0), "0394a86163636570746564040100"),
    (wire.StatusRequest(5), "0392a77374617475733f05"),
    (wire.StatusReply(5, {"m": 1.0}, {"a": "b"}), "0394a67374617475730581a16dcb3ff000000000000081a161a162"),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda value: type(value).__name__)
def test_golden_bytes(message, golden):
    assert wire.encode(message).hex() == golden
    assert wire.decode(bytes.fromhex(golden)) == message


def test_every_message_has_golden_bytes():
    assert {type(message) for message, _ in GOLDEN} == set(wire.Message.__args__)


def test_a_welcome_carries_every_kind_of_offer():
    message = wire.Welcome(1, "n", HOST, "0.1", REGION)
    assert wire.decode(wire.encode(message)) == message


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_rejected_with_a_reason_and_nothing_else(data):
    try:
        wire.decode(data)
    except wire.WireError as error:
        assert error.reason in {"empty", "version", "malformed"} and error.message


@settings(max_examples=150, deadline=None)
@given(which=st.integers(0, len(GOLDEN) - 1), position=st.integers(0, 60), value=st.integers(0, 255),
       cut=st.integers(0, 60))
def test_damaged_messages_are_rejected_or_still_within_bounds(which, position, value, cut):
    data = bytearray(bytes.fromhex(GOLDEN[which][1]))
    data[position % len(data)] = value
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            message = wire.decode(damaged)
        except wire.WireError as error:
            assert error.reason in {"empty", "version", "malformed"}
        else:
            assert len(wire.encode(message)) <= wire.MESSAGE_MAX_BYTES
            assert all(length > 0 for length in getattr(message, "lengths", ()))


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "empty"),
    (b"\x01" + wire.encode(wire.Release(1))[1:], "version"),
    (b"\x03" + bytes(wire.MESSAGE_MAX_BYTES), "too_large"),
    (wire.encode(wire.Release(1)) + b"\0", "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["release", -1]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["release", 1, 2]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["acquire", 1, [], 5]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["acquire", 1, [b"k" * 83], 5]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["acquire", 1, [b"k"] * 1025, 5]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["acquire", 1, [b"k"], 0]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["fetch", 1, []]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["fetched", 1, [[9, b""]]]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["fetched", 1, [[9, bytes(wire.FETCH_MAX_BYTES + 1)]]]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["offer", 1, "n", "c", ["b", 1], [b"k"], [1, 2]]), "malformed"),
    (b"\x03" + msgspec.msgpack.encode({"type": "release"}), "malformed"),
    (b"\x03" + msgspec.msgpack.encode(["renewal", 1]), "malformed"),
], ids=range(16))
def test_what_breaks_a_rule_is_rejected_for_that_reason(data, reason):
    with pytest.raises(wire.WireError) as caught:
        wire.decode(data)
    assert caught.value.reason == reason


def messages_in(data: bytes, sizes: list[int]) -> list[wire.Message | str]:
    """Feed a stream in pieces of these sizes, over and over; return what comes out, for refusals their reason."""
    inbox, found, start = wire.Inbox(), [], 0
    while start < len(data):
        size = sizes[0]
        sizes = [*sizes[1:], size]
        inbox.feed(data[start:start + size])
        start += size
        try:
            while (message := inbox.take()) is not None:
                found.append(message)
        except wire.WireError as error:
            found.append(error.reason)
            if isinstance(error, wire.FramingError):
                break
    return found


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_however_a_stream_is_cut_the_same_messages_come_out(sizes):
    messages = [message for message, _ in GOLDEN]
    assert messages_in(b"".join(wire.frame(message) for message in messages), sizes) == messages


def test_a_stream_goes_on_behind_a_bad_message_and_ends_at_a_bad_length():
    bad = (3).to_bytes(4, "big") + b"\x03\xff\xff"
    good = wire.frame(wire.Release(1))
    # fed byte by byte, so that what is refused is taken on its own
    assert messages_in(bytes(4) + bad + good, [1]) == ["empty", "malformed", wire.Release(1)]
    assert messages_in(good + b"GET / HTTP/1.1" + good, [1]) == [wire.Release(1), "too_large"]
    assert messages_in((wire.MESSAGE_MAX_BYTES + 1).to_bytes(4, "big"), [4]) == ["too_large"]


def test_an_inbox_keeps_what_is_not_a_whole_message():
    inbox = wire.Inbox()
    inbox.feed(wire.frame(wire.Release(1))[:-1])
    assert inbox.take() is None and len(inbox) > 0
    inbox.feed(wire.frame(wire.Release(1))[-1:])
    assert inbox.take() == wire.Release(1) and len(inbox) == 0


def test_a_message_too_large_to_send_is_our_bug():
    with pytest.raises(LocalProtocolError, match="StatusReply"):
        wire.encode(wire.StatusReply(1, {}, {str(number): "x" * 500 for number in range(2100)}))
