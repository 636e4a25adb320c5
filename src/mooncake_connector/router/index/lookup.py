"""Answer what every engine holds of one prompt.

Pure: no sockets, threads or clocks; reads the index and changes nothing.

What a stream can use of a prompt is the longest prefix of which each of its KV cache groups holds what it needs: all of
it with full attention, the last tokens with a window, the last block for a group that keeps states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mooncake_connector.router.index.blocks import Blocks
from mooncake_connector.router.index.columns import WORD_BITS, Column, Tier
from mooncake_connector.router.index.hashing import TokenHash, Tokens, Words

_LOCAL = (Tier.DEVICE, Tier.HOST, Tier.DISK)


class Prompt:
    """One prompt, hashed once per block size and as often as it is looked up.

    Args:
        token_hash: the index's.
        tokens: token ids.
        start: the scope: LoRA adapter and cache salt.
    """

    def __init__(self, token_hash: TokenHash, tokens: Tokens, start: int) -> None:
        self.num_tokens = len(tokens)
        self._hash = token_hash
        self._tokens = tokens
        self._start = start
        self._hashes: dict[int, Words] = {}

    def hashes(self, block_tokens: int) -> Words:
        """Return the hash of the prefix that ends with each whole block."""
        hashes = self._hashes.get(block_tokens)
        if hashes is None:
            hashes = self._hashes[block_tokens] = self._hash.prefixes(self._start, self._tokens, block_tokens)
        return hashes


class Held(NamedTuple):
    """How many leading tokens of a prompt lie where, for one stream.

    Attributes:
        device: in the engine's device memory.
        local: in its device memory, its host memory or on its disk.
        reachable: in one of these or in the pool.
    """

    device: int = 0
    local: int = 0
    reachable: int = 0


NOTHING = Held()


class Found(NamedTuple):
    """What is known of one prompt.

    Attributes:
        streams: what each holds; those that are missing hold nothing, and reach what is in the pool.
        pool: leading tokens that are in the pool.
    """

    streams: Mapping[int, Held]
    pool: int


def find(blocks: Blocks, prompt: Prompt) -> Found:
    """Return what every stream holds of one prompt."""
    layout = blocks.columns.layout()
    by_column: dict[int, Held] = {}
    num_pooled = 0
    for block_tokens, bits_of_word in layout.full.items():
        hashes = prompt.hashes(block_tokens)
        rows = blocks.leading(hashes)
        pooled = _pooled(blocks, rows)
        if pooled is not None:
            num_pooled = max(num_pooled, _leading(pooled) * block_tokens)
        for word, bits in bits_of_word.items():
            _count(blocks, rows, pooled, block_tokens, word, bits, by_column)
    streams: dict[int, Held] = {}
    for number, held in by_column.items():
        stream = layout.stream_of.get(number)
        if stream is not None:
            streams[stream] = held
    for stream, columns in layout.grouped.items():
        windowed = layout.windowed.get(stream, [])
        held = _join(blocks, prompt, columns, windowed, by_column)
        if held != NOTHING:
            streams[stream] = held
    return Found(streams, num_pooled)


def _count(
    blocks: Blocks, rows: slice | npt.NDArray[np.intp], pooled: npt.NDArray[np.bool_] | None, block_tokens: int,
    word: int, bits: int, by_column: dict[int, Held],
) -> None:  # fmt: skip
    """Add what the columns of one mask hold."""
    masks = [mask for tier in _LOCAL if (mask := blocks.held(rows, word, tier)) is not None]
    if not masks or not masks[0].size:
        return
    device = blocks.held(rows, word, Tier.DEVICE)
    on_device = {} if device is None else _leading_bits(device, bits)
    local = masks[0]
    for mask in masks[1:]:
        local = local | mask
    in_reach = here = on_device if len(masks) == 1 and device is not None else _leading_bits(local, bits)
    if pooled is not None:
        # All bits of a block that is in the pool: every engine can get it.
        in_reach = _leading_bits(local | -pooled.astype(np.uint64), bits)
    first = word * WORD_BITS
    for at, reachable in in_reach.items():
        by_column[first + at] = Held(
            on_device.get(at, 0) * block_tokens, here.get(at, 0) * block_tokens, reachable * block_tokens
        )


def _leading_bits(masks: Words, bits: int) -> dict[int, int]:
    """Return for each of some bits that the first mask has, in how many leading masks it is."""
    counts: dict[int, int] = {}
    current = masks.item(0) & bits
    if not current:
        return counts
    common = np.bitwise_and.accumulate(masks)
    for position in (common[1:] != common[:-1]).nonzero()[0].tolist():
        after = common.item(position + 1) & bits
        _note(counts, current & ~after, position + 1)
        current = after
    _note(counts, current, masks.size)
    return counts


def _note(counts: dict[int, int], bits: int, count: int) -> None:
    while bits:
        lowest = bits & -bits
        counts[lowest.bit_length() - 1] = count
        bits ^= lowest


def _pooled(blocks: Blocks, rows: slice | npt.NDArray[np.intp]) -> npt.NDArray[np.bool_] | None:
    """Tell of each block whether it is in the pool; None when none ever was."""
    pooled = None
    for word in range(len(blocks.masks)):
        mask = blocks.held(rows, word, Tier.POOL)
        if mask is not None:
            pooled = mask != 0 if pooled is None else pooled | (mask != 0)
    return pooled


def _leading(flags: npt.NDArray[np.bool_]) -> int:
    """Return how many leading flags are set."""
    absent = (~flags).nonzero()[0]
    return int(absent[0]) if absent.size else flags.size


# ---- streams with several groups, or windows


def _join(
    blocks: Blocks, prompt: Prompt, columns: list[Column], windowed: list[Column], by_column: Mapping[int, Held]
) -> Held:
    """Return what a stream can use: what its groups agree on."""
    counts = []
    for level in range(3):
        by_group: dict[int, int] = {}
        for column in columns:
            count = by_column.get(column.number, NOTHING)[level]
            by_group[column.group] = max(by_group.get(column.group, 0), count)
        limit = min(by_group.values(), default=prompt.num_tokens)
        counts.append(_fit(blocks, prompt, columns, windowed, limit, level) if limit and windowed else limit)
    return Held(*counts)


def _fit(blocks: Blocks, prompt: Prompt, columns: list[Column], windowed: list[Column], limit: int, level: int) -> int:
    """Return the longest prefix of at most ``limit`` tokens that ends where every windowed group can go on."""
    groups = {column.group for column in windowed}
    while limit:
        before = limit
        for group in groups:
            limit = max(_last_end(blocks, prompt, each, limit, level) for each in windowed if each.group == group)
        if columns:
            limit -= limit % min(column.block_tokens for column in columns)
        if limit == before:
            return limit
    return 0


def _last_end(blocks: Blocks, prompt: Prompt, column: Column, limit: int, level: int) -> int:
    """Return the last end of a block, up to ``limit``, before which the column holds its whole window."""
    num_blocks = limit // column.block_tokens
    rows = blocks.all_rows(prompt.hashes(column.block_tokens)[:num_blocks])
    is_there = np.zeros(num_blocks, np.bool_)
    for tier in (_LOCAL[:1], _LOCAL, tuple(Tier))[level]:
        for word in range(len(blocks.masks)) if tier is Tier.POOL else (column.word,):
            mask = blocks.held(rows, word, tier)
            if mask is not None:
                is_there |= (mask if tier is Tier.POOL else mask & np.uint64(column.bit)) != 0
    is_there &= rows >= 0
    num_needed = max(1, -(-(column.window_tokens - 1) // column.block_tokens))
    absent = np.concatenate(([0], np.add.accumulate(~is_there)))
    ends = np.arange(num_blocks + 1)
    fitting = (absent == absent[np.maximum(ends - num_needed, 0)]).nonzero()[0]
    return int(fitting[-1]) * column.block_tokens
