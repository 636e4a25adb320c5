"""Let HiCache run with ``--device cpu``, where SGLang 0.5.23 has neither copies nor host memory for it.

Supplies, as a plugin, torch copies for ``--hicache-io-backend direct`` with the layouts ``layer_first`` and
``page_first_direct``, unpinned host memory, and events that take ``enable_timing``. Everything above the copies is
SGLang's own.
"""

import os


def _slots(indices):
    import torch

    return indices.to("cpu", torch.int64)


def _pages(indices, page_size):
    return _slots(indices).view(-1, page_size)[:, 0] // page_size


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
    source, target = _slots(src_indices), _slots(dst_indices)
    for one, other in zip(src_layers, dst_layers, strict=True):
        other[target] = one[source].view_as(other[target])


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    num_layers = len(src_ptrs) // len(dst_ptrs)
    source, pages = _slots(src_indices), _pages(dst_indices, page_size)
    for which, target in enumerate(dst_ptrs):  # shape: page, layer, page_size, heads, dim
        for layer in range(num_layers):
            tensor = src_ptrs[which * num_layers + layer]
            target[pages, layer] = tensor[source].view(len(pages), page_size, *tensor.shape[1:])


def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    pages, target = _pages(src_indices, page_size), _slots(dst_indices)
    for source, tensor in zip(src_ptrs, dst_ptrs, strict=True):
        tensor[target] = source[pages, layer_id].reshape(len(target), *tensor.shape[1:])


def activate():
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    import torch
    from sglang.srt.mem_cache.pool_host import base, common, mha

    # SGLang leaves 10 GiB of the host's memory to others, which a test machine may not have.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 1 << 30

    def allocate(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None):
        return allocator.allocate(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    for function in (transfer_kv_direct, transfer_kv_all_layer_direct_lf_pf, transfer_kv_per_layer_direct_pf_lf):
        setattr(mha, function.__name__, function)
    try:
        torch.cpu.Event(enable_timing=True)
    except TypeError:
        class Event(torch.cpu.Event):
            def __init__(self, enable_timing=False, **more):
                super().__init__()

            def elapsed_time(self, other):
                return 0.0

        torch.cpu.Event = Event
