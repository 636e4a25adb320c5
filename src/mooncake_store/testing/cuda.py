"""Stand in for the CUDA driver on a machine without a GPU: host memory plays the device's.

Reads of another process's "device" go through process_vm_readv(2), so they end with that process, as real ones do. A
process cannot open its own handles, and copies are through only when asked for the second time, as on a device.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading

import numpy as np
import numpy.typing as npt

from mooncake_store.transport import libc
from mooncake_store.transport.copying import single_range
from mooncake_store.transport.cuda import Allocation, CudaError

UUID = b"fake-gpu-number-"
ALLOCATION_BYTES = 2 << 20
"""Every address lies in an allocation that begins at a multiple of this and ends with the address space."""
_HANDLE = struct.Struct("<QQ48x")
_MAPPED_SHIFT = 48


class FakeCuda:
    """Implements ``cuda.Driver``.

    Args:
        is_exportable: whether memory has IPC handles; piecewise mapped memory has none.
        hangs: copies never end.

    Attributes:
        num_mapped, num_allocated, num_streams: what is held now.
    """

    def __init__(self, *, is_exportable: bool = True, hangs: bool = False) -> None:
        libc.allow_any_tracer()
        self.hangs = hangs
        self.num_streams = 0
        self._is_exportable = is_exportable
        self._lock = threading.Lock()
        self._mapped: dict[int, int] = {}
        self._allocated: dict[int, npt.NDArray[np.uint8]] = {}

    @property
    def num_mapped(self) -> int:
        """Count the open allocations of peers."""
        return len(self._mapped)

    @property
    def num_allocated(self) -> int:
        """Count our own allocations."""
        return len(self._allocated)

    def probe(self) -> str:
        """Works everywhere."""
        return ""

    def allocation_of(self, address: int) -> Allocation:
        """Return the allocation around an address."""
        return Allocation(address - address % ALLOCATION_BYTES, 1 << 47, 0, self._is_exportable)

    def export(self, base: int) -> bytes:
        """Name our memory."""
        return _HANDLE.pack(os.getpid(), base)

    def open(self, handle: bytes, device: int) -> int:
        """Give a peer's memory an address that no host memory has."""
        pid, base = _HANDLE.unpack(handle)
        if pid == os.getpid():
            raise CudaError("cuIpcOpenMemHandle failed: CUDA_ERROR_INVALID_CONTEXT (201)", where="cuda")
        with self._lock:
            number = next(number for number in range(1, 1 << 15) if number not in self._mapped)
            self._mapped[number] = pid
        return int(number << _MAPPED_SHIFT | base)

    def unmap(self, address: int) -> None:
        """Forget a peer's memory."""
        with self._lock:
            if self._mapped.pop(address >> _MAPPED_SHIFT, None) is None:
                raise CudaError("cuIpcCloseMemHandle failed: CUDA_ERROR_INVALID_VALUE (1)", where="cuda")

    def device_uuid(self, device: int) -> bytes:
        """Name the one device."""
        return UUID

    def device_with(self, uuid: bytes) -> int:
        """Find it."""
        if uuid != UUID:
            raise CudaError(f"GPU {uuid.hex()} is not visible to this process", where="cuda")
        return 0

    def allocate(self, device: int, num_bytes: int) -> int:
        """Allocate host memory."""
        memory = np.zeros(num_bytes, np.uint8)
        with self._lock:
            self._allocated[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def free(self, address: int) -> None:
        """Free it."""
        with self._lock:
            del self._allocated[address]

    def write_word(self, address: int, value: int) -> None:
        """Store 8 bytes."""
        ctypes.c_uint64.from_address(address).value = value

    def open_stream(self, device: int) -> FakeStream:
        """Make a stream."""
        with self._lock:
            self.num_streams += 1
        return FakeStream(self)

    def has_dmabuf(self, device: int) -> bool:
        """Say yes; what ``dmabuf`` returns is a memfd."""
        return True

    def dmabuf(self, address: int, num_bytes: int) -> int:
        """Return some descriptor."""
        return os.memfd_create("fake-dmabuf", os.MFD_CLOEXEC)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Do one copy."""
        with self._lock:
            pid = self._mapped.get(source >> _MAPPED_SHIFT, os.getpid() if source >> _MAPPED_SHIFT == 0 else -1)
        try:
            copied = libc.read_process(pid, single_range(target, num_bytes),
                                       single_range(source & (1 << _MAPPED_SHIFT) - 1, num_bytes))
        except OSError as error:
            raise CudaError(f"cuMemcpyAsync failed: CUDA_ERROR_INVALID_VALUE (1), {error}", where="cuda") from error
        if copied != num_bytes:
            raise CudaError("cuMemcpyAsync failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)", where="cuda")


class FakeStream:
    """Implements ``cuda.Stream``."""

    def __init__(self, driver: FakeCuda) -> None:
        self._driver = driver
        self._is_busy = False
        self._is_open = True

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy at once, but say so only later."""
        self._driver.copy(target, source, num_bytes)
        self._is_busy = True

    def is_done(self) -> bool:
        """Say no the first time."""
        was_busy, self._is_busy = self._is_busy, self._driver.hangs
        return not was_busy

    def close(self) -> None:
        """Free it. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._driver.num_streams -= 1


__all__ = ["FakeCuda"]
