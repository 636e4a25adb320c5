"""Media picks, passes on, cools down and comes back, and says so in metrics."""

import itertools
import logging
import time

import msgspec
import numpy as np
import pytest

from mooncake_store.errors import ChecksumMismatch, ConfigError, PeerUnreachable, TransferFailed
from mooncake_store.metrics import Metrics
from mooncake_store.testing.transport import Target, pattern, scattered, soon
from mooncake_store.transport.base import LocalMemory, ReadResult, RegionGone
from mooncake_store.transport.cma import CmaTransport
from mooncake_store.transport.faults import FaultPlan, FaultyTransport
from mooncake_store.transport.media import Media
from mooncake_store.transport.memory import map_memfd
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.transport.tcp import TcpTransport

SIZE = 1 << 20


class Owner:
    def __init__(self, allowed=("shm", "cma", "tcp")):
        self.media = Media(allowed=allowed, metrics=Metrics())
        self.shared = map_memfd(SIZE, "test")
        self.shared.array()[:] = pattern(SIZE, 1)
        self.region = self.media.serve(self.shared.memory())
        self.source = pattern(SIZE, 1)


@pytest.fixture
def owner():
    owner = Owner()
    yield owner
    owner.media.close()
    owner.shared.close()


def wrapped(plan, cool_down_s=30.0):
    """A reader whose shm misbehaves, with cma and tcp behind it."""
    transports = {"shm": FaultyTransport(ShmTransport(), plan), "cma": CmaTransport(), "tcp": TcpTransport()}
    return Media.of(transports, metrics=Metrics(), cool_down_s=cool_down_s)


def sample(media, name, medium):
    return media._metrics.snapshot().get(f'{name}{{medium="{medium}"}}', 0.0)


def fallbacks(media, medium, reason=None):
    labels = f'{{medium="{medium}",reason="{reason or ""}'
    return sum(value for name, value in media._metrics.snapshot().items()
               if name.startswith("mooncake_pull_fallbacks_total" + labels))


def read(attachment, source, seed=0):
    target = scattered(np.random.default_rng(seed), 50, 5000, SIZE)
    result = attachment.read(target.batch, deadline_ns=soon())
    target.check(result, source)
    return result


@pytest.mark.parametrize("allowed", [("shm", "cma", "tcp"), ("cma", "tcp"), ("tcp",)])
def test_the_first_allowed_medium_moves_the_bytes_and_counts_them(owner, allowed):
    media = Media(allowed=allowed, metrics=Metrics())
    # as it arrives at a peer
    region = msgspec.msgpack.decode(msgspec.msgpack.encode(owner.region), type=type(owner.region))
    attachment = media.attach(region, deadline_ns=soon())
    result = read(attachment, owner.source)
    assert attachment.medium == allowed[0] and attachment.reason
    assert sample(media, "mooncake_pull_bytes_total", allowed[0]) == result.num_bytes > 0
    media.close()


def test_start_up_says_once_what_is_usable(caplog):
    with caplog.at_level(logging.INFO):
        Media(allowed=("shm", "tcp"), host="192.0.2.7", metrics=Metrics()).close()
    lines = [record.getMessage() for record in caplog.records if "media:" in record.getMessage()]
    assert len(lines) == 1 and "shm usable" in lines[0] and "tcp unusable (cannot bind 192.0.2.7" in lines[0]


