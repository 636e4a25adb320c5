"""Define what a medium must do: let peers read our memory, and read theirs.

Architecture::

    Media (media.py)            one per process: serves our memory on every medium, attaches to a peer's on the best one
      └─ Transport              one per medium: shm | cma | cuda | rdma | tcp | loopback
           ├─ serve(memory)     -> Offer        goes into the RegionDescriptor that we publish
           └─ attach(region)    -> Attachment   reads batches out of a peer's region

Memory model: a region is one contiguous range of the owner's virtual memory. The owner keeps it mapped until
``withdraw``. A reader names bytes by offset into the region; the target is an absolute address in the reader's process.

Failure model: per request. ``Attachment.read`` never raises for a failed read: it reports each request once. It raises
only LocalProtocolError, for a batch that breaks the rules below. A failed request may have written part of its target.

Threading model: ``serve``/``withdraw``/``attach``/``close`` may be called from any thread. An ``Attachment`` is used by
one thread at a time; different attachments may be read from different threads in parallel.

Consistency: a read sees each byte as it was at some moment during the call; the owner may be writing. That the bytes
are the wanted ones is the caller's job: a lease held across the read, or an epoch word read again after it.

Implementor contract: ``read`` honours ``deadline_ns`` (CLOCK_MONOTONIC), accepts any batch size, releases the GIL while
bytes move, and never reads outside the region (checked on the serving side too, where there is one).
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import msgspec
import numpy as np

from mooncake_store.errors import LocalProtocolError, MooncakeError, PeerUnreachable
from mooncake_store.types import HostIdentity, Pid, Uint63

OFFERS_MAX = 16
SOCKET_NAME_MAX_CHARS = 100
_LABEL = "[A-Za-z0-9_-]{1,63}"
HOST_PATTERN = (rf"^(?=.{{1,253}}\Z)(?:{_LABEL}(?:\.{_LABEL})*\.?"
                r"|[0-9A-Fa-f:]*:[0-9A-Fa-f:]*(?:\d{1,3}(?:\.\d{1,3}){3})?(?:%[A-Za-z0-9_-]{1,15})?)\Z")
"""A name or an address; what the resolver would raise on does not get that far."""

Host = Annotated[str, msgspec.Meta(pattern=HOST_PATTERN)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]
Length = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
IpcHandle = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class RegionGone(PeerUnreachable):
    """The owner's process is dead, or it no longer serves the region: no other medium will reach it either."""


class ShmOffer(msgspec.Struct, frozen=True, array_like=True, tag="shm"):
    """Memory backed by a memfd, handed over by SCM_RIGHTS on an abstract unix socket."""

    socket: Annotated[str, msgspec.Meta(min_length=1, max_length=SOCKET_NAME_MAX_CHARS)]


class CmaOffer(msgspec.Struct, frozen=True, array_like=True, tag="cma"):
    """Memory readable with process_vm_readv(2).

    ``start_ticks`` guards against a reused pid (/proc/PID/stat field 22). The 8 bytes at ``guard_address`` hold the
    region's id while it is served (guard.py).
    """

    pid: Pid
    start_ticks: Uint63
    address: Uint63
    guard_address: Uint63


class TcpOffer(msgspec.Struct, frozen=True, array_like=True, tag="tcp"):
    """Memory served by a read server; ``is_tls`` tells whether it expects TLS."""

    host: Host
    port: Port
    is_tls: bool = False


class RdmaOffer(msgspec.Struct, frozen=True, array_like=True, tag="rdma"):
    """Memory registered with RDMA devices; a link server connects queue pairs with it and tells its keys."""

    host: Host
    port: Port


class CudaOffer(msgspec.Struct, frozen=True, array_like=True, tag="cuda"):
    """GPU memory readable by CUDA IPC: ``offset`` into the allocation that ``handle`` names, and a guard word likewise.

    The addresses are those in the owner's process, for readers within it.
    """

    pid: Pid
    start_ticks: Uint63
    device_uuid: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    handle: IpcHandle
    offset: Uint63
    address: Uint63
    guard_handle: IpcHandle
    guard_offset: Uint63
    guard_address: Uint63


class LoopbackOffer(msgspec.Struct, frozen=True, array_like=True, tag="loopback"):
    """Memory of this very process; for tests and for reading our own segment."""

    pid: Pid
    address: Uint63


Offer = ShmOffer | CmaOffer | CudaOffer | RdmaOffer | TcpOffer | LoopbackOffer


