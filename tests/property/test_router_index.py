"""Whatever the network does to event streams, the index equals what the engines hold, or says that it may not.

The model is an engine that publishes as vLLM and SGLang do: numbered batches, the last few kept for a replay. Between
it and the index, batches vanish, come twice or late, connections break, and the engine starts anew.
"""

from __future__ import annotations

import array
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mooncake_connector.router.index.blocks import Blocks
from mooncake_connector.router.index.columns import Tier
from mooncake_connector.router.index.events import Stored
from mooncake_connector.router.index.hashing import TokenHash, pack_tokens
from mooncake_connector.router.index.holdings import Holdings, Source
from mooncake_connector.router.index.intake import Intake
from mooncake_connector.router.index.lookup import Held
from mooncake_connector.router.index.streams import TRANSITIONS, Ask, Seen, State
from mooncake_connector.router.index.table import KeyTable
from mooncake_store.errors import RemoteProtocolError

SECRET = b"property" * 4
BUFFER_MAX = 4
MEDIA = ("GPU", "CPU", "EXTERNAL")
TIMEOUT_NS = 100
PROMPTS = [[number // 3 % 5 for number in range(seed, seed + 12)] for seed in range(4)]
END = (1 << 64) - 1


class Engine:
    """One engine and its publisher: what it holds, and the batches that it sent."""

    def __init__(self, block_tokens: int, is_map: bool, seed: int) -> None:
        self.block_tokens = block_tokens
        self.is_map = is_map
        self.clock = 0.0
        self.seed = seed
        self.restart()

    def restart(self) -> None:
        self.seed += 1000
        self.number = 0
        self.buffer: list[tuple[int, bytes]] = []
        self.held: dict[str, set[tuple[int, ...]]] = {medium: set() for medium in MEDIA}
        self.published: list[bytes] = []

    def name(self, prefix: tuple[int, ...]) -> int:
        """Hash as an engine does: signed, and differently in each process."""
        return hash((self.seed, prefix))

    def publish(self, events: list[dict[str, object]]) -> tuple[int, bytes]:
        # Not every clock tells two steps apart, but a restart takes longer than a tick.
        self.clock += 1.0
        encoded = [event if self.is_map else self.as_array(event) for event in events]
        payload = msgspec.msgpack.encode([self.clock, encoded, 0])
        message = self.number, payload
        self.number += 1
        self.buffer = [*self.buffer, message][-BUFFER_MAX:]
        return message

    @staticmethod
    def as_array(event: dict[str, object]) -> list[object]:
        return list(event.values())

    def store(self, prompt: list[int], first: int, last: int, medium: str) -> dict[str, object]:
        size = self.block_tokens
        prefixes = [tuple(prompt[: (index + 1) * size]) for index in range(first, last)]
        self.held[medium].update(prefixes)
        parent = tuple(prompt[: first * size])
        return {
            "type": "BlockStored",
            "block_hashes": [self.name(prefix) for prefix in prefixes],
            "parent_block_hash": self.name(parent) if parent else None,
            "token_ids": prompt[first * size : last * size],
            "block_size": size,
            "lora_id": None,
            "medium": medium,
        }

    def remove(self, prefixes: list[tuple[int, ...]], medium: str) -> dict[str, object]:
        self.held[medium].difference_update(prefixes)
        names = [self.name(prefix) for prefix in prefixes]
        return {"type": "BlockRemoved", "block_hashes": names, "medium": medium}

    def clear(self) -> dict[str, object]:
        for held in self.held.values():
            held.clear()
        return {"type": "AllBlocksCleared"}

    def expected(self, prompt: list[int], pool: set[tuple[int, ...]]) -> Held:
        here, size = self.held, self.block_tokens
        levels = here["GPU"], here["GPU"] | here["CPU"], here["GPU"] | here["CPU"] | pool
        counts = []
        for level in levels:
            end = size
            while end <= len(prompt) and tuple(prompt[:end]) in level:
                end += size
            counts.append(end - size)
        return Held(*counts)


class Feed(RuleBasedStateMachine):
    """Two engines with different block sizes and layouts, and what happens on the way from them."""

    @initialize(sizes=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4])), seed=st.integers(0, 1 << 20))
    def begin(self, sizes, seed) -> None:
        self.now_ns = 0
        self.random = random.Random(seed)
        self.holdings = Holdings(4096, secret=SECRET, fill_timeout_ns=TIMEOUT_NS)
        self.sources = [Source("http://a"), Source("http://b", 1)]
        self.engines = [Engine(sizes[0], True, 1), Engine(sizes[1], False, 2)]
        self.wire: list[list[tuple[int, bytes]]] = [[], []]
        self.replay: list[list[tuple[int, bytes]] | None] = [None, None]
        self.lost = [-1, -1]  # the last batch that vanished: until a later one comes, nothing tells that it did
        for which in range(2):
            self.holdings.add(self.sources[which])
            self.connect(which)

    # ---- what engines do

    @rule(
        which=st.integers(0, 1), prompt=st.sampled_from(PROMPTS), last=st.integers(1, 12),
        medium=st.sampled_from(MEDIA),
    )  # fmt: skip
    def engine_stores(self, which, prompt, last, medium) -> None:
        engine = self.engines[which]
        last = min(last, len(prompt) // engine.block_tokens)
        first = 0
        while first < last and tuple(prompt[: (first + 1) * engine.block_tokens]) in engine.held[medium]:
            first += 1
        if first < last:
            self.send(which, [engine.store(prompt, first, last, medium)])

    @rule(which=st.integers(0, 1), medium=st.sampled_from(MEDIA), count=st.integers(1, 3))
    def engine_removes(self, which, medium, count) -> None:
        engine = self.engines[which]
        prefixes = sorted(engine.held[medium], key=len, reverse=True)[:count]
        if prefixes:
            self.send(which, [engine.remove(prefixes, medium)])

    @rule(which=st.integers(0, 1), prompt=st.sampled_from(PROMPTS), medium=st.sampled_from(MEDIA))
    def engine_does_much_in_one_step(self, which, prompt, medium) -> None:
        engine = self.engines[which]
        last = len(prompt) // engine.block_tokens
        stored = engine.store(prompt, 0, last, medium)
        removed = engine.remove([tuple(prompt[: last * engine.block_tokens])], medium)
        self.send(which, [stored, removed, engine.store(prompt, 0, last, medium), engine.store(prompt, 0, 1, "CPU")])

    @rule(which=st.integers(0, 1))
    def engine_clears(self, which) -> None:
        self.send(which, [self.engines[which].clear()])

    @rule(which=st.integers(0, 1), is_told=st.booleans())
    def engine_restarts(self, which, is_told) -> None:
        self.engines[which].restart()
        self.wire[which].clear()
        self.replay[which] = None
        if is_told:
            self.holdings.on_renewed(self.sources[which].url)
        self.connect(which)

    def send(self, which, events) -> None:
        self.wire[which].append(self.engines[which].publish(events))

    # ---- what happens on the way

    @rule(which=st.integers(0, 1))
    def batch_arrives(self, which) -> None:
        if self.wire[which]:
            self.deliver(which, self.wire[which].pop(0), is_replay=False)

    @rule(which=st.integers(0, 1), at=st.integers(0, 5))
    def batch_is_lost(self, which, at) -> None:
        if at < len(self.wire[which]):
            self.lost[which] = max(self.lost[which], self.wire[which].pop(at)[0])

    @rule(which=st.integers(0, 1), at=st.integers(0, 5))
    def batch_comes_twice(self, which, at) -> None:
        if at < len(self.wire[which]):
            self.wire[which].insert(at, self.wire[which][at])

    @rule(which=st.integers(0, 1), at=st.integers(0, 5), to=st.integers(0, 5))
    def batch_overtakes(self, which, at, to) -> None:
        if at < len(self.wire[which]):
            self.wire[which].insert(to, self.wire[which].pop(at))

    @rule(which=st.integers(0, 1))
    def old_batch_comes_again(self, which) -> None:
        if self.engines[which].buffer:
            number, payload = self.random.choice(self.engines[which].buffer)
            if all(number < waiting for waiting, _ in self.wire[which]):
                self.deliver(which, (number, payload), is_replay=False)

    @rule(which=st.integers(0, 1))
    def replay_goes_on(self, which) -> None:
        replay = self.replay[which]
        if replay:
            self.deliver(which, replay.pop(0), is_replay=True)

    @rule(which=st.integers(0, 1))
    def replay_breaks(self, which) -> None:
        self.replay[which] = None

    @rule(which=st.integers(0, 1))
    def connection_breaks(self, which) -> None:
        self.wire[which].clear()
        self.connect(which)

    @rule(which=st.integers(0, 1))
    def garbage_comes_instead(self, which) -> None:
        if self.wire[which]:
            number, _ = self.wire[which].pop(0)
            with pytest.raises(RemoteProtocolError, match="malformed"):
                self.deliver(which, (number, b"\xc1garbage"), is_replay=False)

    @rule(step_ns=st.integers(1, 2 * TIMEOUT_NS))
    def time_passes(self, step_ns) -> None:
        self.now_ns += step_ns
        for source, ask in self.holdings.on_time(now_ns=self.now_ns):
            self.asked(self.sources.index(source), ask)

    @rule()
    def index_cleans_up(self) -> None:
        self.holdings.flush()
        self.holdings.blocks.sweep_all()

    def connect(self, which) -> None:
        self.lost[which] = -1
        self.asked(which, self.holdings.on_connected(self.sources[which], now_ns=self.now_ns))

    def deliver(self, which, message, *, is_replay) -> None:
        number, payload = message
        frames = [b"", b"topic", number.to_bytes(8, "big"), payload][0 if is_replay else 1 :]
        source = self.sources[which]
        if self.lost[which] <= number < END:  # the end of a replay does not tell of what was published after it began
            self.lost[which] = -1
        self.asked(which, self.holdings.on_message(source, frames, is_replay=is_replay, now_ns=self.now_ns))

    def asked(self, which, ask: Ask | None) -> None:
        if ask is not None:
            kept = [message for message in self.engines[which].buffer if message[0] >= ask.first]
            self.replay[which] = [*kept, (END, b"")]

    # ---- what must hold

    def is_up_to_date(self, which) -> bool:
        """Tell whether the index has got all that there is to get: nothing waits, and nothing vanished silently."""
        return not self.wire[which] and self.lost[which] < 0

    @invariant()
    def index_is_the_truth_or_stale(self) -> None:
        if not hasattr(self, "holdings"):
            return
        self.holdings.flush()
        known = [
            which for which in range(2) if not self.holdings.is_stale(self.sources[which]) and self.is_up_to_date(which)
        ]
        for prompt in PROMPTS:
            answer = self.holdings.match(self.holdings.prompt(pack_tokens(prompt)))
            for which in known:
                engine = self.engines[which]
                held = answer.engines.get(self.sources[which].url, Held(reachable=0))
                expected = engine.expected(prompt, set())
                assert (held.device, held.local) == (expected.device, expected.local)
            if len(known) == 2:
                pool = self.engines[0].held["EXTERNAL"] | self.engines[1].held["EXTERNAL"]
                for which in known:
                    expected = self.engines[which].expected(prompt, pool).reachable
                    held = answer.engines.get(self.sources[which].url)
                    if held is not None and held.local:
                        assert held.reachable == expected

    @invariant()
    def bookkeeping_agrees(self) -> None:
        if hasattr(self, "holdings"):
            check_blocks(self.holdings.blocks)


def check_blocks(blocks: Blocks) -> None:
    """Compare counts with what is really in the arrays."""
    keys = blocks._names.keys
    values = blocks._names.values[keys != 0]
    rows = (values & np.uint64((1 << 28) - 1)).astype(np.int64)
    assert blocks._names.num_keys == values.size
    assert blocks.num_live == np.count_nonzero(values >> np.uint64(63))
    num_names = np.bincount(rows, minlength=blocks.capacity)
    assert (num_names == blocks._num_names).all()
    used = num_names > 0
    assert blocks.num_blocks == np.count_nonzero(used) == np.unique(blocks.hashes[used]).size
    assert blocks._num_free + np.count_nonzero(used) == blocks._num_rows_used
    for tiers in blocks.masks:
        for mask in tiers:
            assert mask is None or not mask[~used].any()


TestFeed = Feed.TestCase
TestFeed.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6),
    block_tokens=st.integers(1, 4),
    scope=st.integers(0, (1 << 64) - 1),
)
@settings(deadline=None)
def test_runs_hash_as_prefixes_do(prompts, block_tokens, scope):
    token_hash = TokenHash(SECRET)
    starts, depths, lengths, tokens, expected = [], [], [], [], []
    for prompt in prompts:
        num_blocks = len(prompt) // block_tokens
        hashes = token_hash.prefixes(scope, pack_tokens(prompt), block_tokens).tolist()
        cut = num_blocks // 2
        for first, last in ((0, cut), (cut, num_blocks)):
            if first == last:
                continue
            is_linked = first and lengths and depths[-1] == 0 and lengths[-1] == first
            starts.append(-len(starts) if is_linked else hashes[first - 1] if first else scope)
            depths.append(first * block_tokens)
            lengths.append(last - first)
            tokens += prompt[first * block_tokens : last * block_tokens]
            expected += hashes[first:last]
    if lengths:
        hashes, ends = token_hash.runs(starts, depths, lengths, pack_tokens(tokens), block_tokens)
        assert hashes.tolist() == expected
        assert ends.tolist() == [
            depth + (number + 1) * block_tokens
            for depth, length in zip(depths, lengths, strict=True)
            for number in range(length)
        ]


