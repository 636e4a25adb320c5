"""Shared memory is sealed, populated and lives as long as someone looks at it."""

import fcntl
import mmap
import os

import numpy as np
import pytest

from mooncake_store.errors import CapacityExceeded
from mooncake_store.transport import memory
from mooncake_store.transport.base import LocalMemory
from mooncake_store.transport.guard import GUARD_SLOTS_MAX, GuardPage
from mooncake_store.transport.shm import ShmTransport


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * memory.PAGE_BYTES


def test_a_mapped_memfd_is_zeroed_writable_and_faulted_in():
    before = resident_bytes()
    shared = memory.map_memfd(32 << 20, "test")
    assert resident_bytes() - before > 30 << 20
    view = shared.array()
    assert not view.any()
    view[-1] = 7
    assert os.pread(shared.memfd, 1, (32 << 20) - 1) == b"\7"
    shared.close()


def test_a_mapped_memfd_cannot_shrink_or_be_mapped_for_writing_by_others():
    shared = memory.map_memfd(8192, "test")
    with pytest.raises(PermissionError):
        os.ftruncate(shared.memfd, 4096)
    with pytest.raises(PermissionError):
        mmap.mmap(shared.memfd, 8192)
    mmap.mmap(shared.memfd, 8192, prot=mmap.PROT_READ).close()
    shared.close()


def test_views_outlive_close():
    shared = memory.map_memfd(4096, "test")
    view = shared.array()
    kept = shared.memory().owner
    shared.close()
    shared.close()
    view[:] = 3
    assert view.sum() == 3 * 4096 and kept is not None
    with pytest.raises(ValueError, match="closed"):
        shared.memory()


def test_more_than_the_machine_has_is_refused_before_it_is_tried():
    with pytest.raises(CapacityExceeded, match="available"):
        memory.map_memfd(1 << 50, "test")
    with pytest.raises(ValueError, match="at least 1"):
        memory.map_memfd(0, "test")


def test_populate_faults_in_without_changing_contents():
    area = mmap.mmap(-1, 16 << 20)
    view = np.frombuffer(area, np.uint8)
    view[12345] = 9
    before = resident_bytes()
    seconds = memory.populate(view.ctypes.data + 5, len(view) - 10)
    assert seconds >= 0 and resident_bytes() - before > 14 << 20
    assert view[12345] == 9 and view.sum() == 9


def test_start_ticks_tell_processes_apart():
    ours = memory.process_start_ticks(os.getpid())
    assert ours is not None and ours == memory.process_start_ticks(os.getpid())
    assert memory.process_start_ticks(1) != ours
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert memory.process_start_ticks(child) is None


def test_host_identity_names_this_kernel():
    identity = memory.host_identity()
    assert len(identity.boot_id) == 36 and identity.pid_namespace > 0


def test_shm_does_not_offer_memory_that_could_shrink():
    transport = ShmTransport()
    memfd = os.memfd_create("unsealable")  # without MFD_ALLOW_SEALING
    os.ftruncate(memfd, 4096)
    assert transport.serve(1, LocalMemory(0, 4096, memfd)) is None
    assert transport.serve(1, LocalMemory(0, 4096)) is None
    os.close(memfd)
    transport.close()


def test_shm_seals_a_memfd_it_offers():
    transport = ShmTransport()
    memfd = os.memfd_create("plain", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, 4096)
    assert transport.serve(1, LocalMemory(0, 4096, memfd)) is not None
    assert fcntl.fcntl(memfd, memory.F_GET_SEALS) & memory.SEAL_SHRINK
    os.close(memfd)
    transport.close()


def test_a_guard_page_is_bounded_and_reuses_words():
    page = GuardPage()
    offsets = [page.hold(region_id) for region_id in range(1, GUARD_SLOTS_MAX + 1)]
    assert len(set(offsets)) == GUARD_SLOTS_MAX
    with pytest.raises(CapacityExceeded):
        page.hold(99_999)
    assert page.release(5) and not page.release(5)
    assert page.hold(99_999) == offsets[4]
    assert int.from_bytes(os.pread(page.memfd, 8, offsets[4]), "little") == 99_999
    page.close()
    with pytest.raises(CapacityExceeded):
        page.hold(1)
