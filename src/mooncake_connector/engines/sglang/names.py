"""Name pages for the pool: SGLang's page hashes say nothing about the model, and its weights may be exchanged."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

import msgspec

from mooncake_connector.engines.sglang import compat
from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.keys import pool_keys
from mooncake_store.types import BlockKey

logger = logging.getLogger(__name__)


class PageNames:
    """Names the pages of one rank. Threads: any.

    Weights that were loaded into the running server give other keys and values for the same tokens. From then on pages
    have other names: those of the weight version that the update was given, or names that nobody else has.

    Args:
        marks: what the pages are compatible with.
        part: our rank among those that hold parts of the same page.

    Raises:
        ConfigError: this SGLang does not tell when weights change.
    """

    def __init__(self, marks: Fingerprint, part: int) -> None:
        self._marks = marks
        self._part = part
        self._namespace = marks.namespace()
        compat.watch_weights(self)

    def keys(self, hashes: Sequence[str]) -> list[BlockKey]:
        """Return the pool's key of each page; ``hashes`` are SGLang's, in hexadecimal."""
        return pool_keys(self._namespace, self._part, [bytes.fromhex(text) for text in hashes])

    def change_weights(self, version: str | None) -> None:
        """Take other names; without a version, names that nobody else has."""
        name = f"version {version}" if version else f"unknown {secrets.token_hex(16)}"
        self._namespace = msgspec.structs.replace(self._marks, model=f"{self._marks.model}, {name}").namespace()
        logger.info("the weights changed; pages of the pool are now those of %s", name)
