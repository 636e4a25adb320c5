"""The tcp read server in a process of its own: what happens when it, its parent or its memory goes."""

import ctypes
import functools
import mmap
import os
import signal
import sys
import time

import msgspec
import numpy as np
import psutil
import pytest

from mooncake_store.errors import PeerUnreachable
from mooncake_store.testing.transport import Owned, OwnerProcess, Target, pattern, soon
from mooncake_store.transport import tcp_process
from mooncake_store.transport.base import LocalMemory, RegionDescriptor
from mooncake_store.transport.memory import host_identity
from mooncake_store.transport.tcp import TcpTransport

SIZE = 1 << 20


def children(pid=None):
    return {child.pid for child in psutil.Process(pid).children()}


@pytest.fixture
def server():
    before = children()
    transport = TcpTransport(process=True)
    yield transport
    transport.close()
    assert children() == before


def child_of(transport):
    return transport._process._process.pid


def wait_until(holds, seconds=10.0):
    stop = time.monotonic() + seconds
    while not holds() and time.monotonic() < stop:
        time.sleep(0.02)
    assert holds()


def read_all(region, source):
    """Attach and read everything; return the error."""
    attachment = TcpTransport().attach(region, deadline_ns=soon())
    target = Target(np.arange(0, len(source), 65_536), np.full(len(source) // 65_536, 65_536))
    result = attachment.read(target.batch, deadline_ns=soon())
    target.check(result, source)
    attachment.close()
    return result.error


@pytest.mark.parametrize("backing", ["memfd", "private"])
def test_what_the_owner_writes_later_is_what_readers_get(server, backing):
    owned = Owned(server, backing, SIZE)
    assert children() >= {child_of(server)}
    assert read_all(owned.descriptor, owned.bytes) is None
    owned.bytes[:] = pattern(SIZE, 5)
    assert read_all(owned.descriptor, owned.bytes) is None
    owned.close()


def test_a_process_that_dies_is_succeeded_on_the_same_address(server, caplog):
    both = [Owned(server, backing, SIZE, seed) for seed, backing in enumerate(("memfd", "private"), 1)]
    attachment = TcpTransport().attach(both[0].descriptor, deadline_ns=soon())
    target = Target(np.array([7]), np.array([300_000]))
    assert attachment.read(target.batch, deadline_ns=soon()).error is None
    os.kill(child_of(server), signal.SIGKILL)
    wait_until(lambda: "serving 2 regions from here" in caplog.text)
    assert attachment.read(target.batch, deadline_ns=soon()).error is None  # over a connection of its own making
    attachment.close()
    for owned in both:
        assert read_all(owned.descriptor, owned.bytes) is None
    late = Owned(server, "private", SIZE, 3)
    assert read_all(late.descriptor, late.bytes) is None
    for owned in (*both, late):
        server.withdraw(owned.descriptor.region_id)
        with pytest.raises(PeerUnreachable):
            read_all(owned.descriptor, owned.bytes)
        owned.close()


def test_a_process_that_hangs_is_ended_before_memory_is_given_back(server, monkeypatch, caplog):
    monkeypatch.setattr(tcp_process.ServerProcess._ask, "__kwdefaults__", {"memfd": -1, "timeout_s": 0.3})
    goes, stays = Owned(server, "private", SIZE, 1), Owned(server, "memfd", SIZE, 2)
    os.kill(child := child_of(server), signal.SIGSTOP)
    server.withdraw(goes.descriptor.region_id)
    assert child not in children()
    wait_until(lambda: "serving 1 regions from here" in caplog.text)
    assert read_all(stays.descriptor, stays.bytes) is None
    with pytest.raises(PeerUnreachable):
        read_all(goes.descriptor, goes.bytes)
    stays.close()


def test_memory_that_was_unmapped_without_a_word_costs_its_readers_only(server):
    room = mmap.mmap(-1, SIZE)
    address = ctypes.addressof(view := ctypes.c_char.from_buffer(room))
    offer = server.serve(9, LocalMemory(address, SIZE))
    stays = Owned(server, "private", SIZE)
    region = RegionDescriptor(9, SIZE, host_identity(), (offer,))
    assert read_all(region, np.zeros(SIZE, np.uint8)) is None
    child = child_of(server)
    del view
    room.close()
    assert isinstance(read_all(region, np.zeros(SIZE, np.uint8)), PeerUnreachable)
    assert read_all(stays.descriptor, stays.bytes) is None and child_of(server) == child


def test_a_memfd_that_can_shrink_is_read_as_private_memory_is(server):
    memfd = os.memfd_create("unsealed")
    os.ftruncate(memfd, SIZE)
    with mmap.mmap(memfd, SIZE) as room:
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(room))
        offer = server.serve(9, LocalMemory(address, SIZE, memfd))
        region = RegionDescriptor(9, SIZE, host_identity(), (offer,))
        assert read_all(region, np.zeros(SIZE, np.uint8)) is None
        os.ftruncate(memfd, 0)
        assert isinstance(read_all(region, np.zeros(SIZE, np.uint8)), PeerUnreachable)
        del view
    os.close(memfd)


def test_the_process_ends_with_its_parent():
    owner = OwnerProcess(functools.partial(TcpTransport, process=True), "memfd", SIZE)
    (child,) = children(owner.process.pid)
    owner.signal(signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(child))
    with pytest.raises(PeerUnreachable):
        TcpTransport().attach(owner.descriptor, deadline_ns=soon())
    owner.close()


def test_where_no_process_starts_this_one_serves(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    before = len(os.listdir("/proc/self/fd"))
    transport = TcpTransport(process=True)
    owned = Owned(transport, "private", SIZE)
    assert "serving 1048576 bytes over tcp from this process" in caplog.text
    assert read_all(owned.descriptor, owned.bytes) is None
    transport.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_command_that_is_none_is_answered_with_a_reason(server):
    Owned(server, "private", SIZE)
    link = server._process._link
    link.settimeout(10)
    link.send(b"garbage")
    assert msgspec.msgpack.decode(link.recv(4096), type=tcp_process.Answer).error
