"""Define what the pull protocol needs from the rest of the store, so that it knows neither segment nor directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mooncake_store.types import BlockKey, Extent, HostIdentity, Member, NodeId

GetResult = Literal["ok", "miss", "failed", "corrupt"]


class Scatter(NamedTuple):
    """One block's pieces in this process's memory, in image order.

    Shape: two 1-D uint64 arrays of equal length n >= 1. Units: bytes; addresses are absolute and must stay mapped until
    the call that takes the scatter returns.
    """

    addresses: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]


Runs = Sequence[tuple[int, int]]
"""A scatter with neighbours in memory joined: (address, length) in image order, no length 0, at least one."""


class GetOutcome(NamedTuple):
    """What became of one block asked for.

    Attributes:
        result: ``ok`` (its bytes are in the target), ``miss`` (nobody reachable has it), ``failed`` (somebody has it
            but it did not arrive in time) or ``corrupt`` (what arrived was not what was stored). Unless ``ok``, the
            target's bytes are undefined.
        medium: what moved the bytes: ``local``, ``inline`` (they came with the owner's answer), ``shm``, ``cma``,
            ``tcp``, ...; empty unless ``ok`` or ``corrupt``.
        num_bytes: bytes that arrived; 0 unless ``ok``.
        reason: one line for people; empty when ``ok``.
    """

    result: GetResult
    medium: str
    num_bytes: int
    reason: str


class Pulled(NamedTuple):
    """A :class:`GetOutcome` with what the owner said of the block; ``peer`` is empty when nobody was asked."""

    outcome: GetOutcome
    checksum: int
    peer: str


class HeldBlock(Protocol):
    """A block that its owner keeps in place until it is unpinned."""

    @property
    def extent(self) -> Extent:
        """Where it is in the owner's region."""
        ...

    @property
    def checksum(self) -> int:
        """Checksum of its image (transport/checksum.py)."""
        ...


class BlockSource(Protocol):
    """What the server serves blocks from; ``pool.segment.Segment`` is one. Threads: any."""

    def pin(self, keys: Sequence[BlockKey]) -> Sequence[Any]:
        """Return a HeldBlock per key, None where there is none; each must be unpinned once."""
        ...

    def unpin(self, blocks: Sequence[Any]) -> None:
        """Let blocks go."""
        ...

    def bytes_of(self, block: Any) -> bytes:
        """Return a copy of a pinned block's image."""
        ...

    def verify(self, key: BlockKey) -> bool | None:
        """Compare a block's bytes with its checksum, drop it when they differ; None when there is no such block."""
        ...


class Cell(Protocol):
    """What the puller needs of the directory; ``directory.base.Directory`` is one. Threads: any; no I/O."""

    def members(self) -> dict[NodeId, Member]:
        """Return the members known now."""
        ...

    def locate(self, keys: Sequence[BlockKey]) -> list[tuple[NodeId, ...]]:
        """Return who holds each key."""
        ...


class PeerAddress(NamedTuple):
    """Where one life of a peer answers."""

    node_id: NodeId
    control: str
    host: HostIdentity
