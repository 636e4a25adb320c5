"""plan_pull: tokens to blocks to bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.kv.layout import KVLayout
from mooncake_connector.kv.plan import Progress, plan_pull, ready_blocks, ready_per_layer

LAYERS, PAGE, BLOCKS, TOKENS = 3, 10, 8, 16
SOURCE = KVLayout(tuple(i * PAGE * BLOCKS for i in range(LAYERS)), PAGE, PAGE, BLOCKS, TOKENS, LAYERS * PAGE * BLOCKS)
TARGET = KVLayout(tuple(i * PAGE for i in range(LAYERS)), PAGE * LAYERS, PAGE, BLOCKS, TOKENS, LAYERS * PAGE * BLOCKS)


@pytest.mark.parametrize(("tokens", "needed", "blocks"), [
    (0, 100, 0), (15, 100, 0), (16, 100, 1), (99, 100, 6), (100, 100, 7), (101, 100, 7), (96, 96, 6), (0, 0, 0),
])
def test_the_tail_is_ready_only_with_the_last_needed_token(tokens, needed, blocks):
    assert ready_blocks(tokens, needed, TOKENS) == blocks


def test_layers_of_a_running_step_are_ready_one_by_one():
    assert ready_per_layer(Progress(16, 40, 2), 40, SOURCE).tolist() == [3, 3, 1]


def test_unequal_pages_are_refused():
    other = KVLayout((0,), PAGE, PAGE, BLOCKS, TOKENS, PAGE * BLOCKS)
    with pytest.raises(ValueError, match="pages differ"):
        plan_pull(source=other, target=TARGET, source_blocks=[0], target_blocks=[0],
                  pulled=np.zeros(3, np.uint64), ready=np.ones(3, np.uint64))


def test_more_ready_blocks_than_ids_is_refused():
    with pytest.raises(ValueError, match="2 blocks are ready"):
        plan_pull(source=SOURCE, target=TARGET, source_blocks=[0], target_blocks=[0, 1],
                  pulled=np.zeros(3, np.uint64), ready=np.full(3, 2, np.uint64))


@given(st.data())
def test_any_sequence_of_progress_copies_every_page_exactly_once(data):
    num_blocks = data.draw(st.integers(1, BLOCKS))
    needed = data.draw(st.integers((num_blocks - 1) * TOKENS + 1, num_blocks * TOKENS))
    source_blocks = data.draw(st.permutations(range(BLOCKS)))[:num_blocks]
    target_blocks = data.draw(st.permutations(range(BLOCKS)))[:num_blocks]
    first = data.draw(st.integers(0, num_blocks - 1))
    source_bytes = np.random.default_rng(0).integers(0, 256, SOURCE.size_bytes, np.uint8)
    target_bytes = np.zeros(TARGET.size_bytes, np.uint8)
    pulled = np.full(LAYERS, first, np.uint64)
    done, num_copied = first * TOKENS, 0
    while done < needed:
        after = data.draw(st.integers(done + 1, needed))
        for progress in (Progress(done, after, data.draw(st.integers(0, LAYERS))), Progress(after, after, 0)):
            ready = ready_per_layer(progress, needed, TARGET)
            plan = plan_pull(source=SOURCE, target=TARGET, source_blocks=source_blocks, target_blocks=target_blocks,
                             pulled=pulled, ready=ready)
            for a, b in zip(plan.source_offsets.tolist(), plan.target_offsets.tolist(), strict=True):
                target_bytes[b: b + PAGE] = source_bytes[a: a + PAGE]
            num_copied += len(plan)
            pulled = np.maximum(pulled, ready)
        done = after
    assert num_copied == (num_blocks - first) * LAYERS
    for logical in range(first, num_blocks):
        for layer in range(LAYERS):
            a = SOURCE.page_offsets([source_blocks[logical]])[layer, 0]
            b = TARGET.page_offsets([target_blocks[logical]])[layer, 0]
            assert np.array_equal(target_bytes[b: b + PAGE], source_bytes[a: a + PAGE])