@given(first=st.lists(st.integers(0, 9), max_size=9), second=st.lists(st.integers(0, 9), max_size=9))
@settings(deadline=None)
def test_prefixes_are_told_apart(first, second):
    token_hash = TokenHash(SECRET)
    hashes = [token_hash.prefixes(7, pack_tokens(prompt), 1).tolist()[-1:] for prompt in (first, second)]
    assert (hashes[0] == hashes[1]) == (first == second)


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(1, 120), min_size=1, max_size=20, unique=True)), max_size=30
    )
)
@settings(deadline=None)
def test_table_equals_a_dictionary(steps):
    table, model = KeyTable(7), {}
    for is_add, keys in steps:
        if is_add:
            keys = [key for key in keys if key not in model][: 90 - len(model)]
            table.add(np.array(keys, np.uint64), np.array(keys, np.int32) * 3)
            model |= {key: key * 3 for key in keys}
        else:
            keys = [key for key in keys if key in model]
            table.drop(table.find(np.array(keys, np.uint64)))
            for key in keys:
                del model[key]
        wanted = np.arange(1, 121, dtype=np.uint64)
        for is_likely in (True, False):
            slots = table.find(wanted, is_likely=is_likely)
            found = {int(key): int(table.values[slot]) for key, slot in zip(wanted, slots, strict=True) if slot >= 0}
            assert found == model
        assert [table.find_one(int(key)) for key in wanted] == slots.tolist()
        assert table.num_keys == len(model)


@given(capacity=st.integers(50, 300), seed=st.integers(0, 1 << 20), num_steps=st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_a_full_index_forgets_and_stays_consistent(capacity, seed, num_steps):
    rng = random.Random(seed)
    blocks, token_hash = Blocks(capacity), TokenHash(SECRET)
    intake = Intake(blocks, token_hash)
    lives = [intake.open() for _ in range(3)]
    for step in range(num_steps):
        life = rng.choice(lives)
        num_blocks = rng.randrange(1, 40)
        tokens = array.array("I", [step, *range(num_blocks - 1)])
        names = [step * 1000 + number for number in range(num_blocks)]
        assert intake.store(life, Stored(names, None, tokens, 1, Tier.DEVICE, 0, 0, "", "", None))
        if rng.random() < 0.1:
            intake.close(life)
            lives[lives.index(life)] = intake.open()
        if rng.random() < 0.5:
            intake.flush()
        check_blocks(blocks)
    assert blocks.num_live <= blocks.capacity


def test_every_state_and_event_is_in_the_table():
    assert set(TRANSITIONS) == set(State)
    assert all(set(row) == set(Seen) for row in TRANSITIONS.values())
