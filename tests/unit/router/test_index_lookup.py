"""What engines hold of a prompt: media, groups, windows, block sizes, adapters, and when memory is short."""

from __future__ import annotations

import array

import numpy as np
import pytest

from mooncake_connector.router.index.blocks import Blocks
from mooncake_connector.router.index.columns import WORD_BITS, Tier
from mooncake_connector.router.index.events import ANY_GROUP, Removed, Stored
from mooncake_connector.router.index.hashing import TokenHash, pack_tokens
from mooncake_connector.router.index.intake import FLUSH_BLOCKS, Intake, Life
from mooncake_connector.router.index.lookup import NOTHING, Held, Prompt, find
from mooncake_connector.router.index.table import KeyTable
from mooncake_store.errors import CapacityExceeded

SIZE = 4
PROMPT = list(range(100, 164))


class Index:
    """An index, and engines that tell it what they hold of ``PROMPT``."""

    def __init__(self, capacity: int = 4096) -> None:
        self.blocks = Blocks(capacity)
        self.hash = TokenHash(b"0123456789abcdef")
        self.intake = Intake(self.blocks, self.hash)

    def engine(self) -> Life:
        return self.intake.open()

    def store(self, life: Life, first: int, last: int, *, tier: Tier = Tier.DEVICE, group: int = 0, size: int = SIZE,
              window: int = 0, lora: str = "", salt: str = "", prompt: list[int] = PROMPT,
              contents: list[bytes] | None = None) -> bool:  # fmt: skip
        parent = self.name(first, size, prompt) if first else None
        tokens = array.array("I", prompt[first * size : last * size])
        hashes = [self.name(end, size, prompt) for end in range(first + 1, last + 1)]
        return self.intake.store(life, Stored(hashes, parent, tokens, size, tier, group, window, lora, salt, contents))

    def remove(self, life: Life, *blocks: int, tier: Tier = Tier.DEVICE, group: int = ANY_GROUP,
               size: int = SIZE) -> None:  # fmt: skip
        self.intake.remove(life, Removed([self.name(block + 1, size, PROMPT) for block in blocks], tier, group))

    @staticmethod
    def name(end: int, size: int, prompt: list[int]) -> int:
        """Name a block as vLLM does: by the prefix that ends with it, whatever the block size."""
        return hash(tuple(prompt[: end * size])) & ((1 << 64) - 1)

    def held(self, life: Life, prompt: list[int] = PROMPT, *, lora: str = "", salt: str = "") -> Held:
        self.intake.flush()
        found = find(self.blocks, Prompt(self.hash, pack_tokens(prompt), self.hash.scope(lora, salt)))
        return found.streams.get(life.stream, NOTHING)

    def pooled(self) -> int:
        self.intake.flush()
        return find(self.blocks, Prompt(self.hash, pack_tokens(PROMPT), self.hash.scope())).pool


@pytest.fixture
def index() -> Index:
    return Index()


def test_the_nearest_medium_counts_first(index):
    engine = index.engine()
    index.store(engine, 0, 2)
    index.store(engine, 2, 4, tier=Tier.HOST)
    index.store(engine, 4, 5, tier=Tier.DISK)
    index.store(engine, 5, 8, tier=Tier.POOL)
    assert index.held(engine) == Held(8, 20, 32)
    index.remove(engine, 3, tier=Tier.HOST)
    assert index.held(engine) == Held(8, 12, 12)
    index.store(engine, 3, 4, tier=Tier.POOL)
    assert index.held(engine) == Held(8, 12, 32)


def test_a_block_on_two_media_is_gone_with_the_last(index):
    engine = index.engine()
    index.store(engine, 0, 1)
    index.store(engine, 0, 1, tier=Tier.HOST)
    index.remove(engine, 0)
    assert index.held(engine) == Held(0, 4, 4)
    index.remove(engine, 0, tier=Tier.HOST)
    assert index.held(engine) == NOTHING and index.blocks.num_live == 0


def test_the_pool_is_everybodys(index):
    first, second = index.engine(), index.engine()
    index.store(first, 0, 4, tier=Tier.POOL)
    index.store(second, 0, 1)
    assert index.held(second) == Held(4, 4, 16) and index.pooled() == 16
    index.remove(first, 2, tier=Tier.POOL)
    assert index.held(second) == Held(4, 4, 8) and index.pooled() == 8


def test_engines_with_different_block_sizes_share_rows(index):
    fine, coarse = index.engine(), index.engine()
    index.store(fine, 0, 8)
    index.store(coarse, 0, 2, size=16)
    assert index.held(fine).device == 32 and index.held(coarse).device == 32
    assert index.blocks.num_blocks == 8
    index.remove(fine, 3)
    assert index.held(fine).device == 12 and index.held(coarse).device == 32


