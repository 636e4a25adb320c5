"""Read a peer's GPU memory on the same host by CUDA IPC, and prepare GPU memory for RDMA.

Untested on hardware: run so far only on the fake driver of ``mooncake_store.testing.cuda`` (docs/limits.md).

The owner exports the allocation that a region lies in; the reader opens it once and then copies by itself, on a stream
of its own, device to device or device to host. As with shared memory nobody on the owner's side takes part, so the
owner keeps a guard word per region, here in device memory: the reader copies it behind each batch on the same stream,
and the batch counts only if it still is the region's id. A dead owner is found by its start time in /proc.

PyTorch's allocator hands out pieces of larger allocations. An IPC handle always names the whole allocation, so the
offer carries the offset inside it. Memory mapped piecewise (``expandable_segments:True``, cuMemMap) has no such handle:
it is refused with what to change. Why so: docs/adr/0008-cuda.md.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Literal, NamedTuple, Protocol

import numpy as np

from mooncake_store.errors import CapacityExceeded, MooncakeError, TransferFailed
from mooncake_store.transport.base import CudaOffer, LocalMemory, ReadBatch, ReadResult, RegionDescriptor, RegionGone
from mooncake_store.transport.coalesce import coalesce, groups
from mooncake_store.transport.copying import past_deadline
from mooncake_store.transport.memory import PAGE_BYTES, process_start_ticks

GUARD_BYTES = 8
GUARD_PAGE_BYTES = 4096
GROUP_COUNT_MAX = 1024
GROUP_MAX_BYTES = 64 << 20
"""Copies under way at once: they cannot be called back, so a read returns only when they are through (some ms)."""
HANG_MAX_S = 5.0
"""A device that does not finish one group within this beyond the deadline is taken for hung."""
POLL_S = 50e-6


class CudaError(TransferFailed):
    """A call of the driver failed."""


class Allocation(NamedTuple):
    """What an address lies in; ``is_exportable`` when one IPC handle can name it."""

    base: int
    size_bytes: int
    device: int
    is_exportable: bool


class Stream(Protocol):
    """A queue of copies on one device; used by one thread at a time."""

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queue a copy between any two addresses, of host or device. Raises CudaError."""
        ...

    def is_done(self) -> bool:
        """Tell whether everything queued is through. Raises CudaError when any of it failed."""
        ...

    def close(self) -> None:
        """Free the stream. Idempotent."""
        ...


class Driver(Protocol):
    """What this module needs of CUDA. Threads: any. Every method raises CudaError; releases the GIL."""

    def probe(self) -> str:
        """Return why CUDA cannot be used here, empty when it can."""
        ...

    def allocation_of(self, address: int) -> Allocation:
        """Return the allocation that a device address lies in."""
        ...

    def export(self, base: int) -> bytes:
        """Return the IPC handle of an allocation, 64 bytes."""
        ...

    def open(self, handle: bytes, device: int) -> int:
        """Map a peer's allocation; return its address here."""
        ...

    def unmap(self, address: int) -> None:
        """Undo ``open``."""
        ...

    def device_uuid(self, device: int) -> bytes:
        """Return what names the device in every process, 16 bytes."""
        ...

    def device_with(self, uuid: bytes) -> int:
        """Return our number of that device."""
        ...

    def allocate(self, device: int, num_bytes: int) -> int:
        """Allocate device memory of our own, zeroed."""
        ...

    def free(self, address: int) -> None:
        """Free it."""
        ...

    def write_word(self, address: int, value: int) -> None:
        """Store 8 bytes in device memory; they are there when this returns."""
        ...

    def open_stream(self, device: int) -> Stream:
        """Make a stream."""
        ...

    def has_dmabuf(self, device: int) -> bool:
        """Tell whether the driver exports this device's memory as dmabuf."""
        ...

    def dmabuf(self, address: int, num_bytes: int) -> int:
        """Export page-aligned device memory; return a descriptor that the caller closes."""
        ...


# ------------------------------------------------------------------------------------------------------ for RDMA [pure]
class Registration(NamedTuple):
    """How to register GPU memory with an RDMA device; ``refusal`` is empty unless it cannot be."""

    way: Literal["dmabuf", "peermem", "none"]
    reason: str
    refusal: str = ""


