"""Hold the store's settings; this is the only module of the package that reads the environment.

Precedence, highest first: explicit values (command line, engine JSON) > ``MOONCAKE_<KEY>`` environment > the file named
by ``MOONCAKE_CONFIG`` (JSON or TOML) > default. Environment names are derived from the field names, so there is no
second list.
"""

from __future__ import annotations

import msgspec


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one store client or capacity node.

    Attributes:
        directory: ``etcd://host:port[,host:port]``, ``memory`` (this process only) or ``off``.
        cell: name that isolates deployments sharing one etcd.
        host: address to bind and to announce; use the machine's address for more than one machine.
        segment_bytes: memory we lend to the pool; 0 = read only. Sizes are accepted as ``2GiB``.
        media: media we may use, in order of preference; the medium is chosen per peer.
        membership_ttl_s: a silent member's entries vanish after this.
        lease_s: longest time a reader may hold blocks without renewing.
        pull_timeout_s: deadline of one pull.
        inflight_max_bytes: bytes one puller may have in flight.
        checksum: verify each pulled pool block.
    """

    directory: str = "etcd://127.0.0.1:2379"
    cell: str = "default"
    host: str = "127.0.0.1"
    segment_bytes: int = 1 << 30
    media: tuple[str, ...] = ("shm", "cma", "tcp")
    membership_ttl_s: int = 10
    lease_s: float = 5.0
    pull_timeout_s: float = 10.0
    inflight_max_bytes: int = 256 << 20
    checksum: bool = True
