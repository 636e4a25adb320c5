"""Define the messages that readers and owners exchange, and turn them into bytes and back.

Pure. A message is one version byte followed by one msgpack array whose first element is the message's tag. On a stream
its length goes before it, as 4 bytes, big-endian.

==============  ==================  =====================================================================
reader -> owner  answered with       meaning
==============  ==================  =====================================================================
Hello            Welcome, Denied     who we are; the answer names the owner's life and its region
Acquire          Granted, Denied     promise that these blocks stay put for ``ttl_ms``
Renew            Renewed, Denied     prolong that promise
Release          nothing             we have what we wanted
Fetch            Fetched, Denied     send these blocks, which are small
Report           nothing             the bytes of this block did not match its checksum: look again
Offer            Accepted, Denied    we hold blocks that you might want to keep as well
StatusRequest    StatusReply         metrics and facts, for people and tests
==============  ==================  =====================================================================

Every length is bounded here, so a decoded message is safe to loop over. ``request_id`` is chosen by the asker and
returned unchanged; 0 answers a message that could not be understood.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
from msgspec import Meta

from mooncake_store.errors import LocalProtocolError, RemoteProtocolError
from mooncake_store.transport.base import RegionDescriptor
from mooncake_store.types import CONTENT_MAX_BYTES, NAMESPACE_BYTES, PART_BYTES, HostIdentity

WIRE_VERSION = 3
MESSAGE_MAX_BYTES = 1 << 20
LENGTH_BYTES = 4
KEYS_MAX = 1024
FETCH_MAX_BYTES = 16 << 10
"""Blocks that together have no more can be fetched, which takes less time than a lease and a read."""
KEY_MAX_BYTES = NAMESPACE_BYTES + PART_BYTES + CONTENT_MAX_BYTES
TEXT_MAX_CHARS = 512
TTL_MAX_MS = 600_000
SAMPLES_MAX = 4096

Key = Annotated[bytes, Meta(min_length=1, max_length=KEY_MAX_BYTES)]
Keys = Annotated[tuple[Key, ...], Meta(min_length=1, max_length=KEYS_MAX)]
Text = Annotated[str, Meta(max_length=TEXT_MAX_CHARS)]
Uint63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Length = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Checksum = Uint63
"""See transport/checksum.py; says which kind it is."""
TtlMs = Annotated[int, Meta(ge=1, le=TTL_MAX_MS)]


class WireError(RemoteProtocolError):
    """A message cannot be accepted; ``reason`` is one of a closed set, fit for a metric label."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message, hint="run the same mooncake version on every member of the cell")
        self.reason = reason


class FramingError(WireError):
    """What follows on the stream cannot be told apart: the connection is of no more use."""


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Common shape of every message."""


class Hello(_Message, frozen=True, array_like=True, tag="hello"):
    """Introduce a reader. ``version`` is the package's, for people."""

    request_id: Uint63
    node_id: Text
    host: HostIdentity
    version: Text


class Welcome(_Message, frozen=True, array_like=True, tag="welcome"):
    """Name the owner's life and the region its extents are in; ``region`` is None when it lends no memory."""

    request_id: Uint63
    node_id: Text
    host: HostIdentity
    version: Text
    region: RegionDescriptor | None


class Acquire(_Message, frozen=True, array_like=True, tag="acquire"):
    """Ask for a lease on blocks."""

    request_id: Uint63
    keys: Keys
    ttl_ms: TtlMs


class BlockEntry(_Message, frozen=True, array_like=True):
    """Where one leased block is in the owner's region, and the checksum of its bytes."""

    offset: Uint63
    length: Length
    checksum: Checksum


class Granted(_Message, frozen=True, array_like=True, tag="granted"):
    """Grant a lease: one entry per key asked for, None where the owner has no such block.

    ``lease_id`` is 0 when every entry is None: nothing is held, nothing needs a release.
    """

    request_id: Uint63
    lease_id: Uint63
    ttl_ms: TtlMs
    entries: Annotated[tuple[BlockEntry | None, ...], Meta(max_length=KEYS_MAX)]


class Denied(_Message, frozen=True, array_like=True, tag="denied"):
    """Refuse a request. ``reason`` is a short word from ``DENIALS``, ``detail`` is for people."""

    request_id: Uint63
    reason: Text
    detail: Text = ""


class Renew(_Message, frozen=True, array_like=True, tag="renew"):
    """Prolong a lease."""

    request_id: Uint63
    lease_id: Uint63
    ttl_ms: TtlMs


class Renewed(_Message, frozen=True, array_like=True, tag="renewed"):
    """Confirm that a lease was still alive and now is for ``ttl_ms`` more."""

    request_id: Uint63
    lease_id: Uint63
    ttl_ms: TtlMs


class Release(_Message, frozen=True, array_like=True, tag="release"):
    """Give a lease back."""

    lease_id: Uint63


