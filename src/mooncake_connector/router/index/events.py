"""Read the KV-cache events of vLLM and SGLang, in every layout that either has published.

Pure: no sockets, threads or clocks.

A batch is an array ``[time, events, rank]``. An event is a map with the key ``type`` (both engines since mid-2026) or
an array that begins with its type (before); map keys that we do not know are skipped. The two engines agree on the
map's keys and on the array's first seven items; in vLLM's arrays the eighth is the LoRA adapter's name, in SGLang's the
cache salt. A block hash is a 64-bit number, signed or not, or the bytes of which that number is the end.

Whatever is not exactly this is refused with a reason, and bounded before it costs memory.
"""

from __future__ import annotations

import array
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from mooncake_connector.router.index.columns import Tier
from mooncake_store.errors import RemoteProtocolError

MESSAGE_MAX_BYTES = 16 << 20
EVENTS_MAX = 1 << 16
HASHES_MAX = 1 << 16
TOKENS_MAX = 1 << 20
BLOCK_TOKENS_MAX = 1 << 16
GROUPS_MAX = 64
TEXT_MAX_CHARS = 1024
HASH_MIN_BYTES = 8
HASH_MAX_BYTES = 64
ANY_GROUP = -1
_WORD_MASK = (1 << 64) - 1

Dialect = Literal["vllm", "sglang"]
Hash = (
    Annotated[int, msgspec.Meta(ge=-(1 << 63))]
    | Annotated[bytes, msgspec.Meta(min_length=HASH_MIN_BYTES, max_length=HASH_MAX_BYTES)]
)
Hashes = Annotated[list[Hash], msgspec.Meta(max_length=HASHES_MAX)]
TokenIds = Annotated[list[int | list[int]], msgspec.Meta(max_length=TOKENS_MAX)]
BlockTokens = Annotated[int, msgspec.Meta(ge=0, le=BLOCK_TOKENS_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX_CHARS)]
Group = Annotated[int, msgspec.Meta(ge=0, lt=GROUPS_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
ExtraKeys = Annotated[list[list[Any] | None], msgspec.Meta(max_length=HASHES_MAX)]

TIERS = {
    "GPU": Tier.DEVICE,
    "gpu": Tier.DEVICE,
    "cpu": Tier.HOST,
    "cpu_pinned": Tier.HOST,
    "disk": Tier.DISK,
    "storage": Tier.DISK,
    "external": Tier.POOL,
}
_WINDOWED_KINDS = {"sliding_window", "sliding_window_mla", "chunked_local_attention"}
_STATE_KINDS = {"mamba"}


class Stored(NamedTuple):
    """Blocks that follow each other in a prompt are now on a medium.

    Attributes:
        hashes: what the engine calls them.
        parent: what it calls the block before the first one; None at the start of a prompt.
        tokens: token ids, 32 bits each; empty when the engine tells only hashes, of blocks that it told of before.
        block_tokens: tokens per block; 0 when there are none.
        group: KV cache group; 0 where the engine has no groups.
        window_tokens: how much before a position the group needs to go on from there; 0 for all of it.
        lora, salt: what else must be equal; the salt is only told at the start of a prompt.
        contents: per block, what else it holds, such as images; None when no block does.
    """

    hashes: list[int]
    parent: int | None
    tokens: array.array[int]
    block_tokens: int
    tier: Tier
    group: int
    window_tokens: int
    lora: str
    salt: str
    contents: Sequence[bytes] | None


class Removed(NamedTuple):
    """Blocks are no longer on a medium; ``group`` is ``ANY_GROUP`` when the engine does not say."""

    hashes: list[int]
    tier: Tier
    group: int


class Cleared(NamedTuple):
    """The engine forgot every block."""


KvEvent = Stored | Removed | Cleared


class Batch(NamedTuple):
    """What one engine did in one step.

    Attributes:
        time_s: the engine's clock.
        events: in order.
        num_ignored: events on a medium that we do not know.
    """

    time_s: float
    events: Sequence[KvEvent]
    num_ignored: int


# ---- wire


class _StoredFields(msgspec.Struct, tag="BlockStored"):
    block_hashes: Hashes
    parent_block_hash: Hash | None = None
    token_ids: TokenIds = []
    block_size: BlockTokens = 0
    lora_id: int | None = None
    medium: Text | None = None
    lora_name: Text | None = None
    extra_keys: ExtraKeys | None = None
    group_idx: Group | None = None
    kv_cache_spec_kind: Text | None = None
    kv_cache_spec_sliding_window: Count | None = None
    locality: Text | None = None
    cache_salt: Text | None = None


class _RemovedFields(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: Hashes
    medium: Text | None = None
    group_idx: Group | None = None
    locality: Text | None = None


class _ClearedFields(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _StoredItems(_StoredFields, array_like=True, tag="BlockStored"):
    pass


class _SglangStoredItems(msgspec.Struct, array_like=True, tag="BlockStored"):
    block_hashes: Hashes
    parent_block_hash: Hash | None
    token_ids: TokenIds
    block_size: BlockTokens
    lora_id: int | None = None
    medium: Text | None = None
    cache_salt: Text | None = None
    session_id: Text | None = None
    lora_name: Text | None = None
    # What these arrays never told.
    extra_keys: None = None
    group_idx: None = None
    kv_cache_spec_kind: None = None
    locality: None = None


class _RemovedItems(_RemovedFields, array_like=True, tag="BlockRemoved"):
    pass


class _ClearedItems(_ClearedFields, array_like=True, tag="AllBlocksCleared"):
    pass


_Time = float
_Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)] | None


class _Maps(msgspec.Struct, array_like=True):
    time_s: _Time
    events: Annotated[list[_StoredFields | _RemovedFields | _ClearedFields], msgspec.Meta(max_length=EVENTS_MAX)]
    rank: _Rank = None


class _Arrays(msgspec.Struct, array_like=True):
    time_s: _Time
    events: Annotated[list[_StoredItems | _RemovedItems | _ClearedItems], msgspec.Meta(max_length=EVENTS_MAX)]
    rank: _Rank = None


class _SglangArrays(msgspec.Struct, array_like=True):
    time_s: _Time
    events: Annotated[list[_SglangStoredItems | _RemovedItems | _ClearedItems], msgspec.Meta(max_length=EVENTS_MAX)]
    rank: _Rank = None


_Wire = _Maps | _Arrays | _SglangArrays
_maps: msgspec.msgpack.Decoder[_Wire] = msgspec.msgpack.Decoder(_Maps)
_arrays: dict[Dialect, msgspec.msgpack.Decoder[_Wire]] = {
    "vllm": msgspec.msgpack.Decoder(_Arrays),
    "sglang": msgspec.msgpack.Decoder(_SglangArrays),
}
_encoder = msgspec.msgpack.Encoder()


def decode_batch(payload: bytes, dialect: Dialect = "vllm") -> Batch:
    """Return what one message says.

    Args:
        payload: the message's last frame.
        dialect: whose arrays they are, if they are arrays.

    Raises:
        RemoteProtocolError: for anything that is not exactly one well-formed batch.
    """
    if len(payload) > MESSAGE_MAX_BYTES:
        raise RemoteProtocolError(f"the batch has {len(payload)} bytes, more than {MESSAGE_MAX_BYTES}")
    try:
        wire = _decode(payload, dialect)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed batch of KV events: {error}") from error
    if not math.isfinite(wire.time_s):
        raise RemoteProtocolError(f"malformed batch of KV events: its time is {wire.time_s}")
    events: list[KvEvent] = []
    num_ignored = 0
    for each in wire.events:
        event = _read(each)
        if event is None:
            num_ignored += 1
        elif not isinstance(event, Removed) or not _is_merged(event, events):
            events.append(event)
    return Batch(wire.time_s, events, num_ignored)


def _decode(payload: bytes, dialect: Dialect) -> _Wire:
    try:
        return _maps.decode(payload)
    except msgspec.ValidationError as error:
        try:
            return _arrays[dialect].decode(payload)
        except msgspec.ValidationError as again:
            # Of the two reasons, the one that looked into an event helps.
            raise (again if "got `array`" in str(error) else error) from again


def _read(event: Any) -> KvEvent | None:
    if isinstance(event, _ClearedFields):
        return Cleared()
    tier = _tier(event.medium, event.locality)
    if tier is None:
        return None
    hashes = _words(event.block_hashes)
    if isinstance(event, _RemovedFields):
        return Removed(hashes, tier, ANY_GROUP if event.group_idx is None else event.group_idx)
    tokens = _tokens(event.token_ids)
    block_tokens = event.block_size if tokens else 0
    if tokens and len(tokens) != len(hashes) * block_tokens:
        raise RemoteProtocolError(
            f"malformed batch of KV events: {len(hashes)} blocks of {block_tokens} have {len(tokens)} tokens"
        )
    parent = event.parent_block_hash
    if parent is not None and (type(parent) is not int or parent < 0):
        parent = _word(parent)
    is_plain = not (event.lora_name or event.lora_id or event.cache_salt or event.extra_keys)
    lora, salt, contents = ("", "", None) if is_plain else _scope(event)
    window = _window(event, block_tokens) if event.kv_cache_spec_kind is not None else 0
    return Stored(hashes, parent, tokens, block_tokens, tier, event.group_idx or 0, window, lora, salt, contents)


def _is_merged(event: Removed, events: list[KvEvent]) -> bool:
    """Put a removal into the one before it, if it goes on with it: vLLM removes block by block."""
    last = events[-1] if events else None
    if not isinstance(last, Removed) or (last.tier, last.group) != (event.tier, event.group):
        return False
    last.hashes.extend(event.hashes)
    return True


def _tokens(token_ids: list[Any]) -> array.array[int]:
    try:
        if token_ids and type(token_ids[0]) is list:
            # With speculative decoding SGLang tells each token with its neighbour; the first of each pair is the text.
            token_ids = [first for first, _ in token_ids]
        return array.array("I", token_ids)
    except (TypeError, ValueError) as error:
        raise RemoteProtocolError("malformed batch of KV events: tokens and pairs of tokens are mixed") from error
    except OverflowError as error:
        raise RemoteProtocolError(f"malformed batch of KV events: a token is no 32-bit number: {error}") from error


def _tier(medium: str | None, locality: str | None) -> Tier | None:
    if medium is None:
        return Tier.DEVICE
    tier = TIERS.get(medium)
    if tier is None:
        tier = TIERS.get(medium.lower())
    return Tier.POOL if tier is Tier.DISK and locality == "REMOTE" else tier


def _word(value: int | bytes) -> int:
    """Return a hash as an unsigned 64-bit number: of bytes, the end of them, as vLLM does itself."""
    return (int.from_bytes(value[-8:], "big") if isinstance(value, bytes) else value) & _WORD_MASK


def _words(values: list[Any]) -> list[int]:
    try:
        if min(values, default=0) >= 0:
            return values
    except TypeError:
        pass  # bytes, or both kinds
    return [_word(value) for value in values]


def _window(event: Any, block_tokens: int) -> int:
    kind = event.kv_cache_spec_kind
    if kind in _WINDOWED_KINDS:
        window: int = event.kv_cache_spec_sliding_window or 0
        return window
    return block_tokens if kind in _STATE_KINDS else 0


def _scope(event: Any) -> tuple[str, str, list[bytes] | None]:
    """Return LoRA adapter, cache salt, and what each block holds besides tokens."""
    lora = event.lora_name or ""
    if not lora and event.lora_id:
        lora = f"#{event.lora_id}"
    salt = event.cache_salt or ""
    keys = event.extra_keys
    if not keys or not any(keys):
        return lora, salt, None
    if len(keys) != len(event.block_hashes):
        raise RemoteProtocolError(
            f"malformed batch of KV events: {len(event.block_hashes)} blocks have {len(keys)} extra keys"
        )
    contents = []
    for position, items in enumerate(keys):
        # vLLM lists the adapter's name, then images as (id, offset), then the salt, then digests of embeddings.
        rest = list(items or ())
        if rest and event.lora_name and rest[0] == event.lora_name:
            del rest[0]
        if position == 0 and event.parent_block_hash is None:
            texts = [item for item in rest if isinstance(item, str)]
            if texts:
                salt = texts[-1]
                rest.remove(salt)
        contents.append(_encoder.encode(rest) if rest else b"")
    return lora, salt, contents if any(contents) else None


# ---- frames


END_NUMBER = (1 << 64) - 1
NUMBER_BYTES = 8
FRAMES_MIN = 2
FRAMES_MAX = 4


def split_frames(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """Return number and payload of a message, live or replayed; ``END_NUMBER`` ends a replay.

    A live message has a topic before them. A replayed one has an empty frame, and a topic only since 2026.

    Raises:
        RemoteProtocolError: for any other message.
    """
    if not FRAMES_MIN <= len(frames) <= FRAMES_MAX or len(frames[-2]) != NUMBER_BYTES:
        sizes = [len(frame) for frame in frames[: FRAMES_MAX + 1]]
        raise RemoteProtocolError(f"malformed message of KV events: {len(frames)} frames of {sizes} bytes")
    return int.from_bytes(frames[-2], "big"), frames[-1]
