"""Ask members and engines for their metrics."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterable

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from mooncake_store.config import StoreConfig
from mooncake_store.directory.open import open_directory
from mooncake_store.errors import MooncakeError, PeerUnreachable
from mooncake_store.metrics import Metrics
from mooncake_store.pull.control import query_status
from mooncake_store.types import Member

QUERY_TIMEOUT_S = 3.0
SCRAPE_TIMEOUT_S = 5.0
POLL_S = 0.2

HELD = ("mooncake_leases_active", "mooncake_transfers_active", "mooncake_blocks_held")
"""What must be zero when nobody is asking for anything."""


class MemberStatus(msgspec.Struct):
    """One member and what it answered; ``error`` is set when it did not."""

    member: Member
    samples: dict[str, float] = {}
    info: dict[str, str] = {}
    error: str = ""


class CellStatus:
    """Watches who is in a cell and asks them; use it as a context manager.

    Args:
        directory: the cell's directory, ``etcd://host:port``.
    """

    def __init__(self, directory: str) -> None:
        self._directory = open_directory(StoreConfig(directory=directory), Metrics())

    def __enter__(self) -> CellStatus:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching. Idempotent."""
        self._directory.close()

    def members(self) -> list[Member]:
        """Return the members known now."""
        return list(self._directory.members().values())

    def wait_member(self, pids: Iterable[int], timeout_s: float) -> Member | None:
        """Wait until one of these processes is a member; None on timeout."""
        wanted = set(pids)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for member in self.members():
                if member.pid in wanted:
                    return member
            time.sleep(POLL_S)
        return None

    def ask(self, *, timeout_s: float = QUERY_TIMEOUT_S) -> list[MemberStatus]:
        """Ask every member; one that does not answer has ``error`` set."""
        found = []
        for member in self.members():
            status = MemberStatus(member)
            try:
                reply = query_status(member.control, timeout_s)
                status.samples, status.info = reply.samples, reply.info
            except MooncakeError as error:
                status.error = error.message
            found.append(status)
        return found


def scrape(url: str) -> dict[str, float]:
    """Return an engine's ``/metrics`` as ``name`` or ``name{source="..."}`` -> value, summed over all other labels.

    Raises:
        PeerUnreachable: if it does not answer.
    """
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=SCRAPE_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except OSError as error:
        raise PeerUnreachable(f"no metrics from {url}: {error}", where=url, hint="is the engine alive?") from error
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_bucket")):
                source = sample.labels.get("source") or sample.labels.get("cache_source")
                name = f'{sample.name}{{source="{source}"}}' if source else sample.name
                totals[name] = totals.get(name, 0.0) + sample.value
    return totals


def total(samples: dict[str, float], name: str) -> float:
    """Return a metric's value summed over its labels; 0 when it was never set."""
    return sum(value for key, value in samples.items() if key == name or key.startswith(name + "{"))


def by_label(samples: dict[str, float], name: str) -> dict[str, float]:
    """Return a metric with one label as label value -> value."""
    return {key.split('"')[1]: value for key, value in samples.items() if key.startswith(name + "{")}


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """Return how much every sample grew."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def held(statuses: Iterable[MemberStatus]) -> dict[str, float]:
    """Return everything that members still hold, as ``node metric`` -> number; empty when nothing is."""
    found = {}
    for status in statuses:
        for name in HELD:
            value = total(status.samples, name)
            if value:
                found[f"{status.member.kind} {status.member.node_id} {name}"] = value
    return found
