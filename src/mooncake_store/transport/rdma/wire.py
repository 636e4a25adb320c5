"""Define what the two ends of an RDMA connection tell each other over tcp before the first read.

Pure. One question, one answer::

    header(12): magic, version, kind, length of the body | body: msgpack

The connection then stays open without a word: its end is the end of the queue pairs, on either side.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from mooncake_store.errors import RemoteProtocolError
from mooncake_store.transport.rdma.backend import Queue
from mooncake_store.transport.rdma.gids import GID_BYTES, Gid, LinkLayer
from mooncake_store.transport.rdma.rails import RAILS_MAX, RailEnd

MAGIC = b"MRDM"
VERSION = 1
HEADER = struct.Struct("<4sHHI")
BODY_MAX_BYTES = 32 << 10
GIDS_MAX = 64
QUEUES_MAX = 4

_U24 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
_U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_U63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Lid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
_Mtu = Annotated[int, msgspec.Meta(ge=1, le=5)]
_ReadsMax = Annotated[int, msgspec.Meta(ge=1, le=255)]
_RawGid = Annotated[bytes, msgspec.Meta(min_length=GID_BYTES, max_length=GID_BYTES)]
_Position = Annotated[int, msgspec.Meta(ge=0, lt=RAILS_MAX)]


class WireQueue(msgspec.Struct, frozen=True, array_like=True):
    """One queue pair."""

    number: _U24
    packet_number: _U24


class WireGid(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a port's table."""

    index: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    is_version2: bool
    raw: _RawGid


_Queues = Annotated[tuple[WireQueue, ...], msgspec.Meta(min_length=1, max_length=QUEUES_MAX)]


class ReaderRail(msgspec.Struct, frozen=True, array_like=True):
    """A rail that the reader can use, with its queue pairs ready."""

    link_layer: LinkLayer
    lid: _Lid
    mtu: _Mtu
    reads_max: _ReadsMax
    gids: Annotated[tuple[WireGid, ...], msgspec.Meta(max_length=GIDS_MAX)]
    queues: _Queues

    def end(self) -> RailEnd:
        """Return what pairing needs to know of it."""
        return RailEnd(self.link_layer, unpack_gids(self.gids, self.link_layer))


class OwnerRail(msgspec.Struct, frozen=True, array_like=True):
    """The owner's end of one of the reader's rails: connected, and ready to serve reads of the region."""

    position: _Position
    """In the reader's list."""
    reader_gid_index: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    gid: _RawGid
    lid: _Lid
    is_global: bool
    mtu: _Mtu
    reads_max: _ReadsMax
    address: _U63
    rkey: _U32
    queues: _Queues


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """Reader to owner: connect me with this region."""

    region_id: _U63
    rails: Annotated[tuple[ReaderRail, ...], msgspec.Meta(min_length=1, max_length=RAILS_MAX)]


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="opened"):
    """Owner to reader: your queue pairs have these peers."""

    size_bytes: _U63
    rails: Annotated[tuple[OwnerRail, ...], msgspec.Meta(min_length=1, max_length=RAILS_MAX)]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Owner to reader: no. ``is_gone``: the region is not served (any more)."""

    is_gone: bool
    reason: Annotated[str, msgspec.Meta(max_length=1000)]


Message = Open | Opened | Refused
_decoder = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    """Encode a message with its header."""
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(MAGIC, VERSION, 0, len(body)) + body


def unpack_header(data: bytes) -> int:
    """Return the length of the body that follows.

    Raises:
        RemoteProtocolError: not our protocol, another version, or a body that is too long.
    """
    magic, version, _, length = HEADER.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"not a mooncake rdma message: starts with {magic!r}")
    if version != VERSION:
        raise RemoteProtocolError(f"peer speaks rdma version {version}, we speak {VERSION}",
                                  hint="run the same release on both ends")
    if not 0 < length <= BODY_MAX_BYTES:
        raise RemoteProtocolError(f"rdma message of {length} bytes, at most {BODY_MAX_BYTES} are allowed")
    return int(length)


def unpack_body(data: bytes) -> Message:
    """Decode a body.

    Raises:
        RemoteProtocolError: it is malformed or out of range.
    """
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed rdma message: {error}") from error
    if isinstance(message, Opened):
        positions = [rail.position for rail in message.rails]
        if len(set(positions)) != len(positions):
            raise RemoteProtocolError(f"rdma answer names a rail twice: {positions}")
    return message


def pack_gids(gids: tuple[Gid, ...]) -> tuple[WireGid, ...]:
    """Return a port's table as it is sent."""
    return tuple(WireGid(gid.table_index, gid.kind == "roce2", gid.raw) for gid in gids[:GIDS_MAX])


def unpack_gids(gids: tuple[WireGid, ...], link_layer: LinkLayer) -> tuple[Gid, ...]:
    """Return a port's table as it was."""
    if link_layer == "infiniband":
        return tuple(Gid(gid.index, "ib", gid.raw) for gid in gids)
    return tuple(Gid(gid.index, "roce2" if gid.is_version2 else "roce1", gid.raw) for gid in gids)


def pack_queues(queues: tuple[Queue, ...]) -> tuple[WireQueue, ...]:
    """Return queue pairs as they are sent."""
    return tuple(WireQueue(*queue) for queue in queues)


def unpack_queues(queues: tuple[WireQueue, ...]) -> tuple[Queue, ...]:
    """Return queue pairs as they were."""
    return tuple(Queue(queue.number, queue.packet_number) for queue in queues)
