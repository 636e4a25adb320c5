"""Hold what the two threads of an etcd directory share: which server to use, and whether the link is up.

Two roles use the link, each from a thread and a connection of its own: the *mirror* (reads and watches) and the
*session* (lease and writes). Neither waits for the other.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from typing import Literal

from mooncake_store.directory.endpoints import Endpoint
from mooncake_store.directory.etcd_rpc import EtcdRpc
from mooncake_store.metrics import Metrics

Role = Literal["mirror", "session"]
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 1.0

_log = logging.getLogger(__name__)


class Connector:
    """Opens connections to the servers of one etcd, in order, one at a time.

    Threads: ``rpc`` and ``failed`` belong to one thread; ``abort`` may come from any.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._index = 0
        self._rpc: EtcdRpc | None = None
        self._num_failures = 0

    def rpc(self) -> EtcdRpc:
        """Return the present connection, a new one if there is none."""
        if self._rpc is None:
            self._rpc = EtcdRpc(self._endpoints[self._index])
        return self._rpc

    def succeeded(self) -> None:
        """Take note that the present connection works: the next failure is retried fast."""
        self._num_failures = 0

    def failed(self) -> float:
        """Drop the connection, go on to the next server; return how long to wait before using it, in seconds."""
        self.abort()
        self._index = (self._index + 1) % len(self._endpoints)
        rounds = self._num_failures // len(self._endpoints)
        self._num_failures += 1
        # Jitter: a restarted etcd should not meet all its clients in the same millisecond.
        return float(min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(rounds, 8)) * random.uniform(0.5, 1.0))

    def abort(self) -> None:
        """Close the present connection, which ends calls in flight. Idempotent."""
        rpc, self._rpc = self._rpc, None
        if rpc is not None:
            rpc.close()


class LinkStatus:
    """Knows whether the link is up, logs each outage once and its end once.

    Threads: any.
    """

    def __init__(self, endpoints: Sequence[Endpoint], metrics: Metrics) -> None:
        self._where = ",".join(map(str, endpoints))
        self._metrics = metrics
        self._changed = threading.Condition()
        self._error_of: dict[Role, str] = {"mirror": "not connected yet"}
        self._was_ever_up = False
        self._is_reported = False
        self._num_reports = 0
        self._down_since = time.monotonic()
        metrics.set("mooncake_directory_connected", 0)

    @property
    def is_up(self) -> bool:
        """Return whether every role in use works."""
        return not self._error_of

    @property
    def error(self) -> str:
        """Return the failures in one line; empty when up."""
        return "; ".join(f"{role}: {error}" for role, error in list(self._error_of.items()))

    def up(self, role: Role) -> None:
        """Take note that a role works."""
        if role not in self._error_of:
            return
        with self._changed:
            self._error_of.pop(role, None)
            if not self._error_of:
                self._was_ever_up = True
                if self._is_reported:
                    self._is_reported = False
                    _log.info("etcd at %s is back after %.1f s", self._where, time.monotonic() - self._down_since)
                self._metrics.set("mooncake_directory_connected", 1)
            self._changed.notify_all()

    def down(self, role: Role, error: str) -> None:
        """Take note that a role failed, and log if that begins an outage."""
        with self._changed:
            if not self._error_of:
                self._down_since = time.monotonic()
                self._metrics.set("mooncake_directory_connected", 0)
            self._error_of[role] = error
            self._num_reports += 1
            is_first, self._is_reported = not self._is_reported, True
            self._changed.notify_all()
        if not is_first:
            return
        if self._was_ever_up:
            _log.warning("lost etcd at %s (%s): answering from what we know, retrying", self._where, error)
        else:
            _log.warning(
                "no etcd at %s: start one with `mooncake etcd`, or set `directory` to etcd://HOST:PORT of a "
                "running one, or to off; going on without it and retrying (%s)",
                self._where,
                error,
            )

    def down_for_good(self) -> None:
        """Take note that the directory was closed."""
        self._metrics.set("mooncake_directory_connected", 0)

    def wait_first_attempt(self, timeout_s: float) -> None:
        """Wait until the link came up or failed for the first time."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_up or self._num_reports > 0, timeout_s)
