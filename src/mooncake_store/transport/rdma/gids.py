"""Choose the addresses that two RDMA ports reach each other by.

Pure. A port has a table of GIDs: on RoCE one per address of its network interface and protocol version, on InfiniBand
one per subnet. Which one works is no matter of its index: an index that works on one machine is another address, or
none, on the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

GidKind = Literal["ib", "roce1", "roce2"]
LinkLayer = Literal["infiniband", "ethernet"]

GID_BYTES = 16
ANY_INDEX = -1
_MAPPED = bytes(10) + b"\xff\xff"
_KIND_RANK: dict[GidKind, int] = {"ib": 0, "roce2": 0, "roce1": 1}


class Gid(NamedTuple):
    """One entry of a port's table: its index there, its protocol, its 16 bytes."""

    table_index: int
    kind: GidKind
    raw: bytes


class GidPair(NamedTuple):
    """The entries to use. ``is_global``: packets need a global route header; on one InfiniBand subnet LIDs do."""

    own: Gid
    peer: Gid
    is_global: bool


def offerable(gids: Sequence[Gid], override: int = ANY_INDEX) -> tuple[Gid, ...]:
    """Return the entries that a peer may be told of: all that are set, or only the one that the user insists on."""
    return tuple(gid for gid in gids if any(gid.raw) and override in (ANY_INDEX, gid.table_index))


def choose_gids(own: Sequence[Gid], peer: Sequence[Gid], is_routed: Callable[[Gid, Gid], bool]) -> GidPair | None:
    """Return the best pair of entries, None when the ports share no protocol or no route.

    Preferred in this order: RoCE v2 to v1 (which no router passes on); IPv4, then IPv6, then link-local addresses;
    addresses with the longer common prefix, which are more likely in one subnet; lower indexes.

    Args:
        own: our port's entries.
        peer: the peer's.
        is_routed: whether our address has a route to the peer's; asked for addresses that are not link-local.
    """
    pairs = [(ours, theirs) for ours in own for theirs in peer
             if ours.kind == theirs.kind and family(ours) == family(theirs)]
    for ours, theirs in sorted(pairs, key=_order):
        if ours.kind == "ib":
            return GidPair(ours, theirs, is_global=ours.raw[:8] != theirs.raw[:8])
        if ours.kind == "roce1" or family(ours) == "local" or is_routed(ours, theirs):
            return GidPair(ours, theirs, is_global=True)
    return None


def family(gid: Gid) -> Literal["ib", "v4", "v6", "local"]:
    """Return what kind of address the entry holds."""
    if gid.kind == "ib":
        return "ib"
    if gid.raw[:12] == _MAPPED:
        return "v4"
    return "local" if gid.raw[0] == 0xFE and gid.raw[1] & 0xC0 == 0x80 else "v6"


def ip_text(gid: Gid) -> str:
    """Return the entry as an address that a socket takes."""
    return ".".join(str(byte) for byte in gid.raw[12:]) if family(gid) == "v4" else gid_text(gid.raw)


def gid_text(raw: bytes) -> str:
    """Return 16 bytes as eight groups of four digits, the only form that pyverbs reads."""
    return ":".join(raw[i:i + 2].hex() for i in range(0, GID_BYTES, 2))


def parse_gid(text: str) -> bytes:
    """Return the bytes of a GID in the form that sysfs and pyverbs print.

    Raises:
        ValueError: it is no GID.
    """
    raw = bytes.fromhex(text.strip().replace(":", ""))
    if len(raw) != GID_BYTES:
        raise ValueError(f"{text!r} is no GID")
    return raw


def common_prefix_bits(one: bytes, other: bytes) -> int:
    """Return how many leading bits are equal."""
    differing = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return len(one) * 8 - differing.bit_length()


def _order(pair: tuple[Gid, Gid]) -> tuple[int, int, int, int, int]:
    ours, theirs = pair
    family_rank = ("ib", "v4", "v6", "local").index(family(ours))
    shared_bits = common_prefix_bits(ours.raw, theirs.raw)
    return (_KIND_RANK[ours.kind], family_rank, -shared_bits, ours.table_index, theirs.table_index)
