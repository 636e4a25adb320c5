"""Describe where each (layer, block) page lives in one worker's KV cache.

Pure. One layout covers one KV cache group whose pages are contiguous per (layer, block); any engine whose cache fits
that sentence can be described, see engines/vllm/worker.py for how vLLM 0.32's LBHNC and BLHNC caches do.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

LAYERS_MAX = 65_536
SIZE_MAX_BYTES = (1 << 62) - 1
"""Below 2^63, so that no offset overflows when it is computed."""

Size = Annotated[int, msgspec.Meta(ge=0, le=SIZE_MAX_BYTES)]
U64 = npt.NDArray[np.uint64]


class KVLayout(msgspec.Struct, frozen=True, array_like=True):
    """Where each (layer, block) page lives, as byte offsets from the start of one region.

    Shape: page (l, b) is ``page_bytes`` long and starts at ``layer_offsets[l] + b * block_stride``.

    Attributes:
        layer_offsets: offset of block 0 of each layer, in the order the forward pass runs.
        block_stride: bytes from a block's page to the next block's page of the same layer.
        page_bytes: bytes of one page: ``block_size`` tokens of one layer.
        num_blocks: blocks in the cache.
        block_size: tokens per block.
        size_bytes: length of the region.
    """

    layer_offsets: Annotated[tuple[Size, ...], msgspec.Meta(max_length=LAYERS_MAX)]
    block_stride: Size
    page_bytes: Size
    num_blocks: Size
    block_size: Size
    size_bytes: Size

    def __post_init__(self) -> None:
        if not self.layer_offsets or min(self.block_stride, self.page_bytes, self.num_blocks, self.block_size) < 1:
            raise ValueError(f"layout has an empty dimension: {self}")
        end = max(self.layer_offsets) + (self.num_blocks - 1) * self.block_stride + self.page_bytes
        if min(self.layer_offsets) < 0 or end > self.size_bytes:
            raise ValueError(f"layout reaches byte {end} of a region of {self.size_bytes}")

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return len(self.layer_offsets)

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block over all layers: the size of its image in the pool."""
        return self.page_bytes * self.num_layers

    def page_offsets(self, block_ids: npt.ArrayLike, first_layer: int = 0, last_layer: int | None = None) -> U64:
        """Return the offsets of the pages of some blocks.

        Shape: (layers in [first_layer, last_layer), blocks). Raises: IndexError for a block id outside the cache.
        """
        ids = np.asarray(block_ids, dtype=np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.num_blocks):
            raise IndexError(f"block id {int(ids.max())} outside a cache of {self.num_blocks} blocks")
        layers = np.asarray(self.layer_offsets[first_layer:last_layer], dtype=np.uint64)
        offsets: U64 = layers[:, None] + ids.astype(np.uint64)[None, :] * np.uint64(self.block_stride)
        return offsets
