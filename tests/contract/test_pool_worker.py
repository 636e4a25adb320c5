"""Saving to and loading from the pool between two worker endpoints; the engines are two byte arrays."""

import threading
import time

import numpy as np
import pytest

from contract.test_handoff import BLOCKS, FINGERPRINT, LAYERS, Engine
from mooncake_connector.kv.keys import pool_keys
from mooncake_connector.transfer.prefix import SAVE_BATCH_BLOCKS
from mooncake_connector.transfer.steps import Finished, PoolLoad, PoolSave, StepPlan

NAMESPACE = FINGERPRINT.namespace()


def keys(names):
    return [pool_keys(NAMESPACE, 0, [name.encode() * 8 for name in names])]


def save(names, blocks, request_id="s"):
    return StepPlan(pool_saves=[PoolSave(request_id, keys(names), list(blocks))])


def load(names, blocks, request_id="l"):
    return StepPlan(pool_loads=[PoolLoad(request_id, keys(names), list(blocks), 0)])


@pytest.fixture
def pair(request):
    made = []

    def make(**changes):
        cell = f"pool-{request.node.name}-{time.monotonic_ns()}"[:60]
        settings = {"pool": True, "directory": "memory", "cell": cell, "segment_bytes": 8 << 20, **changes}
        made.extend([Engine(f"a-{cell}", seed=1, **settings), Engine(f"b-{cell}", seed=2, **settings)])
        return made

    yield make
    for engine in made:
        engine.endpoint.close()


def saved(engine, num_blocks):
    engine.until(lambda r: engine.sample('mooncake_save_blocks_total{result="stored"}') >= num_blocks)


def assert_same(source, target, pairs):
    for a, b in pairs:
        for layer in range(LAYERS):
            assert np.array_equal(source.page(layer, a), target.page(layer, b)), (layer, a, b)


def test_what_one_engine_saved_another_loads_into_other_blocks(pair):
    source, target = pair()
    source.step(save("abcdef", [3, 1, 4, 15, 9, 2]))
    saved(source, 6)
    target.step(load("abcdef", [5, 6, 7, 8, 20, 0]))
    target.until(lambda r: r.received == {"l"})
    assert target.results.bad_blocks == set()
    assert_same(source, target, zip([3, 1, 4, 15, 9, 2], [5, 6, 7, 8, 20, 0], strict=True))


def test_blocks_that_nobody_has_are_reported_bad_and_only_those(pair):
    source, target = pair()
    source.step(save("ab", [3, 1]))
    saved(source, 2)
    target.step(load("axby", [5, 6, 7, 8]))
    target.until(lambda r: r.received == {"l"})
    assert target.results.bad_blocks == {6, 8}
    assert_same(source, target, [(3, 5), (1, 7)])


def test_a_finished_request_is_reported_once_and_only_after_its_last_save(pair):
    source, _ = pair()
    gate = threading.Event()
    put = source.endpoint.client.put
    source.endpoint.client.put = lambda *args: (gate.wait(5), put(*args))[1]
    source.step(save("abcdefgh", range(8), "r"))
    source.step(StepPlan(finished=[Finished("r", "", False, True, 8)]))
    for _ in range(30):
        source.step()
        time.sleep(0.005)
    assert source.results.sent == set(), "its blocks are still being read"
    assert source.sample("mooncake_blocks_held") == 8
    gate.set()
    source.until(lambda r: r.sent == {"r"})
    source.until(lambda r: source.sample("mooncake_blocks_held") == 0)


def test_a_preempted_request_never_stores_what_came_after_it(pair):
    source, target = pair()
    rng = np.random.default_rng(5)
    for turn in range(20):
        names = [f"{turn}-{i}" for i in range(12)]
        before = source.cache.copy()
        source.step(save(names, range(12), "r"))
        time.sleep(rng.random() * 0.002)
        source.endpoint.before_step(StepPlan(preempted=["r"]))
        source.cache[:] = rng.integers(0, 256, source.cache.size, np.uint8)     # the engine reuses the blocks at once
        source.step()
        have = [i for i, key in enumerate(keys(names)[0]) if source.endpoint.client.has(key)]
        target.results.received.clear()
        if have:
            target.step(load([names[i] for i in have], range(len(have)), f"l{turn}"))
            target.until(lambda r, turn=turn: f"l{turn}" in r.received)
        now, source.cache = source.cache, before
        assert_same(source, target, [(i, place) for place, i in enumerate(have)])
        source.cache = now
    assert target.results.bad_blocks == set()


def test_a_preemption_waits_for_the_batch_being_copied_and_for_no_other(pair):
    source, _ = pair()
    started, gate, calls, put = threading.Event(), threading.Event(), [], source.endpoint.client.put
    source.endpoint.client.put = lambda keys, *args: (calls.append(keys), started.set(), gate.wait(5),
                                                      put(keys, *args))[3]
    source.step(save("abcdefghijkl", range(12), "r"))
    assert started.wait(5)
    preempted = threading.Thread(target=lambda: source.endpoint.before_step(StepPlan(preempted=["r"])))
    preempted.start()
    time.sleep(0.05)
    assert preempted.is_alive(), "its blocks are still being read"
    gate.set()
    preempted.join(5)
    source.step(StepPlan(finished=[Finished("r", "", False, True, 12)]))
    source.until(lambda r: r.sent == {"r"})
    assert [len(keys) for keys in calls] == [SAVE_BATCH_BLOCKS]


def test_a_full_queue_skips_and_counts_instead_of_waiting(pair):
    source, _ = pair(save_queue_max_blocks=4)
    gate = threading.Event()
    put = source.endpoint.client.put
    source.endpoint.client.put = lambda *args: (gate.wait(5), put(*args))[1]
    for i in range(4):
        source.step(save([f"{i}a", f"{i}b"], [0, 1], f"r{i}"))
    assert source.sample('mooncake_save_blocks_total{result="queue_full"}') >= 2
    source.step(StepPlan(finished=[Finished(f"r{i}", "", False, True, 2) for i in range(4)]))
    gate.set()
    source.until(lambda r: r.sent == {"r0", "r1", "r2", "r3"})


def test_a_pool_smaller_than_what_is_saved_keeps_serving_right_bytes(pair):
    source, target = pair(segment_bytes=10 * LAYERS * 8192)
    source.step(save([f"{i}" for i in range(BLOCKS)], range(BLOCKS)))
    source.step(StepPlan(finished=[Finished("s", "", False, True, BLOCKS)]))
    source.until(lambda r: r.sent == {"s"})
    target.step(load([f"{i}" for i in range(BLOCKS)], range(BLOCKS)))
    target.until(lambda r: r.received)
    good = [i for i in range(BLOCKS) if i not in target.results.bad_blocks]
    assert 1 <= len(good) <= 10
    assert_same(source, target, [(i, i) for i in good])


def test_closing_while_work_is_under_way_is_bounded_and_leaves_no_thread(pair):
    others = set(threading.enumerate())
    source, target = pair()
    ours = set(threading.enumerate()) - others
    assert ours
    source.step(save([f"{i}" for i in range(BLOCKS)], range(BLOCKS)))
    target.step(load([f"{i}" for i in range(BLOCKS)], range(BLOCKS)))
    started = time.monotonic()
    source.endpoint.close()
    target.endpoint.close()
    source.endpoint.close()
    assert time.monotonic() - started < 10
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [thread.name for thread in ours if thread.is_alive()]
        if not left:
            break
        time.sleep(0.05)
    assert not left
