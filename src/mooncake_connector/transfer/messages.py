"""Define what a prefill worker and a decode worker say to each other about a hand-over.

Pure. msgspec tagged structs in msgpack behind one version byte; golden bytes in tests/unit/transfer. Grouped by
receiver. A decode worker opens with Hello; everything else waits for its Welcome or Refused.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.layout import KVLayout, Size
from mooncake_connector.kv.plan import Progress
from mooncake_store.errors import RemoteProtocolError
from mooncake_store.transport.base import RegionDescriptor
from mooncake_store.types import HostIdentity, Pid, Uint63

WIRE_VERSION = 2
MESSAGE_MAX_BYTES = 4 << 20
TEXT_MAX_CHARS = 65_536
TRANSFER_ID_MAX_CHARS = 1024
HEARTBEATS_MAX = 65_536
BLOCKS_MAX = 1 << 20
NOTE_MAX_BYTES = 64 << 10
PARTS_MAX = 4096

TransferId = Annotated[str, Meta(max_length=TRANSFER_ID_MAX_CHARS)]
Text = Annotated[str, Meta(max_length=TEXT_MAX_CHARS)]
Index = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


# ---- to the prefill worker


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Say who we are; ``pid`` with ``host`` lets a peer on this machine watch our process."""

    fingerprint: Fingerprint
    host: HostIdentity
    pid: Pid


class Subscribe(msgspec.Struct, frozen=True, array_like=True, tag="subscribe"):
    """Ask to be told what becomes ready of one transfer; repeated harmlessly."""

    transfer_id: TransferId


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="heartbeat"):
    """Renew the leases of these transfers."""

    transfer_ids: Annotated[list[TransferId], Meta(max_length=HEARTBEATS_MAX)]


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """Say that we read all we want of a transfer; its blocks may go."""

    transfer_id: TransferId


class VerifyRequest(msgspec.Struct, frozen=True, array_like=True, tag="verify"):
    """Ask for the checksums of the first ``num_blocks`` blocks of a transfer; only with ``verify`` on."""

    transfer_id: TransferId
    num_blocks: Uint63


# ---- to the decode worker


class CachePart(msgspec.Struct, frozen=True, array_like=True):
    """One region of a cache; ``offset`` is where it begins in the layout's address space."""

    offset: Size
    region: RegionDescriptor


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """Describe the prefill worker's cache and its page of epoch words, once per connection.

    ``cache`` covers every page of ``layout``, not necessarily what is between pages.
    """

    layout: KVLayout
    cache: Annotated[tuple[CachePart, ...], Meta(min_length=1, max_length=PARTS_MAX)]
    epochs: RegionDescriptor
    host: HostIdentity
    pid: Pid

    def __post_init__(self) -> None:
        end = max(part.offset + part.region.size_bytes for part in self.cache)
        if self.layout.size_bytes > end:
            raise ValueError(f"a layout of {self.layout.size_bytes} bytes in regions that end at {end}")


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Say why this peer gets nothing: the fields in which the fingerprints differ."""

    reason: Text


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Tell how far a prefill has come.

    Attributes:
        epoch_slot: index of the transfer's 64-bit word in the epochs region.
        epoch: value it must still have after a copy; anything else means that the copy may hold other bytes.
        progress: see kv.plan.Progress.
        block_ids: ids of the prompt's blocks; None when unchanged since the last Ready of this transfer to this peer.
        note: what the prefill engine has to say once the last block is ready; None before, and when it says nothing.
    """

    transfer_id: TransferId
    epoch_slot: Index
    epoch: int
    progress: Progress
    block_ids: Annotated[list[Index], Meta(max_length=BLOCKS_MAX)] | None
    note: Annotated[bytes, Meta(max_length=NOTE_MAX_BYTES)] | None = None


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Say that nothing more will come of a transfer."""

    transfer_id: TransferId
    reason: Text


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="alive"):
    """Answer a heartbeat."""


class VerifyReply(msgspec.Struct, frozen=True, array_like=True, tag="verified"):
    """Give one checksum per block; empty when the transfer is gone."""

    transfer_id: TransferId
    checksums: Annotated[list[int], Meta(max_length=BLOCKS_MAX)]


Message = TypeVar("Message")
ToPrefill = Hello | Subscribe | Heartbeat | Done | VerifyRequest
ToDecode = Welcome | Refused | Ready | Abort | Alive | VerifyReply

_encoder = msgspec.msgpack.Encoder()
_to_prefill = msgspec.msgpack.Decoder(ToPrefill)
_to_decode = msgspec.msgpack.Decoder(ToDecode)
_VERSION = bytes([WIRE_VERSION])


def encode(message: ToPrefill | ToDecode) -> bytes:
    """Return the bytes of one message."""
    return _VERSION + _encoder.encode(message)


def decode_to_prefill(data: bytes) -> ToPrefill:
    """Read a message sent to a prefill worker. Raises: RemoteProtocolError with the reason."""
    message: ToPrefill = _decode(data, _to_prefill)
    return message


def decode_to_decode(data: bytes) -> ToDecode:
    """Read a message sent to a decode worker. Raises: RemoteProtocolError with the reason."""
    message: ToDecode = _decode(data, _to_decode)
    return message


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[Message]) -> Message:
    if len(data) > MESSAGE_MAX_BYTES:
        raise RemoteProtocolError(f"message of {len(data)} bytes; at most {MESSAGE_MAX_BYTES} are read")
    if data[:1] != _VERSION:
        raise RemoteProtocolError(f"hand-over wire version {data[:1].hex() or 'missing'}, ours is {WIRE_VERSION:02x}",
                                  hint="run the same plugin version on both engines")
    try:
        message: Message = decoder.decode(memoryview(data)[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed hand-over message: {error}") from error
    return message
