"""Tell which dialect an engine speaks.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

import msgspec

from mooncake_connector.router.dialects.base import Dialect
from mooncake_connector.router.dialects.sglang import SglangDialect
from mooncake_connector.router.dialects.vllm import VllmDialect
from mooncake_connector.router.messages import EngineKind, Placed

DIALECTS: dict[EngineKind, Dialect] = {"vllm": VllmDialect(), "sglang": SglangDialect()}
DEFAULT: EngineKind = "vllm"


class _ModelCard(msgspec.Struct):
    owned_by: str = ""


def dialect_of(placed: Placed) -> Dialect:
    """Return the dialect of a placed pair; of a request that runs whole, any: it goes out as the client wrote it."""
    return DIALECTS["vllm" if placed.bootstrap is None else "sglang"]


def recognise(card: bytes) -> EngineKind:
    """Return the engine whose ``/v1/models`` has this card: both name themselves as the owner of what they serve."""
    try:
        owner = msgspec.json.decode(card, type=_ModelCard).owned_by
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return DEFAULT
    return next((kind for kind in DIALECTS if kind == owner), DEFAULT)
