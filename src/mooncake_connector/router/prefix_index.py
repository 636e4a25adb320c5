"""Remember, approximately, which engine has seen which prompt prefix.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

The index knows only prompts that were placed here: it is told nothing by the engines, so it may claim a prefix that an
engine has evicted, or miss one that somebody else sent. It is used as a tie-break, where being wrong costs little.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

CHUNK_BYTES = 256
CHUNKS_MAX = 4096
ENTRIES_PER_ENGINE_MAX = 262_144
HASH_BYTES = 8


def prompt_chain(scope: bytes, prompt: bytes) -> tuple[int, ...]:
    """Return the chained hashes of a prompt's whole leading chunks.

    Hash i names everything up to the end of chunk i, so two prompts share hash i only if they share all before it.
    The prompt itself is not kept. A prompt longer than ``CHUNKS_MAX`` chunks is cut there.

    Args:
        scope: what must be equal too for a prefix to be shared: model, tools, cache salt.
        prompt: the prompt as bytes: text, or the JSON of messages or token ids.
    """
    running = hashlib.blake2b(scope, digest_size=HASH_BYTES)
    num_chunks = min(len(prompt) // CHUNK_BYTES, CHUNKS_MAX)
    chain: list[int] = []
    for start in range(0, num_chunks * CHUNK_BYTES, CHUNK_BYTES):
        running.update(prompt[start : start + CHUNK_BYTES])
        chain.append(int.from_bytes(running.digest(), "big"))
    return tuple(chain)


class PrefixIndex:
    """Keeps, per engine, the most recently placed prefix hashes.

    Args:
        entries_max: hashes kept per engine, some 150 bytes each; the least recently used are dropped first.
    """

    def __init__(self, *, entries_max: int = ENTRIES_PER_ENGINE_MAX) -> None:
        self._entries_max = entries_max
        self._engines: dict[str, OrderedDict[int, None]] = {}

    def insert(self, engine: str, chain: Sequence[int]) -> None:
        """Remember that ``engine`` is about to hold this prefix. Modifies the index."""
        if not chain:
            return
        known = self._engines.setdefault(engine, OrderedDict())
        # Last chunk first, so that a prefix's start is dropped after its end: an end without a start is no use.
        for value in reversed(chain[: self._entries_max]):
            known[value] = None
            known.move_to_end(value)
        while len(known) > self._entries_max:
            known.popitem(last=False)

    def match(self, engine: str, chain: Sequence[int]) -> int:
        """Return how many leading chunks of ``chain`` the engine is believed to hold."""
        known = self._engines.get(engine)
        if not known:
            return 0
        for position, value in enumerate(chain):
            if value not in known:
                return position
        return len(chain)

    def match_all(self, chain: Sequence[int]) -> dict[str, int]:
        """Return, for each engine that holds any, how many leading chunks of ``chain`` it is believed to hold."""
        found: dict[str, int] = {}
        if not chain:
            return found
        first = chain[0]
        for engine, known in self._engines.items():
            if first in known:
                num_chunks = 0
                for value in chain:
                    if value not in known:
                        break
                    num_chunks += 1
                found[engine] = num_chunks
        return found

    def forget(self, engine: str) -> None:
        """Drop all that is known of an engine, because its process is a new one or gone."""
        self._engines.pop(engine, None)

    def engines(self) -> Iterable[str]:
        """Return the engines that have entries."""
        return tuple(self._engines)

    def num_entries(self) -> int:
        """Return how many hashes are kept, over all engines."""
        return sum(len(known) for known in self._engines.values())
