"""What a prefix lookup costs the scheduler: a 4,096-token prompt among many known blocks, in the mirror that it reads.

``fresh`` asks for another prompt each time with keys built anew, as a scheduler does: every probe hashes its key and
meets a cold cache line. ``again`` repeats one prompt. ``in turns``: eight prompts were published block by block in
turns, so that no two neighbours of a prompt lie next to each other. Wanted: match <= 50 us p50 among 100,000 blocks.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import harness

from mooncake_store.directory.schema import PAGE_ENTRIES_MAX, CellPaths, MemberPut, PagePut, decode_event, encode_page
from mooncake_store.directory.view import DirectoryView
from mooncake_store.testing.directory import make_member
from mooncake_store.types import BlockKey, block_key

NAMESPACE = hashlib.sha256(b"namespace").digest()[:16]
PROMPT_TOKENS = 4096
NUM_NODES = 4
NUM_TURNS = 8


class Case(NamedTuple):
    """A state of the cell."""

    known_blocks: int
    replicas: int
    published: str


CASES = (
    Case(100_000, 1, "in order"),
    Case(100_000, 2, "in order"),
    Case(100_000, 1, "in turns"),
    Case(10_000, 1, "in order"),
    Case(1_000_000, 1, "in order"),
)


def main() -> None:
    args = harness.parser(__doc__.splitlines()[0]).parse_args()
    rows = []
    for case in CASES[:1] if args.quick else CASES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            bytes_per_block = other.submit(memory_per_block, case).result()
        view = build(case)
        for block_size in (128, 16):
            for prompts in ("fresh", "again"):
                measured = measure(view, case, PROMPT_TOKENS // block_size, prompts, 500 if args.quick else 3_000)
                rows.append(case._asdict() | {"block_size": block_size} | measured)
        harness.say(f"  {case}: {bytes_per_block} bytes per block")
        for row in rows[-4:]:
            row["bytes_per_block"] = bytes_per_block
    harness.publish(args, rows, title="Prefix lookup in the directory's mirror (4,096 tokens; match <= 50 us wanted)")


def key_of(index: int) -> BlockKey:
    return block_key(NAMESPACE, 0, hashlib.sha256(index.to_bytes(8, "big")).digest())


def memory_per_block(case: Case) -> int:
    """Return what a view adds to the resident memory of a new process."""
    before = resident_bytes()
    view = build(case)
    return round((resident_bytes() - before) / view.num_blocks)


def build(case: Case) -> DirectoryView:
    """Fill a view as the watch would, from encoded pages."""
    paths, num_blocks = CellPaths("bench"), case.known_blocks
    view = DirectoryView()
    for node in range(NUM_NODES):
        member = make_member(f"node-{node}")
        view.apply([MemberPut(member.node_id, member)], 1)
    order: Sequence[int] = range(num_blocks)
    if case.published == "in turns":
        order = [turn + step for step in range(num_blocks // NUM_TURNS)
                 for turn in range(0, num_blocks, num_blocks // NUM_TURNS)]  # fmt: skip
    for page, start in enumerate(range(0, num_blocks, PAGE_ENTRIES_MAX)):
        value = encode_page([key_of(index) for index in order[start : start + PAGE_ENTRIES_MAX]])
        for replica in range(case.replicas):
            event = decode_event(paths, paths.page(f"node-{(page + replica) % NUM_NODES}", page), value)
            assert isinstance(event, PagePut)
            view.apply([event], page)
    assert view.num_blocks == num_blocks
    return view


def measure(view: DirectoryView, case: Case, num_keys: int, prompts: str, runs: int) -> dict[str, Any]:
    rng = random.Random(0)
    starts = [rng.randrange(case.known_blocks - num_keys) for _ in range(runs)] if prompts == "fresh" else [0] * runs
    match_us, locate_us = [], []
    for keys in prompt_keys(starts, num_keys, prompts):
        match_us.append(timed_us(view.match, keys))
    for keys in prompt_keys(starts, num_keys, prompts):
        locate_us.append(timed_us(view.locate, keys))
    match_us.sort()
    locate_us.sort()
    return {
        "keys": num_keys, "prompts": prompts, "runs": runs,
        "match_p50_us": round(match_us[runs // 2], 2), "match_p99_us": round(match_us[int(runs * 0.99)], 2),
        "locate_p50_us": round(locate_us[runs // 2], 2), "locate_p99_us": round(locate_us[int(runs * 0.99)], 2),
    }  # fmt: skip


def prompt_keys(starts: list[int], num_keys: int, prompts: str) -> Iterator[list[BlockKey]]:
    """Yield the keys of each prompt: scattered over the whole view, as prompts that came at different times are."""
    same = [key_of(index) for index in range(num_keys)]
    for start in starts:
        yield same if prompts == "again" else [key_of(start + index) for index in range(num_keys)]


def timed_us(call: Callable[[list[BlockKey]], Any], keys: list[BlockKey]) -> float:
    begin = time.perf_counter_ns()
    result = call(keys)
    elapsed_us = (time.perf_counter_ns() - begin) / 1e3
    assert (result if isinstance(result, int) else len(result)) == len(keys)
    return elapsed_us


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    harness.run(main)
