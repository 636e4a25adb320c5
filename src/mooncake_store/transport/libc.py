"""Bind the few libc calls that move bytes or map memory; every one of them releases the GIL.

Addresses are plain ints, iovec lists are numpy arrays of shape (n, 2) uint64 (address, length): building one costs no
Python object per entry. A wrong address here is a segmentation fault or EFAULT, so only checked ranges come in.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy.typing as npt

IOV_MAX = 1024
"""iovecs one call takes (linux/uio.h UIO_MAXIOV)."""

PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED = 1
MADV_HUGEPAGE = 14
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

_libc = ctypes.CDLL(None, use_errno=True)


class _MessageHeader(ctypes.Structure):
    """struct msghdr of <sys/socket.h>, 64-bit Linux."""

    _fields_ = [
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p), ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t), ("flags", ctypes.c_int),
    ]


def _bind(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.restype = result
    function.argtypes = arguments
    return function


_mmap = _bind("mmap", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
              ctypes.c_int64)
_munmap = _bind("munmap", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_madvise = _bind("madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_prctl = _bind("prctl", ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_process_vm_readv = _bind("process_vm_readv", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong,
                          ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
_sendmsg = _bind("sendmsg", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_recvmsg = _bind("recvmsg", ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int)

_MAP_FAILED = ctypes.c_void_p(-1).value
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000


def _fail() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def map_shared(fd: int, size_bytes: int, *, writable: bool) -> int:
    """Map ``size_bytes`` of ``fd`` from offset 0, shared; return the address. Raises OSError."""
    protection = PROT_READ | (PROT_WRITE if writable else 0)
    address = _mmap(None, size_bytes, protection, MAP_SHARED, fd, 0)
    if address is None or address == _MAP_FAILED:
        raise _fail()
    return int(address)


def unmap(address: int, size_bytes: int) -> None:
    """Unmap a range that :func:`map_shared` returned. Raises OSError."""
    if _munmap(address, size_bytes):
        raise _fail()


def advise(address: int, size_bytes: int, advice: int) -> None:
    """Call madvise(2). Raises OSError."""
    if _madvise(address, size_bytes, advice):
        raise _fail()


def allow_any_tracer() -> bool:
    """Let any process of our user read our memory where Yama's ptrace_scope is 1; False where there is no Yama."""
    return bool(_prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0) == 0)


def read_process(pid: int, local: npt.NDArray[Any], remote: npt.NDArray[Any]) -> int:
    """Copy from ``remote`` ranges of process ``pid`` to ``local`` ranges; return bytes copied, maybe fewer than asked.

    Both are C-contiguous (n, 2) uint64 arrays with n <= IOV_MAX. Raises OSError when nothing was copied.
    """
    return read_process_at(pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote))


def read_process_at(pid: int, local_address: int, num_local: int, remote_address: int, num_remote: int) -> int:
    """Do as :func:`read_process`, with the addresses of the two arrays: asking numpy for them costs 2 us."""
    count = _process_vm_readv(pid, local_address, num_local, remote_address, num_remote, 0)
    if count < 0:
        raise _fail()
    return int(count)


def send_ranges(fd: int, address: int, count: int) -> int:
    """Send memory ranges, ``count`` pairs of (address, length) at ``address``, on a socket without blocking.

    Returns bytes sent. Raises BlockingIOError, OSError.
    """
    header = _MessageHeader(iov=address, iov_length=count)
    sent = _sendmsg(fd, ctypes.addressof(header), _MSG_DONTWAIT | _MSG_NOSIGNAL)
    if sent < 0:
        raise _fail()
    return int(sent)


def receive_ranges(fd: int, address: int, count: int) -> int:
    """Receive into memory ranges without blocking; return bytes received, 0 at end of stream. Raises OSError."""
    header = _MessageHeader(iov=address, iov_length=count)
    received = _recvmsg(fd, ctypes.addressof(header), _MSG_DONTWAIT)
    if received < 0:
        raise _fail()
    return int(received)


def address_space() -> memoryview:
    """View the whole address space of this process: ``view[address:address + length]`` is memory, unchecked.

    A slice costs 0.4 us; a ctypes array per range costs twice that.
    """
    return memoryview((ctypes.c_char * (1 << 47)).from_address(0)).cast("B")
