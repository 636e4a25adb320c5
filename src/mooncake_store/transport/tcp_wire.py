"""Lay out the frames of the tcp medium. Pure.

::

    request   header(24) | count x (offset u64, length u64)
    response  header(24) | the bytes of every read, in order
    response  header(24) | chunks, each: the bytes of some reads, in order | their checksum u64    when WANT_CHECKSUM

A connection carries any number of request frames, answered in order. ``count`` 0 asks only whether the region is
served. Both ends cut a frame into the same chunks (``chunks``), each summed just before it is sent and just after it
has arrived, while it is in the cache. A refusal is a response header without bytes; the reader drops the connection
after one. Little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import RemoteProtocolError
from mooncake_store.transport.coalesce import Group, groups

MAGIC = b"MTCP"
VERSION = 3
FRAME_READS_MAX = 1024
FRAME_MAX_BYTES = 8 << 20
"""Bytes of one response. Also the longest read: longer ones are cut before they get here."""
CHUNK_BYTES = 512 << 10
"""Bytes under one checksum, give or take a read."""

HEADER = struct.Struct("<4sHHIIQ")
HEADER_BYTES = HEADER.size
_READ = struct.Struct("<QQ")
READ_BYTES = _READ.size
_SINGLE = struct.Struct(HEADER.format + "QQ")
CHECKSUM_BYTES = 8
REQUEST_MAX_BYTES = HEADER_BYTES + READ_BYTES * FRAME_READS_MAX

WANT_CHECKSUM = 1
OK, UNKNOWN_REGION, OUT_OF_BOUNDS, BAD_REQUEST = range(4)
STATUS_TEXT = {
    UNKNOWN_REGION: "the owner does not serve this region (any more)",
    OUT_OF_BOUNDS: "the owner says the read is outside the region",
    BAD_REQUEST: "the owner could not understand the request",
}


class Request(NamedTuple):
    """A request header. ``flags``: WANT_CHECKSUM or 0."""

    flags: int
    frame_id: int
    num_reads: int
    region_id: int


class Response(NamedTuple):
    """A response header. ``num_bytes``: bytes of data that follow, without the checksums."""

    status: int
    frame_id: int
    num_reads: int
    num_bytes: int


def pack_request(request: Request, reads: npt.NDArray[np.uint64]) -> bytes:
    """Encode a request; ``reads`` is uint64 [count, 2] of (offset, length)."""
    header = HEADER.pack(MAGIC, VERSION, request.flags, request.frame_id, request.num_reads, request.region_id)
    return header + reads.astype("<u8", copy=False).tobytes()


def unpack_request(data: bytes | bytearray) -> Request:
    """Decode the request header that ``data`` begins with.

    Raises:
        RemoteProtocolError: not our protocol, another version, unknown flags, or more reads than a frame may hold.
    """
    flags, frame_id, count, region_id = _unpack(data)
    if flags & ~WANT_CHECKSUM:
        raise RemoteProtocolError(f"unknown flags {flags:#x} in a tcp request")
    if count > FRAME_READS_MAX:
        raise RemoteProtocolError(f"tcp request has {count} reads, more than {FRAME_READS_MAX}")
    return Request(flags, frame_id, count, region_id)


def pack_single(request: Request, offset: int, length: int) -> bytes:
    """Encode a request of one read."""
    return _SINGLE.pack(MAGIC, VERSION, request.flags, request.frame_id, 1, request.region_id, offset, length)


def chunks(lengths: npt.NDArray[np.uint64]) -> Iterator[Group]:
    """Divide the reads of a frame into the chunks that a checksum follows."""
    return groups(lengths, count_max=FRAME_READS_MAX, bytes_max=CHUNK_BYTES)


def lay_out(header: npt.NDArray[np.uint64], reads: npt.NDArray[np.uint64], stops: Sequence[int],
            checksums_address: int) -> npt.NDArray[np.uint64]:
    """List a response's bytes in the order in which they travel, as ranges of the memory of one end, uint64 [m, 2].

    Args:
        header: where the header is, uint64 [1, 2] of (address, length).
        reads: where the bytes of every read are, uint64 [n, 2].
        stops: behind how many reads each checksum comes, ascending; empty = no checksums.
        checksums_address: where the checksums are, one after the other.
    """
    count = len(stops)
    ranges = np.empty((1 + len(reads) + count, 2), np.uint64)
    if count == 0:
        ranges[1:] = reads
    else:
        places = np.array(stops) + np.arange(1, count + 1)
        is_read = np.ones(len(ranges), np.bool_)
        is_read[0] = is_read[places] = False
        ranges[is_read] = reads
        ranges[places, 0] = checksums_address + CHECKSUM_BYTES * np.arange(count)
        ranges[places, 1] = CHECKSUM_BYTES
    ranges[0] = header
    return ranges


def unpack_read(data: bytes) -> tuple[int, int]:
    """Decode one read: offset and length."""
    offset, length = _READ.unpack(data)
    return offset, length


def pack_response(response: Response) -> bytes:
    """Encode a response header."""
    return HEADER.pack(MAGIC, VERSION, response.status, response.frame_id, response.num_reads, response.num_bytes)


def unpack_response(data: bytes | bytearray) -> Response:
    """Decode a response header.

    Raises:
        RemoteProtocolError: not our protocol, or another version.
    """
    return Response(*_unpack(data))


def check_reads(reads: npt.NDArray[np.uint64], region_size_bytes: int) -> int:
    """Return OK, or the status that refuses these reads (uint64 [count, 2] of offset, length)."""
    if len(reads) == 0:
        return OK
    offsets, lengths = reads[:, 0], reads[:, 1]
    longest = int(lengths.max())
    if longest > FRAME_MAX_BYTES or int(lengths.sum()) > FRAME_MAX_BYTES or not lengths.all():
        return BAD_REQUEST  # the sum, of at most 1,024 x 8 MiB, cannot overflow
    if longest > region_size_bytes or bool((offsets > np.uint64(region_size_bytes) - lengths).any()):
        return OUT_OF_BOUNDS
    return OK


def _unpack(data: bytes | bytearray) -> tuple[int, int, int, int]:
    magic, version, word, frame_id, count, last = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"not a mooncake tcp frame: starts with {magic!r}")
    if version != VERSION:
        raise RemoteProtocolError(f"peer speaks tcp version {version}, we speak {VERSION}")
    return word, frame_id, count, last
