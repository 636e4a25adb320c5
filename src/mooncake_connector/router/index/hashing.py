"""Hash prefixes of token sequences, thousands of blocks at a time.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

The hash of a prefix is the sum of its tokens, each times the weight of its position, modulo 2^64; the weights are the
powers of a secret odd number, and the sum begins with a number for the scope (LoRA adapter, cache salt). Two things
follow that a chain of hashes does not give: all blocks of a prompt are hashed by one matrix product and one running sum
instead of a loop, and the hash of the first n tokens does not depend on block size, so that engines with different
block sizes meet in one table.

It is no cryptographic hash. Two prompts have the same value by accident with a chance near 2^-60 per pair, and by
intent only for somebody who knows the secret, which never leaves the process; the price would be a wrong estimate. How
it was chosen: docs/adr/0012-prefix-index.md.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.uint32]

WORD_MASK = (1 << 64) - 1
BLOCKS_MAX = 1 << 17
SCOPES_MAX = 4096
POWERS_MIN = 1024
DEPTH_STEP = 1 << 12
DEPTH_MAX = 1 << 26


def pack_tokens(token_ids: Sequence[int]) -> Tokens:
    """Return token ids as an array.

    Raises:
        OverflowError: when one is negative or has more than 32 bits.
    """
    return np.frombuffer(array.array("I", token_ids), np.uint32)


class TokenHash:
    """Hashes prefixes of token sequences.

    Args:
        secret: 16 to 64 random bytes; the same secret gives the same hashes.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        # 5 mod 8: the longest period that powers modulo 2^64 can have.
        self._base = self.word(b"base") & ~7 | 5
        self._scopes: dict[tuple[str, str], int] = {}
        self._powers: dict[int, _Powers] = {}
        self._steps = _geometric(self._base, DEPTH_STEP)
        self._leaps = _geometric(pow(self._base, DEPTH_STEP, 1 << 64), DEPTH_MAX // DEPTH_STEP)

    def scope(self, lora: str = "", salt: str = "") -> int:
        """Return the hash of the empty prefix under a LoRA adapter and a cache salt."""
        value = self._scopes.get((lora, salt))
        if value is None:
            if len(self._scopes) >= SCOPES_MAX:
                self._scopes.clear()
            value = self._scopes[lora, salt] = self.word(f"scope {len(lora)}:{lora}{salt}".encode())
        return value

    def word(self, content: bytes) -> int:
        """Return a 64-bit hash of anything that must be equal for a block to be shared, such as an image's id."""
        return int.from_bytes(hashlib.blake2b(content, key=self._secret, digest_size=8).digest(), "little")

    def prefixes(self, start: int, tokens: Tokens, block_tokens: int) -> Words:
        """Return the hash of the prefix that ends with each whole block.

        Args:
            start: the scope.
            tokens: token ids from the first one on.
            block_tokens: tokens per block, at least 1. At most ``BLOCKS_MAX`` blocks are looked at.
        """
        num_blocks = min(len(tokens) // block_tokens, BLOCKS_MAX)
        powers = self._powers_of(block_tokens, num_blocks)
        sums = powers.contents(tokens[: num_blocks * block_tokens])
        sums *= powers.before[:num_blocks]
        if num_blocks:
            sums[0] = int(sums[0]) + start & WORD_MASK
        return np.add.accumulate(sums, out=sums)

    def runs(
        self,
        starts: Sequence[int],
        depths: Sequence[int],
        lengths: Sequence[int],
        tokens: Tokens,
        block_tokens: int,
        extras: Words | None = None,
    ) -> tuple[Words, npt.NDArray[np.intp]]:
        """Return what :meth:`prefixes` would, for runs of blocks that begin anywhere in prompts, and how long each is.

        Args:
            starts: per run, the hash of what comes before it; or, for one that goes on where an earlier run ends, minus
                one minus that run's number.
            depths: per run, how many tokens come before it; less than ``DEPTH_MAX``.
            lengths: per run its number of blocks, at least 1; together at most ``BLOCKS_MAX``.
            tokens: token ids of all runs, one after the other.
            block_tokens: tokens per block.
            extras: per block, a number that belongs to its content; None when no block has one.
        """
        num_blocks = sum(lengths)
        powers = self._powers_of(block_tokens, max(lengths))
        sums = powers.contents(tokens)
        if extras is not None:
            sums += extras
        counts = np.array(lengths, np.intp)
        ends = np.add.accumulate(counts)
        positions = np.arange(num_blocks)
        positions -= np.repeat(ends - counts, counts)
        sums *= powers.before.take(positions)
        np.add.accumulate(sums, out=sums)
        totals = [0, *sums[ends - 1].tolist()]
        lifts = self._weights(depths)
        stops: list[int] = []
        bases: list[int] = []
        for run, (start, lift) in enumerate(zip(starts, lifts.tolist(), strict=True)):
            known = start if start >= 0 else stops[-1 - start]
            bases.append(known - totals[run] * lift & WORD_MASK)
            stops.append(bases[-1] + totals[run + 1] * lift & WORD_MASK)
        sums *= np.repeat(lifts, counts)
        sums += np.repeat(np.array(bases, np.uint64), counts)
        positions += 1
        positions *= block_tokens
        positions += np.repeat(np.array(depths, np.intp), counts)
        return sums, positions

    def _weights(self, depths: Sequence[int]) -> Words:
        """Return the weights of positions."""
        leaps, steps = np.divmod(np.array(depths, np.intp), DEPTH_STEP)
        return self._leaps[leaps] * self._steps[steps]

    def _powers_of(self, block_tokens: int, num_blocks: int) -> _Powers:
        powers = self._powers.get(block_tokens)
        if powers is None or len(powers.before) < num_blocks:
            size = POWERS_MIN
            while size < num_blocks:
                size *= 2
            powers = self._powers[block_tokens] = _Powers(self._base, block_tokens, size)
        return powers


class _Powers:
    """Powers of the base for one block size.

    Attributes:
        before: shape (num_blocks,): the weight of the first token of block i, ``base ** (i * block_tokens)``.
    """

    def __init__(self, base: int, block_tokens: int, num_blocks: int) -> None:
        self.before = _geometric(pow(base, block_tokens, 1 << 64), num_blocks)
        self._inside = _geometric(base, block_tokens)
        self._sum = self._inside.sum(dtype=np.uint64)

    def contents(self, tokens: Tokens) -> Words:
        """Return the weighted sum of each block's tokens, each counted as one more: token 0 must not be nothing."""
        sums: Words = tokens.astype(np.uint64).reshape(-1, len(self._inside)) @ self._inside
        sums += self._sum
        return sums


def _geometric(ratio: int, length: int) -> Words:
    """Return ratio^0 .. ratio^(length - 1) modulo 2^64."""
    factors = np.full(length, ratio, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
