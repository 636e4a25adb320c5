"""Keep a directory in etcd: the production implementation of :class:`~mooncake_store.directory.base.Directory`.

Architecture::

    EtcdDirectory
      ├─ Mirror    (etcd_mirror.py)   thread + connection: list, watch -> DirectoryView
      ├─ Session   (etcd_session.py)  thread + connection: lease, member entry, pages written behind; starts at join
      └─ LinkStatus (etcd_link.py)    is the link up; one log line per outage

Both threads sleep in gRPC or on a condition while nothing happens; a mirror that never joins has one thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from mooncake_store.directory.base import DirectoryHealth
from mooncake_store.directory.endpoints import Endpoint
from mooncake_store.directory.etcd_link import Connector, LinkStatus
from mooncake_store.directory.etcd_mirror import Mirror
from mooncake_store.directory.etcd_session import UNWRITTEN_MAX, Session
from mooncake_store.directory.schema import CellPaths
from mooncake_store.metrics import Metrics
from mooncake_store.types import BlockKey, Member, NodeId

FIRST_ATTEMPT_S = 2.0
"""How long the constructor waits for the first listing, so that a process starts with a warm view."""
CLOSE_SESSION_S = 1.5
CLOSE_MIRROR_S = 0.5


class EtcdDirectory:
    """Mirrors one cell of an etcd and announces our blocks in it.

    Args:
        endpoints: servers of one etcd, tried in order.
        cell: name of the cell.
        ttl_s: our entries vanish this long after our last sign of life.
        metrics: where to report.
        unwritten_max: publications that may wait for etcd; beyond it the oldest are dropped and counted.

    Raises:
        LocalProtocolError: the cell's name cannot be used. Never for an unreachable etcd.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        cell: str,
        ttl_s: int,
        metrics: Metrics,
        unwritten_max: int = UNWRITTEN_MAX,
    ) -> None:
        paths = CellPaths(cell)
        self._status = LinkStatus(endpoints, metrics)
        self._session = Session(
            Connector(endpoints),
            paths=paths,
            ttl_s=ttl_s,
            status=self._status,
            metrics=metrics,
            unwritten_max=unwritten_max,
        )
        self._mirror = Mirror(
            Connector(endpoints),
            paths=paths,
            grace_s=float(ttl_s),
            status=self._status,
            metrics=metrics,
            own=self._session,
        )
        self._view = self._mirror.view
        self._is_closed = False
        self._mirror.start()
        self._status.wait_first_attempt(FIRST_ATTEMPT_S)

    def join(self, member: Member) -> None:
        """Announce ourselves, written behind. Raises LocalProtocolError for an id that etcd keys cannot carry."""
        self._session.announce(member)

    def members(self) -> dict[NodeId, Member]:
        """Return a copy of the members that the mirror knows."""
        return self._view.members()

    def publish(self, keys: Sequence[BlockKey]) -> None:
        """Announce blocks. Raises LocalProtocolError before ``join``."""
        self._session.add(keys)

    def withdraw(self, keys: Sequence[BlockKey]) -> None:
        """Take blocks back; unknown keys are ignored."""
        self._session.remove(keys)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is written and our own mirror shows it; False on timeout."""
        deadline = time.monotonic() + timeout_s
        if not self._session.flush(timeout_s) or self._is_closed:
            return False
        return self._mirror.wait(
            lambda: self._view.revision >= self._session.written_revision, max(0.0, deadline - time.monotonic())
        )

    def locate(self, keys: Sequence[BlockKey]) -> list[tuple[NodeId, ...]]:
        """Return who holds each key. No I/O, no lock."""
        return self._view.locate(keys)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading keys have a replica. No I/O, no lock."""
        return self._view.match(keys)

    def revision(self) -> int:
        """Return the revision of the last change in this cell that the mirror applied.

        Not etcd's own revision, which other cells move too: a peer that waits for this number is sure to reach it.
        """
        return self._mirror.last_event_revision

    def wait_revision(self, revision: int, timeout_s: float) -> bool:
        """Wait until the mirror has applied ``revision``; False on timeout."""
        return self._mirror.wait(lambda: self._view.revision >= revision, timeout_s)

    def health(self) -> DirectoryHealth:
        """Return the state of the link."""
        return DirectoryHealth(
            connected=self._status.is_up and not self._is_closed,
            revision=self.revision(),
            num_blocks=self._view.num_blocks,
            num_members=self._view.num_members,
            num_pending=self._session.num_pending,
            error="closed" if self._is_closed else self._status.error,
        )

    def close(self) -> None:
        """Leave the cell: revoke the lease, end both threads. Idempotent, at most 2 s."""
        self._close(abandon=False)

    def abandon(self) -> None:
        """End as a killed process would: our entries stay until the lease expires. For tests."""
        self._close(abandon=True)

    def _close(self, *, abandon: bool) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._session.stop(abandon=abandon)
        self._mirror.stop()
        self._session.join(CLOSE_SESSION_S)
        self._mirror.join(CLOSE_MIRROR_S)
        self._status.down_for_good()
