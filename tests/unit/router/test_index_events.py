"""What engines publish is read as they mean it, in every layout; what makes no sense is refused with a reason."""

from __future__ import annotations

import array

import msgspec
import pytest

from mooncake_connector.router.index.columns import Tier
from mooncake_connector.router.index.events import (
    ANY_GROUP,
    END_NUMBER,
    MESSAGE_MAX_BYTES,
    Cleared,
    Removed,
    Stored,
    decode_batch,
    split_frames,
)
from mooncake_store.errors import RemoteProtocolError

HASH_BYTES = bytes(range(32))
HASH_WORD = int.from_bytes(HASH_BYTES, "big") & ((1 << 64) - 1)
BASE = {"block_hashes": [1, 2], "parent_block_hash": None, "token_ids": [7, 8, 9, 10], "block_size": 2, "lora_id": None}


def read(*events: object, dialect: str = "vllm"):
    return decode_batch(msgspec.msgpack.encode([1.5, events, 0]), dialect).events  # type: ignore[arg-type]


def stored(**fields: object) -> Stored:
    (event,) = read({"type": "BlockStored", **BASE, **fields})
    assert isinstance(event, Stored)
    return event


def tokens(*values: int) -> array.array[int]:
    return array.array("I", values)


def test_vllm_maps_and_arrays_mean_the_same():
    fields = {**BASE, "medium": "GPU", "lora_name": "a", "extra_keys": [["a", ["image", 3], "salt"], None],
              "group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 128}  # fmt: skip
    expected = Stored([1, 2], None, tokens(7, 8, 9, 10), 2, Tier.DEVICE, 1, 128, "a", "salt",
                      [msgspec.msgpack.encode([["image", 3]]), b""])  # fmt: skip
    assert read({"type": "BlockStored", **fields, "session_id": "x"}) == [expected]
    assert read(["BlockStored", *fields.values()]) == [expected]
    removed = Removed([5], Tier.HOST, 2)
    assert read({"type": "BlockRemoved", "block_hashes": [5], "medium": "CPU", "group_idx": 2}) == [removed]
    assert read(["BlockRemoved", [5], "CPU", 2]) == [removed]
    assert read({"type": "AllBlocksCleared"}) == read(["AllBlocksCleared"]) == [Cleared()]


def test_sglang_arrays_have_the_salt_where_vllm_has_the_adapter():
    event = ["BlockStored", [-1], -2, [7, 8], 2, None, "CPU_PINNED", "pepper"]
    (read_as_sglang,) = read(event, dialect="sglang")
    assert read_as_sglang == Stored(
        [(1 << 64) - 1], (1 << 64) - 2, tokens(7, 8), 2, Tier.HOST, 0, 0, "", "pepper", None
    )
    (read_as_vllm,) = read(event)
    assert (read_as_vllm.lora, read_as_vllm.salt) == ("pepper", "")


def test_old_events_without_a_medium_are_on_the_device():
    assert read(["BlockStored", [1], None, [7], 1], ["BlockRemoved", [1]]) == [
        Stored([1], None, tokens(7), 1, Tier.DEVICE, 0, 0, "", "", None),
        Removed([1], Tier.DEVICE, ANY_GROUP),
    ]


def test_bytes_are_the_number_that_they_end_with():
    event = stored(block_hashes=[HASH_BYTES, 5], parent_block_hash=HASH_BYTES)
    assert event.hashes == [HASH_WORD, 5] and event.parent == HASH_WORD
    (removed,) = read({"type": "BlockRemoved", "block_hashes": [HASH_BYTES]})
    assert removed == Removed([HASH_WORD], Tier.DEVICE, ANY_GROUP)


def test_removals_that_follow_each_other_are_one():
    removals = [{"type": "BlockRemoved", "block_hashes": [number], "medium": "GPU"} for number in range(3)]
    other = {"type": "BlockRemoved", "block_hashes": [9], "medium": "CPU"}
    assert read(*removals, other, removals[0]) == [
        Removed([0, 1, 2], Tier.DEVICE, ANY_GROUP),
        Removed([9], Tier.HOST, ANY_GROUP),
        Removed([0], Tier.DEVICE, ANY_GROUP),
    ]


@pytest.mark.parametrize(
    ("medium", "locality", "tier"),
    [("GPU", None, Tier.DEVICE), ("cpu", None, Tier.HOST), ("CPU_PINNED", None, Tier.HOST), ("DISK", None, Tier.DISK),
     ("STORAGE", "LOCAL", Tier.DISK), ("STORAGE", "REMOTE", Tier.POOL), ("EXTERNAL", None, Tier.POOL)],
)  # fmt: skip
def test_media(medium, locality, tier):
    assert stored(medium=medium, locality=locality).tier is tier


def test_a_medium_that_nobody_knows_is_counted():
    batch = decode_batch(msgspec.msgpack.encode([1, [{"type": "BlockStored", **BASE, "medium": "TAPE"}]]))
    assert (batch.events, batch.num_ignored) == ([], 1)


@pytest.mark.parametrize(
    ("kind", "window", "expected"),
    [("full_attention", None, 0), (None, 99, 0), ("sliding_window", 100, 100), ("mamba", None, 2)],
)
def test_windows(kind, window, expected):
    assert stored(kv_cache_spec_kind=kind, kv_cache_spec_sliding_window=window).window_tokens == expected


def test_scopes():
    assert stored(lora_id=3).lora == "#3"
    # The salt is told with the first block of a prompt only; later text is content.
    later = stored(parent_block_hash=5, extra_keys=[["x"], None])
    assert later.salt == "" and later.contents == [msgspec.msgpack.encode(["x"]), b""]
    assert stored(extra_keys=[None, None]).contents is None


def test_pairs_of_tokens_are_told_by_their_first():
    assert stored(token_ids=[[7, 8], [8, 9], [9, 10], [10, 11]]).tokens == tokens(7, 8, 9, 10)


def test_hashes_without_tokens():
    event = stored(token_ids=[], block_size=0, medium="CPU")
    assert (event.hashes, len(event.tokens), event.block_tokens) == ([1, 2], 0, 0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_ids": [1, 2, 3]}, "2 blocks of 2 have 3 tokens"),
        ({"token_ids": [1, 2, 3, -1]}, "32-bit"),
        ({"token_ids": [1, 2, 3, 1 << 32]}, "32-bit"),
        ({"token_ids": [1, 2, 3, [4, 5]]}, "mixed"),
        ({"token_ids": [[1, 2]] * 3 + [[4]]}, "mixed"),
        ({"block_hashes": [b"short", 1]}, "length"),
        ({"block_hashes": ["x", 1]}, "Expected `int | bytes`"),
        ({"block_size": -2}, "Expected `int` >= 0"),
        ({"group_idx": 64}, "Expected `int`"),
        ({"extra_keys": [["x"]]}, "2 blocks have 1 extra keys"),
        ({"medium": "x" * 2000}, "length"),
    ],
)
def test_nonsense_in_an_event(fields, reason):
    with pytest.raises(RemoteProtocolError, match="malformed batch of KV events") as caught:
        stored(**fields)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", msgspec.msgpack.encode([1.0]), msgspec.msgpack.encode([float("nan"), []]),
     msgspec.msgpack.encode([float("inf"), []]), msgspec.msgpack.encode({"ts": 1}),
     msgspec.msgpack.encode([1.0, [{"type": "BlockMoved"}]]), msgspec.msgpack.encode([1.0, [["BlockMoved"]]]),
     b"x" * (MESSAGE_MAX_BYTES + 1)],
)  # fmt: skip
def test_nonsense_instead_of_a_batch(payload):
    with pytest.raises(RemoteProtocolError):
        decode_batch(payload)


def test_the_reason_is_that_of_the_layout_used():
    with pytest.raises(RemoteProtocolError, match=r"\$\[1\]\[0\]\[4\]"):
        read(["BlockStored", [1], None, [7], "x"])
    with pytest.raises(RemoteProtocolError, match=r"block_size"):
        read({"type": "BlockStored", **BASE, "block_size": "x"})


def test_frames():
    number = (7).to_bytes(8, "big")
    for frames in ([b"topic", number, b"p"], [b"", number, b"p"], [b"", b"topic", number, b"p"], [number, b"p"]):
        assert split_frames(frames) == (7, b"p")
    assert split_frames([b"", b"\xff" * 8, b""]) == (END_NUMBER, b"")
    for frames in ([], [b"p"], [b"topic", b"short", b"p"], [b"", b"", b"", number, b"p"]):
        with pytest.raises(RemoteProtocolError, match="frames of"):
            split_frames(frames)
