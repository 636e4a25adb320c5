"""Define what this medium needs of a verbs library, so that tests can run it without one.

Implementations: ``verbs.VerbsBackend`` on pyverbs, ``mooncake_store.testing.verbs.FakeVerbs`` within one machine.

Threads: a backend and a device may be used from any thread, a queue set by one thread at a time. Every failure is a
``TransferFailed`` whose hint says what to change.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

from mooncake_store.transport.rdma.gids import Gid
from mooncake_store.transport.rdma.rails import Rail


class Status(enum.Enum):
    """How one work request ended."""

    OK = "ok"
    FLUSHED = "flushed after an earlier failure"
    REMOTE_ACCESS = "the owner's device refused the access"
    RETRIES = "the owner's device does not answer"
    LOCAL = "our device may not write there"
    OTHER = "the device reports an error"


class Completion(NamedTuple):
    """The end of one work request. ``detail`` is the library's name of the status, for people."""

    wr_id: int
    status: Status
    detail: str


class Queue(NamedTuple):
    """One end of a connection: queue pair number, and the first packet number it sends."""

    number: int
    packet_number: int


class Route(NamedTuple):
    """How to reach the peer's port: our GID's index and theirs, or their LID when not ``is_global``."""

    own_gid_index: int
    peer_gid: bytes
    peer_lid: int
    is_global: bool
    mtu: int
    """As verbs count it: 1 = 256 bytes to 5 = 4,096."""
    reads_max: int
    """Reads that may be on the wire per queue pair."""


class Reads(NamedTuple):
    """A chain of reads out of one remote and into one local registration; the lists are equally long."""

    rkey: int
    lkey: int
    remote: list[int]
    local: list[int]
    lengths: list[int]


class Registration(Protocol):
    """Memory that a device may use. ``close`` takes it from the device at once; idempotent."""

    lkey: int
    rkey: int

    def close(self) -> None:
        """Deregister: reads of it fail from here on."""
        ...


class QueueSet(Protocol):
    """Some queue pairs on one device, completing into one queue."""

    queues: tuple[Queue, ...]
    fd: int
    """Readable after ``arm`` when something completed; -1 for an owner's set, on which nobody waits."""

    def connect(self, route: Route, peers: tuple[Queue, ...], *, is_reader: bool) -> None:
        """Connect queue i with ``peers[i]``; only a reader's may post afterwards."""
        ...

    def post(self, index: int, first_wr_id: int, reads: Reads) -> None:
        """Hand a chain to the device; read i has the id ``first_wr_id + i`` and only the last one reports success."""
        ...

    def poll(self) -> list[Completion]:
        """Return what completed."""
        ...

    def arm(self) -> None:
        """Ask for ``fd`` to become readable at the next completion; poll once more afterwards."""
        ...

    def take_event(self) -> None:
        """Consume what made ``fd`` readable."""
        ...

    def fail(self) -> None:
        """Put every queue pair into its error state: what is under way is flushed."""
        ...

    def close(self) -> None:
        """Destroy: once this returns the device writes nothing of it any more. Idempotent."""
        ...


class Device(Protocol):
    """An opened port."""

    rail: Rail
    mtu: int
    reads_max: int

    def register(self, address: int, size_bytes: int, *, is_target: bool) -> Registration:
        """Pin memory; peers that know its key may read it, and with ``is_target`` our own reads may write it."""
        ...

    def open_queues(self, count: int, *, is_reader: bool) -> QueueSet:
        """Make queue pairs: for our own reads, or for a peer's."""
        ...

    def close(self) -> None:
        """Close the port. Idempotent."""
        ...


class Backend(Protocol):
    """A verbs library."""

    def probe(self) -> str:
        """Return why nothing can be done here, empty when it can."""
        ...

    def rails(self) -> list[Rail]:
        """Return the rails to use, sorted by device name."""
        ...

    def open(self, rail: Rail) -> Device:
        """Open a port."""
        ...

    def is_routed(self, own: Gid, peer: Gid) -> bool:
        """Tell whether a route leads from our address to the peer's."""
        ...
