"""Read the address of an etcd [pure]."""

from __future__ import annotations

from typing import NamedTuple

from mooncake_store.errors import ConfigError

ETCD_SCHEME = "etcd://"
ETCD_DEFAULT_PORT = 2379
ENDPOINTS_MAX = 16


class Endpoint(NamedTuple):
    """Address of one etcd server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoints(url: str) -> tuple[Endpoint, ...]:
    """Return the servers of an ``etcd://`` address, in order.

    Raises:
        ConfigError: it is not one.
    """
    if not url.startswith(ETCD_SCHEME):
        raise _bad(url, "neither an etcd:// address nor memory nor off")
    parts = url[len(ETCD_SCHEME) :].rstrip("/").split(",")
    if len(parts) > ENDPOINTS_MAX:
        raise _bad(url, f"more than {ENDPOINTS_MAX} servers")
    return tuple(_parse_endpoint(url, part.strip()) for part in parts)


def _parse_endpoint(url: str, text: str) -> Endpoint:
    host, port = text, str(ETCD_DEFAULT_PORT)
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise _bad(url, f"cannot read {text!r}")
        port = rest[1:] or port
    elif ":" in text:
        host, _, port = text.rpartition(":")
    if not host or any(character in host for character in "/@ ?#") or (":" in host and not text.startswith("[")):
        raise _bad(url, f"no host in {text!r}")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise _bad(url, f"port {port!r} is not 1 to 65535")
    return Endpoint(host, int(port))


def _bad(url: str, why: str) -> ConfigError:
    return ConfigError(
        f"directory {url!r}: {why}",
        where="$.directory",
        hint="use etcd://host:port[,host:port] (IPv6 in brackets), memory, or off",
    )
