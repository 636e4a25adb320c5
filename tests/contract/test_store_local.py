"""The store within one process: real segments, sockets and shared memory, a directory in memory."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from contract.store_parts import (
    BLOCK_BYTES,
    Blocks,
    RawPeer,
    assert_at_rest,
    content_of,
    flip_byte,
    get,
    key_of,
    put,
    results,
    wait_for,
)
from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.directory.memory import MemoryCell, MemoryDirectory
from mooncake_store.errors import LocalProtocolError, PeerUnreachable, RemoteProtocolError
from mooncake_store.metrics import Metrics
from mooncake_store.node import StoreNode
from mooncake_store.pull import fetch, wire
from mooncake_store.pull.base import GetOutcome, Scatter
from mooncake_store.pull.control import query_status
from mooncake_store.transport.faults import FaultPlan, FaultyTransport
from mooncake_store.transport.media import Media
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.types import HostIdentity

CERTIFICATES = Path(__file__).parent / "certificates"
ROOM_FOR = 16
SEGMENT_BYTES = ROOM_FOR * BLOCK_BYTES


class Cell:
    """Makes members of one cell; closes them and checks that nothing is left."""

    def __init__(self):
        self.memory = MemoryCell()
        self.members = []

    def client(self, *, media=None, **settings) -> StoreClient:
        return self._keep(StoreClient(self.config(**settings), directory=MemoryDirectory(self.memory), media=media))

    def node(self, **settings) -> StoreNode:
        return self._keep(StoreNode(self.config(**settings), directory=MemoryDirectory(self.memory)))

    def config(self, **settings) -> StoreConfig:
        defaults = {"directory": "memory", "segment_bytes": SEGMENT_BYTES, "media": ("shm", "cma")}
        return StoreConfig(**{**defaults, **settings})

    def _keep(self, member):
        self.members.append(member)
        return member


@pytest.fixture
def cell():
    made = Cell()
    yield made
    for member in made.members:
        client = getattr(member, "client", member)
        wait_for(lambda client=client: client.status()["mooncake_leases_active"] == 0 or client._is_closed,
                 what="the end of all leases")
        client._segment.check()
        member.close()
        assert client._segment.num_in_use() == (0, 0)


def test_a_block_travels_from_one_member_to_another_and_back_into_its_own_engine(cell):
    owner, reader = cell.client(), cell.client(segment_bytes=0)
    assert put(owner, range(4)) == [True] * 4 and owner.has(key_of(0)) and not reader.has(key_of(0))
    assert reader.match([key_of(number) for number in range(6)]) == 4
    outcomes = get(reader, [3, 1, 9, 0])
    assert results(outcomes) == ["ok", "ok", "miss", "ok"] and outcomes[0].medium == "shm"
    assert outcomes[2].reason == "no replica"
    assert [outcome.medium for outcome in get(owner, [0, 1])] == ["local", "local"]
    wait_for(lambda: owner.status().get('mooncake_leases_total{result="released"}') == 1.0)
    assert_at_rest(owner.status())


def test_the_same_key_twice_is_delivered_twice(cell):
    owner, reader = cell.client(), cell.client()
    put(owner, [1])
    assert results(get(reader, [1, 1])) == ["ok", "ok"] and put(owner, [1, 1]) == [True, True]
    assert owner.status()['mooncake_put_blocks_total{result="duplicate"}'] == 2


def test_puts_into_a_full_pool_all_succeed_and_the_directory_follows(cell):
    owner, reader = cell.client(), cell.client()
    for number in range(3 * ROOM_FOR):
        assert put(owner, [number]) == [True], "a pool of unleased blocks never refuses"
    status = owner.status()
    assert status["mooncake_segment_evictions_total"] == 2 * ROOM_FOR
    held = [number for number in range(3 * ROOM_FOR) if owner.has(key_of(number))]
    assert held == list(range(2 * ROOM_FOR, 3 * ROOM_FOR))
    located = reader.directory.locate([key_of(number) for number in range(3 * ROOM_FOR)])
    assert [number for number, nodes in enumerate(located) if nodes] == held


def test_one_put_larger_than_the_pool_keeps_its_head(cell):
    owner = cell.client()
    is_here = put(owner, range(2 * ROOM_FOR))
    assert is_here == [True] * ROOM_FOR + [False] * ROOM_FOR
    assert owner.status()['mooncake_put_blocks_total{result="full"}'] == ROOM_FOR
    assert put(owner, [99]) == [True] and owner.has(key_of(0)) and not owner.has(key_of(ROOM_FOR - 1))


def test_a_directory_entry_that_is_stale_is_a_miss_asked_for_only_once(cell):
    owner, reader = cell.client(), cell.client()
    put(owner, [1, 2])
    owner._segment.drop(key_of(1))  # the directory still lists it
    outcomes = get(reader, [1, 2])
    assert results(outcomes) == ["miss", "ok"] and "no longer" in outcomes[0].reason
    leases = wait_for(lambda: owner.status().get('mooncake_leases_total{result="released"}'))
    assert results(get(reader, [1])) == ["miss"]
    assert owner.status()['mooncake_leases_total{result="released"}'] == leases
    assert reader.status()['mooncake_pull_blocks_total{result="miss"}'] == 2


def test_the_next_replica_is_tried_when_the_first_owner_has_lost_the_block(cell):
    first, second, reader = cell.client(), cell.client(), cell.client()
    for owner in (first, second):
        put(owner, range(4))
    min(first, second, key=lambda client: client.node_id)._segment.drop(key_of(2))
    assert results(get(reader, range(4))) == ["ok"] * 4


def test_a_corrupt_block_is_never_delivered_and_its_owner_drops_it(cell):
    owner, reader = cell.client(), cell.client()
    put(owner, [1, 2])
    flip_byte(owner, 1)
    outcomes = get(reader, [1, 2])
    assert results(outcomes) == ["corrupt", "ok"]
    wait_for(lambda: not owner.has(key_of(1)), what="the owner drops the block")
    wait_for(lambda: reader.directory.locate([key_of(1)]) == [()], what="the owner withdraws it")
    assert owner.status()["mooncake_segment_dropped_total"] == 1
    assert reader.status()['mooncake_pull_blocks_total{result="corrupt"}'] == 1
    assert put(owner, [1]) == [True] and results(get(reader, [1])) == ["ok"], "put again, it is good again"


def small_get(client, number, size_bytes=4096):
    """Get one block into two pieces; return the outcome, and whether its bytes are right."""
    memory = np.zeros(2 * size_bytes, np.uint8)
    address, half = memory.ctypes.data, size_bytes // 2 - 3
    pieces = Scatter(np.array([address, address + size_bytes], np.uint64),
                     np.array([half, size_bytes - half], np.uint64))
    (outcome,) = client.get([key_of(number)], [pieces], deadline_ns=time.monotonic_ns() + 5 * 10**9)
    image = np.concatenate((memory[:half], memory[size_bytes:2 * size_bytes - half]))
    return outcome, np.array_equal(image, content_of(number, size_bytes=size_bytes))


def small_put(client, number, size_bytes=4096):
    content = content_of(number, size_bytes=size_bytes)
    pieces = Scatter(np.array([content.ctypes.data], np.uint64), np.array([size_bytes], np.uint64))
    assert client.put([key_of(number)], [pieces]) == [True]


def test_small_blocks_come_with_the_answer_and_leave_no_lease(cell):
    owner, reader = cell.client(), cell.client()
    for number, size_bytes in ((1, 4096), (2, wire.FETCH_MAX_BYTES), (3, wire.FETCH_MAX_BYTES + 8)):
        small_put(owner, number, size_bytes)
    assert small_get(reader, 1)[0].medium == "shm", "the first opens the connection"
    wait_for(lambda: owner.status().get('mooncake_leases_total{result="released"}') == 1)
    outcome, is_right = small_get(reader, 1)
    assert (outcome.result, outcome.medium, outcome.num_bytes, is_right) == ("ok", "inline", 4096, True)
    outcome, is_right = small_get(reader, 2, wire.FETCH_MAX_BYTES)
    assert outcome.medium == "inline" and is_right
    assert owner.status()["mooncake_leases_active"] == 0 and owner._segment.num_in_use() == (0, 0)
    outcome, is_right = small_get(reader, 3, wire.FETCH_MAX_BYTES + 8)
    assert outcome.medium == "shm" and is_right
    wait_for(lambda: owner.status()['mooncake_leases_total{result="released"}'] == 2)
    assert reader.status()['mooncake_pull_bytes_total{medium="inline"}'] == 4096 + wire.FETCH_MAX_BYTES


def test_what_a_small_block_ends_as_is_found_out_by_the_road_with_leases(cell):
    owner, reader = cell.client(), cell.client()
    for number in (1, 2, 3, 4):
        small_put(owner, number)
    assert small_get(reader, 1)[0].result == "ok"
    flip_byte(owner, 2, offset=2000)
    assert small_get(reader, 2)[0].result == "corrupt"
    wait_for(lambda: not owner.has(key_of(2)), what="the owner drops the block")
    outcome, _ = small_get(reader, 3, 2048)
    assert outcome.result == "failed" and "4096 bytes" in outcome.reason
    owner._segment.drop(key_of(3))
    assert small_get(reader, 3)[0].result == "miss"
    assert small_get(reader, 4) == (GetOutcome("ok", "inline", 4096, ""), True), "and the shortcut is still there"


def test_an_owner_too_slow_to_be_fetched_from_is_asked_for_a_lease(cell, monkeypatch):
    owner, reader = cell.client(), cell.client()
    small_put(owner, 1)
    assert small_get(reader, 1)[0].medium == "shm"
    monkeypatch.setattr(fetch, "WAIT_MAX_NS", 0)
    for _ in range(20):  # what was fetched arrives late, in the middle of other conversations
        outcome, is_right = small_get(reader, 1)
        assert (outcome.result, outcome.medium, is_right) == ("ok", "shm", True)
    monkeypatch.undo()
    assert small_get(reader, 1)[0].medium == "inline" and reader._puller.num_links() == 1


def test_a_block_with_two_holders_is_fetched_from_one_that_is_left(cell):
    owners, reader = [cell.client(), cell.client()], cell.client()
    for owner in owners:
        small_put(owner, 1)
        small_put(owner, 100 + owners.index(owner))
    assert [small_get(reader, number)[0].result for number in (100, 101)] == ["ok", "ok"]
    assert small_get(reader, 1)[0].medium == "inline"
    owners[0].close()
    owners[0].directory.close()
    for _ in range(3):
        outcome, is_right = small_get(reader, 1)
        assert outcome.result == "ok" and is_right


def test_under_tls_no_block_comes_with_an_answer_which_nothing_encrypts(cell):
    tls = {"tls_cert": str(CERTIFICATES / "member.pem"), "tls_key": str(CERTIFICATES / "member.key"),
           "tls_ca": str(CERTIFICATES / "authority.pem")}
    config = cell.config(media=("tcp",), **tls)
    owner, reader = (cell._keep(StoreClient(config, directory=MemoryDirectory(cell.memory))) for _ in range(2))
    small_put(owner, 1)
    for _ in range(2):
        outcome, is_right = small_get(reader, 1)
        assert outcome.medium == "tcp" and is_right
    with RawPeer(owner.address) as peer:
        peer.send(wire.Fetch(2, (key_of(1),)))
        assert peer.receive() == wire.Denied(2, "too_large")


def test_a_false_report_costs_the_owner_nothing(cell):
    owner = cell.client()
    put(owner, [1])
    with RawPeer(owner.address) as peer:
        peer.send(wire.Hello(1, "liar", HostIdentity("x", 1), "0"))
        peer.receive()
        for _ in range(200):
            peer.send(wire.Report(key_of(1), 0))
        peer.send(wire.StatusRequest(2))
        assert peer.receive().samples["mooncake_segment_blocks"] == 1


class SlowMedia:
    """Media whose reads take their time, wrapped around the real ones."""

    def __init__(self, media, delay_s, before_read=lambda: None):
        self._media, self._delay_s, self._before_read = media, delay_s, before_read

    def attach(self, region, *, deadline_ns):
        attachment = self._media.attach(region, deadline_ns=deadline_ns)
        read = attachment.read

        def slow_read(batch, *, deadline_ns):
            self._before_read()
            time.sleep(self._delay_s)
            return read(batch, deadline_ns=max(deadline_ns, time.monotonic_ns() + 1_000_000_000))

        attachment.read = slow_read
        return attachment


@pytest.mark.parametrize("checksum", [True, False])
def test_a_lease_that_ends_during_a_slow_read_never_yields_wrong_bytes(cell, checksum):
    owner = cell.client(lease_s=0.2)
    reader = cell.client(lease_s=0.2, checksum=checksum)
    put(owner, range(ROOM_FOR))
    reader._puller._media = SlowMedia(reader.media, 0.5, lambda: wait_for(
        lambda: put(owner, range(100, 100 + ROOM_FOR)) == [True] * ROOM_FOR, what="the leases end and others move in"))
    outcomes = get(reader, range(ROOM_FOR))
    assert set(results(outcomes)) <= {"failed", "corrupt"} and len(outcomes) == ROOM_FOR
    assert owner.status()['mooncake_leases_total{result="expired"}'] >= 1


@pytest.mark.parametrize("plan", [
    FaultPlan(seed=1, corrupt=0.2), FaultPlan(seed=2, drop=0.2, truncate=0.2), FaultPlan(seed=3, reset=0.5),
    FaultPlan(seed=4, delay=1.0, delay_s=0.4), FaultPlan(seed=5, death_after_reads=1),
], ids=["corrupt", "lossy", "reset", "slower than its lease", "death"])
def test_a_medium_that_misbehaves_never_yields_wrong_bytes(cell, plan):
    owner = cell.client(lease_s=0.3)
    metrics = Metrics()
    media = Media.of({"shm": FaultyTransport(ShmTransport(), plan)}, metrics=metrics, cool_down_s=0.05)
    reader = cell.client(media=media, lease_s=0.3, pull_timeout_s=1.0)
    put(owner, range(ROOM_FOR))
    seen = []
    for _ in range(4):
        started = time.monotonic()
        seen += results(get(reader, range(ROOM_FOR)))  # compares the bytes of every ok block
        assert time.monotonic() - started < 1.5
        for peer in reader._puller._peers._peers.values():
            peer.blamed_until_ns = 0  # so that the medium is tried again
    assert len(seen) == 4 * ROOM_FOR and set(seen) <= {"ok", "failed", "corrupt"} and seen.count("ok") < len(seen)
    assert all(owner.has(key_of(number)) for number in range(ROOM_FOR)), "reports about a bad medium cost no blocks"
    wait_for(lambda: owner.status()["mooncake_leases_active"] == 0, what="the end of all leases")
    reader.close()
    media.close()


def test_a_checksum_of_another_kind_is_not_compared_and_costs_the_owner_nothing(cell):
    owner, reader, careless = cell.client(), cell.client(), cell.client(checksum=False)
    put(owner, [1])
    (block,) = owner._segment.pin([key_of(1)])
    block.checksum ^= 1 << 56  # as a member with a later definition would say
    owner._segment.unpin([block])
    (outcome,) = get(reader, [1])
    assert outcome.result == "failed" and "another kind" in outcome.reason
    assert owner.has(key_of(1)) and results(get(careless, [1])) == ["ok"]


def test_leased_bytes_never_change_under_a_reader_while_the_pool_overflows(cell):
    owner, reader = cell.client(), cell.client(checksum=False)
    put(owner, range(8))
    stop, refused = threading.Event(), []

    def overflow():
        number = 1000
        while not stop.is_set():
            refused.extend(result for result in put(owner, range(number, number + 4)) if not result)
            number += 4

    thread = threading.Thread(target=overflow)
    reader._puller._media = SlowMedia(reader.media, 0.02)
    thread.start()
    try:
        for _ in range(10):
            outcomes = get(reader, range(8))  # compares the bytes of every ok block
            assert set(results(outcomes)) <= {"ok", "miss"}
            put(owner, range(8))
    finally:
        stop.set()
        thread.join(10)
    status = owner.status()
    skipped = status.get('mooncake_put_blocks_total{result="full"}', 0) + status.get(
        'mooncake_put_blocks_total{result="busy"}', 0)
    assert len(refused) <= skipped, "every refusal is counted"
    assert status["mooncake_segment_evictions_total"] > ROOM_FOR


def test_a_thousand_random_operations_at_once_deliver_right_bytes_only(cell):
    clients = [cell.client() for _ in range(3)]
    failures: list[BaseException] = []
    seen: list[str] = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(170):
                client = rng.choice(clients)
                numbers = [rng.randrange(60) for _ in range(rng.randint(1, 5))]
                roll = rng.random()
                if roll < 0.45:
                    put(client, numbers)
                elif roll < 0.9:
                    seen.extend(results(get(client, numbers)))
                else:
                    client._segment.drop(key_of(numbers[0]))
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    assert set(seen) <= {"ok", "miss"} and seen.count("ok") > 100, {kind: seen.count(kind) for kind in set(seen)}
    for client in clients:
        wait_for(lambda client=client: client.status()["mooncake_leases_active"] == 0)
        client._segment.report()
        assert_at_rest(client.status())


def test_bytes_in_flight_are_bounded_and_every_block_still_arrives(cell):
    owner, reader = cell.client(), cell.client(inflight_max_bytes=3 * BLOCK_BYTES)
    put(owner, range(ROOM_FOR))
    peak = [0]
    peers = reader._puller._peers
    original = peers._try_begin

    def watched(*arguments):
        link = original(*arguments)
        peak[0] = max(peak[0], peers._inflight_bytes)
        return link

    peers._try_begin = watched
    threads = [threading.Thread(target=lambda: get(reader, range(ROOM_FOR))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results(get(reader, range(ROOM_FOR))) == ["ok"] * ROOM_FOR
    assert 0 < peak[0] <= 3 * BLOCK_BYTES and peers._inflight_bytes == 0


def test_a_capacity_node_takes_copies_that_outlive_their_source(cell):
    node = cell.node(segment_bytes=64 * BLOCK_BYTES)
    source, reader = cell.client(), cell.client()
    put(source, range(10))
    source.replicate([key_of(number) for number in range(12)])
    assert source.wait_replicated(5.0) and node.wait_idle(5.0)
    wait_for(lambda: all(node.client.has(key_of(number)) for number in range(10)))
    status = source.status()
    assert status['mooncake_replicate_blocks_total{result="accepted"}'] == 10
    assert status['mooncake_replicate_blocks_total{result="gone"}'] == 2
    source.close()
    source.directory.close()
    assert results(get(reader, range(10))) == ["ok"] * 10
    wait_for(lambda: node.client.status()["mooncake_leases_active"] == 0)
    assert_at_rest(node.client.status())


def test_replication_without_a_node_is_counted_and_costs_nothing(cell):
    source = cell.client()
    put(source, [1])
    source.replicate([key_of(1)])
    assert source.wait_replicated(5.0)
    wait_for(lambda: source.status().get('mooncake_replicate_blocks_total{result="no_node"}') == 1)


def test_an_engine_refuses_offers(cell):
    engine = cell.client()
    with RawPeer(engine.address) as peer:
        peer.send(wire.Offer(1, "x", "tcp://127.0.0.1:1", HostIdentity("h", 1), (b"k",), (1,)))
        assert peer.receive() == wire.Denied(1, "not_a_store")


def test_garbage_is_answered_counted_and_survived(cell):
    owner, reader = cell.client(), cell.client()
    put(owner, [1])
    with RawPeer(owner.address) as peer:
        for garbage in (b"", b"\x03\xff\xff", b"\x01abc", wire.encode(wire.Renewed(1, 1, 1)),
                        wire.encode(wire.Acquire(7, (b"k",), 100))):
            peer.send_bytes(garbage)
        reasons = [peer.receive().reason for _ in range(5)]
        assert reasons == ["malformed", "malformed", "version", "unexpected", "hello_first"]
        peer.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert peer.socket.recv(1) == b"", "what cannot be told apart ends the connection"
    status = query_status(owner.address, 2.0).samples
    for reason in ("empty", "malformed", "version", "unexpected", "too_large"):
        assert status[f'mooncake_protocol_errors_total{{reason="{reason}"}}'] == 1
    assert results(get(reader, [1])) == ["ok"]


def test_one_leaking_reader_cannot_take_all_leases(cell):
    owner, reader = cell.client(lease_s=0.3), cell.client()
    put(owner, [1])
    owner._server._leases._max_per_peer = 3
    with RawPeer(owner.address) as peer:
        peer.send(wire.Hello(1, "leak", HostIdentity("h", 1), "0"))
        peer.receive()
        for number in range(5):
            peer.send(wire.Acquire(number, (key_of(1),), 60_000))
        kinds = [type(peer.receive()).__name__ for _ in range(5)]
        assert kinds == ["Granted"] * 3 + ["Denied"] * 2
        assert results(get(reader, [1])) == ["ok"]
        wait_for(lambda: owner.status()["mooncake_leases_active"] == 0, what="the leaked leases expire")
        assert owner.status()['mooncake_leases_total{result="expired"}'] == 3


def test_status_over_the_control_socket(cell):
    owner = cell.client()
    put(owner, [1])
    reply = query_status(owner.address, 2.0)
    assert reply.info["node_id"] == owner.node_id and reply.info["kind"] == "engine"
    assert reply.samples["mooncake_segment_blocks"] == 1
    owner.close()
    started = time.monotonic()
    with pytest.raises(PeerUnreachable):
        query_status(owner.address, 0.3)
    assert time.monotonic() - started < 1.0
    with pytest.raises(PeerUnreachable, match="cannot connect"):
        query_status("nonsense", 0.3)


def test_a_status_answer_that_is_none_is_a_protocol_error(cell):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(wire.frame(wire.Release(1)))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RemoteProtocolError, match="Release"):
            query_status(f"tcp://127.0.0.1:{listener.getsockname()[1]}", 2.0)
        thread.join()


def test_closing_twice_and_calling_afterwards_is_harmless(cell):
    owner = cell.client()
    put(owner, [1])
    owner.close()
    owner.close()
    assert put(owner, [2]) == [False] and results(get(owner, [1])) == ["failed"]
    owner.replicate([key_of(1)])
    assert owner.status()['mooncake_put_blocks_total{result="closed"}'] == 1 and not owner.has(key_of(2))


def test_closing_ends_a_running_get_soon(cell):
    owner, reader = cell.client(), cell.client()
    put(owner, range(4))
    reader._puller._media = SlowMedia(reader.media, 0.2)
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.extend(get(reader, range(4))))
    thread.start()
    time.sleep(0.05)
    started = time.monotonic()
    reader.close()
    thread.join(5)
    assert time.monotonic() - started < 3.0 and len(outcomes) == 4


def test_wrong_arguments_are_our_bug_and_say_so(cell):
    client, blocks = cell.client(), Blocks(1)
    with pytest.raises(LocalProtocolError, match="2 keys with 1"):
        client.put([key_of(1), key_of(2)], blocks.scatters())
    with pytest.raises(LocalProtocolError, match="without bytes"):
        client.get([key_of(1)], [blocks.scatter(0)._replace(lengths=np.zeros(5, np.uint64))], deadline_ns=0)


def test_a_target_of_another_size_fails_and_is_not_touched(cell):
    owner, reader = cell.client(), cell.client()
    put(owner, [1])
    for client in (owner, reader):
        target = Blocks(1)
        scatter = target.scatter(0)
        short = type(scatter)(scatter.addresses[:2], scatter.lengths[:2])
        (outcome,) = client.get([key_of(1)], [short], deadline_ns=time.monotonic_ns() + 10**9)
        assert outcome.result == "failed" and "bytes" in outcome.reason and not target.memory.any()


def test_a_deadline_in_the_past_returns_at_once(cell):
    owner, reader = cell.client(), cell.client()
    put(owner, [1])
    started, target = time.monotonic(), Blocks(1)
    (outcome,) = reader.get([key_of(1)], target.scatters(), deadline_ns=1)
    assert outcome.result in ("miss", "failed") and time.monotonic() - started < 0.2


def test_members_come_and_go_without_leaving_threads_or_descriptors(cell):
    reader = cell.client()

    def one_life(number):
        owner = StoreClient(cell.config(), directory=MemoryDirectory(cell.memory))
        put(owner, [number])
        assert results(get(reader, [number])) == ["ok"]
        owner.close()
        owner.directory.close()
        reader._puller.sweep()

    one_life(0)
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for number in range(1, 6):
        one_life(number)
    assert reader._puller.num_links() == 0
    wait_for(lambda: (threading.active_count(), len(os.listdir("/proc/self/fd"))) <= before,
             what=f"threads and descriptors come back to {before}")


def test_content_helper_differs_by_number():
    assert not np.array_equal(content_of(1), content_of(2))
