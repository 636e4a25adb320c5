"""Decide which caches may share bytes.

Pure. Two workers may exchange a block only if every field here is equal: the engine's block hashes cover tokens, LoRA,
images and salt (vLLM v1/core/kv_cache_utils.py), and nothing about weights, dtype, layout or hardware.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, NamedTuple

import msgspec

from mooncake_store.errors import FingerprintMismatch
from mooncake_store.types import NAMESPACE_BYTES, Uint63

TEXT_MAX_CHARS = 1024
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX_CHARS)]


class Difference(NamedTuple):
    """One field in which two fingerprints differ."""

    field: str
    ours: str
    theirs: str


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that must be equal to share bytes.

    Attributes:
        engine: engine and the revision of its KV format, e.g. ``vllm/lbhnc-4d``.
        model: digest of the weights where they can be seen, else name and revision.
        model_config: digest of the model's configuration.
        dtype: activation type.
        cache_dtype: storage type of the cache.
        layout: the engine's name of the byte order inside a page.
        block_size: tokens per block.
        num_layers: layers in this worker's cache.
        page_bytes: bytes per (layer, block).
        num_kv_heads: KV heads in this worker's cache.
        head_size: elements per head.
        tensor_parallel: number of TP ranks that share a block.
        pipeline_parallel: number of PP stages.
        attention: attention backend, which may pack the bytes.
        isa: instruction set that the CPU backend packs for; ``-`` where the backend does not pack.
        hash_algorithm: block hash algorithm.
        hash_seed: seed of the hash chain's root.
    """

    engine: Text
    model: Text
    model_config: Text
    dtype: Text
    cache_dtype: Text
    layout: Text
    block_size: Uint63
    num_layers: Uint63
    page_bytes: Uint63
    num_kv_heads: Uint63
    head_size: Uint63
    tensor_parallel: Uint63
    pipeline_parallel: Uint63
    attention: Text
    isa: Text
    hash_algorithm: Text
    hash_seed: Text

    def differences(self, other: Fingerprint) -> list[Difference]:
        """Return every field that differs, in declaration order."""
        return [
            Difference(name, str(getattr(self, name)), str(getattr(other, name)))
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        ]

    def require_equal(self, other: Fingerprint, *, where: str) -> None:
        """Raise FingerprintMismatch naming every differing field with both values."""
        found = self.differences(other)
        if found:
            raise FingerprintMismatch(
                describe(found, len(self.__struct_fields__)),
                where=where,
                hint="start both engines with the same model, dtype, block size and parallel sizes on one kind of CPU",
            )

    def namespace(self) -> bytes:
        """Return the 16-byte digest that prefixes every pool key of such caches."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=NAMESPACE_BYTES).digest()


def describe(found: list[Difference], num_fields: int) -> str:
    """Say in one line which fields differ and how."""
    listed = "; ".join(f"{item.field}: ours {item.ours}, theirs {item.theirs}" for item in found)
    return f"{len(found)} of {num_fields} fields differ: {listed}"
