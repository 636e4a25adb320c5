"""Read a peer's memory on the same host with process_vm_readv(2).

Nothing is shared beforehand and no code runs on the owner's side. For memory that is not a memfd, such as an engine's
KV cache. The kernel copies once, straight from the owner's pages to ours, up to 1,024 ranges per call.

Who may read whom is the kernel's ptrace rule (PTRACE_MODE_ATTACH_REALCREDS): same user and dumpable, or
CAP_SYS_PTRACE, and both see each other's pids. Under Yama's ptrace_scope=1 the owner must allow it, which ``serve``
does (prctl PR_SET_PTRACER_ANY: any process of the same user may then read, and debug, this one); scope 2 and above
need CAP_SYS_PTRACE.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np

from mooncake_store.errors import MooncakeError, TransferFailed
from mooncake_store.transport import libc
from mooncake_store.transport.base import CmaOffer, LocalMemory, ReadBatch, ReadResult, RegionDescriptor, RegionGone
from mooncake_store.transport.coalesce import coalesce
from mooncake_store.transport.copying import copy_from_process, past_deadline, single_range
from mooncake_store.transport.guard import GuardPage
from mooncake_store.transport.memory import process_start_ticks

LONE_MAX_BYTES = 1 << 20
"""A lone read up to this goes the short way: an epoch word is re-read after every copy."""
RANGE_BYTES = 16
GUARD_BYTES = 8


def explain(error: OSError, pid: int) -> MooncakeError:
    """Turn an errno of process_vm_readv into what happened and what to change."""
    where = f"cma, pid {pid}"
    if error.errno == errno.ESRCH:
        return RegionGone("the owner's process is gone", where=where)
    if error.errno == errno.EFAULT:
        return TransferFailed("the owner unmapped part of the region, or the target is not writable", where=where)
    if error.errno == errno.EPERM:
        return TransferFailed(
            f"the kernel does not let us read the owner's memory (Yama ptrace_scope is {_ptrace_scope()})", where=where,
            hint="run both processes as the same user; in containers share the pid namespace and add SYS_PTRACE "
                 "(docker --cap-add=SYS_PTRACE, Kubernetes securityContext.capabilities.add); on the host "
                 "`sysctl kernel.yama.ptrace_scope=1` or 0; or leave cma out of `media`")
    if error.errno == errno.ENOSYS:
        return TransferFailed("this kernel has no process_vm_readv", where=where, hint="leave cma out of `media`")
    return TransferFailed(f"process_vm_readv failed: {error}", where=where)


class CmaTransport:
    """Serves and reads memory by process_vm_readv. Implements ``base.Transport``; has no threads."""

    medium = "cma"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guards: GuardPage | None = None
        self._kept: dict[int, LocalMemory] = {}

    def probe(self) -> str:
        """Return why this medium cannot work here, empty when it can: reads 8 bytes of ourselves."""
        source, target = np.array([0x6D6F6F6E], np.uint64), np.zeros(1, np.uint64)
        try:
            libc.read_process(os.getpid(), single_range(target.ctypes.data, 8), single_range(source.ctypes.data, 8))
        except OSError as error:
            return explain(error, os.getpid()).message
        return "" if target[0] == source[0] else "process_vm_readv copied wrong bytes"

    def serve(self, region_id: int, memory: LocalMemory) -> CmaOffer | None:
        """Allow peers to read the memory; None when its guard cannot be kept (too many regions).

        Raises:
            MooncakeError: the guard page cannot be made.
        """
        with self._lock:
            if self._guards is None:
                self._guards = GuardPage()
                libc.allow_any_tracer()
            guard_offset = self._guards.hold(region_id)
            self._kept[region_id] = memory
            ticks = process_start_ticks(os.getpid())
            return CmaOffer(os.getpid(), ticks or 0, memory.address, self._guards.address + guard_offset)

    def withdraw(self, region_id: int) -> None:
        """Clear the region's guard: reads that end after this fail. Idempotent."""
        with self._lock:
            if self._guards is not None:
                self._guards.release(region_id)
            self._kept.pop(region_id, None)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> CmaAttachment:
        """Check that the owner lives, may be read, and still serves the region.

        Raises:
            RegionGone: the process is gone, its pid is another's now, or the region is withdrawn.
            TransferFailed: not offered, or the kernel forbids it; the hint says what to change.
        """
        offer = next((offer for offer in region.offers if isinstance(offer, CmaOffer)), None)
        if offer is None:
            raise TransferFailed("the region is not offered over cma")
        if process_start_ticks(offer.pid) != offer.start_ticks:
            raise RegionGone("the owner's process is gone", where=f"cma, pid {offer.pid}")
        attachment = CmaAttachment(region, offer)
        error = attachment.check_guard()
        if error is not None:
            raise error
        return attachment

    def close(self) -> None:
        """Withdraw everything. Idempotent."""
        with self._lock:
            if self._guards is not None:
                self._guards.close()
                self._guards = None
            self._kept.clear()


