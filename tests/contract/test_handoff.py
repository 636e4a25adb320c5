"""Hand-over between two worker endpoints over real sockets, media and processes; the engines are two byte arrays."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.kv.layout import KVLayout
from mooncake_connector.transfer.cache import AttachedCache
from mooncake_connector.transfer.endpoint import CacheMemory, WorkerEndpoint
from mooncake_connector.transfer.messages import CachePart
from mooncake_connector.transfer.steps import (
    Announced,
    Expected,
    Finished,
    HandoffLoad,
    PrefillStep,
    StepPlan,
    StepResults,
)
from mooncake_store.metrics import Metrics
from mooncake_store.transport.base import LocalMemory, ReadBatch
from mooncake_store.transport.media import Media
from mooncake_store.types import Extent
from unit.kv.test_fingerprint import ONE as FINGERPRINT

LAYERS, PAGE, BLOCKS, TOKENS = 4, 8192, 32, 16
LAYOUT = KVLayout(tuple(i * PAGE * BLOCKS for i in range(LAYERS)), PAGE, PAGE, BLOCKS, TOKENS, LAYERS * PAGE * BLOCKS)
NEEDED = 100  # 6 whole blocks and a tail
SOURCE_BLOCKS = [3, 9, 4, 20, 31, 0, 7]
TARGET_BLOCKS = [5, 6, 1, 30, 2, 11, 12]


def config(**changes):
    defaults = {"pool": False, "handoff_lease_s": 2.0, "handoff_timeout_s": 6.0, "verify": True}
    return ConnectorConfig(**{**defaults, **changes})


class Engine:
    """Stands in for an engine's model thread over a cache of random bytes."""

    def __init__(self, name, *, fingerprint=FINGERPRINT, seed=0, **changes):
        rng = np.random.default_rng(seed)
        self.cache = rng.integers(0, 256, LAYOUT.size_bytes, np.uint8)
        memory = CacheMemory(self.cache.ctypes.data, LAYOUT, fingerprint, self.cache)
        self.endpoint = WorkerEndpoint(config(**changes), engine_id=name, rank=0, cache=memory)
        self.results = StepResults()

    def step(self, plan=None, num_layers=0):
        plan = plan or StepPlan(is_empty=True)
        self.endpoint.before_step(plan)
        self.endpoint.begin_step(plan)
        for layer in range(num_layers):
            self.endpoint.finish_layer(layer + 1)
        self.endpoint.finish_step()
        got = self.endpoint.take_results()
        assert not self.results.sent & got.sent, "reported twice"
        assert not self.results.received & got.received, "reported twice"
        self.results.sent |= got.sent
        self.results.received |= got.received
        self.results.bad_blocks |= got.bad_blocks
        self.results.notes |= got.notes
        self.results.lost |= got.lost

    def until(self, condition, timeout_s=5.0):
        deadline = time.monotonic() + timeout_s
        while not condition(self.results):
            assert time.monotonic() < deadline, f"{self.results} {self.endpoint.samples()}"
            self.step()
            time.sleep(0.002)

    def page(self, layer, block):
        start = int(LAYOUT.page_offsets([block])[layer, 0])
        return self.cache[start: start + PAGE]

    def sample(self, name):
        return self.endpoint.samples().get(name, 0.0)

    @property
    def num_pulled_bytes(self):
        samples = self.endpoint.samples()
        return sum(value for name, value in samples.items() if name.startswith("mooncake_handoff_bytes"))


@pytest.fixture
def pair(request):
    made = []

    def make(**changes):
        made.extend([Engine(f"p-{request.node.name}", seed=1, **changes), Engine(f"d-{request.node.name}", seed=2)])
        return made

    yield make
    for engine in made:
        engine.endpoint.close()


def prefill(request_id="p", transfer="t", before=0, after=NEEDED + 1):
    return PrefillStep(request_id, transfer, SOURCE_BLOCKS, before, after, NEEDED, True)


def load(engine, first=0, transfer="t", request_id="d"):
    return HandoffLoad(request_id, transfer, [engine.endpoint.address], TARGET_BLOCKS, first, NEEDED)


def assert_equal(source, target, first=0):
    for a, b in list(zip(SOURCE_BLOCKS, TARGET_BLOCKS, strict=True))[first:]:
        for layer in range(LAYERS):
            assert np.array_equal(source.page(layer, a), target.page(layer, b)), (layer, a, b)


