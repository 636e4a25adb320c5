"""Turn an engine's block hashes into pool keys.

Pure. The engine's hash is used unchanged: it chains over the whole prefix and already covers LoRA, images and salt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mooncake_store.types import BlockKey, block_key


def pool_keys(namespace: bytes, part: int, block_hashes: Iterable[bytes]) -> list[BlockKey]:
    """Return the key of each block as worker ``part`` holds it."""
    return [block_key(namespace, part, content) for content in block_hashes]


class PromptKeys:
    """Keeps the pool keys of one request, extending them as its block hashes grow.

    Building keys costs a concatenation per block; a request is looked up several times, so they are kept.
    """

    def __init__(self, namespace: bytes, num_parts: int) -> None:
        self._namespace = namespace
        self._parts: list[list[BlockKey]] = [[] for _ in range(num_parts)]

    def extend(self, block_hashes: Sequence[bytes]) -> None:
        """Add keys for hashes that were not seen yet; hashes only ever grow at the end."""
        known = len(self._parts[0])
        if len(block_hashes) > known:
            for part, keys in enumerate(self._parts):
                keys.extend(pool_keys(self._namespace, part, block_hashes[known:]))

    def __len__(self) -> int:
        return len(self._parts[0])

    def part(self, part: int, first: int = 0, last: int | None = None) -> list[BlockKey]:
        """Return the keys of blocks [first, last) as ``part`` holds them."""
        return self._parts[part][first:last]

    @property
    def num_parts(self) -> int:
        """Return the number of workers that each hold a part of every block."""
        return len(self._parts)
