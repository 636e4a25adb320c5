"""What a real etcd can do to a directory: each failure is caused here."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from mooncake_store.config import StoreConfig
from mooncake_store.directory.endpoints import Endpoint
from mooncake_store.directory.etcd import EtcdDirectory
from mooncake_store.directory.etcd_rpc import EtcdRpc, Write
from mooncake_store.directory.open import open_directory
from mooncake_store.directory.schema import CellPaths
from mooncake_store.directory.server import EtcdServer
from mooncake_store.errors import DirectoryUnavailable
from mooncake_store.metrics import Metrics
from mooncake_store.testing.directory import make_keys, make_member, wait_until

pytestmark = pytest.mark.etcd

CELL = "default"
TTL_S = 2
REACTION_S = 8.0
KEYS = make_keys(1_000)


class Opener:
    """Opens directories and closes them at the end of the test."""

    def __init__(self):
        self.opened = []

    def reader(self, url, metrics=None, ttl_s=TTL_S):
        directory = open_directory(StoreConfig(directory=url, membership_ttl_s=ttl_s), metrics or Metrics())
        self.opened.append(directory)
        return directory

    def node(self, url, node_id, keys=(), **options):
        directory = self.reader(url, **options)
        directory.join(make_member(node_id))
        directory.publish(keys)
        assert directory.flush(REACTION_S)
        return directory


@pytest.fixture
def opener():
    opener = Opener()
    yield opener
    for directory in opener.opened:
        directory.close()


@pytest.fixture
def server(tmp_path):
    with EtcdServer(tmp_path / "etcd") as running:
        yield running


class Proxy:
    """A TCP relay to etcd that can be cut: a network failure that etcd does not notice."""

    def __init__(self, target_port):
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._is_cut = False
        self._pairs = []
        self._relays = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"etcd://127.0.0.1:{self.port}"

    def cut(self):
        self._is_cut = True
        pairs, self._pairs = self._pairs, []
        for end in (end for pair in pairs for end in pair):
            with _ignoring_os_errors():
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._relays:
            thread.join(5.0)
        for end in (end for pair in pairs for end in pair):
            end.close()

    def mend(self):
        self._is_cut = False

    def close(self):
        self._listener.close()
        self.cut()

    def _accept(self):
        with _ignoring_os_errors():
            while True:
                near, _ = self._listener.accept()
                if self._is_cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target_port))
                self._pairs.append((near, far))
                for source, target in ((near, far), (far, near)):
                    relay = threading.Thread(target=self._relay, args=(source, target), daemon=True)
                    self._relays.append(relay)
                    relay.start()

    def _relay(self, source, target):
        with _ignoring_os_errors():
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with _ignoring_os_errors():
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def _ignoring_os_errors():
    try:
        yield
    except OSError:
        pass


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@contextmanager
def never_a_miss(directory, keys):
    """Check from another thread that a reader finds all keys all the time."""
    shortest = [len(keys)]
    is_done = threading.Event()

    def read():
        while not is_done.is_set():
            shortest[0] = min(shortest[0], directory.match(keys))
            time.sleep(0.0005)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join(10.0)
    assert shortest[0] == len(keys)


def connected(*directories):
    return wait_until(lambda: all(directory.health().connected for directory in directories), REACTION_S)


def synced(writer, reader):
    return writer.flush(REACTION_S) and reader.wait_revision(writer.revision(), REACTION_S)


# ---------------------------------------------------------------------- etcd goes away and comes back


def test_etcd_killed_and_restarted_with_its_data(server, opener):
    writer, reader = opener.node(server.url, "a", KEYS), opener.reader(server.url)
    with never_a_miss(reader, KEYS):
        server.kill()
        assert wait_until(lambda: not reader.health().connected and not writer.health().connected, REACTION_S)
        assert reader.health().error
        new = make_keys(50, "while down")
        writer.publish(new)
        writer.withdraw(new[:5])
        assert not writer.flush(0.2)
        server.start()
        assert connected(writer, reader)
        assert synced(writer, reader)
        assert reader.match(new[5:]) == 45
        assert reader.locate(new[:5]) == [()] * 5
        time.sleep(TTL_S + 1.5)  # the lease survived as well
    assert reader.health().error == ""


def test_etcd_restarted_empty_is_filled_again_by_its_members(server, opener):
    metrics = Metrics()
    writer, other = opener.node(server.url, "a", KEYS), opener.node(server.url, "b", KEYS[:10])
    reader = opener.reader(server.url, metrics=metrics)
    assert reader.match(KEYS) == 1_000
    dead = opener.node(server.url, "dead", make_keys(10, "dead"))
    assert synced(dead, reader)
    with never_a_miss(reader, KEYS):
        dead.abandon()
        server.kill()
        shutil.rmtree(server.data_dir / "data")
        server.start()
        assert connected(writer, other, reader)
        assert synced(writer, reader) and synced(other, reader)
        time.sleep(TTL_S + 1.5)
    assert [set(holders) for holders in reader.locate(KEYS[:11])] == [{"a", "b"}] * 10 + [{"a"}]
    # Whoever did not come back is gone, and a newcomer sees the same.
    assert set(reader.members()) == {"a", "b"}
    assert reader.locate(make_keys(10, "dead")) == [()] * 10
    newcomer = opener.reader(server.url)
    assert newcomer.match(KEYS) == 1_000 and set(newcomer.members()) == {"a", "b"}
    assert metrics.snapshot()["mooncake_directory_connected"] == 1


def test_etcd_that_comes_up_after_us(tmp_path, opener, caplog):
    server = EtcdServer(tmp_path / "etcd")
    with server:
        url = server.url
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="mooncake_store.directory"):
        writer, reader = opener.reader(url), opener.reader(url)
        assert time.monotonic() - begin < 4.0
        writer.join(make_member("a"))
        writer.publish(KEYS)
        assert writer.match(KEYS) == 0
        assert not writer.flush(0.5)
        assert writer.health().num_pending == 1_000
        time.sleep(1.0)
    hints = [record.getMessage() for record in caplog.records]
    assert len(hints) == 2, hints  # one line per directory, however long it takes
    assert "mooncake etcd" in hints[0] and "127.0.0.1" in hints[0]
    server.start()
    try:
        assert connected(writer, reader)
        assert synced(writer, reader)
        assert reader.match(KEYS) == 1_000
    finally:
        server.stop()


def test_the_queue_is_bounded_while_etcd_is_away(tmp_path):
    server = EtcdServer(tmp_path / "etcd")
    with server:
        endpoint = Endpoint("127.0.0.1", server.port)
    metrics = Metrics()
    directory = EtcdDirectory([endpoint], cell=CELL, ttl_s=TTL_S, metrics=metrics, unwritten_max=100)
    try:
        directory.join(make_member("a"))
        for start in range(0, 150, 30):
            directory.publish(KEYS[start : start + 30])
            time.sleep(0.15)  # let it try, and fail, in between
        assert directory.health().num_pending == 100
        assert metrics.snapshot()["mooncake_directory_dropped_total"] == 50
        server.start()
        assert connected(directory)
        assert directory.flush(REACTION_S)
        assert [bool(holders) for holders in directory.locate(KEYS[:150])] == [False] * 50 + [True] * 100
        directory.publish(KEYS[:50])
        assert directory.flush(REACTION_S)
        assert directory.match(KEYS[:150]) == 150
    finally:
        directory.close()
        server.stop()


def test_a_frozen_etcd_is_noticed(server, opener):
    writer = opener.node(server.url, "a", KEYS)
    server.send_signal(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        writer.publish(make_keys(1, "frozen"))
        assert writer.match(KEYS) == 1_000
        assert time.monotonic() - begin < 0.1
        assert wait_until(lambda: not writer.health().connected, REACTION_S)
    finally:
        server.send_signal(signal.SIGCONT)
    assert connected(writer)
    assert writer.flush(REACTION_S)
    assert writer.match(make_keys(1, "frozen")) == 1


def test_close_is_bounded_when_etcd_is_frozen(server, opener):
    writer = opener.node(server.url, "a", KEYS)
    server.send_signal(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        writer.close()
        assert time.monotonic() - begin < 2.5
    finally:
        server.send_signal(signal.SIGCONT)


# ---------------------------------------------------------------------- the connection goes away, etcd does not


def test_changes_during_a_disconnect_arrive_afterwards(server, proxy, opener, caplog):
    writer, reader = opener.node(server.url, "a", KEYS), opener.reader(proxy.url)
    assert reader.match(KEYS) == 1_000
    with caplog.at_level(logging.INFO, logger="mooncake_store.directory"), never_a_miss(reader, KEYS[:500]):
        proxy.cut()
        assert wait_until(lambda: not reader.health().connected, REACTION_S)
        new = make_keys(20, "new")
        writer.withdraw(KEYS[500:])
        writer.publish(new)
        assert writer.flush(REACTION_S)
        proxy.mend()
        assert synced(writer, reader)
    assert reader.match(KEYS) == 500
    assert reader.match(new) == 20
    assert "listing again" not in caplog.text


def test_compaction_during_a_disconnect(server, proxy, opener, caplog):
    writer, leaver = opener.node(server.url, "a", KEYS), opener.node(server.url, "b", KEYS[600:])
    reader = opener.reader(proxy.url)
    assert reader.match(KEYS) == 1_000
    with caplog.at_level(logging.INFO, logger="mooncake_store.directory"), never_a_miss(reader, KEYS[:500]):
        proxy.cut()
        assert wait_until(lambda: not reader.health().connected, REACTION_S)
        leaver.close()
        writer.withdraw(KEYS[500:])
        assert writer.flush(REACTION_S)
        writer.publish(make_keys(20, "new"))
        assert writer.flush(REACTION_S)
        rpc = EtcdRpc(Endpoint("127.0.0.1", server.port))
        rpc.compact(writer.revision())
        rpc.close()
        proxy.mend()
        assert synced(writer, reader)
    assert "listing again" in caplog.text
    assert reader.match(KEYS) == 500
    assert reader.locate(KEYS[500:]) == [()] * 500
    assert reader.match(make_keys(20, "new")) == 20
    assert set(reader.members()) == {"a"}


def test_a_writer_cut_off_for_longer_than_its_ttl_joins_again(server, proxy, opener):
    writer, reader = opener.node(proxy.url, "a", KEYS), opener.reader(server.url)
    assert reader.match(KEYS) == 1_000
    proxy.cut()
    assert wait_until(lambda: not reader.members(), TTL_S + REACTION_S)
    assert reader.locate(KEYS) == [()] * 1_000
    writer.withdraw(KEYS[:100])
    proxy.mend()
    assert connected(writer)
    assert wait_until(lambda: reader.match(KEYS[100:]) == 900, REACTION_S)
    assert reader.locate(KEYS[:100]) == [()] * 100
    assert wait_until(lambda: writer.match(KEYS[100:]) == 900, REACTION_S)


def test_several_servers_are_tried_in_order(server, opener):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        dead_port = unused.getsockname()[1]
    directory = opener.node(f"etcd://127.0.0.1:{dead_port},127.0.0.1:{server.port}", "a", KEYS)
    assert directory.match(KEYS) == 1_000


# ---------------------------------------------------------------------- a member goes away


MEMBER_PROGRAM = """
import sys, time
from mooncake_store.config import StoreConfig
from mooncake_store.directory.open import open_directory
from mooncake_store.metrics import Metrics
from mooncake_store.testing.directory import make_keys, make_member
directory = open_directory(StoreConfig(directory=sys.argv[1], membership_ttl_s=int(sys.argv[2])), Metrics())
directory.join(make_member("other"))
directory.publish(make_keys(700, "other"))
print(directory.flush(10.0), flush=True)
time.sleep(300)
"""


@pytest.fixture
def member(server):
    process = subprocess.Popen(
        [sys.executable, "-c", MEMBER_PROGRAM, server.url, str(TTL_S)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline().strip() == b"True"
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait(10.0)
    process.stdout.close()


def test_a_member_killed_is_forgotten(server, opener, member):
    reader = opener.node(server.url, "a", KEYS)
    others = make_keys(700, "other")
    assert reader.match(others) == 700
    member.kill()
    assert wait_until(lambda: reader.match(others) == 0, TTL_S + REACTION_S)
    assert set(reader.members()) == {"a"}
    assert reader.locate(others) == [()] * 700
    assert reader.match(KEYS) == 1_000


def test_a_member_stopped_for_longer_than_its_ttl_comes_back_whole(server, opener, member):
    reader = opener.reader(server.url)
    others = make_keys(700, "other")
    assert reader.match(others) == 700
    member.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: not reader.members(), TTL_S + REACTION_S)
    assert reader.match(others) == 0
    time.sleep(0.5)
    member.send_signal(signal.SIGCONT)
    assert wait_until(lambda: reader.match(others) == 700, REACTION_S)
    assert set(reader.members()) == {"other"}
    time.sleep(TTL_S + 1.5)
    assert reader.match(others) == 700


def test_a_reader_stopped_meanwhile_catches_up(server, opener):
    # The mirror's thread is ours to hold up: nothing is applied while a listener keeps the view's lock.
    writer, reader = opener.node(server.url, "a", KEYS), opener.reader(server.url)
    with reader._mirror._applied:
        for round_number in range(5):
            writer.publish(make_keys(200, f"round {round_number}"))
            assert writer.flush(REACTION_S)
        assert reader.match(make_keys(1, "round 4")) == 0
    assert reader.wait_revision(writer.revision(), REACTION_S)
    assert all(reader.match(make_keys(200, f"round {number}")) == 200 for number in range(5))


# ---------------------------------------------------------------------- foreign hands in our keys


@pytest.fixture
def rpc(server):
    rpc = EtcdRpc(Endpoint("127.0.0.1", server.port))
    yield rpc
    rpc.close()


def test_garbage_is_rejected_and_counted(server, opener, rpc, caplog):
    metrics = Metrics()
    writer, reader = opener.node(server.url, "a", KEYS), opener.reader(server.url, metrics=metrics)
    paths = CellPaths(CELL)
    garbage = [
        Write(paths.root + b"what/is/this", b"x"),
        Write(paths.root + b"member/b", b"\x01not msgpack"),
        Write(paths.root + b"member/c", b"\x09" + b"\x90"),
        Write(paths.root + b"member/d", b""),
        Write(paths.root + b"page/a/zzzzzzzz", b"\x01\x90"),
        Write(paths.root + b"page/a/000000ff", b"\x01" + os.urandom(200)),
        Write(paths.root + b"page/\xff\xfe/00000000", b"\x01"),
    ]
    with caplog.at_level(logging.WARNING, logger="mooncake_store.directory"):
        for _ in range(3):
            rpc.commit(garbage, 0)
        writer.publish(make_keys(5, "after"))
        assert synced(writer, reader)
    assert reader.match(KEYS) == 1_000
    assert reader.match(make_keys(5, "after")) == 5
    assert set(reader.members()) == {"a"}
    counts = {name: value for name, value in metrics.snapshot().items() if "protocol_errors" in name}
    assert counts == {
        'mooncake_protocol_errors_total{reason="directory_path"}': 9,
        'mooncake_protocol_errors_total{reason="directory_version"}': 6,
        'mooncake_protocol_errors_total{reason="directory_malformed"}': 6,
    }
    # Logged once per reason and mirror (two mirrors here), not once per value.
    assert len([record for record in caplog.records if "ignoring" in record.getMessage()]) == 6
    # A newcomer meets the same garbage in its listing.
    newcomer = opener.reader(server.url)
    assert newcomer.match(KEYS) == 1_000 and set(newcomer.members()) == {"a"}


def test_a_page_overwritten_with_garbage_counts_as_empty(server, opener, rpc):
    reader = opener.reader(server.url)
    opener.node(server.url, "a", KEYS[:256])
    assert wait_until(lambda: reader.match(KEYS[:256]) == 256, REACTION_S)
    revision = rpc.commit([Write(CellPaths(CELL).page("a", 0), b"\x01junk")], 0)
    assert reader.wait_revision(revision, REACTION_S)
    assert reader.locate(KEYS[:256]) == [()] * 256


def test_entries_deleted_by_hand_are_written_again(server, opener, rpc):
    writer, reader = opener.node(server.url, "a", KEYS), opener.reader(server.url)
    paths = CellPaths(CELL)
    rpc.commit([Write(paths.page("a", 1), None)], 0)
    assert wait_until(lambda: reader.match(KEYS) < 1_000, REACTION_S)
    assert wait_until(lambda: reader.match(KEYS) == 1_000, REACTION_S)
    everything = [entry.path for entries, _ in rpc.list_range(paths.root, paths.root_end) for entry in entries]
    revision = rpc.commit([Write(path, None) for path in everything], 0)
    assert reader.wait_revision(revision + 1, REACTION_S)
    assert wait_until(lambda: set(reader.members()) == {"a"} and reader.match(KEYS) == 1_000, REACTION_S)
    assert synced(writer, reader)


# ---------------------------------------------------------------------- the server


def test_no_etcd_outlives_a_killed_parent(tmp_path):
    program = (
        "import sys, time; from mooncake_store.directory.server import EtcdServer;"
        "server = EtcdServer(sys.argv[1]); server.start(); print(server.pid, flush=True); time.sleep(300)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pid = int(parent.stdout.readline())
    assert b"etcd" in _command_line(pid)
    parent.kill()
    parent.wait(10.0)
    parent.stdout.close()
    assert wait_until(lambda: not _command_line(pid), 5.0)


def _command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()  # empty for a zombie
    except OSError:
        return b""


def test_a_taken_port_is_refused(tmp_path, server):
    second = EtcdServer(tmp_path / "second", server.port)
    with pytest.raises(DirectoryUnavailable) as raised:
        second.start(timeout_s=10.0)
    assert f"port {server.port} is in use" in str(raised.value)
    assert second.pid == 0


def test_an_etcd_that_ends_at_start_is_reported_with_its_log(tmp_path):
    (tmp_path / "data").write_text("not a directory")
    server = EtcdServer(tmp_path)
    begin = time.monotonic()
    with pytest.raises(DirectoryUnavailable) as raised:
        server.start(timeout_s=10.0)
    assert time.monotonic() - begin < 8.0
    assert "ended at start" in str(raised.value) and "etcd.log" in str(raised.value)
    assert "not a directory" in str(raised.value)
    assert server.pid == 0


def test_a_server_that_does_not_answer_is_stopped_at_the_deadline(tmp_path, monkeypatch):
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr("mooncake_store.directory.server.find_etcd_binary", lambda: silent)
    server = EtcdServer(tmp_path / "data", fsync=True)
    begin = time.monotonic()
    with pytest.raises(DirectoryUnavailable) as raised:
        server.start(timeout_s=1.0)
    assert 1.0 <= time.monotonic() - begin < 5.0
    assert "did not answer within 1 s" in str(raised.value)
    assert server.pid == 0


def test_start_and_stop_are_idempotent(tmp_path):
    server = EtcdServer(tmp_path)
    server.stop()
    server.start()
    pid, port = server.pid, server.port
    server.start()
    assert (server.pid, server.port) == (pid, port)
    server.stop()
    server.stop()
    assert server.pid == 0 and not _command_line(pid)
