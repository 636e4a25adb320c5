"""Every failure of a device or a peer is reported once, blamed on the right end, and mended by the next read.

Runs inside the guest of test_in_guest.py.
"""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest

from mooncake_store.errors import PeerUnreachable, TransferFailed
from mooncake_store.testing.transport import REGION_BYTES, OwnerProcess, Pair, Target, pattern, scattered, soon
from mooncake_store.transport.base import RegionGone
from mooncake_store.transport.rdma.backend import Reads, Status
from mooncake_store.transport.rdma.chains import Chain, Ledger
from mooncake_store.transport.rdma.link import Link
from mooncake_store.transport.rdma.transport import RdmaTransport

READ_S = 20.0


@pytest.fixture
def pair():
    pair = Pair(RdmaTransport(), RdmaTransport(), "private")
    yield pair
    pair.close()


@contextmanager
def owner_process():
    owner, reader = OwnerProcess(RdmaTransport, "private", REGION_BYTES), RdmaTransport()
    try:
        yield owner, reader, reader.attach(owner.descriptor, deadline_ns=soon())
    finally:
        reader.close()
        owner.close()


def read(attachment, source, deadline_s=READ_S, seed=0):
    target = scattered(np.random.default_rng(seed), 64, 5000)
    result = attachment.read(target.batch, deadline_ns=soon(deadline_s))
    target.check(result, source)
    return result


def fails_then_mends(attachment, source, kind, words):
    result = read(attachment, source)
    assert not result.ok.all() and isinstance(result.error, kind) and words in str(result.error), result.error
    assert attachment._connection is None, "a connection that failed must not be used again"
    assert read(attachment, source).ok.all()


def tamper(attachment, **changes):
    connection = attachment._connection
    connection.lanes = [lane._replace(**changes) for lane in connection.lanes]
    connection.queues = [(connection.lanes[0], 0)] * len(connection.queues)


def test_a_wrong_key_is_refused_by_the_owners_device(pair):
    attachment = pair.attach()
    assert read(attachment, pair.bytes).ok.all()
    tamper(attachment, rkey=attachment._connection.lanes[0].rkey ^ 0x5A5A)
    fails_then_mends(attachment, pair.bytes, RegionGone, "IBV_WC_REM_ACCESS_ERR")


def test_a_deregistered_region_is_refused_by_the_owners_device(pair):
    attachment = pair.attach()
    pair.owner._server._regions[pair.descriptor.region_id].close()
    result = read(attachment, pair.bytes)
    assert not result.ok.any() and isinstance(result.error, RegionGone)
    assert "IBV_WC_REM_ACCESS_ERR" in str(result.error)


def test_memory_of_ours_that_the_device_may_not_write_is_our_fault(pair):
    attachment = pair.attach()
    assert read(attachment, pair.bytes).ok.all()
    for registration in attachment._bounce.registrations:
        registration.close()
    result = read(attachment, pair.bytes)
    assert not result.ok.any() and type(result.error) is TransferFailed and "IBV_WC_LOC_" in str(result.error)


def test_queue_pairs_in_their_error_state_flush_and_are_replaced(pair):
    attachment = pair.attach()
    for lane in attachment._connection.lanes:
        lane.queue_set.fail()
    fails_then_mends(attachment, pair.bytes, PeerUnreachable, "IBV_WC_WR_FLUSH_ERR")


def test_the_reads_before_a_failed_one_are_complete(pair):
    attachment = pair.attach()
    lane = attachment._connection.lanes[0]
    target = np.zeros(8 * 4096, np.uint8)
    registration = attachment._devices[0].register(target.ctypes.data, target.nbytes, is_target=True)
    remote = [lane.address + i * 4096 for i in range(8)]
    remote[3] = lane.address + REGION_BYTES - 1
    lane.queue_set.post(0, 0, Reads(lane.rkey, registration.lkey, remote,
                                    [int(target.ctypes.data) + i * 4096 for i in range(8)], [4096] * 8))
    ledger = Ledger([Chain(np.arange(8), 0, 8 * 4096)], num_queues=1, num_slots=0)
    assert ledger.start_next() is not None
    end, statuses, started = None, {}, time.monotonic()
    while end is None and time.monotonic() - started < READ_S:
        for completion in lane.queue_set.poll():
            statuses[completion.wr_id] = completion.status
            end = ledger.settle(completion.wr_id, is_ok=completion.status is Status.OK) or end
    assert end is not None and end.num_done == 3
    assert statuses == {3: Status.REMOTE_ACCESS, **dict.fromkeys(range(4, 8), Status.FLUSHED)}
    assert np.array_equal(target[:3 * 4096], pair.bytes[:3 * 4096])
    registration.close()


