"""Call the CUDA driver through ctypes: no toolkit, no torch; libcuda.so.1 is loaded at the first probe.

Untested on hardware. Signatures and numbers are those of cuda.h, CUDA 11.7 and later. ctypes releases the GIL.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from mooncake_store.transport.cuda import Allocation, CudaError

IPC_HANDLE_BYTES = 64
UUID_BYTES = 16
_SUCCESS, _NOT_READY = 0, 600
_IPC_LAZY_ENABLE_PEER_ACCESS = 1
_STREAM_NON_BLOCKING = 1
_POINTER_SYNC_MEMOPS, _POINTER_DEVICE_ORDINAL, _POINTER_IPC_CAPABLE = 6, 9, 10
_DEVICE_DMA_BUF_SUPPORTED = 124
_RANGE_HANDLE_DMA_BUF_FD = 1

_Ptr = ctypes.c_uint64
_Size = ctypes.c_size_t
_Int = ctypes.c_int
_Out = ctypes.c_void_p


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * IPC_HANDLE_BYTES)]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (_Out,),
    "cuDeviceGet": (_Out, _Int),
    "cuDeviceGetUuid": (_Out, _Int),
    "cuDeviceGetAttribute": (_Out, _Int, _Int),
    "cuDevicePrimaryCtxRetain": (_Out, _Int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (_Out,),
    "cuPointerGetAttribute": (_Out, _Int, _Ptr),
    "cuPointerSetAttribute": (_Out, _Int, _Ptr),
    "cuMemGetAddressRange_v2": (_Out, _Out, _Ptr),
    "cuMemGetHandleForAddressRange": (_Out, _Ptr, _Size, _Int, ctypes.c_ulonglong),
    "cuMemAlloc_v2": (_Out, _Size),
    "cuMemFree_v2": (_Ptr,),
    "cuMemsetD8_v2": (_Ptr, ctypes.c_ubyte, _Size),
    "cuMemcpyHtoD_v2": (_Ptr, ctypes.c_void_p, _Size),
    "cuMemcpyAsync": (_Ptr, _Ptr, _Size, ctypes.c_void_p),
    "cuIpcGetMemHandle": (_Out, _Ptr),
    "cuIpcOpenMemHandle_v2": (_Out, _IpcHandle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_Ptr,),
    "cuStreamCreate": (_Out, ctypes.c_uint),
    "cuStreamQuery": (ctypes.c_void_p,),
    "cuStreamDestroy_v2": (ctypes.c_void_p,),
    "cuGetErrorName": (_Int, _Out),
}


class LibCuda:
    """Implements ``cuda.Driver`` on the driver library. The primary context of a device is kept once used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._library: Any = None
        self._contexts: dict[int, int] = {}

    def probe(self) -> str:
        """Return why CUDA cannot be used here, empty when it can."""
        try:
            self._load()
            count = _Int()
            self.call("cuDeviceGetCount", ctypes.byref(count))
        except (OSError, AttributeError, CudaError) as error:
            return f"no CUDA driver: {error}"
        return "" if count.value else "no CUDA device"

    def call(self, name: str, *arguments: Any, allowed: tuple[int, ...] = ()) -> int:
        """Call a function of the driver; return its result, which is success or in ``allowed``. Raises CudaError."""
        if self._library is None:
            self._load()
        result: int = getattr(self._library, name)(*arguments)
        if result != _SUCCESS and result not in allowed:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(result, ctypes.byref(text))
            raise CudaError(f"{name} failed: {(text.value or b'error').decode()} ({result})", where="cuda")
        return result

    def allocation_of(self, address: int) -> Allocation:
        """Return the allocation that a device address lies in."""
        device, is_exportable = _Int(), _Int()
        self.call("cuPointerGetAttribute", ctypes.byref(device), _POINTER_DEVICE_ORDINAL, address)
        self.call("cuPointerGetAttribute", ctypes.byref(is_exportable), _POINTER_IPC_CAPABLE, address)
        base, size = _Ptr(), _Size()
        with self.on(device.value):
            self.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        return Allocation(base.value, size.value, device.value, bool(is_exportable.value))

    def export(self, base: int) -> bytes:
        """Return the IPC handle of an allocation."""
        handle = _IpcHandle()
        with self.on(self.allocation_of(base).device):
            self.call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle)

    def open(self, handle: bytes, device: int) -> int:
        """Map a peer's allocation."""
        address = _Ptr()
        with self.on(device):
            self.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _IpcHandle.from_buffer_copy(handle),
                      _IPC_LAZY_ENABLE_PEER_ACCESS)
        return address.value

    def unmap(self, address: int) -> None:
        """Undo ``open``."""
        with self.on(self.allocation_of(address).device):
            self.call("cuIpcCloseMemHandle", address)

    def device_uuid(self, device: int) -> bytes:
        """Return what names the device in every process."""
        uuid = (ctypes.c_ubyte * UUID_BYTES)()
        self.call("cuDeviceGetUuid", ctypes.byref(uuid), self._handle_of(device))
        return bytes(uuid)

    def device_with(self, uuid: bytes) -> int:
        """Return our number of that device."""
        count = _Int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        for device in range(count.value):
            if self.device_uuid(device) == uuid:
                return device
        raise CudaError(f"GPU {uuid.hex()} is not visible to this process", where="cuda",
                        hint="make every engine see all GPUs of the host (CUDA_VISIBLE_DEVICES)")

    def allocate(self, device: int, num_bytes: int) -> int:
        """Allocate device memory of our own, zeroed."""
        address = _Ptr()
        with self.on(device):
            self.call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
            self.call("cuMemsetD8_v2", address.value, 0, num_bytes)
        return address.value

    def free(self, address: int) -> None:
        """Free it."""
        with self.on(self.allocation_of(address).device):
            self.call("cuMemFree_v2", address)

    def write_word(self, address: int, value: int) -> None:
        """Store 8 bytes in device memory."""
        word = ctypes.c_uint64(value)
        with self.on(self.allocation_of(address).device):
            self.call("cuMemcpyHtoD_v2", address, ctypes.addressof(word), 8)

    def open_stream(self, device: int) -> CudaStream:
        """Make a stream that does not wait for the engine's."""
        stream = ctypes.c_void_p()
        with self.on(device):
            self.call("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        return CudaStream(self, device, stream.value or 0)

    def has_dmabuf(self, device: int) -> bool:
        """Tell whether the driver exports this device's memory as dmabuf."""
        value = _Int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), _DEVICE_DMA_BUF_SUPPORTED, self._handle_of(device))
        return bool(value.value)

    def dmabuf(self, address: int, num_bytes: int) -> int:
        """Export page-aligned device memory; copies to it are made synchronous first, as RDMA needs."""
        fd, flag = _Int(-1), ctypes.c_uint(1)
        with self.on(self.allocation_of(address).device):
            self.call("cuPointerSetAttribute", ctypes.byref(flag), _POINTER_SYNC_MEMOPS, address)
            self.call("cuMemGetHandleForAddressRange", ctypes.byref(fd), address, num_bytes,
                      _RANGE_HANDLE_DMA_BUF_FD, 0)
        return fd.value

    def on(self, device: int) -> _Current:
        """Make a device's primary context current for a ``with`` block; the engine uses the same one."""
        with self._lock:
            context = self._contexts.get(device)
            if context is None:
                made = ctypes.c_void_p()
                self.call("cuDevicePrimaryCtxRetain", ctypes.byref(made), self._handle_of(device))
                context = self._contexts[device] = made.value or 0
        return _Current(self, context)

    def _handle_of(self, device: int) -> int:
        handle = _Int()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        return handle.value

    def _load(self) -> None:
        """Load the library. Raises OSError, AttributeError: there is none, or one too old; CudaError."""
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _Int
        self._library = library
        self.call("cuInit", 0)


class _Current:
    """A context pushed for the length of a ``with`` block."""

    def __init__(self, driver: LibCuda, context: int) -> None:
        self._driver = driver
        self._context = context

    def __enter__(self) -> None:
        self._driver.call("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *_: object) -> None:
        self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class CudaStream:
    """Implements ``cuda.Stream``."""

    def __init__(self, driver: LibCuda, device: int, stream: int) -> None:
        self._driver = driver
        self._device = device
        self._stream = stream

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Queue a copy; where the addresses are, the driver knows (unified addressing)."""
        with self._driver.on(self._device):
            self._driver.call("cuMemcpyAsync", target, source, num_bytes, self._stream)

    def is_done(self) -> bool:
        """Tell whether everything queued is through."""
        with self._driver.on(self._device):
            return self._driver.call("cuStreamQuery", self._stream, allowed=(_NOT_READY,)) == _SUCCESS

    def close(self) -> None:
        """Free the stream. Idempotent."""
        stream, self._stream = self._stream, 0
        if stream:
            with self._driver.on(self._device):
                self._driver.call("cuStreamDestroy_v2", stream)
