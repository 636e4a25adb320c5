"""Serve one page of 64-bit words that tell readers whether what they copied was still valid.

A reader copies blocks, then reads the transfer's word: equal to what Ready named means that the owner had not given the
blocks up before the copy ended. That replaces an acknowledgement round trip (a seqlock with one writer). The words live
in a memfd, so that a reader on the same machine pays no system call for them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mooncake_connector.transfer.held import TRANSFERS_MAX
from mooncake_store.transport.base import RegionDescriptor
from mooncake_store.transport.media import Media
from mooncake_store.transport.memory import map_memfd

WORD_BYTES = 8


class Epochs:
    """Owns the words. Threads: ``bump`` and ``words`` under the producer's lock."""

    def __init__(self, media: Media) -> None:
        self._media = media
        self._memory = map_memfd(TRANSFERS_MAX * WORD_BYTES, "mooncake-epochs")
        self.words: npt.NDArray[np.uint64] = self._memory.array().view(np.uint64)
        self.region: RegionDescriptor = media.serve(self._memory.memory())

    def bump(self, slot: int) -> None:
        """Void every copy that is under way from this slot's transfer."""
        self.words[slot] += np.uint64(1)

    def close(self) -> None:
        """Stop serving the words. Idempotent."""
        self._media.withdraw(self.region.region_id)
        self._memory.close()
