"""Define the nouns both planes share: keys, extents, hosts, members.

Pure: no sockets, threads, clocks, torch or engine imports.
"""

from __future__ import annotations

from typing import Annotated, NewType

import msgspec

BlockKey = NewType("BlockKey", bytes)
"""Names the content of one block; equal keys mean interchangeable bytes. Built by :func:`block_key`."""

NodeId = NewType("NodeId", str)
"""Names one member of a cell for one life of its process; never reused."""

NAME_MAX_CHARS = 512
Name = Annotated[str, msgspec.Meta(max_length=NAME_MAX_CHARS)]
Uint63 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Pid = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
"""What arrives from a peer is bounded where it is decoded, so that no use of it can overflow."""

NAMESPACE_BYTES = 16
PART_BYTES = 2
CONTENT_MAX_BYTES = 64


def block_key(namespace: bytes, part: int, content: bytes) -> BlockKey:
    """Join the three things that name a block's bytes.

    Args:
        namespace: 16-byte digest of everything that must be equal to share bytes.
        part: TP/PP part index, 0 <= part < 65,536.
        content: the engine's prefix-chained block hash, unchanged, 1 to 64 bytes.

    Raises:
        ValueError: if a length or the part is out of range.
    """
    if len(namespace) != NAMESPACE_BYTES:
        raise ValueError(f"namespace has {len(namespace)} bytes, not {NAMESPACE_BYTES}")
    if not 0 < len(content) <= CONTENT_MAX_BYTES:
        raise ValueError(f"content hash has {len(content)} bytes, not 1 to {CONTENT_MAX_BYTES}")
    return BlockKey(namespace + part.to_bytes(PART_BYTES, "big") + content)


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """One contiguous byte range of a segment.

    Units: bytes. Invariant: ``offset >= 0`` and ``length > 0``.
    """

    offset: int
    length: int


class HostIdentity(msgspec.Struct, frozen=True, array_like=True):
    """Tells whether two processes share a kernel, and whether they see each other's pids.

    Source: /proc/sys/kernel/random/boot_id and the inode of /proc/self/ns/pid.
    """

    boot_id: Name
    pid_namespace: Uint63


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One process of a cell as its membership announces it.

    Attributes:
        node_id: unique for one life of the process.
        kind: ``engine`` (embedded client) or ``store`` (capacity node).
        control: address of its pull server, e.g. ``tcp://127.0.0.1:40123``.
        host: lets a peer see that it is on the same machine.
        pid: process id inside ``host.pid_namespace``.
        capacity_bytes: size of its segment; 0 when it only reads.
        version: package version, for ``mooncake status``.
        about: what the process tells others like it; the store only carries it.
    """

    node_id: NodeId
    kind: Name
    control: Name
    host: HostIdentity
    pid: Pid
    capacity_bytes: Uint63
    version: Name
    about: Annotated[str, msgspec.Meta(max_length=1024)] = ""