def choose_registration(*, has_driver_dmabuf: bool, has_verbs_dmabuf: bool, has_peermem: bool) -> Registration:
    """Choose between a dmabuf and nvidia-peermem. Pure.

    Args:
        has_driver_dmabuf: the GPU's driver exports dmabufs (open kernel modules, CUDA 11.7 or later).
        has_verbs_dmabuf: libibverbs registers them (ibv_reg_dmabuf_mr, rdma-core 34, Linux 5.12).
        has_peermem: the module nvidia_peermem is loaded.
    """
    if has_driver_dmabuf and has_verbs_dmabuf:
        return Registration("dmabuf", "the driver exports dmabufs and libibverbs takes them")
    missing = "the driver exports no dmabuf" if not has_driver_dmabuf else "libibverbs registers no dmabuf"
    if has_peermem:
        return Registration("peermem", f"{missing}; nvidia_peermem is loaded, the address is registered as it is")
    return Registration("none", missing, f"{missing} and nvidia_peermem is not loaded: modprobe nvidia_peermem, or use "
                                         "NVIDIA's open kernel modules with rdma-core 34 and Linux 5.12 or later")


class DmaBuf(NamedTuple):
    """Exported memory: the region's first byte is at ``offset`` of ``fd``, which the caller closes.

    Registered with iova = ``offset``, remote addresses of such a registration start there, not at the GPU's address.
    """

    fd: int
    offset: int
    size_bytes: int


def export_dmabuf(driver: Driver, address: int, num_bytes: int) -> DmaBuf:
    """Export the pages around a range of device memory. Raises CudaError."""
    first = address - address % PAGE_BYTES
    end = address + num_bytes
    end += -end % PAGE_BYTES
    return DmaBuf(driver.dmabuf(first, end - first), address - first, num_bytes)


# ----------------------------------------------------------------------------------------------------------- transport
class _Guards:
    """The guard words of one device, in its memory. Not thread-safe."""

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        self.address = driver.allocate(device, GUARD_PAGE_BYTES)
        self.allocation = driver.allocation_of(self.address)
        self._free = list(range(0, GUARD_PAGE_BYTES, GUARD_BYTES))[::-1]

    def hold(self, region_id: int) -> int:
        if not self._free:
            raise CapacityExceeded(f"{GUARD_PAGE_BYTES // GUARD_BYTES} regions are served", hint="withdraw some")
        offset = self._free.pop()
        self._driver.write_word(self.address + offset, region_id)
        return offset

    def release(self, offset: int) -> None:
        self._driver.write_word(self.address + offset, 0)
        self._free.append(offset)

    def close(self) -> None:
        self._driver.free(self.address)


class _Served(NamedTuple):
    memory: LocalMemory
    guards: _Guards
    guard_offset: int


class CudaTransport:
    """Serves and reads GPU memory on one host. Implements ``base.Transport``; has no threads.

    Args:
        driver: ``cuda_driver.LibCuda``, or a fake.
    """

    medium = "cuda"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._guards: dict[int, _Guards] = {}
        self._served: dict[int, _Served] = {}

    def probe(self) -> str:
        """Return why this medium cannot work here, empty when it can."""
        return self._driver.probe()

    def serve(self, region_id: int, memory: LocalMemory) -> CudaOffer | None:
        """Export the memory; None for host memory.

        Raises:
            CudaError: the driver refuses, or the memory has no IPC handle.
        """
        if memory.kind != "cuda":
            return None
        allocation = self._driver.allocation_of(memory.address)
        offset = memory.address - allocation.base
        if not allocation.is_exportable or offset + memory.size_bytes > allocation.size_bytes:
            raise CudaError(f"{memory.size_bytes} bytes at {memory.address:#x} lie in no single allocation that has an "
                            "IPC handle", where="cuda", hint="unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF")
        with self._lock:
            guards = self._guards.get(allocation.device)
            if guards is None:
                guards = self._guards[allocation.device] = _Guards(self._driver, allocation.device)
            guard_offset = guards.hold(region_id)
            self._served[region_id] = _Served(memory, guards, guard_offset)
        return CudaOffer(
            pid=os.getpid(), start_ticks=process_start_ticks(os.getpid()) or 0,
            device_uuid=self._driver.device_uuid(allocation.device), handle=self._driver.export(allocation.base),
            offset=offset, address=memory.address, guard_handle=self._driver.export(guards.allocation.base),
            guard_offset=guards.address - guards.allocation.base + guard_offset,
            guard_address=guards.address + guard_offset)

    def withdraw(self, region_id: int) -> None:
        """Clear the region's guard: reads that end after this fail. Idempotent."""
        with self._lock:
            served = self._served.pop(region_id, None)
            if served is not None:
                served.guards.release(served.guard_offset)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> CudaAttachment:
        """Open the owner's allocation.

        Raises:
            RegionGone: the owner is dead, or no longer serves the region.
            TransferFailed: not offered, or the driver refuses.
        """
        offer = next((offer for offer in region.offers if isinstance(offer, CudaOffer)), None)
        if offer is None:
            raise TransferFailed("the region is not offered over cuda")
        attachment = CudaAttachment(self._driver, region, offer)
        try:
            attachment.check(deadline_ns)
        except MooncakeError:
            attachment.close()
            raise
        return attachment

    def close(self) -> None:
        """Withdraw everything and free the guards. Idempotent."""
        with self._lock:
            for served in self._served.values():
                served.guards.release(served.guard_offset)
            self._served.clear()
            for guards in self._guards.values():
                guards.close()
            self._guards.clear()


