"""Let SGLang's own mooncake_tcp transfer backend run on a CPU host, to measure against it.

Its sender takes page ids as pinned tensors with a CUDA event, which needs CUDA; told that it does not, SGLang gives it
arrays. Found as a plugin when this folder is on PYTHONPATH; it changes nothing else.
"""


def activate():
    """Take the way without CUDA events."""
    from sglang.srt.disaggregation.mooncake import conn

    conn.MooncakeKVSender.supports_host_tensor_indices = False
