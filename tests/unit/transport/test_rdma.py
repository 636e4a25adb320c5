"""rdma keeps the transport contract on devices that are faked with process_vm_readv, and its own promises."""

import errno
import importlib.util
import logging
import resource
import socket
import sys
import threading

import msgspec
import numpy as np
import pytest

from mooncake_store.errors import PeerUnreachable, TransferFailed
from mooncake_store.metrics import Metrics
from mooncake_store.testing.transport import REGION_BYTES, Pair, Target, TransportTests, scattered, soon
from mooncake_store.testing.verbs import FakeVerbs
from mooncake_store.transport.base import LocalMemory, RdmaOffer, ReadBatch, RegionGone
from mooncake_store.transport.media import Media
from mooncake_store.transport.rdma import devices, verbs, wire
from mooncake_store.transport.rdma.transport import RdmaTransport
from mooncake_store.transport.tcp import TcpTransport


def make():
    return RdmaTransport(backend=FakeVerbs())


class TestRdmaOnFakeDevices(TransportTests):
    make = staticmethod(make)


def read(attachment, source, seed=0, deadline_s=20.0):
    target = scattered(np.random.default_rng(seed), 200, 9000)
    result = attachment.read(target.batch, deadline_ns=soon(deadline_s))
    target.check(result, source)
    return result


@pytest.fixture
def pair():
    pair = Pair(make(), make(), "private")
    yield pair
    pair.close()


def test_both_rails_carry_a_large_read(pair):
    attachment = pair.attach()
    target = Target(np.arange(64)[::-1] * 131072, np.full(64, 131072))
    target.check(attachment.read(target.batch, deadline_ns=soon()), pair.bytes)
    assert attachment.read_bytes == {"fake0": REGION_BYTES // 2, "fake1": REGION_BYTES // 2}


def test_memory_that_we_serve_is_read_into_without_a_copy(pair):
    target = np.zeros(REGION_BYTES, np.uint8)
    pair.reader.serve(5, LocalMemory(target.ctypes.data, target.nbytes, owner=target))
    attachment = pair.attach()
    batch = ReadBatch(*(np.array([value], np.uint64) for value in (0, target.ctypes.data, REGION_BYTES)))
    assert attachment.read(batch, deadline_ns=soon()).ok.all()
    assert np.array_equal(target, pair.bytes) and attachment._bounce is None
    pair.reader.withdraw(5)
    assert read(attachment, pair.bytes).ok.all() and attachment._bounce is not None


def test_a_read_that_hangs_is_flushed_at_its_deadline_and_the_next_connects_anew():
    backend = FakeVerbs(hang_after=150)
    pair = Pair(make(), RdmaTransport(backend=backend), "private")
    attachment = pair.attach()
    result = read(attachment, pair.bytes, deadline_s=0.2)
    assert result.error is not None and "deadline" in str(result.error) and not result.ok.all()
    assert attachment._connection is None and backend.num_open_queue_sets == 0
    backend.hang_after = -1
    assert read(attachment, pair.bytes).ok.all()
    pair.close()


def test_a_completion_that_comes_twice_is_not_taken_for_the_next_reads():
    backend = FakeVerbs(repeats=True)
    pair = Pair(make(), RdmaTransport(backend=backend), "private")
    attachment = pair.attach()
    assert read(attachment, pair.bytes).ok.all() and read(attachment, pair.bytes).ok.all()
    backend.hang_after = backend.num_reads
    assert not read(attachment, pair.bytes, deadline_s=0.2).ok.any()
    pair.close()


def test_a_read_is_refused_by_the_device_once_the_region_is_deregistered(pair):
    attachment = pair.attach()
    pair.owner._server._regions[pair.descriptor.region_id].close()
    result = read(attachment, pair.bytes)
    assert not result.ok.any() and isinstance(result.error, RegionGone)


def test_nothing_stays_registered_or_connected_after_close():
    owner, reader = FakeVerbs(), FakeVerbs()
    pair = Pair(RdmaTransport(backend=owner), RdmaTransport(backend=reader), "private")
    assert read(pair.attach(), pair.bytes).ok.all()
    assert owner.pinned_bytes and reader.pinned_bytes and owner.num_open_queue_sets == reader.num_open_queue_sets == 2
    pair.close()
    assert (owner.pinned_bytes, reader.pinned_bytes) == (0, 0)
    assert (owner.num_open_queue_sets, reader.num_open_queue_sets) == (0, 0)
    assert not owner.page.words.any()


def test_memory_beyond_the_limit_is_not_half_registered():
    backend = FakeVerbs(memlock_bytes=3 << 20)
    transport = RdmaTransport(backend=backend)
    memory = np.zeros(2 << 20, np.uint8)
    with pytest.raises(TransferFailed, match="cannot pin"):
        transport.serve(1, LocalMemory(memory.ctypes.data, memory.nbytes, owner=memory))
    assert backend.pinned_bytes == 0
    transport.close()


def test_machines_whose_rails_do_not_meet_say_so(monkeypatch):
    pair = Pair(make(), make(), "private")
    monkeypatch.setattr(pair.owner._backend, "is_routed", lambda own, peer: False)
    pair.owner._server._is_routed = lambda own, peer: False
    with pytest.raises(TransferFailed, match="no RDMA port of the owner reaches"):
        pair.attach()
    pair.close()


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    wire.HEADER.pack(wire.MAGIC, 9, 0, 4),
    wire.HEADER.pack(wire.MAGIC, 1, 0, 1 << 31),
    wire.HEADER.pack(wire.MAGIC, 1, 0, 3) + b"\xff\xff\xff",
    wire.pack(wire.Refused(True, "what?")),
], ids=["http", "version", "length", "garbage", "answer"])
def test_garbage_is_dropped_and_the_next_reader_is_served(pair, data):
    offer = pair.descriptor.offers[0]
    with socket.create_connection((offer.host, offer.port), timeout=5) as connection:
        connection.sendall(data)
        assert connection.recv(100) == b""
    assert read(pair.attach(), pair.bytes).ok.all()


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", wire.pack(wire.Refused(False, "go away")),
                                    wire.pack(wire.Opened(1, (wire.OwnerRail(3, 0, bytes(16), 0, True, 5, 1, 0, 0, (
                                        wire.WireQueue(1, 1),)),)))], ids=["hangs up", "ssh", "refuses", "lies"])