class RegionDescriptor(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to read one region; safe to publish.

    ``region_id`` is random and unique per life of the owner, so a stale descriptor is refused, not misread.
    """

    region_id: Length
    size_bytes: Length
    host: HostIdentity
    offers: Annotated[tuple[Offer, ...], msgspec.Meta(max_length=OFFERS_MAX)]


class LocalMemory(msgspec.Struct, frozen=True):
    """A range of our own memory to serve.

    Attributes:
        address: virtual address of its first byte.
        size_bytes: length.
        memfd: descriptor whose offset 0 is ``address``, or -1 when the memory is not shared.
        owner: object kept alive as long as the region is served (a tensor, an mmap).
        kind: whether ``address`` is memory of the host or of a GPU, which only ``cuda`` serves.
    """

    address: int
    size_bytes: int
    memfd: int = -1
    owner: object = None
    kind: Literal["host", "cuda"] = "host"


class ReadBatch(msgspec.Struct, frozen=True):
    """Reads out of one region; element i copies ``lengths[i]`` bytes.

    Shape: three 1-D uint64 arrays of equal length n >= 1. Units: bytes; ``local_addresses`` are absolute in this
    process. ``is_verified_later``: the caller has a checksum of its own to compare, so a medium that would verify what
    arrives need not.
    """

    remote_offsets: np.ndarray
    local_addresses: np.ndarray
    lengths: np.ndarray
    is_verified_later: bool = False

    def check(self, region_size_bytes: int) -> None:
        """Raise LocalProtocolError unless the arrays agree and every read lies inside the region.

        Reads of zero bytes are refused too. Targets are not checked: that they are writable and do not overlap is the
        caller's promise.
        """
        count = len(self.lengths)
        if count == 0 or len(self.remote_offsets) != count or len(self.local_addresses) != count:
            raise LocalProtocolError(f"read batch arrays have lengths {len(self.remote_offsets)}, "
                                     f"{len(self.local_addresses)}, {count}; they must be equal and at least 1")
        if not (self.remote_offsets.dtype == self.local_addresses.dtype == self.lengths.dtype == np.uint64):
            raise LocalProtocolError(f"read batch arrays are {self.remote_offsets.dtype}, "
                                     f"{self.local_addresses.dtype}, {self.lengths.dtype}; all must be uint64")
        if count == 1:  # plain ints: an epoch word is re-read after every copy, and numpy costs 1 us per operation
            length = int(self.lengths[0])
            is_inside = 0 < length <= region_size_bytes - int(self.remote_offsets[0])
        else:
            # offset <= size - length, without the overflow that offset + length could have
            is_inside = bool(self.lengths.all()) and bool((self.lengths <= region_size_bytes).all()) and bool(
                (self.remote_offsets <= np.uint64(region_size_bytes) - self.lengths).all())
        if not is_inside:
            raise LocalProtocolError(f"a read is empty or lies outside its region of {region_size_bytes} bytes")


class ReadResult(msgspec.Struct, frozen=True):
    """Outcome of one batch: ``ok[i]`` is True when all bytes of request i arrived.

    ``error`` is the first failure, None when every request is ok. ``num_bytes`` counts bytes of ok requests.
    """

    ok: np.ndarray
    num_bytes: int
    error: MooncakeError | None = None

    @staticmethod
    def of(batch: ReadBatch, ok: np.ndarray, error: MooncakeError | None) -> ReadResult:
        """Sum up a batch whose request i is complete where ``ok[i]``."""
        if error is None:
            return ReadResult(ok, int(batch.lengths.sum()))
        return ReadResult(ok, int(batch.lengths[ok].sum()), error)

    @staticmethod
    def failed(batch: ReadBatch, error: MooncakeError) -> ReadResult:
        """Say that no request of the batch arrived."""
        return ReadResult(np.zeros(len(batch.lengths), np.bool_), 0, error)


class Attachment(Protocol):
    """A reader's handle on one remote region."""

    medium: str

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy every request of the batch into local memory; blocks until done, failed or past the deadline."""
        ...

    def close(self) -> None:
        """Release the handle. Idempotent."""
        ...


class Transport(Protocol):
    """One medium. Moves bytes; never decides what to move."""

    medium: str

    def serve(self, region_id: int, memory: LocalMemory) -> Offer | None:
        """Let peers read ``memory`` under ``region_id``; None when this medium cannot serve such memory."""
        ...

    def withdraw(self, region_id: int) -> None:
        """Stop serving a region; readers get failures from here on. Idempotent."""
        ...

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> Attachment:
        """Open a peer's region.

        Raises:
            RegionGone: the owner's process is dead, or does not serve the region.
            PeerUnreachable: the owner does not answer on this medium.
            TransferFailed: the medium refuses (permission, limits); ``hint`` says what to change.
        """
        ...

    def close(self) -> None:
        """Withdraw everything and stop threads. Idempotent."""
        ...
