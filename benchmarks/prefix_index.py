"""What the router's prefix index costs: memory per block, blocks taken in per second, time of a lookup.

64 engines publish as vLLM does (maps, events of 32 blocks of 16 tokens); each block is counted once per engine that
holds it. ``memory`` is what the resident set of a new process grows by. ``ingest`` begins at the bytes of a message and
ends where lookups see its blocks: ``fill`` into an empty index, ``turnover`` with a removal for every block stored, in
events of one block as vLLM sends them, ``decode steps`` events of one block for 64 requests per message. ``lookup`` is
of 12,000-token prompts among all these blocks: ``hash and find`` for a request that comes, ``find`` for one that waits.
``whole`` is held by two engines in full, ``split`` too but in pieces that do not lie beside each other, ``half`` up to
its middle, ``none`` by nobody. ``per_cpu_s`` is per second that the processor was ours: the same on an idle machine.
Wanted: 150 bytes per block, 500,000 blocks/s, 100 us.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import harness
import msgspec
import numpy as np

from mooncake_connector.router.index.hashing import Tokens, pack_tokens
from mooncake_connector.router.index.holdings import Holdings, Source

NUM_ENGINES = 64
BLOCK_TOKENS = 16
EVENT_BLOCKS = 32
PROMPT_TOKENS = 12_000
VOCABULARY = 128_000
SHARED_BY = 2
SECRET = b"benchmark " * 3
SOURCES = [Source(f"http://engine-{number}:8000") for number in range(NUM_ENGINES)]


class Scale(NamedTuple):
    """How much is indexed and measured."""

    num_blocks: int
    num_lookups: int


class Publisher:
    """Writes what an engine's publisher would."""

    def __init__(self, number: int) -> None:
        self.source = SOURCES[number]
        self.rng = random.Random(number)
        self.number = 0

    def message(self, events: Sequence[dict[str, Any]]) -> list[bytes]:
        """Return the frames of the next batch."""
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        frames = [b"", self.number.to_bytes(8, "big"), payload]
        self.number += 1
        return frames

    def stored(self, tokens: Sequence[int], parent: int | None) -> dict[str, Any]:
        """Return the event for blocks that follow ``parent``."""
        names = [self.rng.getrandbits(64) for _ in range(len(tokens) // BLOCK_TOKENS)]
        return {"type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": tokens,
                "block_size": BLOCK_TOKENS, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0,
                "kv_cache_spec_kind": "full_attention"}  # fmt: skip

    @staticmethod
    def removed(name: int) -> dict[str, Any]:
        """Return the event for one block."""
        return {"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU", "group_idx": 0}


Message = tuple[Source, list[bytes]]


def main() -> None:
    args = harness.parser(__doc__.splitlines()[0]).parse_args()
    scale = Scale(48_000, 200) if args.quick else Scale(1_000_000, 2_000)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        rows = [other.submit(measure_memory, scale).result()]
    holdings, work = new_holdings(scale), Workload(scale)
    rows.append(measure_ingest("fill", holdings, work.fill()))
    harness.say(f"  {holdings.blocks.num_live} blocks of {NUM_ENGINES} engines are indexed")
    for case, prompts in work.prompts.items():
        rows += measure_lookup(holdings, case, prompts, scale.num_lookups)
    num_messages = scale.num_blocks // EVENT_BLOCKS // 5
    rows.append(measure_ingest("turnover", holdings, work.turnover(num_messages)))
    rows.append(measure_ingest("decode steps", holdings, work.steps(num_messages // 4)))
    harness.publish(args, rows, title="Prefix index (wanted: 150 bytes/block, 500,000 blocks/s, 100 us)")


def row(what: str, case: str, **values: float) -> dict[str, Any]:
    columns = ("bytes_per_block", "blocks_per_s", "blocks_per_cpu_s", "p50_us", "p99_us")
    return {"what": what, "case": case} | {name: values.get(name) for name in columns}


def new_holdings(scale: Scale) -> Holdings:
    holdings = Holdings(scale.num_blocks, secret=SECRET)
    for source in SOURCES:
        holdings.add(source)
    return holdings


class Workload:
    """Prompts for 64 engines, and the messages that tell of them.

    Attributes:
        prompts: case -> what is asked later.
        names: engine -> what it calls its blocks, oldest first.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.publishers = [Publisher(number) for number in range(NUM_ENGINES)]
        self.prompts: dict[str, list[Tokens]] = {case: [] for case in ("whole", "split", "half", "none")}
        self.names: dict[int, list[int]] = {number: [] for number in range(NUM_ENGINES)}
        self._rng = np.random.default_rng(0)
        self._turn = 0

    def fill(self) -> Iterator[list[Message]]:
        """Yield messages until the index is as full as it is to be."""
        num_prompts = self.scale.num_blocks // (PROMPT_TOKENS // BLOCK_TOKENS) // SHARED_BY
        cases = ("whole", "split", "half")
        for index in range(0, num_prompts, 2):
            case = cases[index // 2 % len(cases)]
            first, second = self._tell(case), self._tell(case)
            if case == "split":
                # In turns, so that no piece of a prompt lies beside the one before it.
                yield [message for pair in zip(first, second, strict=True) for message in pair]
            else:
                yield first + second

    def _tell(self, case: str) -> list[Message]:
        """Make up a prompt, and let its engines tell of it."""
        tokens = self._random_tokens(PROMPT_TOKENS)
        asked = tokens[: PROMPT_TOKENS // 2] + self._random_tokens(PROMPT_TOKENS // 2) if case == "half" else tokens
        self.prompts[case].append(pack_tokens(asked))
        self.prompts["none"].append(pack_tokens(self._random_tokens(PROMPT_TOKENS)))
        messages = []
        for _ in range(SHARED_BY):
            which = self._turn = (self._turn + 1) % NUM_ENGINES
            publisher, parent = self.publishers[which], None
            for first in range(0, PROMPT_TOKENS, EVENT_BLOCKS * BLOCK_TOKENS):
                event = publisher.stored(tokens[first : first + EVENT_BLOCKS * BLOCK_TOKENS], parent)
                parent = event["block_hashes"][-1]
                self.names[which] += event["block_hashes"]
                messages.append((publisher.source, publisher.message([event])))
        return messages

    def turnover(self, num_messages: int) -> Iterator[list[Message]]:
        """Yield messages of engines that are full: for each block stored one is removed."""
        for index in range(num_messages):
            which = index % NUM_ENGINES
            publisher = self.publishers[which]
            stored = publisher.stored(self._random_tokens(EVENT_BLOCKS * BLOCK_TOKENS), None)
            old, self.names[which] = self.names[which][:EVENT_BLOCKS], self.names[which][EVENT_BLOCKS:]
            yield [(publisher.source, publisher.message([*map(publisher.removed, old), stored]))]

    def steps(self, num_messages: int) -> Iterator[list[Message]]:
        """Yield messages of engines that decode: 64 requests each filled a block."""
        for index in range(num_messages):
            which = index % NUM_ENGINES
            publisher = self.publishers[which]
            parents = self.names[which][-64:]
            events = [publisher.stored(self._random_tokens(BLOCK_TOKENS), parent) for parent in parents]
            self.names[which] += [event["block_hashes"][0] for event in events]
            yield [(publisher.source, publisher.message(events))]

    def _random_tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._rng.integers(0, VOCABULARY, count).tolist()
        return tokens


def take(holdings: Holdings, batches: Iterator[list[Message]]) -> tuple[float, float]:
    """Take messages in as the subscriber does; return how many seconds that took, and how many of a processor.

    Making the messages up is not counted.
    """
    elapsed_ns = busy_ns = 0
    for messages in batches:
        begin_ns, begin_busy_ns = time.perf_counter_ns(), time.thread_time_ns()
        for source, frames in messages:
            holdings.on_message(source, frames, is_replay=False, now_ns=0)
        elapsed_ns += time.perf_counter_ns() - begin_ns
        busy_ns += time.thread_time_ns() - begin_busy_ns
    holdings.flush()  # what is left of a last step
    return elapsed_ns / 1e9, busy_ns / 1e9


def measure_ingest(case: str, holdings: Holdings, batches: Iterator[list[Message]]) -> dict[str, Any]:
    num_before = holdings.counts["blocks"]
    elapsed_s, busy_s = take(holdings, batches)
    assert not holdings.counts["orphans"] and not holdings.num_stale
    num_blocks = holdings.counts["blocks"] - num_before
    return row("ingest", case, blocks_per_s=round(num_blocks / elapsed_s), blocks_per_cpu_s=round(num_blocks / busy_s))


def measure_memory(scale: Scale) -> dict[str, Any]:
    """Return what an index adds to the resident memory of a new process; the messages come from another one."""
    messages = [message for batch in Workload(scale).fill() for message in batch]
    before = resident_bytes()
    holdings = new_holdings(scale)
    take(holdings, iter([messages]))
    grown = resident_bytes() - before
    return row("memory", f"{holdings.blocks.num_live} blocks", bytes_per_block=round(grown / holdings.blocks.num_live))


def measure_lookup(holdings: Holdings, case: str, prompts: list[Tokens], num_lookups: int) -> list[dict[str, Any]]:
    wanted = {"none": 0, "half": PROMPT_TOKENS // 2 // BLOCK_TOKENS * BLOCK_TOKENS}.get(case, PROMPT_TOKENS)
    rows = []
    for is_hashed in (False, True):
        times_us = []
        for index in range(num_lookups):
            prompt = holdings.prompt(prompts[index % len(prompts)])
            if is_hashed:
                prompt.hashes(BLOCK_TOKENS)
            begin = time.perf_counter_ns()
            answer = holdings.match(prompt)
            times_us.append((time.perf_counter_ns() - begin) / 1e3)
            assert [held.device for held in answer.engines.values()] == [wanted] * (SHARED_BY if wanted else 0)
        times_us.sort()
        rows.append(row("lookup", f"{case}, {'find' if is_hashed else 'hash and find'}",
                        p50_us=round(times_us[num_lookups // 2], 1),
                        p99_us=round(times_us[int(num_lookups * 0.99)], 1)))  # fmt: skip
    return rows


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    harness.run(main)