def test_a_dead_machine_is_noticed_by_the_device(monkeypatch):
    # as when the owner's machine vanishes: its end of the tcp connection never says so
    with owner_process() as (owner, _, attachment):
        connection = attachment._connection
        connection._poller.unregister(connection.link.fileno())
        monkeypatch.setattr(Link, "is_broken", lambda self: False)
        owner.signal(signal.SIGKILL)
        owner.process.join(10)
        result = read(attachment, pattern(REGION_BYTES, 1))
        assert not result.ok.any() and isinstance(result.error, PeerUnreachable)
        assert "IBV_WC_RETRY_EXC_ERR" in str(result.error)


def test_a_stopped_owner_is_read_all_the_same_and_a_killed_one_is_noticed():
    with owner_process() as (owner, reader, attachment):
        source = pattern(REGION_BYTES, 1)
        owner.signal(signal.SIGSTOP)
        assert read(attachment, source).ok.all()
        started = time.monotonic()
        with pytest.raises(PeerUnreachable):
            reader.attach(owner.descriptor, deadline_ns=soon(0.5))
        assert time.monotonic() - started < 5.0
        owner.signal(signal.SIGCONT)
        assert read(attachment, source).ok.all()
        owner.signal(signal.SIGKILL)
        owner.process.join(10)
        started = time.monotonic()
        result = read(attachment, source)
        assert not result.ok.any() and isinstance(result.error, PeerUnreachable)
        assert time.monotonic() - started < READ_S / 2, "the end of its connection was not noticed"
        with pytest.raises(PeerUnreachable):
            reader.attach(owner.descriptor, deadline_ns=soon())


def test_nothing_is_written_after_a_deadline_passed(pair):
    attachment = pair.attach()
    offsets = np.random.default_rng(1).integers(0, REGION_BYTES // 65536, 512) * 65536
    target = Target(offsets, np.full(512, 65536), guard_bytes=0)
    result = attachment.read(target.batch, deadline_ns=soon(0.1))
    assert not result.ok.all() and result.error is not None
    after = target.memory.copy()
    time.sleep(0.5)
    assert np.array_equal(after, target.memory)
    target.check(result, pair.bytes)
    assert read(attachment, pair.bytes).ok.all()


def test_an_owner_keeps_nothing_of_a_reader_that_left(pair):
    attachment = pair.attach()
    assert len(pair.owner._server._connections) == 1
    attachment.close()
    started = time.monotonic()
    while pair.owner._server._connections and time.monotonic() - started < READ_S:
        time.sleep(0.05)
    assert not pair.owner._server._connections


LOCKED = """
import os, resource, numpy as np
from mooncake_store.errors import TransferFailed
from mooncake_store.transport.base import LocalMemory
from mooncake_store.transport.rdma.transport import RdmaTransport
assert RdmaTransport().probe() == ""
resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
os.setgid(65534)
os.setuid(65534)  # root is not limited; only now, as modules not imported yet may lie where nobody else can read
memory = np.zeros(64 << 20, np.uint8)
transport = RdmaTransport()
try:
    transport.serve(1, LocalMemory(memory.ctypes.data, memory.nbytes, owner=memory))
except TransferFailed as error:
    print(error)
transport.close()
"""


def test_a_low_limit_on_locked_memory_is_explained():
    output = subprocess.run([sys.executable, "-c", LOCKED], check=True, stdout=subprocess.PIPE, text=True,
                            timeout=100).stdout
    assert "cannot pin 64 MiB: the locked-memory limit is 8192 KiB" in output and "ulimit -l unlimited" in output