class CudaAttachment:
    """Copies out of one opened allocation. Implements ``base.Attachment``.

    Targets may be memory of the device or of the host.
    """

    medium = "cuda"

    def __init__(self, driver: Driver, region: RegionDescriptor, offer: CudaOffer) -> None:
        self._where = f"cuda, pid {offer.pid}"
        self._driver = driver
        self._region = region
        self._offer = offer
        if not self._is_owner_alive():
            raise self._gone()
        self._word = np.zeros(1, np.uint64)
        self._opened: list[int] = []
        self._stream: Stream | None = None
        self._lock = threading.Lock()
        device = driver.device_with(offer.device_uuid)
        try:
            # a process cannot open what it exported itself, and need not
            is_ours = offer.pid == os.getpid()
            self._address = offer.address if is_ours else self._open(offer.handle, device) + offer.offset
            self._guard = offer.guard_address if is_ours else (
                self._open(offer.guard_handle, device) + offer.guard_offset)
            self._stream = driver.open_stream(device)
        except MooncakeError:
            self.close()
            raise

    def check(self, deadline_ns: int) -> None:
        """Raise RegionGone unless the region is served."""
        with self._lock:
            if self._stream is None:
                raise TransferFailed("attachment is closed", where=self._where)
            self._read_guard(self._stream, deadline_ns)

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``."""
        batch.check(self._region.size_bytes)
        with self._lock:  # a close waits: copies under way use what it unmaps
            if self._stream is None:
                return ReadResult.failed(batch, TransferFailed("attachment is closed", where=self._where))
            try:
                return self._read(self._stream, batch, deadline_ns)
            except MooncakeError as error:
                return ReadResult.failed(batch, error if self._is_owner_alive() else self._gone())

    def close(self) -> None:
        """Unmap what was opened, when no read is under way. Idempotent."""
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.close()
            while self._opened:
                self._driver.unmap(self._opened.pop())

    def _is_owner_alive(self) -> bool:
        return process_start_ticks(self._offer.pid) == self._offer.start_ticks

    def _gone(self) -> RegionGone:
        return RegionGone("the owner's process is gone", where=self._where)

    def _open(self, handle: bytes, device: int) -> int:
        address = self._driver.open(handle, device)
        self._opened.append(address)
        return address

    def _read(self, stream: Stream, batch: ReadBatch, deadline_ns: int) -> ReadResult:
        pieces = coalesce(batch)
        total = len(pieces.lengths)
        done = np.zeros(total, np.bool_)
        sources = (pieces.remote_offsets + np.uint64(self._address)).tolist()
        targets, lengths = pieces.local_addresses.tolist(), pieces.lengths.tolist()
        error: MooncakeError | None = None
        for group in groups(pieces.lengths, count_max=GROUP_COUNT_MAX, bytes_max=GROUP_MAX_BYTES):
            if time.monotonic_ns() >= deadline_ns:
                error = past_deadline(self.medium, group.start, total)
                break
            window = slice(group.start, group.stop)
            for target, source, length in zip(targets[window], sources[window], lengths[window], strict=True):
                stream.copy(target, source, length)
            self._wait(stream, deadline_ns)
            done[window] = True
        self._read_guard(stream, deadline_ns)
        return ReadResult.of(batch, pieces.outcome(done), error)

    def _read_guard(self, stream: Stream, deadline_ns: int) -> None:
        """Raise RegionGone unless the owner lives and its guard word is the region's id, behind all copies."""
        self._word[0] = 0
        stream.copy(self._word.ctypes.data, self._guard, GUARD_BYTES)
        self._wait(stream, deadline_ns)
        if not self._is_owner_alive():
            raise self._gone()
        if int(self._word[0]) != self._region.region_id:
            raise RegionGone(f"the owner no longer serves region {self._region.region_id:#x}", where=self._where)

    def _wait(self, stream: Stream, deadline_ns: int) -> None:
        """Wait for what is queued: it writes to its targets, so not even the deadline ends this at once."""
        give_up_ns = max(deadline_ns, time.monotonic_ns()) + int(HANG_MAX_S * 1e9)
        while not stream.is_done():
            if time.monotonic_ns() >= give_up_ns:
                raise CudaError(f"the device did not finish a copy within {HANG_MAX_S:g} s of its deadline",
                                where=self._where, hint="look for Xid messages in the kernel's log")
            time.sleep(POLL_S)
