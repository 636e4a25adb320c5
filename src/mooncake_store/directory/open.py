"""Open the directory that a configuration names."""

from __future__ import annotations

from mooncake_store.config import StoreConfig
from mooncake_store.directory.base import Directory
from mooncake_store.directory.endpoints import parse_endpoints
from mooncake_store.directory.memory import MemoryDirectory, shared_cell
from mooncake_store.directory.schema import check_name
from mooncake_store.errors import ConfigError, LocalProtocolError
from mooncake_store.metrics import Metrics


def open_directory(config: StoreConfig, metrics: Metrics) -> Directory:
    """Return a running directory.

    ``etcd://host:port[,host:port]`` never raises for an unreachable etcd: it logs one line that says what to start and
    keeps trying. ``memory`` shares one cell per name within this process; ``off`` is a cell that nobody else sees.

    Raises:
        ConfigError: the address or the cell's name cannot be used.
    """
    try:
        check_name(config.cell, "cell")
    except LocalProtocolError as error:
        raise ConfigError(error.message, where="$.cell", hint=error.hint) from error
    if config.directory == "memory":
        return MemoryDirectory(shared_cell(config.cell), metrics=metrics)
    if config.directory == "off":
        return MemoryDirectory(metrics=metrics)
    endpoints = parse_endpoints(config.directory)
    # gRPC takes 0.2 s and some 20 MB: only for those who use it.
    from mooncake_store.directory.etcd import EtcdDirectory

    return EtcdDirectory(endpoints, cell=config.cell, ttl_s=config.membership_ttl_s, metrics=metrics)