def test_single_token_blocks(index):
    engine = index.engine()
    index.store(engine, 0, 20, size=1)
    index.store(engine, 20, 50, size=1)
    assert index.held(engine).device == 50


def test_every_group_must_hold_a_prefix(index):
    engine = index.engine()
    index.store(engine, 0, 8, group=0)
    assert index.held(engine).device == 32
    index.store(engine, 0, 3, group=1)
    assert index.held(engine).device == 12
    index.remove(engine, 1, group=1)
    assert index.held(engine).device == 4
    index.remove(engine, 0)  # whatever the group
    assert index.held(engine) == NOTHING


def test_a_windowed_group_needs_the_last_tokens_only(index):
    engine = index.engine()
    index.store(engine, 0, 10, group=0)
    index.store(engine, 0, 10, group=1, window=9)
    index.remove(engine, 0, 1, 2, 3, 4, 9, group=1)
    assert index.held(engine).device == 36  # blocks 7 and 8 have the eight tokens before it
    index.remove(engine, 7, group=1)
    assert index.held(engine).device == 28
    index.remove(engine, 5, group=1)
    assert index.held(engine).device == 0


def test_a_short_prompt_is_its_own_window(index):
    engine = index.engine()
    index.store(engine, 0, 2, group=0)
    index.store(engine, 0, 2, group=1, window=1000)
    assert index.held(engine).device == 8


def test_a_state_is_needed_where_the_prefix_ends(index):
    engine = index.engine()
    index.store(engine, 0, 8, group=0)
    index.store(engine, 0, 2, group=1, size=16, window=16)
    assert index.held(engine).device == 32
    index.remove(engine, 1, group=1, size=16)
    assert index.held(engine).device == 16


def test_windows_reach_into_the_pool_and_host(index):
    engine = index.engine()
    index.store(engine, 0, 4, group=0)
    index.store(engine, 0, 4, group=1, window=5)
    index.remove(engine, 3, group=1)
    index.store(engine, 3, 4, group=1, window=5, tier=Tier.HOST)
    assert index.held(engine) == Held(12, 16, 16)


def test_adapters_salts_and_images_are_told_apart(index):
    plain, adapted, salted, pictured = (index.engine() for _ in range(4))
    index.store(plain, 0, 4)
    index.store(adapted, 0, 4, lora="a")
    index.store(salted, 0, 4, salt="s")
    index.store(pictured, 0, 4, contents=[b"", b"image", b"", b""])
    assert index.held(plain).device == 16
    assert index.held(adapted) == NOTHING and index.held(adapted, lora="a").device == 16
    assert index.held(salted) == NOTHING and index.held(salted, salt="s").device == 16
    assert index.held(salted, lora="s") == NOTHING
    assert index.held(pictured).device == 4


def test_more_engines_than_a_mask_has_bits(index):
    engines = [index.engine() for _ in range(WORD_BITS + 6)]
    for number, engine in enumerate(engines):
        index.store(engine, 0, 1 + number % 5)
    assert len(index.blocks.masks) == 2
    assert [index.held(engine).device for engine in engines] == [4 * (1 + n % 5) for n in range(len(engines))]


def test_a_stream_that_begins_anew_holds_nothing_and_costs_nothing(index):
    engine, other = index.engine(), index.engine()
    index.store(engine, 0, 8)
    index.store(other, 0, 2)
    index.intake.close(engine)
    assert index.held(engine) == NOTHING and index.held(other).device == 8
    index.blocks.sweep_all()
    assert (index.blocks.num_live, index.blocks.num_blocks) == (2, 2)
    for _ in range(3 * WORD_BITS):
        again = index.engine()
        index.store(again, 0, 3)
        assert index.held(again).device == 12
        index.intake.close(again)
    assert len(index.blocks.masks) == 1, "closed columns are used again before another mask is"


