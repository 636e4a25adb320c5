"""Keep our membership and our block entries in etcd, from one thread.

The lease is the membership: the member entry and every page are bound to it, so all of it disappears when we do.
``publish`` and ``withdraw`` only change the page table; the thread writes dirty pages behind, a batch some 20 ms after
the first change. The table is desired state, so recovery from anything is the same: get a lease, mark what is missing
dirty, write.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from mooncake_store.directory.etcd_link import Connector, LinkStatus
from mooncake_store.directory.etcd_rpc import RPC_TIMEOUT_S, EtcdRpc, LeaseLost, Write
from mooncake_store.directory.pages import PageTable, PageWrite
from mooncake_store.directory.schema import CellPaths, check_key, encode_member, encode_page
from mooncake_store.errors import DirectoryUnavailable, LocalProtocolError
from mooncake_store.metrics import Metrics
from mooncake_store.types import BlockKey, Member, NodeId

BATCH_S = 0.02
BATCH_WRITES_MAX = 128
"""etcd's default limit of operations in one transaction (--max-txn-ops)."""
BATCH_MAX_BYTES = 1 << 20
"""etcd's default limit of one request is 1.5 MiB (--max-request-bytes)."""
UNWRITTEN_MAX = 1 << 18
"""Publications that may wait for etcd."""
PUBLISH_CHUNK = 4096
"""Keys added under one hold of the lock."""
REVOKE_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)


