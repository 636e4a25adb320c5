"""Stand in for the CPU build of sgl-kernel, of which there is no wheel.

SGLang 0.5.23 imports some names when SGLANG_USE_CPU_ENGINE=1. Without AMX and speculative decoding it calls only the
two below; everything else on its CPU path falls back to plain torch, because no operator of this library is registered.
"""

import ctypes

__version__ = "0.0.0+torch"


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    position = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[position: position + end - start].to(req_to_token.dtype)
        position += end - start


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [(target, ctypes.string_at(address + source * stride, stride))
                for target, source in zip(tgt_loc.tolist(), src_loc.tolist(), strict=True)]
        for target, row in rows:
            ctypes.memmove(address + target * stride, row, stride)


def __getattr__(name):
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not among the stand-ins for CPU tests")

    return missing