def test_an_engine_that_restarts_among_many_is_not_waited_for(index, monkeypatch):
    engines = [index.engine() for _ in range(WORD_BITS)]
    for engine in engines:
        index.store(engine, 0, 1)
    monkeypatch.setattr(index.blocks, "sweep_all", lambda: pytest.fail("cleaned up everything"))
    for number in range(WORD_BITS // 2):
        index.intake.close(engines[number])
        engines[number] = index.engine()
        index.store(engines[number], 0, 2)
    assert [index.held(engine).device for engine in engines] == [8] * 32 + [4] * 32


def test_a_child_may_name_a_parent_that_was_just_removed(index):
    # vLLM evicts one of two copies of a block while a request still uses the other.
    engine = index.engine()
    index.store(engine, 0, 2)
    index.remove(engine, 1)
    assert index.held(engine).device == 4
    assert index.store(engine, 2, 3)
    index.store(engine, 1, 2)
    assert index.held(engine).device == 12


def test_an_unknown_parent_is_refused(index):
    engine = index.engine()
    assert not index.store(engine, 3, 4)
    assert index.held(engine) == NOTHING


def test_a_name_that_comes_twice_at_once_means_what_it_meant_last(index):
    engine = index.engine()
    index.intake.store(engine, Stored([7, 8, 7], None, array.array("I", [1, 2, 3]), 1, Tier.DEVICE, 0, 0, "", "", None))
    index.store(engine, 0, 3)
    index.store(engine, 0, 2)
    assert index.held(engine).device == 12 and index.held(engine, [1, 2]) == NOTHING
    assert index.blocks.num_live == 5


def test_a_name_that_is_given_to_another_block_means_only_that(index):
    engine = index.engine()
    for token in (5, 6):
        index.intake.store(engine, Stored([7], None, array.array("I", [token]), 1, Tier.DEVICE, 0, 0, "", "", None))
        index.intake.flush()
    assert index.held(engine, [5]) == NOTHING and index.held(engine, [6]).device == 1
    assert index.blocks.num_live == 1


def test_hashes_alone_tell_of_another_medium(index):
    engine = index.engine()
    index.store(engine, 0, 3)
    names = [index.name(end, SIZE, PROMPT) for end in (1, 2, 9)]
    index.intake.store(engine, Stored(names, None, array.array("I"), 0, Tier.HOST, 0, 0, "", "", None))
    index.remove(engine, 0, 1, 2)
    assert index.held(engine) == Held(0, 8, 8)
    assert index.intake.num_unknown == 1


def test_order_within_one_step_counts(index):
    engine = index.engine()
    index.store(engine, 0, 4)
    index.remove(engine, 3)
    index.store(engine, 3, 5)
    index.remove(engine, 4)
    index.remove(engine, 4)
    index.store(engine, 4, 5)
    index.remove(engine, 0, tier=Tier.HOST)
    assert index.held(engine).device == 20
    index.intake.remove(engine, Removed([index.name(5, SIZE, PROMPT)] * 2, Tier.DEVICE, ANY_GROUP))
    assert index.held(engine).device == 16 and index.blocks.num_live == 4


def test_much_is_carried_out_without_being_asked(index):
    engine = index.engine()
    event = Stored(list(range(1, FLUSH_BLOCKS + 1)), None, array.array("I", range(FLUSH_BLOCKS)), 1, Tier.DEVICE, 0, 0,
                   "", "", None)  # fmt: skip
    index.intake.store(engine, event)
    assert index.intake.num_gathered == 0 and index.blocks.num_live == FLUSH_BLOCKS


def test_scattered_rows_are_found_too(index):
    engine = index.engine()
    for block in range(16):
        index.store(engine, block, block + 1)
        index.store(engine, 0, 1, prompt=[block] * SIZE)
        index.intake.flush()
    assert index.held(engine).device == 64
    index.remove(engine, 14)
    assert index.held(engine).device == 56
    assert index.held(engine, [*PROMPT[:40], *[0] * 24]).device == 40


def test_the_oldest_go_when_there_are_too_many():
    index = Index(capacity=1000)
    engine = index.engine()
    prompts = [[number] * 40 for number in range(400)]
    for prompt in prompts:
        assert index.store(engine, 0, 10, prompt=prompt)
        index.intake.flush()
    assert index.blocks.num_live <= index.blocks.capacity
    held = [index.held(engine, prompt).device for prompt in prompts]
    assert held[-60:] == [40] * 60 and held[:200] == [0] * 200
    assert index.blocks.num_evicted and index.blocks.take_evicted() == {engine.stream}


def test_a_step_larger_than_the_index_keeps_its_end():
    index = Index(capacity=100)
    event = Stored(list(range(1, 1001)), None, array.array("I", range(1000)), 1, Tier.DEVICE, 0, 0, "", "", None)
    index.intake.store(index.engine(), event)
    index.intake.flush()
    assert 0 < index.blocks.num_live <= index.blocks.capacity


def test_a_table_says_when_it_is_full():
    table = KeyTable(3)
    table.add(np.arange(1, 7, dtype=np.uint64), np.arange(6, dtype=np.int32))
    with pytest.raises(CapacityExceeded):
        table.add(np.array([9], np.uint64), np.array([9], np.int32))
    assert table.num_keys == 6


def test_the_end_of_a_very_long_prompt_is_not_followed(index):
    engine = index.engine()
    event = Stored([1], None, array.array("I", bytes(4 << 26)), 1 << 26, Tier.DEVICE, 0, 0, "", "", None)
    assert not index.intake.store(engine, event)
