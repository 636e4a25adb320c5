"""Lost, late, cut, changed, broken and slow reads, and dead owners: on every medium, ten thousand pulls.

No byte is delivered that is not its key's, nobody waits beyond a deadline, and nothing is left behind. Ten thousand
pulls of each medium, and as many of the store over all of them; ``--pulls 10000`` makes it ten thousand over each.
"""

from __future__ import annotations

import functools
import gc
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from contract.fault_parts import NUM_BLOCKS, SHARED, SLACK_S, Holdings, MortalOwner, Pulls, put_blocks, rss_mib
from contract.store_parts import wait_for
from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.directory.memory import MemoryCell, MemoryDirectory
from mooncake_store.metrics import Metrics
from mooncake_store.pull import peers
from mooncake_store.testing.transport import Owned, Target, pattern, scattered
from mooncake_store.testing.verbs import FakeVerbs
from mooncake_store.transport.base import ReadResult, RegionDescriptor
from mooncake_store.transport.cma import CmaTransport
from mooncake_store.transport.faults import FaultPlan, FaultyTransport
from mooncake_store.transport.loopback import LoopbackTransport
from mooncake_store.transport.media import Media, ProbedTransport
from mooncake_store.transport.rdma.transport import RdmaTransport
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.transport.tcp import TcpTransport

NUM_READS = 10_000
WARM_UP = 0.2
GROWTH_MAX_MIB = 24.0
REGION_BYTES = 1 << 20
FAULTS = FaultPlan(seed=5, drop=0.01, truncate=0.01, corrupt=0.01, delay=0.02, delay_s=0.002, slow=0.02, slow_s=0.0005,
                   reset=0.02)
NOTICED = msgspec.structs.replace(FAULTS, detects_corruption=True)
KINDS = ("drop", "truncate", "corrupt", "delay", "slow", "reset")


class Loopback(LoopbackTransport):
    """Both ends of the process's own medium; always usable."""

    def probe(self) -> str:
        return ""


Make = Callable[[], tuple[Any, Any]]


def both(make: Callable[[], Any]) -> tuple[Any, Any]:
    return make(), make()


def one_loopback() -> tuple[Any, Any]:
    shared = Loopback()
    return shared, shared


def rdma_on_fake_devices() -> RdmaTransport:
    return RdmaTransport(backend=FakeVerbs())


MEDIA: dict[str, Make] = {
    "shm": functools.partial(both, ShmTransport),
    "cma": functools.partial(both, CmaTransport),
    "rdma": functools.partial(both, rdma_on_fake_devices),
    "tcp": functools.partial(both, TcpTransport),
    "loopback": one_loopback,
}
"""How to make the owner's and the reader's end of each medium."""

every_medium = pytest.mark.parametrize("medium", MEDIA)


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch) -> Iterator[None]:
    """Ask a blamed peer again at once, or most pulls would not be tried; keep ten thousand warnings out of memory."""
    monkeypatch.setattr(peers, "BLAME_NS", 1_000_000)
    logging.getLogger("mooncake_store").setLevel(logging.CRITICAL)
    yield


def settled_mib() -> float:
    """Return what this process holds once what was dropped in cycles is gone, such as a connection's buffer."""
    gc.collect()
    return rss_mib()


def media_of(medium: str, transport: ProbedTransport, *others: Any) -> Media:
    named = {medium: transport} | {other.medium: other for other in others}
    return Media.of(named, metrics=Metrics(), cool_down_s=0.01)


def at_rest(client: StoreClient) -> bool:
    return client.status()["mooncake_leases_active"] == 0


@every_medium
def test_pulls_of_the_store(medium, pytestconfig):
    num_pulls = pytestconfig.getoption("pulls")
    holdings = Holdings()
    ours, theirs = MEDIA[medium]()
    faulty = FaultyTransport(theirs, FAULTS)
    owner_media, reader_media = media_of(medium, ours), media_of(medium, faulty)
    cell = MemoryCell()
    owner = StoreClient(StoreConfig(directory="off", segment_bytes=2 << 20, lease_s=2.0),
                        directory=MemoryDirectory(cell), media=owner_media)
    reader = StoreClient(StoreConfig(directory="off", segment_bytes=0, lease_s=2.0), directory=MemoryDirectory(cell),
                         media=reader_media)
    put_blocks(owner, range(NUM_BLOCKS))
    pulls = Pulls(reader, range(NUM_BLOCKS)).run(int(num_pulls * WARM_UP))
    warm_mib = settled_mib()
    pulls.run(num_pulls - pulls.num_pulls)
    wait_for(lambda: settled_mib() - warm_mib < GROWTH_MAX_MIB, 20, "giving memory back")
    assert pulls.num_pulls == num_pulls
    assert min(faulty.injected[kind] for kind in KINDS) > 10, faulty.injected
    outcomes = pulls.outcomes
    assert outcomes["ok"] > outcomes.total() / 2 and outcomes["corrupt"] and outcomes["failed"], outcomes
    wait_for(functools.partial(at_rest, owner), 10, "the end of all leases")
    owner._segment.check()
    reader.close()
    owner.close()
    assert owner._segment.num_in_use() == (0, 0)
    for media in (reader_media, owner_media):
        media.close()
    del owner, reader, pulls
    gc.collect()
    holdings.check()


def delivered_wrong(target: Target, result: ReadResult, source: np.ndarray) -> list[int]:
    """Return the requests said to be ``ok`` whose bytes are not the region's."""
    offsets, lengths, starts = target.batch.remote_offsets.tolist(), target.batch.lengths.tolist(), target.starts
    return [index for index in np.flatnonzero(result.ok).tolist() if not np.array_equal(
        target.memory[starts[index]:starts[index] + lengths[index]],
        source[offsets[index]:offsets[index] + lengths[index]])]


