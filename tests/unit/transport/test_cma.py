"""process_vm_readv: holes in the owner's memory, dead and recycled processes, and refusals that say what to do."""

import ctypes
import errno
import mmap
import os

import msgspec
import numpy as np
import pytest

from mooncake_store.errors import TransferFailed
from mooncake_store.testing.transport import Owned, Target, soon
from mooncake_store.transport import cma, libc
from mooncake_store.transport.base import LocalMemory, RegionDescriptor, RegionGone
from mooncake_store.transport.memory import PAGE_BYTES, host_identity


def test_ranges_the_owner_unmapped_fail_alone():
    area = mmap.mmap(-1, 64 * PAGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    source = np.frombuffer(area, np.uint8)
    source[:] = np.random.default_rng(0).integers(1, 256, len(source), np.uint8)
    expected = source.copy()
    hole = ctypes.CDLL(None).mprotect
    hole.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    transport = cma.CmaTransport()
    offer = transport.serve(5, LocalMemory(address, len(source), owner=area))
    attachment = transport.attach(RegionDescriptor(5, len(source), host_identity(), (offer,)), deadline_ns=soon())
    holes = [0, 9, 10, 63]
    for page in holes:
        assert hole(address + page * PAGE_BYTES, PAGE_BYTES, 0) == 0
    order = np.random.default_rng(1).permutation(64)
    target = Target(order * PAGE_BYTES, np.full(64, PAGE_BYTES))
    result = attachment.read(target.batch, deadline_ns=soon())
    for page in holes:
        assert hole(address + page * PAGE_BYTES, PAGE_BYTES, 3) == 0
    assert sorted(order[~result.ok].tolist()) == holes
    assert isinstance(result.error, TransferFailed) and "unmapped" in result.error.message
    target.check(result, expected)


def test_a_recycled_pid_is_not_read():
    transport = cma.CmaTransport()
    owned = Owned(transport, "private")
    offer = owned.descriptor.offers[0]
    for other in (msgspec.structs.replace(offer, start_ticks=offer.start_ticks + 1),
                  msgspec.structs.replace(offer, pid=2**22 + 7)):
        with pytest.raises(RegionGone):
            transport.attach(msgspec.structs.replace(owned.descriptor, offers=(other,)), deadline_ns=soon())
    transport.close()


@pytest.mark.parametrize(("code", "error", "says"), [
    (errno.EPERM, TransferFailed, "ptrace_scope"),
    (errno.ESRCH, RegionGone, "gone"),
    (errno.ENOSYS, TransferFailed, "no process_vm_readv"),
])
def test_refusals_say_what_to_do(monkeypatch, code, error, says):
    transport = cma.CmaTransport()
    owned = Owned(transport, "private")
    attachment = transport.attach(owned.descriptor, deadline_ns=soon())

    def refuse(pid, local, num_local, remote, num_remote):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libc, "read_process_at", refuse)
    for count in (1, 3):
        result = attachment.read(Target(np.arange(count), np.full(count, 8)).batch, deadline_ns=soon())
        assert type(result.error) is error and says in result.error.message and not result.ok.any()
    if code == errno.EPERM:
        assert "SYS_PTRACE" in result.error.hint
        assert "ptrace_scope" in transport.probe()


def test_calls_stay_below_the_kernels_limit_and_short_counts_go_on(monkeypatch):
    transport = cma.CmaTransport()
    owned = Owned(transport, "private")
    attachment = transport.attach(owned.descriptor, deadline_ns=soon())
    calls = []
    real = libc.read_process

    def short(pid, local, remote):
        calls.append(len(local))
        assert len(local) == len(remote) <= libc.IOV_MAX
        keep = max(1, len(local) * 2 // 3)  # the kernel may stop early
        return real(pid, local[:keep], remote[:keep])

    monkeypatch.setattr(libc, "read_process", short)
    offsets = np.random.default_rng(0).permutation(3000) * 2000
    target = Target(offsets, np.full(3000, 1999))
    result = attachment.read(target.batch, deadline_ns=soon())
    assert result.error is None and len(calls) > 3
    target.check(result, owned.bytes)