class Session:
    """Writes our entries under our lease.

    Args:
        connector: this thread's way to etcd.
        ttl_s: our entries vanish this long after our last sign of life.
        unwritten_max: publications that may wait for etcd.
    """

    def __init__(
        self,
        connector: Connector,
        *,
        paths: CellPaths,
        ttl_s: int,
        status: LinkStatus,
        metrics: Metrics,
        unwritten_max: int = UNWRITTEN_MAX,
    ) -> None:
        self.written_revision = 0
        self._connector = connector
        self._paths = paths
        self._ttl_s = ttl_s
        self._status = status
        self._metrics = metrics
        self._table = PageTable(unwritten_max=unwritten_max)
        self._changed = threading.Condition()
        self._member: Member | None = None
        self._is_member_dirty = False
        self._lease = 0
        self._keep_alive_at = 0.0
        self._is_in_hurry = False
        self._num_changes = 0
        self._num_changes_written = 0
        self._is_stopping = False
        self._is_abandoned = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ any thread

    def node_id(self) -> NodeId | None:
        """Return our id once joined."""
        member = self._member
        return member.node_id if member else None

    @property
    def num_pending(self) -> int:
        """Return how many publications and pages wait for a write; an estimate for health reports."""
        return max(self._table.num_unwritten, self._table.num_dirty)

    def announce(self, member: Member) -> None:
        """Join, or change what we announce. Raises LocalProtocolError for a second identity."""
        self._paths.member(member.node_id)
        with self._changed:
            if self._is_stopping:
                return
            if self._member is not None and self._member.node_id != member.node_id:
                raise LocalProtocolError(f"already joined as {self._member.node_id}, cannot join as {member.node_id}")
            self._member = member
            self._is_member_dirty = True
            self._num_changes += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mooncake-directory-session", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def add(self, keys: Sequence[BlockKey]) -> None:
        """Publish. Raises LocalProtocolError before ``announce`` and for a key of impossible length."""
        if self._member is None:
            raise LocalProtocolError("publish before join", hint="call join(member) first")
        for key in keys:
            check_key(key)
        for start in range(0, len(keys), PUBLISH_CHUNK):
            with self._changed:
                if self._is_stopping:
                    return
                was_clean = not self._table.num_dirty
                self._num_changes += 1
                num_dropped = self._table.add(keys[start : start + PUBLISH_CHUNK])
                self._wake(was_clean)
            if num_dropped:
                self._metrics.add("mooncake_directory_dropped_total", num_dropped)

    def remove(self, keys: Sequence[BlockKey]) -> None:
        """Withdraw; unknown keys are ignored."""
        with self._changed:
            was_clean = not self._table.num_dirty
            self._num_changes += 1
            self._table.remove(keys)
            self._wake(was_clean)

    def check_lease(self) -> None:
        """Ask for a keep-alive now."""
        with self._changed:
            self._keep_alive_at = 0.0
            self._changed.notify_all()

    def member_lost(self) -> None:
        """Write everything again: our member entry is gone from etcd."""
        with self._changed:
            self._keep_alive_at = 0.0
            self._mark_all()
            self._changed.notify_all()

    def page_lost(self, page: int) -> None:
        """Write this page again if it still should exist."""
        with self._changed:
            if self._table.has_page(page):
                self._table.mark_dirty((page,))
                self._changed.notify_all()

    def reconcile(self, pages: frozenset[int], *, is_member: bool) -> None:
        """Write what a listing lacked, delete what it had too much."""
        with self._changed:
            if self._member is None or self._is_stopping:
                return
            if not is_member:
                self._keep_alive_at = 0.0
                self._is_member_dirty = True
            self._table.mark_dirty(pages.symmetric_difference(self._table.pages()))
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every change made so far is written; False on timeout."""
        with self._changed:
            if self._member is None:
                return True
            self._is_in_hurry = True
            self._changed.notify_all()
            target = self._num_changes
            self._changed.wait_for(lambda: self._num_changes_written >= target or self._is_stopping, timeout_s)
            return self._num_changes_written >= target

    def stop(self, *, abandon: bool = False) -> None:
        """Ask the thread to revoke the lease and end. Idempotent.

        Args:
            abandon: leave the lease to expire, as a crash would.
        """
        with self._changed:
            self._is_stopping = True
            self._is_abandoned = self._is_abandoned or abandon
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end; cuts its connection when that takes too long."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._connector.abort()

    # ------------------------------------------------------------------ under the lock

    def _wake(self, was_clean: bool) -> None:
        """Wake the thread when there is a first change to collect a batch after, or a whole batch."""
        if (was_clean and self._table.num_dirty) or self._table.num_dirty >= BATCH_WRITES_MAX:
            self._changed.notify_all()

    def _mark_all(self) -> None:
        if self._member is not None:
            self._is_member_dirty = True
            self._num_changes += 1
            self._table.mark_all_dirty()

    def _has_work(self) -> bool:
        return self._is_stopping or self._is_member_dirty or self._table.num_dirty > 0 or self._is_keep_alive_due()

    def _is_keep_alive_due(self) -> bool:
        return time.monotonic() >= self._keep_alive_at

    # ------------------------------------------------------------------ thread

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._step()
                continue
            except LeaseLost as error:
                _log.info("our lease is gone (%s): joining again", error.message)
                self._lease = 0
                self._rest(BATCH_S)
                continue
            except DirectoryUnavailable as error:
                reason = error.message
            except Exception as error:  # noqa: BLE001 - the thread must outlive a bug: our entries would expire
                _log.exception("directory session failed, going on")
                self._metrics.add("mooncake_protocol_errors_total", reason="directory_session_bug")
                reason = repr(error)
            self._fail(reason)
        self._leave()

    def _fail(self, reason: str) -> None:
        if self._is_stopping:
            return
        self._status.down("session", reason)
        self._rest(self._connector.failed())
        self._keep_alive_at = 0.0

    def _rest(self, pause_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping, pause_s)

    def _step(self) -> None:
        """Wait for something to do, then do one piece of it."""
        with self._changed:
            self._changed.wait_for(self._has_work, max(0.0, self._keep_alive_at - time.monotonic()))
            if self._is_stopping:
                return
        rpc = self._connector.rpc()
        if not self._lease:
            self._lease = rpc.grant(self._ttl_s)
            self._lease_is_good()
            with self._changed:
                self._mark_all()
        elif self._is_keep_alive_due():
            if not rpc.keep_alive(self._lease, min(RPC_TIMEOUT_S, self._ttl_s / 3)):
                raise LeaseLost("keep-alive refused")
            self._lease_is_good()
        self._collect_batch()
        self._write_batch(rpc)

    def _lease_is_good(self) -> None:
        self._keep_alive_at = time.monotonic() + self._ttl_s / 3
        self._connector.succeeded()
        self._status.up("session")

    def _collect_batch(self) -> None:
        """Give further changes a moment to join the batch."""
        with self._changed:
            if self._table.num_dirty and not self._is_member_dirty:
                self._changed.wait_for(
                    lambda: self._is_in_hurry or self._is_stopping or self._table.num_dirty >= BATCH_WRITES_MAX,
                    BATCH_S,
                )

    def _write_batch(self, rpc: EtcdRpc) -> None:
        with self._changed:
            member = self._member if self._is_member_dirty else None
            pages = self._table.take_dirty(BATCH_WRITES_MAX - 1)
            if self._member is None or (member is None and not pages):
                return
            node_id = self._member.node_id
            self._is_member_dirty = False
            num_changes = 0 if self._table.num_dirty else self._num_changes
        num_done = 0
        is_member_written = member is None
        try:
            while num_done < len(pages) or not is_member_written:
                writes = (
                    []
                    if is_member_written or member is None
                    else [Write(self._paths.member(node_id), encode_member(member))]
                )
                num_taken = self._fill(writes, node_id, pages[num_done:])
                self.written_revision = rpc.commit(writes, self._lease)
                num_done, is_member_written = num_done + num_taken, True
        finally:
            with self._changed:
                self._table.written(pages[:num_done])
                self._table.mark_dirty(write.page for write in pages[num_done:])
                self._is_member_dirty = self._is_member_dirty or not is_member_written
                if num_done == len(pages) and is_member_written:
                    self._num_changes_written = max(self._num_changes_written, num_changes)
                self._is_in_hurry = self._is_in_hurry and self._num_changes_written < self._num_changes
                self._changed.notify_all()
        self._status.up("session")

    def _fill(self, writes: list[Write], node_id: NodeId, pages: Sequence[PageWrite]) -> int:
        """Append as many pages as one request carries; return how many."""
        num_bytes = 0
        for num_taken, (page, keys) in enumerate(pages):
            value = encode_page(keys) if keys else None
            num_bytes += len(value or b"")
            if num_taken and num_bytes > BATCH_MAX_BYTES:
                return num_taken
            writes.append(Write(self._paths.page(node_id, page), value))
        return len(pages)

    def _leave(self) -> None:
        """Revoke the lease: everything of ours disappears for everyone at once."""
        lease, self._lease = self._lease, 0
        if lease and not self._is_abandoned:
            try:
                self._connector.rpc().revoke(lease, REVOKE_TIMEOUT_S)
            except DirectoryUnavailable as error:
                _log.info("could not leave the cell (%s): our entries expire within %d s", error.message, self._ttl_s)
        self._connector.abort()