class CmaAttachment:
    """Reads one region of another process. Implements ``base.Attachment``; holds no descriptor."""

    medium = "cma"

    def __init__(self, region: RegionDescriptor, offer: CmaOffer) -> None:
        self._region = region
        self._offer = offer
        self._guard = np.zeros(1, np.uint64)
        # a lone read and the guard behind it, for one system call
        self._local = np.array([[0, 0], [self._guard.ctypes.data, 8]], np.uint64)
        self._remote = np.array([[0, 0], [offer.guard_address, 8]], np.uint64)
        self._local_address, self._remote_address = self._local.ctypes.data, self._remote.ctypes.data
        self._is_closed = False

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``. A range the owner unmapped fails alone, the others go on."""
        batch.check(self._region.size_bytes)
        if self._is_closed:
            return ReadResult.failed(batch, TransferFailed("attachment is closed", where="cma"))
        if time.monotonic_ns() >= deadline_ns:
            return ReadResult.failed(batch, past_deadline("cma", 0, len(batch.lengths)))
        if len(batch.lengths) == 1 and batch.lengths[0] <= LONE_MAX_BYTES:
            error = self._read_lone(batch)
            return ReadResult(np.ones(1, np.bool_), int(batch.lengths[0])) if error is None else (
                ReadResult.failed(batch, error))
        pieces = coalesce(batch)
        done = np.zeros(len(pieces.lengths), np.bool_)
        failure = copy_from_process(self._offer.pid, pieces, self._offer.address, done, medium="cma",
                                    deadline_ns=deadline_ns)
        error = explain(failure, self._offer.pid) if isinstance(failure, OSError) else failure
        # last, so that everything before it was read while the region was served
        refused = self.check_guard()
        if refused is not None:
            return ReadResult.failed(batch, refused)
        return ReadResult.of(batch, pieces.outcome(done), error)

    def check_guard(self) -> MooncakeError | None:
        """Return why the region is no longer the one described, None when it is."""
        self._guard[0] = 0
        try:
            libc.read_process_at(self._offer.pid, self._local_address + RANGE_BYTES, 1,
                                 self._remote_address + RANGE_BYTES, 1)
        except OSError as error:
            if error.errno != errno.EFAULT:
                return explain(error, self._offer.pid)
        if int(self._guard[0]) == self._region.region_id:
            return None
        return RegionGone(f"the owner no longer serves region {self._region.region_id:#x}",
                               where=f"cma, pid {self._offer.pid}")

    def close(self) -> None:
        """Refuse further reads. Idempotent."""
        self._is_closed = True

    def _read_lone(self, batch: ReadBatch) -> MooncakeError | None:
        length = int(batch.lengths[0])
        self._local[0] = batch.local_addresses[0], length
        self._remote[0] = int(batch.remote_offsets[0]) + self._offer.address, length
        self._guard[0] = 0
        try:
            copied = libc.read_process_at(self._offer.pid, self._local_address, 2, self._remote_address, 2)
        except OSError as error:
            # a fault may mean that the region went, which its guard then says
            return self.check_guard() or explain(error, self._offer.pid)
        if copied == length + GUARD_BYTES and int(self._guard[0]) == self._region.region_id:
            return None
        return self.check_guard() or explain(OSError(errno.EFAULT, os.strerror(errno.EFAULT)), self._offer.pid)


def _ptrace_scope() -> str:
    try:
        return Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii").strip()
    except OSError:
        return "not in use"
