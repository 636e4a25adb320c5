from __future__ import annotations

import pytest

from mooncake_connector.router.messages import (
    FRAME_MAX_BYTES,
    Accepted,
    Admit,
    Busy,
    DecodeParams,
    Finished,
    LoadReport,
    Place,
    Placed,
    PrefillParams,
    Refused,
    Register,
    Unregister,
    decode_answer,
    decode_question,
    encode,
)
from mooncake_store.errors import RemoteProtocolError

GOLDEN = (
    (Register("http://e:1", "both", "m", "id", ("tcp://a:1",)),
     "0196a87265676973746572aa687474703a2f2f653a31a4626f7468a16da2696491a97463703a2f2f613a31"),
    (Unregister("http://e:1"), "0192aa756e7265676973746572aa687474703a2f2f653a31"),
    (LoadReport("http://e:1", 7, 9), "0194a46c6f6164aa687474703a2f2f653a310709"),
    (Place("r", 100, 16, "m", (1, 2**64 - 1), ("http://e:1",), b"\1\0\0\0", "s"),
     "0199a5706c616365a1726410a16d9201cfffffffffffffffff91aa687474703a2f2f653a31c40401000000a173"),
    (Finished("t", "failed", "decode"), "0194a866696e6973686564a174a66661696c6564a66465636f6465"),
    (Placed("r", "http://p:1", "http://d:1", "t",
            PrefillParams(do_remote_decode=True, do_remote_prefill=False, transfer_id="t"),
            DecodeParams(do_remote_prefill=True, do_remote_decode=False, transfer_id="t", remote_engine_id="e",
                         remote_addresses=("tcp://a:1",))),
     "0199a6706c61636564a172aa687474703a2f2f703a31aa687474703a2f2f643a31a17483b0646f5f72656d6f74655f6465636f6465c3b1646f"
     "5f72656d6f74655f70726566696c6cc2ab7472616e736665725f6964a17485b1646f5f72656d6f74655f70726566696c6cc3b0646f5f72656d"
     "6f74655f6465636f6465c2ab7472616e736665725f6964a174b072656d6f74655f656e67696e655f6964a165b072656d6f74655f6164647265"
     "7373657391a97463703a2f2f613a31a0c0"),
    (Refused("r", "full", "why"), "0194a772656675736564a172a466756c6ca3776879"),
    (Admit(Place("r", 100), "paid", "t", 1500, -2, 3, 9000),
     "0198a561646d697499a5706c616365a1726400a09090c400a0a470616964a174cd05dcfe03cd2328"),
    (Busy("r", "why", 7), "0194a462757379a172a377687907"),
    (Accepted("r"), "0192a86163636570746564a172"),
)  # fmt: skip


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=[type(message).__name__ for message, _ in GOLDEN])
def test_bytes_never_change(message: object, golden: str) -> None:
    frame = encode(message)  # type: ignore[arg-type]
    assert frame.hex() == golden
    decode = decode_answer if isinstance(message, Placed | Refused | Busy | Accepted) else decode_question
    assert decode(frame) == message


def test_a_later_version_may_append_fields() -> None:
    longer = b"\x01\x95\xa4load\xaahttp://e:1\x07\x09\xa3new"
    assert decode_question(longer) == LoadReport("http://e:1", 7, 9)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "empty"),
        (b"\x02" + encode(Unregister("http://e:1"))[1:], "version 2"),
        (b"\x01", "truncated"),
        (encode(Unregister("http://e:1")) + b"\x00", "trailing"),
        (encode(Accepted("x")), "accepted"),  # an answer is no question
        (b"\x01" + b"\x00" * FRAME_MAX_BYTES, "more than"),
        (b"\x01\x93\xa8register\xaahttp://e:1\xa4boss", "boss"),
        (b"\x01\x92\xaaunregister\xa9ftp://e:1", "regex"),
        (b"\x01\x92\xaaunregister\xadhttp://e:1/v1", "regex"),
        (b"\x01\x93\xa5place\xa0\x01", "length"),
        (b"\x01\x93\xa5place\xa1r\xff", ">= 0"),
        (b"\x01" + b"\x91" * 5000, "malformed"),
    ],
)
def test_bad_frames_are_rejected_with_the_reason(frame: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match="(?i)" + reason):
        decode_question(frame)
