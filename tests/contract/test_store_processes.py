"""The store across processes: a real etcd, real media, and owners that die, stop and disappear."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from contract.store_parts import (
    BLOCK_BYTES,
    OwnerProcess,
    assert_at_rest,
    flip_byte,
    get,
    key_of,
    put,
    results,
    wait_for,
)
from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.directory.server import EtcdServer
from mooncake_store.pull.control import query_status
from mooncake_store.transport.base import ReadBatch

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as running:
        yield running


_cells = iter(range(1000))


@pytest.fixture
def settings(etcd):
    return {"cell": f"cell{next(_cells)}", "membership_ttl_s": 3}


@pytest.fixture
def reader(etcd, settings):
    client = StoreClient(StoreConfig(directory=etcd.url, segment_bytes=0, **settings))
    yield client
    client.close()


def wait_located(client, numbers, num_replicas=1):
    keys = [key_of(number) for number in numbers]
    wait_for(lambda: all(len(nodes) >= num_replicas for nodes in client.directory.locate(keys)), 10, "the directory")


@pytest.mark.parametrize("medium", ["shm", "tcp"])
def test_blocks_cross_processes_over_each_medium(etcd, settings, medium):
    with OwnerProcess(etcd.url, range(20), media=[medium], **settings) as owner:
        reader = StoreClient(StoreConfig(directory=etcd.url, segment_bytes=0, media=(medium,), **settings))
        wait_located(reader, range(20))
        outcomes = get(reader, range(20))
        assert results(outcomes) == ["ok"] * 20 and {outcome.medium for outcome in outcomes} == {medium}
        wait_for(lambda: owner.ask("status")['mooncake_leases_total{result="released"}'] == 1)
        assert_at_rest(query_status(owner.address, 2.0).samples)
        reader.close()


def test_two_readers_and_two_owners_at_once(etcd, settings, reader):
    with (OwnerProcess(etcd.url, range(30), **settings) as first,
          OwnerProcess(etcd.url, range(15, 45), **settings) as second, OwnerProcess(etcd.url, (), **settings) as other):
        wait_located(reader, range(45))
        answers: list[list[str]] = []
        thread = threading.Thread(target=lambda: answers.append(other.ask("get", numbers=list(range(45)), timeout_s=5)))
        wait_for(lambda: other.ask("get", numbers=[0, 44], timeout_s=5) == ["ok", "ok"], 10, "the other's mirror")
        thread.start()
        mine = results(get(reader, range(45)))
        thread.join(10)
        assert mine == ["ok"] * 45 and answers == [["ok"] * 45]
        for owner in (first, second):
            wait_for(lambda owner=owner: owner.ask("status")["mooncake_leases_active"] == 0)
            assert_at_rest(owner.ask("status"))


class Interrupted:
    """Media that call something between the grant and the first read."""

    def __init__(self, media, action):
        self._media, self._action = media, action

    def attach(self, region, *, deadline_ns):
        attachment = self._media.attach(region, deadline_ns=deadline_ns)
        read = attachment.read

        def interrupted(batch: ReadBatch, *, deadline_ns: int):
            action, self._action = self._action, None
            if action:
                action()
            return read(batch, deadline_ns=deadline_ns)

        attachment.read = interrupted
        return attachment


@pytest.mark.parametrize("medium", ["shm", "tcp", "cma"])
def test_an_owner_killed_between_grant_and_read_costs_a_miss_at_most(etcd, settings, medium):
    reader = StoreClient(StoreConfig(directory=etcd.url, segment_bytes=0, media=(medium,), **settings))
    with OwnerProcess(etcd.url, range(8), media=[medium], **settings) as owner:
        wait_located(reader, range(8))

        def kill():
            owner.process.kill()
            owner.process.wait(5)

        reader._puller._media = Interrupted(reader.media, kill)
        started = time.monotonic()
        outcomes = get(reader, range(8), timeout_s=5.0)  # compares the bytes of what is ok
        assert time.monotonic() - started < 3.0
        assert set(results(outcomes)) <= {"ok", "failed"}
        again = time.monotonic()
        assert set(results(get(reader, range(8)))) <= {"failed", "miss"}
        assert time.monotonic() - again < 0.5, "the dead are not waited for twice"
    reader.close()


def test_what_is_kept_of_a_dead_owner_goes_when_etcd_forgets_it(etcd, settings, reader):
    with OwnerProcess(etcd.url, range(2), **settings) as owner:
        wait_located(reader, range(2))
        assert results(get(reader, range(2))) == ["ok"] * 2 and reader._puller.num_links() == 1
        owner.process.kill()
    wait_for(lambda: owner.node_id not in reader.directory.members(), 10, "etcd forgets the dead")
    wait_for(lambda: reader._puller.num_links() == 0, 5, "the link to it is closed")
    assert results(get(reader, [0])) == ["miss"]


def test_a_killed_owner_is_replaced_by_the_other_replica(etcd, settings, reader):
    with OwnerProcess(etcd.url, range(8), **settings) as first, OwnerProcess(etcd.url, range(8), **settings) as second:
        wait_located(reader, range(8), num_replicas=2)
        favourite = min(first, second, key=lambda owner: owner.node_id)
        favourite.process.kill()
        favourite.process.wait(5)
        started = time.monotonic()
        assert results(get(reader, range(8))) == ["ok"] * 8
        assert time.monotonic() - started < 2.5


def test_a_stopped_owner_costs_one_wait_and_another_replica_serves(etcd, settings, reader):
    with OwnerProcess(etcd.url, range(8), **settings) as first, OwnerProcess(etcd.url, range(8), **settings) as second:
        wait_located(reader, range(8), num_replicas=2)
        favourite = min(first, second, key=lambda owner: owner.node_id)
        os.kill(favourite.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            assert results(get(reader, range(8), timeout_s=4.0)) == ["ok"] * 8
            assert 0.5 < time.monotonic() - started < 2.5
            started = time.monotonic()
            assert results(get(reader, range(8), timeout_s=4.0)) == ["ok"] * 8
            assert time.monotonic() - started < 0.5, "left alone for a while"
        finally:
            os.kill(favourite.process.pid, signal.SIGCONT)


def test_a_stopped_owner_alone_fails_within_the_deadline(etcd, settings, reader):
    with OwnerProcess(etcd.url, range(4), **settings) as owner:
        wait_located(reader, range(4))
        os.kill(owner.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            outcomes = get(reader, range(4), timeout_s=0.6)
            assert set(results(outcomes)) == {"failed"} and time.monotonic() - started < 0.8
            assert "no answer" in outcomes[0].reason
        finally:
            os.kill(owner.process.pid, signal.SIGCONT)
        wait_for(lambda: results(get(reader, range(4))) == ["ok"] * 4, 6, "the owner is back")


def test_a_block_damaged_in_its_owner_is_reported_and_dropped(etcd, settings, reader):
    with OwnerProcess(etcd.url, range(3), **settings) as owner:
        wait_located(reader, range(3))
        owner.ask("flip", number=1)
        assert results(get(reader, range(3))) == ["ok", "corrupt", "ok"]
        wait_for(lambda: owner.ask("status")["mooncake_segment_dropped_total"] == 1)
        wait_for(lambda: reader.directory.locate([key_of(1)]) == [()], 5, "the owner withdraws it")
        assert_at_rest(owner.ask("status"))


def test_a_dead_directory_delays_nothing(etcd, settings, tmp_path):
    with EtcdServer(tmp_path / "own") as own:
        first = StoreClient(StoreConfig(directory=own.url, segment_bytes=16 * BLOCK_BYTES, **settings))
        second = StoreClient(StoreConfig(directory=own.url, segment_bytes=0, **settings))
        put(first, range(4))
        wait_located(second, range(4))
        own.kill()
        started = time.monotonic()
        assert results(get(second, range(4))) == ["ok"] * 4
        assert put(first, range(4, 8)) == [True] * 4
        assert results(get(second, [7])) == ["miss"]
        assert time.monotonic() - started < 1.0
        for client in (first, second):
            started = time.monotonic()
            client.close()
            assert time.monotonic() - started < 5.0


def test_a_capacity_node_keeps_what_its_source_took_to_the_grave(etcd, settings, reader):
    with OwnerProcess(etcd.url, (), kind="store", **settings) as node:
        source = StoreClient(StoreConfig(directory=etcd.url, segment_bytes=32 * BLOCK_BYTES, **settings))
        wait_for(lambda: node.node_id in source.directory.members(), 5, "the node joins")
        put(source, range(20))
        source.replicate([key_of(number) for number in range(20)])
        assert source.wait_replicated(5.0)
        wait_for(lambda: query_status(node.address, 2.0).samples["mooncake_segment_blocks"] == 20, 5, "the node pulls")
        flip_byte(source, 0)
        source.close()
        wait_for(lambda: source.node_id not in reader.directory.members(), 5, "the source leaves")
        wait_located(reader, range(20))
        assert results(get(reader, range(20))) == ["ok"] * 20
        wait_for(lambda: node.ask("status")["mooncake_leases_active"] == 0)
        assert_at_rest(node.ask("status"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_and_leaves_within_three_seconds(etcd, settings, reader, number):
    root = Path(__file__).resolve().parents[2]
    code = ("import argparse, sys\nfrom mooncake_connector.cli import store\nparser = argparse.ArgumentParser()\n"
            "store.add_parser(parser.add_subparsers())\nargs = parser.parse_args()\nsys.exit(args.run(args))")
    options = ["--memory", "16MiB", "--directory", etcd.url, "--cell", settings["cell"]]
    process = subprocess.Popen([sys.executable, "-c", code, "store", "serve", *options], stdout=subprocess.PIPE,
                               text=True, env={"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin"})
    line = process.stdout.readline()
    match = re.fullmatch(r"mooncake store ready: (\S+) lends 16777216 bytes at (\S+) \(.*\)\n", line)
    assert match, line
    wait_for(lambda: match[1] in reader.directory.members(), 5, "the node joins")
    assert query_status(match[2], 2.0).info["kind"] == "store"
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == 0 and time.monotonic() - started < 3.0
    wait_for(lambda: match[1] not in reader.directory.members(), 2, "it left, rather than timed out")
    assert process.stdout.read() == "", "one ready line and nothing else"
    process.stdout.close()
