"""Keep a directory inside one process: the twin of the etcd directory, on the same view and the same pages.

For tests, single-process use and ``directory = "off"``. Members of one :class:`MemoryCell` see each other at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mooncake_store.directory.base import DirectoryHealth
from mooncake_store.directory.pages import PageTable
from mooncake_store.directory.schema import (
    Event,
    MemberGone,
    MemberPut,
    PageGone,
    PagePut,
    check_key,
    check_name,
)
from mooncake_store.directory.view import DirectoryView
from mooncake_store.errors import LocalProtocolError
from mooncake_store.metrics import Metrics
from mooncake_store.types import BlockKey, Member, NodeId

ENTRIES_MAX = 1 << 20
"""Blocks that one member may list."""


class MemoryCell:
    """What the members of one cell share.

    Threads: any.
    """

    def __init__(self) -> None:
        self.view = DirectoryView()
        self._changed = threading.Condition()

    def commit(self, make_events: Callable[[], list[Event]]) -> None:
        """Apply what ``make_events`` returns as one revision; it runs under the cell's lock."""
        with self._changed:
            events = make_events()
            if events:
                self.view.apply(events, self.view.revision + 1)
                self._changed.notify_all()

    def wait_revision(self, revision: int, timeout_s: float) -> bool:
        """Wait until ``revision`` is applied; False on timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self.view.revision >= revision, timeout_s)


class MemoryDirectory:
    """Answers from, and announces to, a cell of this process.

    Args:
        cell: the cell to share; None for one of its own.
        metrics: where to report; None for nowhere.
    """

    def __init__(self, cell: MemoryCell | None = None, *, metrics: Metrics | None = None) -> None:
        self._cell = cell or MemoryCell()
        self._view = self._cell.view
        self._metrics = metrics
        self._table = PageTable(unwritten_max=ENTRIES_MAX)
        self._member: Member | None = None
        self._is_closed = False
        if metrics:
            metrics.set("mooncake_directory_connected", 1)

    def join(self, member: Member) -> None:
        """Announce ourselves. Raises LocalProtocolError for a second identity."""
        check_name(member.node_id, "node id")

        def events() -> list[Event]:
            if self._is_closed:
                return []
            if self._member is not None and self._member.node_id != member.node_id:
                raise LocalProtocolError(f"already joined as {self._member.node_id}, cannot join as {member.node_id}")
            self._member = member
            return [MemberPut(member.node_id, member)]

        self._cell.commit(events)

    def members(self) -> dict[NodeId, Member]:
        """Return a copy of the members, ourselves included."""
        return self._view.members()

    def publish(self, keys: Sequence[BlockKey]) -> None:
        """Announce blocks. Raises LocalProtocolError before ``join``."""
        for key in keys:
            check_key(key)

        def events() -> list[Event]:
            if self._is_closed:
                return []
            num_dropped = self._table.add(keys)
            if num_dropped and self._metrics:
                self._metrics.add("mooncake_directory_dropped_total", num_dropped)
            return self._page_events(self._require_member())

        self._require_member()
        self._cell.commit(events)
        self._report()

    def withdraw(self, keys: Sequence[BlockKey]) -> None:
        """Take blocks back; unknown keys are ignored."""

        def events() -> list[Event]:
            if self._member is None or self._is_closed or not self._table.remove(keys):
                return []
            return self._page_events(self._member)

        self._cell.commit(events)
        self._report()

    def flush(self, timeout_s: float) -> bool:
        """Return True: nothing is written behind here."""
        return True

    def locate(self, keys: Sequence[BlockKey]) -> list[tuple[NodeId, ...]]:
        """Return who holds each key."""
        return self._view.locate(keys)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading keys have a replica."""
        return self._view.match(keys)

    def revision(self) -> int:
        """Return the cell's revision."""
        return self._view.revision

    def wait_revision(self, revision: int, timeout_s: float) -> bool:
        """Wait until ``revision`` is applied; False on timeout."""
        return self._cell.wait_revision(revision, timeout_s)

    def health(self) -> DirectoryHealth:
        """Return the state of the link, which is always up until ``close``."""
        return DirectoryHealth(
            connected=not self._is_closed,
            revision=self._view.revision,
            num_blocks=self._view.num_blocks,
            num_members=self._view.num_members,
            num_pending=0,
            error="closed" if self._is_closed else "",
        )

    def close(self) -> None:
        """Leave the cell. Idempotent."""

        def events() -> list[Event]:
            if self._is_closed:
                return []
            self._is_closed = True
            if self._member is None:
                return []
            node_id = self._member.node_id
            gone: list[Event] = [PageGone(node_id, page) for page in self._table.pages()]
            return [MemberGone(node_id), *gone]

        self._cell.commit(events)
        if self._metrics:
            self._metrics.set("mooncake_directory_connected", 0)

    def _require_member(self) -> Member:
        if self._member is None:
            raise LocalProtocolError("publish before join", hint="call join(member) first")
        return self._member

    def _page_events(self, member: Member) -> list[Event]:
        writes = self._table.take_dirty(ENTRIES_MAX)
        self._table.written(writes)
        return [
            PagePut(member.node_id, page, keys) if keys else PageGone(member.node_id, page) for page, keys in writes
        ]

    def _report(self) -> None:
        if self._metrics:
            self._metrics.set("mooncake_directory_blocks", self._view.num_blocks)


_cells: dict[str, MemoryCell] = {}
_cells_lock = threading.Lock()


def shared_cell(name: str) -> MemoryCell:
    """Return the cell of that name in this process, the same object each time."""
    with _cells_lock:
        return _cells.setdefault(name, MemoryCell())
