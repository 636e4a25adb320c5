"""Address the pages of our own KV cache: for pulls as targets, for the pool as sources, for checksums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mooncake_connector.kv.layout import U64, KVLayout
from mooncake_store.pull.planner import Scatter
from mooncake_store.transport.checksum import checksum_of


class PageReader:
    """Turns block ids into addresses of this process. Threads: any."""

    def __init__(self, layout: KVLayout, address: int) -> None:
        self.layout = layout
        self.address = address
        self._lengths = np.full(layout.num_layers, layout.page_bytes, np.uint64)

    def addresses(self, offsets: U64) -> U64:
        """Return absolute addresses of region offsets."""
        absolute: U64 = offsets + np.uint64(self.address)
        return absolute

    def scatters(self, block_ids: Sequence[int]) -> list[Scatter]:
        """Return each block's pages in layer order: the image that the pool stores."""
        offsets = self.addresses(self.layout.page_offsets(block_ids))
        return [Scatter(np.ascontiguousarray(offsets[:, i]), self._lengths) for i in range(len(block_ids))]

    def checksums(self, block_ids: Sequence[int]) -> list[int]:
        """Return the checksum of each block's image."""
        columns = self.addresses(self.layout.page_offsets(block_ids)).T
        return [checksum_of(np.stack((column, self._lengths), axis=1)) for column in columns]
