"""Choose the medium for a peer's region, and say why.

Pure: what a process can use, what a region offers and where both live go in; a choice with its reason comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mooncake_store.transport.base import (
    CmaOffer,
    CudaOffer,
    LoopbackOffer,
    Offer,
    RdmaOffer,
    RegionDescriptor,
    ShmOffer,
    TcpOffer,
)
from mooncake_store.types import HostIdentity

OFFER_TYPES: dict[str, type] = {"shm": ShmOffer, "cma": CmaOffer, "cuda": CudaOffer, "rdma": RdmaOffer,
                                "tcp": TcpOffer, "loopback": LoopbackOffer}
"""Every medium this version knows."""


class Choice(NamedTuple):
    """The medium to use. ``reason`` is one line: why this one, and why not those preferred to it."""

    medium: str
    offer: Offer
    reason: str


class NoMedium(NamedTuple):
    """Nothing can be used; ``reasons`` has one line per medium, e.g. ``shm: another host``."""

    reasons: tuple[str, ...]


def choose(own: HostIdentity, region: RegionDescriptor, allowed: Sequence[str],
           cooling: frozenset[str] = frozenset()) -> Choice | NoMedium:
    """Pick the first allowed medium that the region offers and that reaches it.

    Args:
        own: where we are.
        region: what the peer published.
        allowed: media usable here, most wanted first.
        cooling: media that failed for this region not long ago; passed over.
    """
    passed: list[str] = []
    for medium in allowed:
        obstacle = _obstacle(medium, own, region, cooling)
        if obstacle:
            passed.append(f"{medium}: {obstacle}")
            continue
        why = "; ".join([_virtue(medium, own, region), *passed])
        return Choice(medium, _offer(medium, region), why)
    return NoMedium(tuple(passed) or ("no medium is allowed",))


def _obstacle(medium: str, own: HostIdentity, region: RegionDescriptor, cooling: frozenset[str]) -> str:
    expected = OFFER_TYPES.get(medium)
    if expected is None:
        return "unknown to this version"
    if not any(isinstance(offer, expected) for offer in region.offers):
        return "not offered"
    if medium in ("shm", "cma", "cuda", "loopback") and own.boot_id != region.host.boot_id:
        return "another host"
    if medium in ("cma", "cuda", "loopback") and own.pid_namespace != region.host.pid_namespace:
        return "another pid namespace"
    if medium in cooling:
        return "failed a moment ago"
    return ""


def _offer(medium: str, region: RegionDescriptor) -> Offer:
    return next(offer for offer in region.offers if isinstance(offer, OFFER_TYPES[medium]))


def _virtue(medium: str, own: HostIdentity, region: RegionDescriptor) -> str:
    if medium == "loopback":
        return "our own memory"
    if medium == "shm":
        return "same host, the region is shared memory"
    if medium == "cma":
        return "same host, same pid namespace"
    if medium == "cuda":
        return "same host, the region is GPU memory"
    return "same host" if own.boot_id == region.host.boot_id else "another host"