def test_layers_stream_and_the_prefill_is_freed(pair):
    source, target = pair()
    target.step(StepPlan(announced=[Announced("d", "t", [source.endpoint.address])], handoffs=[load(source)]))
    source.step(StepPlan(expected=[Expected("p", "t")]))
    source.step(StepPlan(prefills=[prefill(after=64)]), num_layers=LAYERS)
    time.sleep(0.3)
    source.step(StepPlan(prefills=[prefill(before=64)]), num_layers=LAYERS)
    target.until(lambda r: r.received)
    assert (target.results.received, target.results.bad_blocks) == ({"d"}, set())
    assert_equal(source, target)
    source.step(StepPlan(finished=[Finished("p", "t", True, True, 7)]))
    source.until(lambda r: r.sent == {"p"})
    assert target.sample('mooncake_verify_blocks_total{result="equal"}') == len(TARGET_BLOCKS)
    assert source.sample("mooncake_blocks_held") == 0
    target.until(lambda r: target.sample('mooncake_transfers_active{role="decode"}') == 0)


def test_only_the_missing_tail_moves(pair):
    source, target = pair()
    before = target.cache.copy()
    source.step(StepPlan(prefills=[prefill()]), num_layers=LAYERS)
    target.step(StepPlan(handoffs=[load(source, first=4)]))
    target.until(lambda r: r.received)
    assert_equal(source, target, first=4)
    for block in TARGET_BLOCKS[:4]:
        for layer in range(LAYERS):
            start = int(LAYOUT.page_offsets([block])[layer, 0])
            assert np.array_equal(target.cache[start: start + PAGE], before[start: start + PAGE])


def test_another_fingerprint_is_refused_naming_the_fields(pair, caplog):
    import msgspec

    source, _ = pair()
    other = Engine("d-other", fingerprint=msgspec.structs.replace(FINGERPRINT, dtype="float16", block_size=32))
    try:
        other.step(StepPlan(handoffs=[load(source)]))
        other.until(lambda r: r.received)
        assert other.results.bad_blocks == set(TARGET_BLOCKS)
        assert "2 of 17 fields differ: dtype" in caplog.text
    finally:
        other.endpoint.close()


def test_an_aborted_prefill_ends_the_wait_and_keeps_what_arrived(pair):
    source, target = pair()
    target.step(StepPlan(handoffs=[load(source)]))
    source.step(StepPlan(prefills=[prefill(after=64)]), num_layers=LAYERS)
    target.until(lambda r: target.num_pulled_bytes == 4 * LAYERS * PAGE)
    source.step(StepPlan(finished=[Finished("p", "t", False, False, 0)]))
    target.until(lambda r: r.received)
    assert target.results.bad_blocks == set(TARGET_BLOCKS[4:])


def test_a_cancelled_wait_is_reported_once_and_releases_the_prefill(pair):
    source, target = pair()
    target.step(StepPlan(handoffs=[load(source)]))
    source.step(StepPlan(prefills=[prefill(after=64)]), num_layers=LAYERS)
    target.step(StepPlan(cancelled=["d"]))
    target.until(lambda r: r.received == {"d"})
    target.step(StepPlan(cancelled=["d"]))
    source.step(StepPlan(prefills=[prefill(before=64)]), num_layers=LAYERS)
    source.step(StepPlan(finished=[Finished("p", "t", True, True, 7)]))
    source.until(lambda r: r.sent == {"p"})


def test_nobody_ever_comes_for_the_blocks(pair):
    source, _ = pair()
    source.step(StepPlan(prefills=[prefill()]), num_layers=LAYERS)
    started = time.monotonic()
    source.step(StepPlan(finished=[Finished("p", "t", True, True, 7)]))
    source.until(lambda r: r.sent == {"p"})
    assert 1.5 < time.monotonic() - started < 4.0


def test_the_prefill_never_hears_of_the_request(pair):
    source, target = pair()
    target.step(StepPlan(handoffs=[load(source)]))
    target.until(lambda r: r.received, timeout_s=8.0)
    assert target.results.bad_blocks == set(TARGET_BLOCKS)


