"""The GPU medium keeps the transport contract on a driver whose device memory is the host's."""

from __future__ import annotations

import os
import time

import msgspec
import numpy as np
import pytest

from mooncake_store.errors import CapacityExceeded, PeerUnreachable, TransferFailed
from mooncake_store.metrics import Metrics
from mooncake_store.testing.cuda import ALLOCATION_BYTES, FakeCuda
from mooncake_store.testing.transport import OwnerProcess, Target, TransportTests, pattern, scattered, soon
from mooncake_store.transport import cuda
from mooncake_store.transport.base import CudaOffer, LocalMemory, RegionGone
from mooncake_store.transport.cma import CmaTransport
from mooncake_store.transport.cuda import CudaError, CudaTransport, choose_registration, export_dmabuf
from mooncake_store.transport.cuda_driver import LibCuda
from mooncake_store.transport.media import Media
from mooncake_store.transport.tcp import TcpTransport

SIZE = 1 << 20


def fake_cuda() -> CudaTransport:
    return CudaTransport(FakeCuda())


class TestCuda(TransportTests):
    make = fake_cuda
    backings = ("cuda",)
    checks_at_owner = False


def device_memory(seed: int = 1) -> LocalMemory:
    data = pattern(SIZE, seed)
    return LocalMemory(data.ctypes.data, SIZE, owner=data, kind="cuda")


def test_only_the_gpu_medium_serves_gpu_memory_and_only_that():
    memory = device_memory()
    media = Media.of({"cma": CmaTransport(), "cuda": fake_cuda(), "tcp": TcpTransport()}, metrics=Metrics())
    region = media.serve(memory)
    assert [type(offer) for offer in region.offers] == [CudaOffer]
    host = media.serve(LocalMemory(memory.address, SIZE, owner=memory.owner))
    assert CudaOffer not in [type(offer) for offer in host.offers]
    attachment = media.attach(msgspec.msgpack.decode(msgspec.msgpack.encode(region), type=type(region)),
                              deadline_ns=soon())
    assert attachment.medium == "cuda" and "GPU memory" in attachment.reason
    target = scattered(np.random.default_rng(1), 20, 9000, SIZE)
    target.check(attachment.read(target.batch, deadline_ns=soon()), pattern(SIZE, 1))
    media.close()


def test_media_without_a_gpu_medium_refuse_gpu_memory():
    media = Media.of({"cma": CmaTransport(), "tcp": TcpTransport()}, metrics=Metrics())
    with pytest.raises(TransferFailed, match="no medium can serve"):
        media.serve(device_memory())
    media.close()


def test_the_offer_carries_the_offset_inside_the_allocation():
    transport, memory = fake_cuda(), device_memory()
    offer = transport.serve(5, memory)
    assert offer is not None and offer.offset == memory.address % ALLOCATION_BYTES
    transport.close()


def test_piecewise_mapped_memory_is_refused_with_what_to_change():
    transport = CudaTransport(FakeCuda(is_exportable=False))
    with pytest.raises(CudaError) as caught:
        transport.serve(5, device_memory())
    assert "expandable_segments" in caught.value.hint


def test_a_reader_in_another_process_opens_once_and_gives_everything_back():
    driver = FakeCuda()
    reader = CudaTransport(driver)
    owner = OwnerProcess(fake_cuda, "cuda", SIZE)
    try:
        attachment = reader.attach(owner.descriptor, deadline_ns=soon())
        assert driver.num_mapped == 2 and driver.num_streams == 1, "the allocation and the guards"
        for seed in range(5):
            target = scattered(np.random.default_rng(seed), 50, 9000, SIZE)
            target.check(attachment.read(target.batch, deadline_ns=soon()), pattern(SIZE, 1))
        assert driver.num_mapped == 2
        attachment.close()
        attachment.close()
        stale = msgspec.structs.replace(owner.descriptor, region_id=99)
        with pytest.raises(RegionGone):
            reader.attach(stale, deadline_ns=soon())
        assert (driver.num_mapped, driver.num_streams) == (0, 0)
    finally:
        owner.close()
    with pytest.raises(PeerUnreachable):
        reader.attach(owner.descriptor, deadline_ns=soon())


def test_a_hung_device_fails_the_read_and_not_the_caller(monkeypatch):
    monkeypatch.setattr(cuda, "HANG_MAX_S", 0.1)
    driver = FakeCuda()
    transport = CudaTransport(driver)
    media = Media.of({"cuda": transport}, metrics=Metrics())
    attachment = media.attach(media.serve(device_memory()), deadline_ns=soon())
    driver.hangs = True
    started = time.monotonic()
    result = attachment.read(Target(np.array([0]), np.array([64])).batch, deadline_ns=soon(0.1))
    assert not result.ok.any() and "did not finish" in result.error.message and time.monotonic() - started < 5
    driver.hangs = False
    media.close()
    assert driver.num_allocated == 0


def test_more_regions_than_guards_are_refused_and_none_leaks():
    driver, memory = FakeCuda(), device_memory()
    transport = CudaTransport(driver)
    count = cuda.GUARD_PAGE_BYTES // cuda.GUARD_BYTES
    for region_id in range(1, count + 1):
        assert transport.serve(region_id, memory)
    with pytest.raises(CapacityExceeded):
        transport.serve(count + 1, memory)
    transport.withdraw(1)
    assert transport.serve(count + 1, memory)
    assert driver.num_allocated == 1
    transport.close()
    assert driver.num_allocated == 0


@pytest.mark.parametrize(("driver", "verbs", "peermem", "way", "says"), [
    (True, True, True, "dmabuf", "libibverbs takes them"),
    (True, True, False, "dmabuf", "libibverbs takes them"),
    (True, False, True, "peermem", "libibverbs registers no dmabuf"),
    (False, True, True, "peermem", "the driver exports no dmabuf"),
    (False, False, False, "none", "the driver exports no dmabuf"),
    (True, False, False, "none", "libibverbs registers no dmabuf"),
])
def test_the_way_to_register_gpu_memory(driver, verbs, peermem, way, says):
    choice = choose_registration(has_driver_dmabuf=driver, has_verbs_dmabuf=verbs, has_peermem=peermem)
    assert choice.way == way and says in choice.reason
    assert bool(choice.refusal) == (way == "none") and (way != "none" or "modprobe nvidia_peermem" in choice.refusal)


def test_a_dmabuf_covers_the_pages_around_the_range():
    asked = []

    class Noting(FakeCuda):
        def dmabuf(self, address, num_bytes):
            asked.append((address, num_bytes))
            return super().dmabuf(address, num_bytes)

    exported = export_dmabuf(Noting(), 0x10000 + 100, 5000)
    os.close(exported.fd)
    assert asked == [(0x10000, 8192)] and exported[1:] == (100, 5000)


def test_a_machine_without_a_driver_says_so():
    obstacle = LibCuda().probe()
    assert obstacle == "" or obstacle.startswith(("no CUDA driver", "no CUDA device"))
