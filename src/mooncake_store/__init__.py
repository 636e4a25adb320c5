"""Move and keep blocks of bytes: a pooled cache across processes and machines.

Knows nothing of tokens, layers, torch or engines. Names are imported when first used, so the package
itself is cheap to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mooncake_store.client import StoreClient as StoreClient
    from mooncake_store.config import StoreConfig as StoreConfig
    from mooncake_store.directory.open import open_directory as open_directory
    from mooncake_store.errors import MooncakeError as MooncakeError
    from mooncake_store.metrics import Metrics as Metrics
    from mooncake_store.node import StoreNode as StoreNode
    from mooncake_store.pull.base import GetOutcome as GetOutcome
    from mooncake_store.pull.base import Scatter as Scatter
    from mooncake_store.pull.control import query_status as query_status
    from mooncake_store.transport.media import Media as Media
    from mooncake_store.types import BlockKey as BlockKey
    from mooncake_store.types import NodeId as NodeId
    from mooncake_store.types import block_key as block_key

_HOMES = {
    "BlockKey": "types",
    "GetOutcome": "pull.base",
    "Media": "transport.media",
    "Metrics": "metrics",
    "MooncakeError": "errors",
    "NodeId": "types",
    "Scatter": "pull.base",
    "StoreClient": "client",
    "StoreConfig": "config",
    "StoreNode": "node",
    "block_key": "types",
    "open_directory": "directory.open",
    "query_status": "pull.control",
}

__all__ = ["BlockKey", "GetOutcome", "Media", "Metrics", "MooncakeError", "NodeId", "Scatter", "StoreClient",
           "StoreConfig", "StoreNode", "block_key", "open_directory", "query_status"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mooncake_store' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"mooncake_store.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
