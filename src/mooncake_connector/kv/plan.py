"""Plan which bytes to move: tokens to blocks, blocks to byte ranges.

Pure. The one arithmetic rule that everything else rests on: until the last needed token is there, only whole blocks are
ready; from then on the partial tail block is ready too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

from mooncake_connector.kv.layout import U64, KVLayout

TOKENS_MAX = 1 << 40
Tokens = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]


def ready_blocks(num_tokens: int, needed_tokens: int, block_size: int) -> int:
    """Return how many leading blocks may be pulled when ``num_tokens`` of ``needed_tokens`` are computed."""
    if num_tokens >= needed_tokens:
        return -(-needed_tokens // block_size)
    return num_tokens // block_size


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """How far a prefill has come.

    Attributes:
        tokens_done: tokens whose KV is final in every layer.
        tokens_part: tokens whose KV is final in the first ``layers_part`` layers; >= ``tokens_done``.
        layers_part: see above; 0 between steps.
    """

    tokens_done: Tokens = 0
    tokens_part: Tokens = 0
    layers_part: Annotated[int, msgspec.Meta(ge=0, le=65_536)] = 0


def ready_per_layer(progress: Progress, needed_tokens: int, layout: KVLayout) -> U64:
    """Return the number of leading blocks that are ready, per layer. Shape: (num_layers,)."""
    ready = np.full(layout.num_layers, ready_blocks(progress.tokens_done, needed_tokens, layout.block_size), np.uint64)
    ready[: progress.layers_part] = ready_blocks(progress.tokens_part, needed_tokens, layout.block_size)
    return ready


class PagePlan(msgspec.Struct, frozen=True):
    """Pages to copy, layer by layer: offsets in the source's and the target's region, all of ``page_bytes``.

    Shape: two 1-D arrays of equal length.
    """

    source_offsets: U64
    target_offsets: U64
    page_bytes: int

    def __len__(self) -> int:
        return len(self.source_offsets)

    @property
    def size_bytes(self) -> int:
        """Return the bytes to move."""
        return len(self.source_offsets) * self.page_bytes


def plan_pull(
    *,
    source: KVLayout,
    target: KVLayout,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    pulled: U64,
    ready: U64,
) -> PagePlan:
    """Map what became ready since the last pull onto the target's blocks.

    Args:
        source: the owner's layout.
        target: our layout.
        source_blocks: the owner's block id of each logical block, from the prompt's first.
        target_blocks: our block id of each logical block.
        pulled: leading blocks already here, per layer.
        ready: leading blocks ready at the owner, per layer.

    Raises:
        ValueError: if the layouts cannot exchange pages, or a ready block has no id at one of the ends.
    """
    if source.page_bytes != target.page_bytes or source.num_layers != target.num_layers:
        raise ValueError(f"pages differ: {source.num_layers} x {source.page_bytes} against "
                         f"{target.num_layers} x {target.page_bytes}")
    last = int(ready.max(initial=0))
    if last > len(source_blocks) or last > len(target_blocks):
        raise ValueError(f"{last} blocks are ready, but {len(source_blocks)} source and {len(target_blocks)} target "
                         "block ids are known")
    source_parts: list[U64] = []
    target_parts: list[U64] = []
    for first_layer, last_layer, low, high in _runs(pulled, ready):
        source_parts.append(source.page_offsets(source_blocks[low:high], first_layer, last_layer).ravel())
        target_parts.append(target.page_offsets(target_blocks[low:high], first_layer, last_layer).ravel())
    if not source_parts:
        empty: U64 = np.empty(0, np.uint64)
        return PagePlan(empty, empty, source.page_bytes)
    return PagePlan(np.concatenate(source_parts), np.concatenate(target_parts), source.page_bytes)


def _runs(pulled: U64, ready: U64) -> list[tuple[int, int, int, int]]:
    """Group consecutive layers that need the same block range: (first_layer, last_layer, first_block, last_block)."""
    runs: list[tuple[int, int, int, int]] = []
    for layer, (low, high) in enumerate(zip(pulled.tolist(), ready.tolist(), strict=True)):
        if high <= low:
            continue
        if runs and runs[-1][1] == layer and runs[-1][2:] == (low, high):
            runs[-1] = (runs[-1][0], layer + 1, low, high)
        else:
            runs.append((layer, layer + 1, low, high))
    return runs