def test_nobody_listens_at_the_address(pair):
    _, target = pair()
    item = HandoffLoad("d", "t", ["tcp://127.0.0.1:1"], TARGET_BLOCKS, 0, NEEDED)
    target.step(StepPlan(handoffs=[item]))
    target.until(lambda r: r.received, timeout_s=14.0)
    assert target.results.bad_blocks == set(TARGET_BLOCKS)


def test_a_preemption_voids_what_was_not_copied_and_the_transfer_still_ends_right(pair):
    source, target = pair()
    source.step(StepPlan(prefills=[prefill(after=64)]), num_layers=LAYERS)
    source.step(StepPlan(preempted=["p"], is_empty=True))
    source.cache[:] = np.random.default_rng(9).integers(0, 256, LAYOUT.size_bytes, np.uint8)
    target.step(StepPlan(handoffs=[load(source)]))
    source.step(StepPlan(prefills=[prefill()]), num_layers=LAYERS)
    target.until(lambda r: r.received)
    assert target.results.bad_blocks == set()
    assert_equal(source, target)


def test_garbage_on_the_control_socket_is_counted_and_harmless(pair):
    import zmq

    source, target = pair()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 500)
        socket.connect(source.endpoint.address)
        for data in (b"", b"\x00", b"\x02\xc1", os.urandom(64), b"\x02" + os.urandom(2000)):
            socket.send(data)
        socket.send_multipart([b"a", b"b", b"c"])
        source.until(lambda r: source.sample('mooncake_protocol_errors_total{reason="malformed"}') >= 5)
    source.step(StepPlan(prefills=[prefill()]), num_layers=LAYERS)
    target.step(StepPlan(handoffs=[load(source)]))
    target.until(lambda r: r.received)
    assert_equal(source, target)


def test_a_note_arrives_with_the_last_block(pair):
    source, target = pair()
    item = load(source)
    item.wants_note = True
    target.step(StepPlan(handoffs=[item]))
    last = prefill()
    last.note = b"first token: 42"
    source.step(StepPlan(prefills=[prefill(after=64)]), num_layers=LAYERS)
    source.step(StepPlan(prefills=[last]), num_layers=LAYERS)
    target.until(lambda r: r.received)
    assert (target.results.notes, target.results.lost) == ({"d": b"first token: 42"}, {})
    assert_equal(source, target)


def test_a_note_is_waited_for_even_when_every_block_is_here(pair):
    source, target = pair()
    item = load(source, first=len(TARGET_BLOCKS))
    item.wants_note = True
    target.step(StepPlan(handoffs=[item]))
    last = prefill()
    last.note = b"x"
    source.step(StepPlan(prefills=[last]), num_layers=LAYERS)
    target.until(lambda r: r.received)
    assert (target.results.notes, target.num_pulled_bytes) == ({"d": b"x"}, 0)


def test_a_peer_that_gives_up_is_told_to_the_engine_with_the_reason(pair):
    source, target = pair()
    target.step(StepPlan(handoffs=[load(source)]))
    source.step(StepPlan(prefills=[prefill(after=64)]), num_layers=LAYERS)
    target.step(StepPlan(cancelled=["d"]))
    source.until(lambda r: r.lost)
    assert source.results.lost == {"p": "the decode side is through"}
    target.until(lambda r: r.lost)
    assert target.results.lost == {"d": "cancelled"}


@pytest.fixture
def scattered():
    """Yield a source whose layers were allocated one by one, and a target that was not."""
    buffers = [np.random.default_rng(layer).integers(0, 256, PAGE * BLOCKS, np.uint8) for layer in range(LAYERS)]
    starts = [buffer.ctypes.data for buffer in buffers]
    base = min(starts)
    layout = KVLayout(tuple(start - base for start in starts), PAGE, PAGE, BLOCKS, TOKENS,
                      max(starts) - base + PAGE * BLOCKS)
    spans = tuple(Extent(start - base, PAGE * BLOCKS) for start in starts)
    source = Engine.__new__(Engine)
    source.results = StepResults()
    source.endpoint = WorkerEndpoint(config(), engine_id="p-scattered", rank=0,
                                     cache=CacheMemory(base, layout, FINGERPRINT, buffers, spans))
    target = Engine("d-scattered", seed=2)
    yield source, buffers, target
    source.endpoint.close()
    target.endpoint.close()