@every_medium
def test_reads_of_a_medium(medium):
    holdings = Holdings()
    ours, theirs = MEDIA[medium]()
    faulty = FaultyTransport(theirs, NOTICED)
    media = media_of(medium, faulty)
    owned = Owned(ours, "memfd", REGION_BYTES)
    source = pattern(REGION_BYTES, 1)
    attachment = media.attach(owned.descriptor, deadline_ns=time.monotonic_ns() + 10**10)
    targets = [scattered(np.random.default_rng(seed), 4, 16 << 10, REGION_BYTES) for seed in range(100)]
    num_ok = num_failed = 0
    warm_mib = 0.0
    for number in range(NUM_READS):
        target = targets[number % len(targets)]
        target.memory.fill(target.GUARD)
        deadline_s = 0.0005 if number % 50 == 0 else 0.5
        started = time.monotonic()
        result = attachment.read(target.batch, deadline_ns=time.monotonic_ns() + int(deadline_s * 1e9))
        assert time.monotonic() - started < deadline_s + SLACK_S
        assert not delivered_wrong(target, result, source)
        if number % 10 == 0:
            target.check(result, source)  # that nothing else was written either
        num_ok, num_failed = num_ok + int(result.ok.sum()), num_failed + int((~result.ok).sum())
        if number == NUM_READS * WARM_UP:
            warm_mib = settled_mib()
    wait_for(lambda: settled_mib() - warm_mib < GROWTH_MAX_MIB, 20, "giving memory back")
    assert min(faulty.injected[kind] for kind in KINDS) > 20, faulty.injected
    assert num_ok > num_failed > 0
    attachment.close()
    media.close()
    ours.close()
    owned.close()
    del attachment, media, owned, targets, target, result, faulty
    gc.collect()
    holdings.check()


@pytest.mark.parametrize("medium", ["shm", "cma", "tcp"])
def test_an_owner_that_stops_and_is_killed_under_pulls(medium, request):
    """Blocks with a second owner keep coming; the others end as failed or miss; nobody hangs."""
    holdings = Holdings()
    cell = MemoryCell()
    mortal = MortalOwner(cell, medium, range(NUM_BLOCKS))
    request.addfinalizer(mortal.kill)  # also when the test fails before it does
    survivor = StoreClient(StoreConfig(directory="off", segment_bytes=2 << 20, media=(medium,)),
                           directory=MemoryDirectory(cell))
    reader = StoreClient(StoreConfig(directory="off", segment_bytes=0, media=(medium,)),
                         directory=MemoryDirectory(cell))
    put_blocks(survivor, SHARED)
    mortal.wait_ready()
    alive = Pulls(reader, range(NUM_BLOCKS)).run(200)
    assert alive.outcomes["ok"] > 600, alive.reasons

    def stop_then_kill() -> None:
        mortal.signal(signal.SIGSTOP)  # slow
        time.sleep(0.2)
        mortal.signal(signal.SIGCONT)
        time.sleep(0.1)
        mortal.signal(signal.SIGKILL)

    thread = threading.Thread(target=stop_then_kill)
    thread.start()
    during = Pulls(reader, range(NUM_BLOCKS), seed=50)
    while thread.is_alive():
        during.run(80)
    thread.join()
    mortal.kill()
    during.run(80)
    assert set(during.outcomes) <= {"ok", "failed", "miss"}, during.reasons
    after = Pulls(reader, SHARED, seed=90).run(200)
    assert after.outcomes["ok"] > after.outcomes.total() * 0.9, after.reasons
    orphans = Pulls(reader, range(SHARED.stop, NUM_BLOCKS), seed=99).run(40, deadline_s=0.2)
    assert set(orphans.outcomes) <= {"failed", "miss"}, orphans.reasons
    wait_for(functools.partial(at_rest, survivor), 10, "the end of all leases")
    reader.close()
    survivor.close()
    assert survivor._segment.num_in_use() == (0, 0)
    del reader, survivor, alive, during, after, orphans
    gc.collect()
    holdings.check()


@pytest.mark.parametrize("medium", ["shm", "cma", "tcp"])
def test_a_medium_that_dies_hands_over_to_the_next(medium):
    """The reader's end of one medium is dead for good in the middle; the pulls go on over another."""
    ours, theirs = MEDIA[medium]()
    dying = FaultyTransport(theirs, FaultPlan(death_after_reads=100))
    others = [TcpTransport(), TcpTransport()] if medium != "tcp" else [CmaTransport(), CmaTransport()]
    owner_media, reader_media = media_of(medium, ours, others[0]), media_of(medium, dying, others[1])
    owned = Owned(ours, "memfd", REGION_BYTES)
    memory = owned.shared.memory()
    region = owner_media.serve(memory)
    attachment = reader_media.attach(region, deadline_ns=time.monotonic_ns() + 10**10)
    used = []
    for seed in range(300):
        target = scattered(np.random.default_rng(seed), 4, 16 << 10, REGION_BYTES)
        result = attachment.read(target.batch, deadline_ns=time.monotonic_ns() + 5 * 10**9)
        target.check(result, pattern(REGION_BYTES, 1))
        assert result.error is None
        used.append(attachment.medium)
    assert used[99] == medium and set(used[100:]) == {others[0].medium}
    assert isinstance(region, RegionDescriptor) and dying.injected["death_after_reads"] > 0
    reader_media.close()
    owner_media.close()
    owned.close()
