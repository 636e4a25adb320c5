"""A prefill worker hands KV over to a decode worker in another process by RDMA alone; the engines are two arrays.

Runs inside the guest of test_in_guest.py: a whole engine would take too long under emulation.
"""

import multiprocessing

import numpy as np

from contract.test_handoff import LAYERS, LAYOUT, NEEDED, PAGE, SOURCE_BLOCKS, TARGET_BLOCKS, Engine, prefill
from mooncake_connector.transfer.steps import Finished, HandoffLoad, StepPlan

MEDIA = ("rdma",)
ENGINE_S = 60.0


def _serve(link):
    source = Engine("p-child", seed=1, media=MEDIA, handoff_lease_s=20.0, handoff_timeout_s=ENGINE_S)
    link.send((source.endpoint.address, source.cache.tobytes()))
    source.step(StepPlan(prefills=[prefill()]), num_layers=LAYERS)
    source.step(StepPlan(finished=[Finished("p", "t", True, True, 7)]))
    source.until(lambda results: results.sent == {"p"}, timeout_s=ENGINE_S)
    link.send(source.sample("mooncake_blocks_held"))
    link.recv()
    source.endpoint.close()


def test_kv_moves_by_rdma_between_two_processes():
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    target = Engine("d", seed=2, media=MEDIA, handoff_lease_s=20.0, handoff_timeout_s=ENGINE_S)
    try:
        assert link.poll(ENGINE_S)
        address, data = link.recv()
        target.step(StepPlan(handoffs=[HandoffLoad("d", "t", [address], TARGET_BLOCKS, 0, NEEDED)]))
        target.until(lambda results: results.received, timeout_s=ENGINE_S)
        assert (target.results.received, target.results.bad_blocks) == ({"d"}, set())
        cache = np.frombuffer(data, np.uint8)
        for source_block, target_block in zip(SOURCE_BLOCKS, TARGET_BLOCKS, strict=True):
            for layer in range(LAYERS):
                start = int(LAYOUT.page_offsets([source_block])[layer, 0])
                assert np.array_equal(cache[start:start + PAGE], target.page(layer, target_block))
        assert target.sample('mooncake_pull_bytes_total{medium="rdma"}') >= len(SOURCE_BLOCKS) * LAYERS * PAGE
        assert target.sample('mooncake_verify_blocks_total{result="equal"}') == len(TARGET_BLOCKS)
        target.until(lambda _: target.sample('mooncake_transfers_active{role="decode"}') == 0, timeout_s=ENGINE_S)
        assert link.poll(ENGINE_S) and link.recv() == 0, "the prefill worker still holds blocks"
        link.send("stop")
        process.join(30)
        assert process.exitcode == 0
    finally:
        target.endpoint.close()
        process.kill()
        process.join(10)