def test_an_owner_that_makes_no_sense_fails_the_attach_and_leaves_nothing(pair, answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        offers = (RdmaOffer("127.0.0.1", listener.getsockname()[1]),)
        with pytest.raises((PeerUnreachable, TransferFailed)):
            pair.attach(msgspec.structs.replace(pair.descriptor, offers=offers))
        thread.join(10)
    assert pair.reader._backend.num_open_queue_sets == 0


def test_where_there_is_no_device_the_medium_says_so_and_imports_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.find_rails, "__defaults__", (tmp_path,))
    monkeypatch.setattr(devices.explain_absence, "__defaults__", (tmp_path,))
    monkeypatch.setitem(sys.modules, "pyverbs", None)  # importing it would raise
    assert RdmaTransport().probe() == "this machine has no RDMA device"


def machine(root, *, state="4: ACTIVE", layer="Ethernet"):
    """Make a sysfs with one port, as the kernel shows it."""
    device, port = root / "class/infiniband/mlx5_0", root / "class/infiniband/mlx5_0/ports/1"
    files = {"state": state, "link_layer": layer, "rate": "100 Gb/sec (4X EDR)", "lid": "0x1f",
             "gids/0": "fe80:0000:0000:0000:0000:0000:0000:0001", "gids/1": "0000:0000:0000:0000:0000:ffff:0a00:0001",
             "gids/2": "0000:0000:0000:0000:0000:0000:0000:0000", "gid_attrs/types/0": "IB/RoCE v1",
             "gid_attrs/types/1": "RoCE v2"}
    for name, text in files.items():
        (port / name).parent.mkdir(parents=True, exist_ok=True)
        (port / name).write_text(text + "\n")
    hardware = root / "devices/pci0000:00/0000:00:01.0"
    hardware.mkdir(parents=True)
    (hardware / "numa_node").write_text("1\n")
    (device / "device").symlink_to(hardware)


def test_ports_are_read_from_sysfs(tmp_path):
    machine(tmp_path)
    rail, = devices.find_rails(tmp_path)
    assert rail[:4] == ("mlx5_0", 1, "ethernet", 1) and (rail.rate_gbps, rail.lid) == (100.0, 31)
    assert rail.pci_path.endswith("pci0000:00/0000:00:01.0")
    assert [(gid.table_index, gid.kind) for gid in rail.gids] == [(0, "roce1"), (1, "roce2")]


def test_a_port_that_is_down_is_named(tmp_path):
    machine(tmp_path, state="1: DOWN")
    assert devices.find_rails(tmp_path) == [] and devices.explain_absence(tmp_path) == "no port is active on mlx5_0"


def test_a_missing_pyverbs_is_explained(monkeypatch, tmp_path):
    machine(tmp_path)
    monkeypatch.setattr(devices.find_rails, "__defaults__", (tmp_path,))
    monkeypatch.setattr(verbs, "_loaded", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pyverbs is not installed (install it from the distribution" in RdmaTransport().probe()


def test_a_pyverbs_of_another_release_is_explained_and_the_root_logger_kept(monkeypatch, tmp_path):
    package = tmp_path / "pyverbs"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import logging\nlogging.basicConfig(level=logging.INFO, force=True)\n"
        "raise ImportError(\"libibverbs.so.1: version 'IBVERBS_PRIVATE_59' not found\")\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(verbs, "_loaded", [])
    monkeypatch.delitem(sys.modules, "pyverbs", raising=False)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with pytest.raises(TransferFailed, match="IBVERBS_PRIVATE_59") as caught:
        verbs.load()
    assert "must come from one rdma-core release" in caught.value.hint
    assert (root.handlers, root.level) == before


def test_a_full_machine_and_a_low_limit_are_told_apart(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    low = verbs.explain_registration(errno.ENOMEM, 64 << 20, "")
    assert "cannot pin 64 MiB: the locked-memory limit is 8192 KiB" in low.message and "ulimit -l" in low.hint
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert "ulimit" not in verbs.explain_registration(errno.ENOMEM, 64 << 20, "").hint


def test_media_pass_from_a_dead_rail_to_tcp():
    hanging = FakeVerbs(hang_after=0)
    owner = Media.of({"rdma": make(), "tcp": TcpTransport()}, metrics=Metrics())
    reader = Media.of({"rdma": RdmaTransport(backend=hanging), "tcp": TcpTransport()}, metrics=Metrics())
    data = np.random.default_rng(1).integers(0, 256, REGION_BYTES, np.uint8)
    region = owner.serve(LocalMemory(data.ctypes.data, data.nbytes, owner=data))
    attachment = reader.attach(region, deadline_ns=soon())
    assert attachment.medium == "rdma"
    attachment._inner._connection.lanes[0].queue_set.fail()
    attachment._inner._connection.lanes[1].queue_set.fail()
    hanging.hang_after = -1
    assert read(attachment, data).ok.all() and attachment.medium == "tcp"
    reader.close()
    owner.close()