class Fetch(_Message, frozen=True, array_like=True, tag="fetch"):
    """Ask for the bytes of blocks, at most ``FETCH_MAX_BYTES`` together."""

    request_id: Uint63
    keys: Keys


class FetchedBlock(_Message, frozen=True, array_like=True):
    """One block: its bytes, and the checksum that its owner has of them."""

    checksum: Checksum
    data: Annotated[bytes, Meta(min_length=1, max_length=FETCH_MAX_BYTES)]


class Fetched(_Message, frozen=True, array_like=True, tag="fetched"):
    """Send copies of blocks: one per key asked for, None where the owner has no such block."""

    request_id: Uint63
    blocks: Annotated[tuple[FetchedBlock | None, ...], Meta(max_length=KEYS_MAX)]


class Report(_Message, frozen=True, array_like=True, tag="report"):
    """Tell the owner that a block's bytes did not have the checksum it granted."""

    key: Key
    checksum: Checksum


class Offer(_Message, frozen=True, array_like=True, tag="offer"):
    """Offer blocks to a capacity node, which may pull them from ``control`` like any reader."""

    request_id: Uint63
    node_id: Text
    control: Text
    host: HostIdentity
    keys: Keys
    lengths: Annotated[tuple[Length, ...], Meta(min_length=1, max_length=KEYS_MAX)]


class Accepted(_Message, frozen=True, array_like=True, tag="accepted"):
    """Answer an offer with how many of its blocks will be pulled and how many are held already."""

    request_id: Uint63
    num_wanted: Uint63
    num_held: Uint63


class StatusRequest(_Message, frozen=True, array_like=True, tag="status?"):
    """Ask for metrics and facts."""

    request_id: Uint63


class StatusReply(_Message, frozen=True, array_like=True, tag="status"):
    """Carry every metric sample by name, and facts such as the node's id, kind and version."""

    request_id: Uint63
    samples: Annotated[dict[Text, float], Meta(max_length=SAMPLES_MAX)]
    info: Annotated[dict[Text, Text], Meta(max_length=SAMPLES_MAX)]


DENIALS = ("version", "malformed", "hello_first", "no_such_lease", "too_many_leases", "no_segment", "not_a_store",
           "busy", "closing", "too_large", "unexpected")
"""Every ``Denied.reason`` that this version sends."""

Message = (Hello | Welcome | Acquire | Granted | Denied | Renew | Renewed | Release | Fetch | Fetched | Report | Offer
           | Accepted | StatusRequest | StatusReply)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_HEAD = struct.Struct(">IB")


def encode(message: Message) -> bytes:
    """Return the bytes of one message.

    Raises:
        LocalProtocolError: if it is larger than ``MESSAGE_MAX_BYTES``; senders split before that.
    """
    return frame(message)[LENGTH_BYTES:]


def frame(message: Message) -> bytes:
    """Return one message as it goes onto a stream. Raises LocalProtocolError as ``encode``."""
    body = _ENCODER.encode(message)
    size = len(body) + 1
    if size > MESSAGE_MAX_BYTES:
        raise LocalProtocolError(f"{type(message).__name__} has {size} bytes, more than {MESSAGE_MAX_BYTES}")
    return _HEAD.pack(size, WIRE_VERSION) + body


def decode(data: bytes) -> Message:
    """Return the message in ``data``.

    Raises:
        WireError: with ``reason`` ``empty``, ``too_large``, ``version`` or ``malformed``.
    """
    if len(data) == 0:
        raise WireError("empty", "a message without bytes")
    if len(data) > MESSAGE_MAX_BYTES:
        raise WireError("too_large", f"a message of {len(data)} bytes, more than {MESSAGE_MAX_BYTES}")
    if data[0] != WIRE_VERSION:
        raise WireError("version", f"wire version {data[0]}; this side speaks {WIRE_VERSION}")
    try:
        message: Message = _DECODER.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError("malformed", f"not a valid message: {error}") from error
    if isinstance(message, Offer) and len(message.keys) != len(message.lengths):
        raise WireError("malformed", f"an offer of {len(message.keys)} keys with {len(message.lengths)} lengths")
    return message


class Inbox:
    """Cuts a stream into messages. Keeps what was fed and not taken: less than a message, when all are taken."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes)

    def feed(self, data: bytes) -> None:
        """Append what arrived."""
        self._bytes += data

    def take(self) -> Message | None:
        """Take the next message; None when it is not complete.

        Raises:
            WireError: as ``decode``; the message is taken nevertheless.
            FramingError: with ``reason`` ``too_large``.
        """
        data = self._bytes
        if len(data) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "big")
        if end > LENGTH_BYTES + MESSAGE_MAX_BYTES:
            raise FramingError("too_large", f"a message of {end - LENGTH_BYTES} bytes, more than {MESSAGE_MAX_BYTES}")
        if len(data) < end:
            return None
        message = bytes(data[LENGTH_BYTES:end])
        del data[:end]
        return decode(message)