@pytest.mark.parametrize(("allowed", "host", "message"), [
    (("shm", "warp"), "127.0.0.1", "unknown medium warp"),
    ((), "127.0.0.1", "no medium works"),
    (("tcp",), "0.0.0.0", "no medium works"),
])
def test_unusable_settings_are_refused_with_what_to_do(allowed, host, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Media(allowed=allowed, host=host, metrics=Metrics())
    assert caught.value.hint and caught.value.where == "$.media"


def test_memory_that_no_medium_serves_is_refused():
    media = Media(allowed=("shm",), metrics=Metrics())
    private = np.zeros(100, np.uint8)
    with pytest.raises(TransferFailed, match="no medium can serve"):
        media.serve(LocalMemory(private.ctypes.data, 100, owner=private))
    media.close()


def test_our_own_region_is_copied_within_the_process(owner):
    attachment = owner.media.attach(owner.region, deadline_ns=soon())
    assert attachment.medium == "loopback"
    assert read(attachment, owner.source).error is None
    owner.media.withdraw(owner.region.region_id)
    assert isinstance(read(attachment, owner.source).error, RegionGone)


def test_only_what_failed_is_asked_of_the_next_medium(owner):
    media = wrapped(FaultPlan(seed=3, drop=0.3))
    attachment = media.attach(owner.region, deadline_ns=soon())
    assert attachment.medium == "shm"
    result = read(attachment, owner.source)
    assert result.error is None and attachment.medium == "cma"
    by_shm, by_cma = (sample(media, "mooncake_pull_bytes_total", medium) for medium in ("shm", "cma"))
    assert by_shm > 0 and by_cma > 0 and by_shm + by_cma == result.num_bytes
    assert fallbacks(media, "shm") == 1
    assert read(attachment, owner.source, 1).error is None
    assert fallbacks(media, "shm") == 1 and attachment.medium == "cma"
    assert "shm" in attachment.reason
    # another attachment to the same region knows
    assert media.attach(owner.region, deadline_ns=soon()).medium == "cma"
    media.close()


def test_after_the_cool_down_the_better_medium_comes_back(owner):
    media = wrapped(FaultPlan(seed=3, reset=0.5), cool_down_s=0.1)
    attachment = media.attach(owner.region, deadline_ns=soon())
    seen: list[str] = []
    stop_s = time.monotonic() + 20
    # away from shm, back to it, and away again
    while [medium for medium, _ in itertools.groupby(seen)][:3] != ["cma", "shm", "cma"] and time.monotonic() < stop_s:
        assert read(attachment, owner.source, len(seen)).error is None
        if seen or attachment.medium == "cma":
            seen.append(attachment.medium)
        time.sleep(0.01)
    assert time.monotonic() < stop_s, f"shm was not tried again, or its failures were not passed on: {seen}"
    media.close()


def test_a_medium_that_cannot_attach_is_passed_over(owner):
    media = wrapped(FaultPlan(death_after_reads=0))
    attachment = media.attach(owner.region, deadline_ns=soon())
    assert attachment.medium == "cma" and "injected" in attachment.reason
    assert fallbacks(media, "shm", "attach") == fallbacks(media, "shm") == 1
    media.close()


def test_a_failed_medium_is_still_better_than_none(owner):
    faulty = FaultyTransport(ShmTransport(), FaultPlan(seed=1, reset=0.5))
    media = Media.of({"shm": faulty}, metrics=Metrics())
    attachment = media.attach(owner.region, deadline_ns=soon())
    outcomes = [read(attachment, owner.source, seed).error is None for seed in range(30)]
    assert True in outcomes[outcomes.index(False):], "one failure ended all reads"
    assert fallbacks(media, "shm") == 0
    media.close()


def test_a_region_that_is_gone_blames_no_medium(owner):
    media = Media(allowed=("shm", "cma", "tcp"), metrics=Metrics())
    attachment = media.attach(owner.region, deadline_ns=soon())
    owner.media.withdraw(owner.region.region_id)
    assert isinstance(read(attachment, owner.source).error, RegionGone)
    with pytest.raises(RegionGone):
        media.attach(owner.region, deadline_ns=soon())
    assert fallbacks(media, "shm") == 0
    other = owner.media.serve(owner.shared.memory())
    assert media.attach(other, deadline_ns=soon()).medium == "shm"
    media.close()


def test_a_peer_out_of_reach_says_why_per_medium(owner):
    elsewhere = msgspec.structs.replace(owner.region, host=msgspec.structs.replace(owner.region.host, boot_id="x"))
    media = Media(allowed=("shm", "cma"), metrics=Metrics())
    with pytest.raises(PeerUnreachable, match="shm: another host; cma: another host"):
        media.attach(elsewhere, deadline_ns=soon())
    media.close()


def test_close_ends_attachments(owner):
    media = Media(allowed=("shm", "tcp"), metrics=Metrics())
    attachment = media.attach(owner.region, deadline_ns=soon())
    media.close()
    media.close()
    result = attachment.read(Target(np.array([0]), np.array([8])).batch, deadline_ns=soon())
    assert not result.ok.any() and result.error is not None


class Deaf(ShmTransport):
    """Attaches, and then nothing comes until the deadline."""

    def attach(self, region, *, deadline_ns):
        attachment = super().attach(region, deadline_ns=deadline_ns)

        def read(batch, *, deadline_ns):
            time.sleep(max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9))
            return ReadResult.failed(batch, TransferFailed("deadline passed", where="shm"))

        attachment.read = read
        return attachment


def test_a_medium_that_uses_all_the_time_up_is_left_for_the_next_read(owner):
    media = Media.of({"shm": Deaf(), "tcp": TcpTransport()}, metrics=Metrics())
    attachment = media.attach(owner.region, deadline_ns=soon())
    target = Target(np.array([0]), np.array([8]))
    assert not attachment.read(target.batch, deadline_ns=soon(0.01)).ok.any()
    assert attachment.medium == "shm" and fallbacks(media, "shm") == 0, "our own deadline was short"
    assert not attachment.read(target.batch, deadline_ns=soon(0.3)).ok.any()
    assert read(attachment, owner.source).error is None
    assert attachment.medium == "tcp" and fallbacks(media, "shm", "stalled") == 1
    media.close()


@pytest.mark.parametrize(("error", "reason"), [
    (PeerUnreachable("hung up"), "unreachable"), (ChecksumMismatch("changed"), "changed"),
    (TransferFailed("no"), "failed"),
])
def test_a_fallback_is_counted_with_its_reason(owner, error, reason):
    class Failing(ShmTransport):
        def attach(self, region, *, deadline_ns):
            attachment = super().attach(region, deadline_ns=deadline_ns)
            attachment.read = lambda batch, *, deadline_ns: ReadResult.failed(batch, error)
            return attachment

    media = Media.of({"shm": Failing(), "cma": CmaTransport()}, metrics=Metrics())
    assert read(media.attach(owner.region, deadline_ns=soon()), owner.source).error is None
    assert fallbacks(media, "shm", reason) == fallbacks(media, "shm") == 1
    media.close()


def test_each_region_and_medium_is_told_of_once(owner, caplog):
    media = wrapped(FaultPlan(seed=3, reset=0.5), cool_down_s=0.001)
    with caplog.at_level(logging.INFO, "mooncake_store.transport.media"):
        attachment = media.attach(owner.region, deadline_ns=soon())
        for seed in range(40):
            assert read(attachment, owner.source, seed).error is None
            time.sleep(0.002)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert fallbacks(media, "shm") > 5, "it failed and came back often"
    assert sum("over shm" in line for line in told) == sum("over cma" in line for line in told) == 1
    assert sum("shm failed for region" in line for line in told) == 1
    media.close()


def test_preference_is_the_order_given(owner):
    media = Media(allowed=("tcp", "cma", "shm"), metrics=Metrics())
    attachment = media.attach(owner.region, deadline_ns=soon())
    assert attachment.medium == "tcp"
    media.close()
