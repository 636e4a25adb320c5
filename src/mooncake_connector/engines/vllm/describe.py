"""Read vLLM's configuration: what its caches are compatible with, and where their pages lie.

Ref: vllm v1/kv_cache_interface.py KVCacheTensor: page of layer l, block b starts at
``offset + l * layer_stride + b * block_stride`` of the one backing allocation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mooncake_connector.engines.vllm import compat
from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.layout import KVLayout
from mooncake_connector.transfer.endpoint import CacheMemory
from mooncake_connector.transfer.model import config_digest, weights_digest
from mooncake_store.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

COMPACT_LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
"""Layouts in which a (layer, block) page is one run of bytes; see vllm v1/kv_cache_layout.py."""


def require_one_group(kv_cache_config: KVCacheConfig) -> Any:
    """Return the spec of the single KV cache group. Raises: ConfigError for hybrid models."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(f"the model has {len(groups)} KV cache groups; one is supported",
                          where="kv_cache_config.kv_cache_groups",
                          hint="hybrid models (sliding window, Mamba) are not supported yet: docs/limits.md")
    return groups[0].kv_cache_spec


def require_supported_parallelism(vllm_config: VllmConfig) -> None:
    """Raise ConfigError for ways to split a model whose parts our pool keys do not tell apart."""
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if int(getattr(parallel, name, 1) or 1) > 1:
            raise ConfigError(f"{name} is {getattr(parallel, name)}; only tensor and data parallelism are supported",
                              where=f"--{name.replace('_', '-')}", hint="see docs/limits.md")


def fingerprint(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Fingerprint:
    """Describe everything that must be equal to share bytes with this engine."""
    spec = require_one_group(kv_cache_config)
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    head_size = int(getattr(spec, "head_size", 0))
    num_layers = sum(len(tensor.layers) for tensor in kv_cache_config.kv_cache_tensors)
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    return Fingerprint(
        engine="vllm/shared-allocation-4d",
        model=weights_digest(model.model, str(model.revision)),
        model_config=config_digest(model.hf_config.to_dict()),
        dtype=str(model.dtype),
        cache_dtype=str(cache.cache_dtype),
        layout=str(kv_cache_config.kv_cache_layout),
        block_size=int(spec.block_size),
        num_layers=num_layers,
        page_bytes=int(spec.page_size_bytes),
        num_kv_heads=int(getattr(spec, "num_kv_heads", 0)),
        head_size=head_size,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        attention=str(backend),
        isa=compat.attention_isa(vllm_config, head_size),
        hash_algorithm=str(cache.prefix_caching_hash_algo),
        hash_seed=compat.hash_seed(),
    )


def cache_memory(kv_caches: dict[str, torch.Tensor], kv_cache_config: KVCacheConfig, marks: Fingerprint) -> CacheMemory:
    """Describe the registered caches as one region of pages.

    Raises:
        ConfigError: a device, layout or shape that we cannot address, naming it.
    """
    spec = require_one_group(kv_cache_config)
    layout_name = str(kv_cache_config.kv_cache_layout)
    if layout_name.rsplit(".", 1)[-1] not in COMPACT_LAYOUTS:
        raise ConfigError(f"KV layout {layout_name} scatters a block's page", where="kv_cache_config.kv_cache_layout",
                          hint=f"choose an attention backend with one of {', '.join(COMPACT_LAYOUTS)}")
    tensors = kv_cache_config.kv_cache_tensors
    first = kv_caches[tensors[0].layers[0]]
    if first.device.type != "cpu":
        raise ConfigError(f"KV cache is on {first.device.type}; only CPU caches are supported yet",
                          where="register_kv_caches", hint="see docs/limits.md for the state of GPU memory")
    if len({tensor.block_stride for tensor in tensors}) != 1:
        raise ConfigError("KV tensors have different block strides", where="kv_cache_config.kv_cache_tensors",
                          hint="please report the model; docs/limits.md")
    address = first.untyped_storage().data_ptr()
    names = [name for tensor in tensors for name in tensor.layers]
    offsets = [tensor.offset + i * tensor.layer_stride for tensor in tensors for i in range(len(tensor.layers))]
    for name, offset in zip(names, offsets, strict=True):
        if kv_caches[name].data_ptr() != address + offset:
            raise ConfigError(f"layer {name} is not where KVCacheTensor says", where="register_kv_caches",
                              hint="this vLLM lays caches out in a new way; docs/compatibility.md")
    layout = KVLayout(
        layer_offsets=tuple(offsets), block_stride=tensors[0].block_stride, page_bytes=int(spec.page_size_bytes),
        num_blocks=kv_cache_config.num_blocks, block_size=int(spec.block_size), size_bytes=tensors[0].size,
    )
    return CacheMemory(address, layout, marks, first.untyped_storage())


def layer_order(kv_cache_config: KVCacheConfig) -> dict[str, int]:
    """Return each layer's index in the layout."""
    names = [name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers]
    return {name: index for index, name in enumerate(names)}
