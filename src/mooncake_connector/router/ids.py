"""Make ids that nobody can guess, without asking the system for randomness each time.

Threads: one; a second one would be given the same ids.
"""

from __future__ import annotations

import os

ID_BYTES = 16
NUM_AHEAD = 256


class Ids:
    """A source of ids: 32 hexadecimal digits each."""

    def __init__(self) -> None:
        self._random = ""
        self._at = 0

    def new(self) -> str:
        """Return a fresh id."""
        if self._at == len(self._random):
            self._random, self._at = os.urandom(ID_BYTES * NUM_AHEAD).hex(), 0
        self._at += 2 * ID_BYTES
        return self._random[self._at - 2 * ID_BYTES : self._at]
