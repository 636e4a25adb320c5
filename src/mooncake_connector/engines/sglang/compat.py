"""Collect everything we touch of SGLang's internals, probed by feature.

Run with SGLang 0.5.23. Older releases lack parts of the base classes; a newer one is used when every feature is there.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from mooncake_store.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

logger = logging.getLogger(__name__)

OLDEST = (0, 5, 23)
MANAGER_FEATURES = ("check_status", "clear_deferred_abort_state", "is_abort_release_safe", "record_failure",
                    "register_to_bootstrap", "try_ensure_parallel_info", "update_status",
                    "_start_heartbeat_checker_thread")
RECEIVER_FEATURES = ("ensure_abort_notified", "invalidate_cached_bootstrap_infos", "_register_kv_args",
                     "_setup_bootstrap_infos")
SENDER_FEATURES = ("pop_decode_prefix_len", "should_send_kv_chunk", "_prepare_send_indices")

Classes = Callable[[], dict[str, type]]


def require_supported_version(version: str) -> None:
    """Raise ConfigError for a release older than the oldest that has every base class."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"SGLang {version} is older than {oldest}", where="sglang",
                          hint=f"install sglang {oldest} or newer; docs/compatibility.md lists what was run")


def require_features() -> None:
    """Raise ConfigError naming every method of SGLang's base classes that we need and that is not there."""
    from sglang.srt.disaggregation.common import conn

    wanted = {"CommonKVManager": MANAGER_FEATURES, "CommonKVReceiver": RECEIVER_FEATURES,
              "CommonKVSender": SENDER_FEATURES}
    missing = [f"{name}.{feature}" for name, features in wanted.items() for feature in features
               if not hasattr(getattr(conn, name, None), feature)]
    if missing:
        raise ConfigError(f"this SGLang lacks {', '.join(missing)}", where="sglang disaggregation/common/conn.py",
                          hint="use SGLang 0.5.23; docs/compatibility.md lists what was run")


def skip_early_send() -> None:
    """Have a cached prefix handed over with the first chunk, not ahead of it.

    Under overlap scheduling SGLang marks what it sends ahead with a CUDA event, which a CPU build of torch has not, and
    whose pass we would have to wait for (disaggregation/prefill.py maybe_send_cached_prefix_chunk).
    """
    from sglang.srt.environ import envs

    envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.set(False)


def add_transfer_backend(name: str, classes: Classes) -> None:
    """Make SGLang know a transfer backend under a name of its own. Idempotent.

    Choices have an official adder; the enumeration has none, so a member is added to its table of values, and
    ``get_kv_class`` is wrapped by SGLang's own hook registry. Every other backend goes its usual way.

    Raises:
        ConfigError: a release that we do not support.
    """
    require_supported_version(importlib.metadata.version("sglang"))
    from sglang.srt.arg_groups import choices
    from sglang.srt.disaggregation import utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if name in utils.TransferBackend._value2member_map_:
        return

    def get_kv_class(original: Callable[..., Any], backend: Any, role: Any) -> Any:
        if getattr(backend, "value", None) != name or role.value == "kvargs":
            return original(backend, role)
        return classes()[role.value]

    HookRegistry.register("sglang.srt.disaggregation.utils.get_kv_class", get_kv_class, HookType.AROUND)
    member = object.__new__(utils.TransferBackend)
    member._name_, member._value_ = name.upper(), name
    utils.TransferBackend._value2member_map_[name] = member
    if name not in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        choices.add_disagg_transfer_backend_choices([name])


class WeightsWatcher(Protocol):
    """Wants to know when other weights are used."""

    def change_weights(self, version: str | None) -> None:
        """Take notice. ``version`` is None where the update has none, or where pages of the old weights stay cached."""
        ...


_watchers: weakref.WeakSet[WeightsWatcher] = weakref.WeakSet()
_WEIGHTS_METHOD = "SchedulerWeightUpdaterManager.flush_cache_after_weight_update"


def watch_weights(watcher: WeightsWatcher) -> None:
    """Tell ``watcher`` whenever other weights were loaded into this scheduler process, before its cache is emptied.

    Raises:
        ConfigError: the method through which every kind of update ends is not there.
    """
    from sglang.srt.managers.scheduler_components import weight_updater
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    owner, _, method = _WEIGHTS_METHOD.partition(".")
    if not hasattr(getattr(weight_updater, owner, None), method):
        raise ConfigError(f"this SGLang lacks {_WEIGHTS_METHOD}", where=weight_updater.__name__,
                          hint="use SGLang 0.5.23; docs/compatibility.md lists what was run")

    def tell(manager: object, request: Any, *more: object, **named: object) -> None:
        for each in list(_watchers):
            each.change_weights(request.weight_version if request.flush_cache else None)

    if not _watchers:
        HookRegistry.register(f"{weight_updater.__name__}.{_WEIGHTS_METHOD}", tell, HookType.BEFORE)
        HookRegistry.apply_hooks()
    _watchers.add(watcher)


def is_true_on_all_ranks(answer: bool, params: CacheInitParams) -> bool:
    """Tell whether every rank that shares this cache's requests says so; every rank must ask.

    The groups are those over which SGLang's own cache agrees (mem_cache/unified_radix_cache.py
    _all_reduce_attn_groups); of a single rank there is none.
    """
    import torch
    from torch import distributed

    groups = [group for group in (params.attn_cp_cache_group, params.attn_tp_cache_group)
              if group is not None and distributed.get_world_size(group=group) > 1]
    if not groups and params.tp_cache_group is not None and distributed.get_world_size(group=params.tp_cache_group) > 1:
        groups = [params.tp_cache_group]
    votes = torch.tensor([int(answer)], dtype=torch.int)
    for group in groups:
        distributed.all_reduce(votes, op=distributed.ReduceOp.MIN, group=group)
    return bool(votes.item())
