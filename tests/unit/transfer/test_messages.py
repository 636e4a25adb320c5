"""The hand-over's wire format: golden bytes, and nothing but our messages is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv.plan import Progress
from mooncake_connector.transfer import messages
from mooncake_connector.transfer.messages import Abort, Alive, Done, Heartbeat, Ready, Refused, Subscribe, VerifyRequest
from mooncake_store.errors import RemoteProtocolError

GOLDEN_TO_PREFILL = [
    (Subscribe("t1"), "0292a9737562736372696265a27431"),
    (Heartbeat(["t1", "t2"]), "0292a968656172746265617492a27431a27432"),
    (Done("t1"), "0292a4646f6e65a27431"),
    (VerifyRequest("t1", 3), "0293a6766572696679a2743103"),
]
GOLDEN_TO_DECODE = [
    (Ready("t1", 5, 7, Progress(128, 256, 3), [9, 8]), "0297a57265616479a27431050793cc80cd010003920908c0"),
    (Ready("t1", 5, 7, Progress(128, 128, 0), None), "0297a57265616479a27431050793cc80cc8000c0c0"),
    (Ready("t1", 5, 7, Progress(128, 128, 0), None, b"row"), "0297a57265616479a27431050793cc80cc8000c0c403726f77"),
    (Abort("t1", "gone"), "0293a561626f7274a27431a4676f6e65"),
    (Refused("no"), "0292a772656675736564a26e6f"),
    (Alive(), "0291a5616c697665"),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN_TO_PREFILL)
def test_golden_to_prefill(message, golden):
    assert messages.encode(message).hex() == golden
    assert messages.decode_to_prefill(bytes.fromhex(golden)) == message


@pytest.mark.parametrize(("message", "golden"), GOLDEN_TO_DECODE)
def test_golden_to_decode(message, golden):
    assert messages.encode(message).hex() == golden
    assert messages.decode_to_decode(bytes.fromhex(golden)) == message


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x02", b"\x02\xc1", b"\x02\x91\xa5alien", b"\x02\x92\xa4done\x05"])
def test_garbage_is_rejected_with_a_reason(data):
    with pytest.raises(RemoteProtocolError) as caught:
        messages.decode_to_prefill(data)
    assert len(caught.value.message) > 10


def test_an_oversized_message_is_rejected_before_it_is_read():
    with pytest.raises(RemoteProtocolError, match="bytes; at most"):
        messages.decode_to_decode(b"\x02" + bytes(messages.MESSAGE_MAX_BYTES))


@given(st.binary(max_size=300), st.sampled_from([messages.decode_to_prefill, messages.decode_to_decode]))
def test_any_bytes_are_a_message_or_a_rejection(data, decode):
    try:
        message = decode(b"\x02" + data)
    except RemoteProtocolError:
        return
    assert decode(messages.encode(message)) == message
