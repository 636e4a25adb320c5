"""Read SGLang's description of its KV cache: what it is compatible with, and where its pages lie.

Ref: sglang srt/disaggregation/base/conn.py KVArgs and mem_cache/memory_pool.py get_contiguous_buf_infos: page p of
buffer i starts at ``address[i] + p * page_bytes``; buffers are the keys of every layer, then the values of every layer,
each allocated by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.layout import KVLayout
from mooncake_connector.transfer.cache import CacheMemory
from mooncake_connector.transfer.model import config_digest, weights_digest
from mooncake_store.errors import ConfigError
from mooncake_store.types import Extent

if TYPE_CHECKING:
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

MERGE_GAP_BYTES = 4096
"""Buffers closer than this share their pages of memory with nothing else, and are served as one region."""

HASH_ALGORITHM = "sha256-chain"

CONFIG_FLAGS = ("json_model_override_args", "quantization", "quantization_param_path")
"""Flags under which the same weights give other keys and values."""


class Buffers(NamedTuple):
    """A KV cache as SGLang allocated it.

    Attributes:
        addresses, lengths: of each buffer, in bytes.
        page_bytes: of one page in each buffer.
        page_size: tokens of a page.
        element: type of its numbers.
        layout: name of the order of bytes inside a page.
        owner: kept alive as long as the cache is used.
    """

    addresses: list[int]
    lengths: list[int]
    page_bytes: list[int]
    page_size: int
    element: str
    layout: str
    owner: object

    @classmethod
    def of_transfer(cls, args: KVArgs) -> Buffers:
        """Take them from what a transfer backend is given."""
        return cls([int(a) for a in args.kv_data_ptrs], [int(n) for n in args.kv_data_lens],
                   [int(n) for n in args.kv_item_lens], int(args.page_size), str(args.kv_cache_dtype_str),
                   str(args.kv_layout or "nhd"), args)

    @classmethod
    def of_pool(cls, pool: Any, page_size: int) -> Buffers:
        """Take them from a pool of the device. Raises: ConfigError for one that has no such buffers."""
        try:
            addresses, lengths, page_bytes = pool.get_contiguous_buf_infos()
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"{type(pool).__name__} does not keep pages layer by layer: {error}", where="KV cache",
                              hint="docs/limits.md") from error
        return cls([int(a) for a in addresses], [int(n) for n in lengths], [int(n) for n in page_bytes], page_size,
                   str(pool.dtype), "nhd", pool)


def require_supported(args: KVArgs, server_args: ServerArgs, *, is_mla: bool) -> None:
    """Raise ConfigError for a cache or a parallel layout that we cannot hand over, naming it."""
    problems = cache_problems(Buffers.of_transfer(args), server_args)
    if args.state_types:
        kinds = ", ".join(str(getattr(kind, "value", kind)) for kind in args.state_types)
        problems.append(f"the model keeps state beside its KV cache ({kinds})")
    if is_mla:
        problems.append("the model uses multi-head latent attention")
    if getattr(args, "num_draft_entries", 0):
        problems.append("speculative decoding adds a draft model's cache")
    if getattr(server_args, "disaggregation_decode_allocation_policy", "early") != "early":
        problems.append("--disaggregation-decode-allocation-policy is not 'early'")
    if problems:
        raise ConfigError("; ".join(problems), where="--disaggregation-transfer-backend mooncake_pull",
                          hint="use another transfer backend for this model; docs/limits.md")


def cache_problems(buffers: Buffers, server_args: ServerArgs) -> list[str]:
    """Say what of a cache or of a parallel layout we cannot address."""
    problems = []
    if server_args.device != "cpu":
        problems.append(f"the KV cache is on {server_args.device}; only CPU caches are supported yet")
    if len(set(buffers.page_bytes)) != 1:
        problems.append("its buffers have pages of different sizes")
    for flag in ("pp_size", "attn_cp_size", "dcp_size"):
        if int(getattr(server_args, flag, 1) or 1) > 1:
            problems.append(f"--{flag.replace('_', '-')} is above 1")
    return problems


def cache_memory(buffers: Buffers, server_args: ServerArgs, *, tensor_parallel: int) -> CacheMemory:
    """Describe the cache as one address space that begins at its lowest buffer."""
    addresses, lengths, page_bytes = buffers.addresses, buffers.lengths, buffers.page_bytes[0]
    base = min(addresses)
    spans = merge_spans([Extent(address - base, length) for address, length in zip(addresses, lengths, strict=True)])
    layout = KVLayout(
        layer_offsets=tuple(address - base for address in addresses), block_stride=page_bytes, page_bytes=page_bytes,
        num_blocks=min(lengths) // page_bytes, block_size=buffers.page_size,
        size_bytes=spans[-1].offset + spans[-1].length,
    )
    marks = fingerprint(
        server_args, cache_dtype=buffers.element, layout=buffers.layout, block_size=buffers.page_size,
        num_layers=len(addresses), page_bytes=page_bytes, tensor_parallel=tensor_parallel)
    return CacheMemory(base, layout, marks, buffers.owner, spans)


def merge_spans(spans: list[Extent]) -> tuple[Extent, ...]:
    """Join buffers that lie next to each other, so that few regions are served. Pure."""
    merged: list[Extent] = []
    for span in sorted(spans, key=lambda span: span.offset):
        if merged and span.offset - (merged[-1].offset + merged[-1].length) < MERGE_GAP_BYTES:
            merged[-1] = Extent(merged[-1].offset, span.offset + span.length - merged[-1].offset)
        else:
            merged.append(span)
    return tuple(merged)


def fingerprint(server_args: ServerArgs, **marks: Any) -> Fingerprint:
    """Describe everything that must be equal to share bytes.

    SGLang's page hashes cover tokens, LoRA and salt (mem_cache/utils.py); its attention backends do not pack the cache.
    The heads of one rank are not told everywhere; they follow from the model's configuration and ``tensor_parallel``.
    """
    return Fingerprint(
        engine="sglang/pages", num_kv_heads=0, head_size=0,
        model=weights_digest(server_args.model_path, str(server_args.revision)),
        model_config=_config_digest(server_args), dtype=str(server_args.dtype), pipeline_parallel=1, attention="-",
        isa="-", hash_algorithm=HASH_ALGORITHM, hash_seed="-", **marks)


def _config_digest(server_args: ServerArgs) -> str:
    """Name the model's configuration with what the command line changes of it."""
    path = Path(server_args.model_path, "config.json")
    config = json.loads(path.read_text()) if path.is_file() else {}
    changes = {name: str(getattr(server_args, name, None) or "") for name in CONFIG_FLAGS}
    return config_digest({**config, "": changes})