def test_a_cache_of_several_allocations_is_read_and_what_lies_between_is_not(scattered):
    source, buffers, target = scattered
    source.step(StepPlan(prefills=[prefill()]))
    target.step(StepPlan(handoffs=[load(source)]))
    target.until(lambda r: r.received)
    assert target.results.bad_blocks == set()
    for a, b in zip(SOURCE_BLOCKS, TARGET_BLOCKS, strict=True):
        for layer in range(LAYERS):
            assert np.array_equal(buffers[layer][a * PAGE: (a + 1) * PAGE], target.page(layer, b))


def test_a_read_outside_every_region_fails_alone():
    media = Media(allowed=("cma", "tcp"), metrics=Metrics())
    memory = np.arange(4096, dtype=np.uint8)
    parts = (CachePart(4096, media.serve(LocalMemory(memory.ctypes.data, 4096, owner=memory))),
             CachePart(65_536, media.serve(LocalMemory(memory.ctypes.data, 4096, owner=memory))))
    deadline_ns = time.monotonic_ns() + 10**9
    cache = AttachedCache(media, parts, deadline_ns=deadline_ns)
    try:
        out = np.zeros(64, np.uint8)
        for offset, is_inside in ((4096 + 64, True), (65_536, True), (0, False), (8192 - 32, False), (70_000, False)):
            batch = ReadBatch(np.array([offset], np.uint64), np.array([out.ctypes.data], np.uint64),
                              np.array([64], np.uint64))
            result = cache.read(batch, deadline_ns=deadline_ns)
            assert (bool(result.ok[0]), result.error is None) == (is_inside, is_inside), offset
    finally:
        cache.close()
        media.close()


def _serve(connection, after):
    source = Engine("p-child", seed=1)
    connection.send((source.endpoint.address, source.cache.tobytes()))
    source.step(StepPlan(prefills=[prefill(after=after)]), num_layers=LAYERS)
    while not connection.poll(0.002):
        source.step()
    source.endpoint.close()


@pytest.fixture
def child(request):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, request.param), daemon=True)
    process.start()
    address, data = ours.recv()
    yield process, address, np.frombuffer(data, np.uint8)
    if process.is_alive():
        os.kill(process.pid, signal.SIGCONT)
        ours.send("stop")
        process.join(10)


@pytest.mark.parametrize("child", [NEEDED + 1], indirect=True)
def test_bytes_come_from_another_process(child, pair):
    _, address, data = child
    _, target = pair()
    target.step(StepPlan(handoffs=[HandoffLoad("d", "t", [address], TARGET_BLOCKS, 0, NEEDED)]))
    target.until(lambda r: r.received, timeout_s=10)
    assert target.results.bad_blocks == set()
    for a, b in zip(SOURCE_BLOCKS, TARGET_BLOCKS, strict=True):
        for layer in range(LAYERS):
            start = int(LAYOUT.page_offsets([a])[layer, 0])
            assert np.array_equal(data[start: start + PAGE], target.page(layer, b))
    assert target.num_pulled_bytes > 0


@pytest.mark.parametrize("child", [64], indirect=True)
def test_a_killed_prefill_is_noticed_at_once(child, pair):
    process, address, _ = child
    _, target = pair()
    target.step(StepPlan(handoffs=[HandoffLoad("d", "t", [address], TARGET_BLOCKS, 0, NEEDED)]))
    target.until(lambda r: target.num_pulled_bytes > 0, timeout_s=10)
    process.kill()
    started = time.monotonic()
    target.until(lambda r: r.received)
    assert time.monotonic() - started < 1.0
    assert target.results.bad_blocks == set(TARGET_BLOCKS[4:])


@pytest.mark.parametrize("child", [64], indirect=True)
def test_a_frozen_prefill_is_given_up_after_its_lease(child, pair):
    process, address, _ = child
    _, target = pair()
    target.step(StepPlan(handoffs=[HandoffLoad("d", "t", [address], TARGET_BLOCKS, 0, NEEDED)]))
    target.until(lambda r: target.num_pulled_bytes > 0, timeout_s=10)
    os.kill(process.pid, signal.SIGSTOP)
    target.until(lambda r: r.received, timeout_s=6)
    assert target.results.bad_blocks == set(TARGET_BLOCKS[4:])
