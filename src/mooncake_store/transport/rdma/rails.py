"""Choose which RDMA ports to use, and which of ours talks to which of a peer's.

Pure. A *rail* is one port of one device. Data centres connect rail i of every machine to the same switch, so rails are
paired by their position in the list of both ends, which is sorted by device name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mooncake_store.transport.rdma.gids import Gid, GidPair, LinkLayer, choose_gids

RAILS_MAX = 4
NUMA_UNKNOWN = -1
SLOWEST_SHARE = 0.5
"""A port slower than this share of the fastest one near the memory, such as a management port, is left out."""


class Rail(NamedTuple):
    """One active port.

    Attributes:
        device: name, such as ``mlx5_0``.
        port: number, from 1.
        link_layer: what the cable carries.
        numa_node: of the device, -1 when unknown.
        pci_path: path in sysfs from the root of the PCI tree; empty for a device without hardware.
        rate_gbps: speed in Gbit/s, 0 when unknown.
        lid: address on an InfiniBand subnet, 0 elsewhere.
        gids: the port's table.
    """

    device: str
    port: int
    link_layer: LinkLayer
    numa_node: int
    pci_path: str
    rate_gbps: float
    lid: int
    gids: tuple[Gid, ...]


class Place(NamedTuple):
    """Where the memory is: a NUMA node, and for a GPU the sysfs path of its PCI device."""

    numa_node: int = NUMA_UNKNOWN
    pci_path: str = ""


class RailEnd(NamedTuple):
    """What pairing needs to know of one end of a rail."""

    link_layer: LinkLayer
    gids: Sequence[Gid]


class RailPair(NamedTuple):
    """Our rail and the peer's by position, and the addresses that connect them."""

    own: int
    peer: int
    gids: GidPair


def choose_rails(rails: Sequence[Rail], near: Place, *, devices: Sequence[str] = (),
                 rails_max: int = RAILS_MAX) -> list[Rail]:
    """Return the rails to use, sorted by device name: those nearest to the memory, of similar speed.

    Args:
        rails: every active port.
        near: where the memory is.
        devices: names to use, in spite of distance and speed; empty = choose.
        rails_max: most rails returned, the fastest first.
    """
    if devices:
        chosen = [rail for rail in rails if rail.device in devices]
    else:
        nearest = min((distance(rail, near) for rail in rails), default=(0, 0))
        chosen = [rail for rail in rails if distance(rail, near) == nearest]
        fastest = max((rail.rate_gbps for rail in chosen), default=0.0)
        chosen = [rail for rail in chosen if rail.rate_gbps >= fastest * SLOWEST_SHARE]
    chosen.sort(key=lambda rail: (-rail.rate_gbps, rail.device, rail.port))
    return sorted(chosen[:rails_max], key=lambda rail: (rail.device, rail.port))


def distance(rail: Rail, near: Place) -> tuple[int, int]:
    """Return a key that is smaller for a nearer rail: NUMA node first, then switches of the PCI tree not shared.

    What is unknown counts as near.
    """
    is_known = NUMA_UNKNOWN not in (rail.numa_node, near.numa_node)
    is_far = is_known and rail.numa_node != near.numa_node
    if not rail.pci_path or not near.pci_path:
        return int(is_far), 0
    ours, theirs = rail.pci_path.strip("/").split("/"), near.pci_path.strip("/").split("/")
    shared = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        shared += 1
    return int(is_far), len(theirs) - shared


def pair_rails(own: Sequence[RailEnd], peer: Sequence[RailEnd],
               is_routed: Callable[[Gid, Gid], bool]) -> list[RailPair]:
    """Give each rail of the peer one of ours: that at the same position if it can be reached, else another.

    Rails of the peer that none of ours reaches are left out; one of ours may serve several of the peer's.
    """
    pairs: list[RailPair] = []
    for position, theirs in enumerate(peer):
        for i in sorted(range(len(own)), key=lambda i: (i != position, i)):
            if own[i].link_layer != theirs.link_layer:
                continue
            gids = choose_gids(own[i].gids, theirs.gids, is_routed)
            if gids is not None:
                pairs.append(RailPair(i, position, gids))
                break
    return pairs
