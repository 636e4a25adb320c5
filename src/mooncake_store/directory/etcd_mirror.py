"""Follow one cell in etcd: list, then watch, and survive whatever happens to the server.

What can happen, and what the mirror does:

==========================================  ============================================================================
the connection breaks, same data            watch on from the last applied revision
history compacted past that revision        list again and apply the difference
etcd came back empty or older               list again; what is missing stays visible for one TTL, because its owners
                                            are about to announce it again, and a stale entry costs only a miss
a value does not decode                     the entry counts as gone; counted, logged once per reason
==========================================  ============================================================================

Readers use the view without a lock at any time and never meet an empty or half-listed one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mooncake_store.directory.etcd_link import Connector, LinkStatus
from mooncake_store.directory.etcd_rpc import Entry, EtcdRpc, RevisionCompacted, Watch
from mooncake_store.directory.schema import (
    EPOCH_BYTES,
    CellPaths,
    Event,
    MemberGone,
    MemberPut,
    PageGone,
    PagePut,
    Rejected,
    decode_event,
)
from mooncake_store.directory.view import DirectoryView
from mooncake_store.errors import DirectoryUnavailable
from mooncake_store.metrics import Metrics
from mooncake_store.types import NodeId

PACE_ENTRIES = 256
PACE_S = 0.0001
"""After so many block entries (a page, some 0.3 ms of work) the thread rests: it shares the GIL with an engine."""

_log = logging.getLogger(__name__)


class OwnEntries(Protocol):
    """Says what the mirror needs from whoever writes our own entries (the session)."""

    def node_id(self) -> NodeId | None:
        """Return our id once joined."""
        ...

    def check_lease(self) -> None:
        """The lease may be gone: etcd was away."""
        ...

    def member_lost(self) -> None:
        """Our member entry disappeared from etcd."""
        ...

    def page_lost(self, page: int) -> None:
        """A page of ours disappeared from etcd."""
        ...

    def reconcile(self, pages: frozenset[int], *, is_member: bool) -> None:
        """A listing had these pages of ours and no others; ``is_member``: it had our member entry."""
        ...


class Mirror:
    """Keeps a view of one cell in a thread of its own.

    Args:
        connector: this thread's way to etcd.
        paths: the cell.
        grace_s: how long entries survive that a data loss took away.
        status: told about every success and failure.
        own: told when our own entries are missing.
    """

    def __init__(
        self,
        connector: Connector,
        *,
        paths: CellPaths,
        grace_s: float,
        status: LinkStatus,
        metrics: Metrics,
        own: OwnEntries,
    ) -> None:
        self.view = DirectoryView()
        self.last_event_revision = 0
        self._connector = connector
        self._paths = paths
        self._grace_s = grace_s
        self._status = status
        self._metrics = metrics
        self._own = own
        self._applied = threading.Condition()
        self._stop = threading.Event()
        self._epoch = b""
        self._watch: Watch | None = None
        self._sweeper: threading.Timer | None = None
        self._reasons_logged: set[str] = set()
        self._num_unpaced = 0
        self._thread = threading.Thread(target=self._run, name="mooncake-directory-mirror", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wait(self, is_met: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``is_met``, which is asked after each applied revision; False on timeout."""
        with self._applied:
            return self._applied.wait_for(is_met, timeout_s)

    def stop(self) -> None:
        """Ask the thread to end. Any thread, idempotent."""
        self._stop.set()
        watch, sweeper = self._watch, self._sweeper
        if watch is not None:
            watch.cancel()
        if sweeper is not None:
            sweeper.cancel()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end; cuts its connection when that takes too long."""
        self._thread.join(timeout_s)
        self._connector.abort()

    # ------------------------------------------------------------------ thread

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow(self._connector.rpc())
            except DirectoryUnavailable as error:
                reason = error.message
            except Exception as error:  # noqa: BLE001 - the thread must outlive a bug: a mirror that stands still is worse
                _log.exception("directory mirror failed, starting over")
                self._metrics.add("mooncake_protocol_errors_total", reason="directory_mirror_bug")
                reason = repr(error)
                self._epoch = b""
            if not self._stop.is_set():
                self._status.down("mirror", reason)
                self._stop.wait(self._connector.failed())
        self._connector.abort()

    def _follow(self, rpc: EtcdRpc) -> None:
        """Bring the view up to date and keep it so; returns only by an exception."""
        epoch, revision = rpc.ensure_epoch(self._paths.epoch, os.urandom(EPOCH_BYTES))
        is_same_data = epoch == self._epoch and revision >= self.view.revision
        if not is_same_data:
            self._relist(rpc, has_lost_data=self._epoch != b"")
            self._epoch = epoch
        self._own.check_lease()
        while True:
            try:
                self._watch_from(rpc, self.view.revision + 1)
            except RevisionCompacted:
                _log.info("etcd compacted its history past revision %d: listing again", self.view.revision)
                self._relist(rpc, has_lost_data=False)

    def _watch_from(self, rpc: EtcdRpc, revision: int) -> None:
        watch = self._watch = rpc.watch(self._paths.root, self._paths.root_end, revision)
        if self._stop.is_set():  # stop() may have missed the watch we just made
            watch.cancel()
        for entries in watch:
            self._status.up("mirror")
            self._connector.succeeded()
            if entries:
                self._apply(entries)

    def _relist(self, rpc: EtcdRpc, *, has_lost_data: bool) -> None:
        sweeper = self._sweeper
        if sweeper is not None:
            sweeper.cancel()
        with self._applied:
            self.view.begin_listing()
        revision = last_event_revision = 0
        node_id = self._own.node_id()
        own_pages: set[int] = set()
        is_member = False
        for entries, listed_revision in rpc.list_range(self._paths.root, self._paths.root_end):
            revision = listed_revision
            last_event_revision = max([last_event_revision, *(entry.revision for entry in entries)])
            for event in self._take_in(entries):
                if event.node_id == node_id and isinstance(event, PagePut):
                    own_pages.add(event.page)
                elif event.node_id == node_id and isinstance(event, MemberPut):
                    is_member = True
        with self._applied:
            if not has_lost_data:
                self.view.sweep()
                last_event_revision = max(last_event_revision, self.last_event_revision)
            self.view.revision, self.last_event_revision = revision, last_event_revision
            num_unseen = self.view.num_unseen
            self._applied.notify_all()
        if num_unseen:
            _log.warning(
                "etcd lost its data: %d entries stay for %.0f s so that their owners can repeat them",
                num_unseen,
                self._grace_s,
            )
            self._sweeper = threading.Timer(self._grace_s, self._sweep)
            self._sweeper.daemon = True
            self._sweeper.start()
        self._own.reconcile(frozenset(own_pages), is_member=is_member)
        self._report()

    def _sweep(self) -> None:
        with self._applied:
            num_removed = self.view.sweep()
            self._applied.notify_all()
        if num_removed:
            _log.info("dropped %d entries that nobody repeated", num_removed)
        self._report()

    def _apply(self, entries: list[Entry]) -> None:
        events = self._take_in(entries)
        with self._applied:
            self.view.revision = entries[-1].revision
            self.last_event_revision = max(self.last_event_revision, self.view.revision)
            self._applied.notify_all()
        node_id = self._own.node_id()
        for event in events:
            if event.node_id != node_id:
                continue
            if isinstance(event, MemberGone):
                self._own.member_lost()
            elif isinstance(event, PageGone):
                self._own.page_lost(event.page)
        self._report()

    def _take_in(self, entries: list[Entry]) -> list[Event]:
        """Decode and apply one entry after the other, with rests; the revision stays the caller's to set."""
        events: list[Event] = []
        for entry in entries:
            event = self._decode(entry)
            if event is None:
                continue
            with self._applied:
                self.view.apply((event,), self.view.revision)
            events.append(event)
            self._num_unpaced += 1 + (len(event.keys) if isinstance(event, PagePut) else 0)
            if self._num_unpaced >= PACE_ENTRIES:
                self._num_unpaced = 0
                time.sleep(PACE_S)
        return events

    def _decode(self, entry: Entry) -> Event | None:
        decoded = decode_event(self._paths, entry.path, entry.value)
        if not isinstance(decoded, Rejected):
            return decoded
        self._reject(decoded)
        return decoded.instead

    def _reject(self, rejected: Rejected) -> None:
        self._metrics.add("mooncake_protocol_errors_total", reason=rejected.reason)
        if rejected.reason not in self._reasons_logged:
            self._reasons_logged.add(rejected.reason)
            _log.warning("ignoring an entry of the directory (%s): %s", rejected.reason, rejected.detail)

    def _report(self) -> None:
        self._metrics.set("mooncake_directory_blocks", self.view.num_blocks)
