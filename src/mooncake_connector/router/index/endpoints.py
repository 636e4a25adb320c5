"""Say where an engine publishes its KV events.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from mooncake_connector.router.index.events import Dialect
from mooncake_store.errors import ConfigError

RANKS_MAX = 256
_WILDCARDS = ("*", "0.0.0.0", "::", "[::]")

Endpoint = Annotated[str, msgspec.Meta(max_length=512, pattern=r"^((tcp|ipc)://\S+)?$")]


class EventSockets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an engine publishes.

    Attributes:
        endpoint: of data-parallel rank 0, such as tcp://10.0.0.1:5557; each further rank has the next port. With
            ``*`` for the host, the one that the router knows the engine by.
        replay: of rank 0's replay socket; empty when the engine has none.
        num_ranks: data-parallel ranks.
        topic: what messages begin with.
        dialect: whose events they are, vllm or sglang; matters for releases before mid-2026 only.
    """

    endpoint: Endpoint
    replay: Endpoint = ""
    num_ranks: Annotated[int, msgspec.Meta(ge=1, le=RANKS_MAX)] = 1
    topic: Annotated[str, msgspec.Meta(max_length=512)] = ""
    dialect: Dialect = "vllm"


def seen_from(url: str, sockets: EventSockets) -> EventSockets:
    """Return the sockets of the engine at ``url`` as they can be connected to."""
    endpoint, replay = (_with_host(each, urlsplit(url).hostname or "") for each in (sockets.endpoint, sockets.replay))
    return msgspec.structs.replace(sockets, endpoint=endpoint, replay=replay)


def of_rank(endpoint: str, rank: int) -> str:
    """Return a rank's endpoint: the port plus the rank, as both engines count.

    Raises:
        ConfigError: when a further rank's endpoint cannot be told from the first one's.
    """
    if rank == 0 or not endpoint:
        return endpoint
    base, _, port = endpoint.rpartition(":")
    if not base.startswith("tcp://") or not port.isdecimal():
        raise ConfigError(f"{endpoint!r} has no port to count ranks from", where="kv_events")
    return f"{base}:{int(port) + rank}"


def _with_host(endpoint: str, host: str) -> str:
    base, _, port = endpoint.rpartition(":")
    if base.removeprefix("tcp://") not in _WILDCARDS:
        return endpoint
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
