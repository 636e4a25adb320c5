"""Map shared memory, fault it in ahead of use, and say which host and process we are.

Why populate: memory is mapped lazily, and a first-touch copy runs at about a quarter of the speed of a later one.
Why seals: a reader that maps a memfd dies of SIGBUS if the owner shrinks it; a sealed one cannot shrink, and nobody but
the owner can map it for writing.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import mmap
import os
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import CapacityExceeded
from mooncake_store.transport import libc
from mooncake_store.transport.base import LocalMemory
from mooncake_store.types import HostIdentity

logger = logging.getLogger(__name__)

PAGE_BYTES = mmap.PAGESIZE
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEAL_SHRINK, SEAL_GROW, SEAL_FUTURE_WRITE = 0x2, 0x4, 0x10
POPULATE_STEP_BYTES = 256 << 20
_TICKS_FIELD = 22


def _unmap(address: int, size_bytes: int) -> None:
    # also runs from a finalizer, where raising helps nobody; a failure means the range was never ours
    try:
        libc.unmap(address, size_bytes)
    except OSError as error:
        logger.error("cannot unmap %d bytes at %#x: %s", size_bytes, address, error)


class Mapping:
    """Holds one shared mapping; unmapped when the last reference goes, so a copy in progress keeps it valid.

    Args:
        fd: memfd to map from offset 0; not kept.
        size_bytes: length.
        writable: map for writing too.

    Raises:
        OSError: the kernel refuses.
    """

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        self.address = libc.map_shared(fd, size_bytes, writable=writable)
        self.size_bytes = size_bytes
        self._writable = writable
        weakref.finalize(self, _unmap, self.address, size_bytes).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, not self._writable), "shape": (self.size_bytes,), "typestr": "|u1", "version": 3}

    def array(self) -> npt.NDArray[np.uint8]:
        """View the bytes as a 1-D uint8 array that keeps the mapping alive."""
        return np.asarray(self)


class SharedMemory:
    """Memory of ours that peers on this host can map: a memfd, mapped here for writing.

    Attributes:
        address: first byte in this process.
        size_bytes: length.
        memfd: descriptor; -1 once closed.
        populate_s: seconds that faulting it in took.
    """

    def __init__(self, mapping: Mapping, memfd: int, populate_s: float) -> None:
        self._mapping: Mapping | None = mapping
        self.address = mapping.address
        self.size_bytes = mapping.size_bytes
        self.memfd = memfd
        self.populate_s = populate_s
        self._closer = weakref.finalize(self, os.close, memfd)

    def array(self) -> npt.NDArray[np.uint8]:
        """View the bytes as a writable 1-D uint8 array; the view stays valid after ``close``.

        Raises:
            ValueError: after ``close``.
        """
        if self._mapping is None:
            raise ValueError("shared memory is closed")
        return self._mapping.array()

    def memory(self) -> LocalMemory:
        """Describe it for ``Media.serve``; the description keeps it mapped.

        Raises:
            ValueError: after ``close``.
        """
        if self._mapping is None:
            raise ValueError("shared memory is closed")
        return LocalMemory(self.address, self.size_bytes, self.memfd, owner=self._mapping)

    def close(self) -> None:
        """Close the descriptor and drop our mapping; it goes when the last view or served region does. Idempotent."""
        self._mapping = None
        self._closer()
        self.memfd = -1


def map_memfd(size_bytes: int, name: str) -> SharedMemory:
    """Create, map and populate anonymous shared memory.

    Transparent huge pages are asked for; shared memory gets them only where
    /sys/kernel/mm/transparent_hugepage/shmem_enabled is ``advise`` or stronger. The memory starts as zeros.

    Args:
        size_bytes: length > 0.
        name: shown in /proc/PID/maps as ``memfd:NAME``.

    Raises:
        ValueError: size_bytes < 1.
        CapacityExceeded: the machine has not that much memory.
        OSError: no memfd support, or no descriptors left.
    """
    if size_bytes < 1:
        raise ValueError(f"size_bytes is {size_bytes}, must be at least 1")
    available_bytes = _available_bytes()
    if size_bytes > available_bytes:
        raise CapacityExceeded(f"cannot map {size_bytes} bytes: the machine has {available_bytes} available",
                               where=f"memfd {name}", hint="lower segment_bytes")
    memfd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memfd, size_bytes)
        mapping = Mapping(memfd, size_bytes, writable=True)
        seal(memfd)
        populate_s = populate(mapping.address, size_bytes)
    except BaseException:
        os.close(memfd)
        raise
    return SharedMemory(mapping, memfd, populate_s)


def seal(memfd: int) -> bool:
    """Forbid resizing, and new writable mappings; return whether shrinking is now forbidden."""
    for seals in (SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE, SEAL_SHRINK | SEAL_GROW, SEAL_SHRINK):
        try:
            fcntl.fcntl(memfd, F_ADD_SEALS, seals)
            break
        except OSError:
            continue  # FUTURE_WRITE needs Linux 5.1; a memfd sealed before, or made without sealing, refuses them all
    return is_sealed(memfd)


def is_sealed(memfd: int) -> bool:
    """Tell whether ``memfd`` can never shrink, so that reading a mapping of it cannot raise SIGBUS."""
    try:
        return bool(fcntl.fcntl(memfd, F_GET_SEALS) & SEAL_SHRINK)
    except OSError:
        return False


def populate(address: int, size_bytes: int, *, for_writing: bool = True) -> float:
    """Fault existing memory in, with huge pages where the kernel gives them; return the seconds it took.

    Contents do not change. Runs without the GIL, in steps of 256 MiB. On kernels before 5.14 it only asks for huge
    pages: the first copies are then slower.

    Raises:
        CapacityExceeded: memory ran out.
    """
    started = time.monotonic()
    first = address - address % PAGE_BYTES
    end = address + size_bytes
    end += -end % PAGE_BYTES
    try:
        libc.advise(first, end - first, libc.MADV_HUGEPAGE)
    except OSError as error:
        logger.debug("no huge pages for %d bytes at %#x: %s", size_bytes, address, error)
    advice = libc.MADV_POPULATE_WRITE if for_writing else libc.MADV_POPULATE_READ
    for start in range(first, end, POPULATE_STEP_BYTES):
        try:
            libc.advise(start, min(POPULATE_STEP_BYTES, end - start), advice)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise CapacityExceeded(f"cannot fault in {size_bytes} bytes at {address:#x}: {error}",
                                       hint="lower segment_bytes or the engine's cache size") from error
            logger.debug("cannot populate %d bytes at %#x: %s", size_bytes, address, error)
            break
    return time.monotonic() - started


@functools.lru_cache(maxsize=1)
def host_identity() -> HostIdentity:
    """Return what tells whether a peer shares our kernel and our view of process ids."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return HostIdentity(boot_id, os.stat("/proc/self/ns/pid").st_ino)


def process_start_ticks(pid: int) -> int | None:
    """Return when process ``pid`` started, in clock ticks since boot; None when it is dead."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the command name (field 2) may hold blanks and parentheses: count from the last ')'
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[_TICKS_FIELD - 3])


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 63
