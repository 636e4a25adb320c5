"""Keep a mirror of one cell: members, and who holds which block [pure].

The view is a function of the key-value state alone: after any sequence of events it equals what a fresh listing of the
same state would build. In particular a node's blocks are visible exactly while its member entry exists, so every node
that ``locate`` names is in ``members``.

Data structures, chosen for the reader::

    _holders   block key -> tuple of node ids      one probe per block; the tuples are shared between blocks
    _runs      first key of a run -> run           matches 16 blocks with one probe (runs.py)
    _nodes     node id -> _Node(member, pages)     pages: page number -> the keys it holds
    _Node.repeated   key -> extra pages that list it   normally empty: a key being moved between two pages

Threading: one writer at a time (the caller's lock); readers take no lock. A reader sees each block's holders either
before or after an event, never in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mooncake_store.directory.runs import RunIndex
from mooncake_store.directory.schema import Event, MemberPut, PageGone, PagePath, PagePut
from mooncake_store.types import BlockKey, Member, NodeId

_NOBODY: tuple[NodeId, ...] = ()


class _Node:
    """What the view knows about one node; ``member`` is None while only its pages are known."""

    __slots__ = ("alone", "member", "pages", "repeated")

    def __init__(self, node_id: NodeId) -> None:
        self.member: Member | None = None
        self.pages: dict[int, tuple[BlockKey, ...]] = {}
        self.repeated: dict[BlockKey, int] = {}
        self.alone = (node_id,)


class DirectoryView:
    """Mirrors one cell.

    Attributes:
        revision: revision up to which events are applied; the caller's clock, it may move back when data was lost.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._holders: dict[BlockKey, tuple[NodeId, ...]] = {}
        self._runs = RunIndex()
        self._nodes: dict[NodeId, _Node] = {}
        self._members: dict[NodeId, Member] = {}
        self._groups: dict[tuple[NodeId, ...], tuple[NodeId, ...]] = {}
        self._unseen: set[NodeId | PagePath] = set()

    # ------------------------------------------------------------------ readers

    @property
    def num_blocks(self) -> int:
        """Return how many distinct blocks have a replica."""
        return len(self._holders)

    @property
    def num_members(self) -> int:
        """Return how many members are known."""
        return len(self._members)

    def members(self) -> dict[NodeId, Member]:
        """Return a copy of the members."""
        return dict(self._members)

    def has_member(self, node_id: NodeId) -> bool:
        """Return whether this node is a member."""
        return node_id in self._members

    def locate(self, keys: Sequence[BlockKey]) -> list[tuple[NodeId, ...]]:
        """Return the holders of each key, same order, ``()`` for none. Holders are in order of appearance."""
        get = self._holders.get
        return [get(key, _NOBODY) for key in keys]

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading keys have a replica."""
        return self._runs.match(keys, self._holders)

    def pages_of(self, node_id: NodeId) -> dict[int, tuple[BlockKey, ...]]:
        """Return a copy of a node's pages, visible or not."""
        node = self._nodes.get(node_id)
        return dict(node.pages) if node else {}

    # ------------------------------------------------------------------ writer

    def apply(self, events: Iterable[Event], revision: int) -> None:
        """Apply events in order, then take over their revision."""
        for event in events:
            if isinstance(event, PagePut):
                self._put_page(event)
            elif isinstance(event, PageGone):
                self._drop_page(event.node_id, event.page)
            elif isinstance(event, MemberPut):
                self._put_member(event)
            else:
                self._drop_member(event.node_id)
        self.revision = revision

    def begin_listing(self) -> None:
        """Mark everything as unseen; apply the listing's entries next, then call ``sweep``.

        Entries that the listing repeats stay visible throughout, so a reader never sees a half-filled view.
        """
        self._unseen = set(self._members)
        for node_id, node in self._nodes.items():
            self._unseen.update(PagePath(node_id, page) for page in node.pages)

    @property
    def num_unseen(self) -> int:
        """Return how many entries wait for ``sweep``."""
        return len(self._unseen)

    def sweep(self) -> int:
        """Remove what no event has named since ``begin_listing``; return how many entries that were."""
        unseen, self._unseen = self._unseen, set()
        for entry in unseen:
            if isinstance(entry, PagePath):
                self._drop_page(entry.node_id, entry.page)
            else:
                self._drop_member(entry)
        return len(unseen)

    def _put_member(self, event: MemberPut) -> None:
        node = self._node(event.node_id)
        is_new = node.member is None
        node.member = event.member
        # Members first: whoever sees a holder must find its member.
        self._members[event.node_id] = event.member
        if is_new:
            for keys in node.pages.values():
                self._show(node, keys)
                self._runs.add(keys)
        self._seen(event.node_id)

    def _drop_member(self, node_id: NodeId) -> None:
        self._seen(node_id)
        node = self._nodes.get(node_id)
        if node is None or node.member is None:
            return
        for keys in node.pages.values():
            self._runs.remove(keys)
            self._hide(node, keys)
        node.member = None
        self._members.pop(node_id, None)
        self._forget_if_empty(node_id, node)

    def _put_page(self, event: PagePut) -> None:
        node = self._node(event.node_id)
        old, keys = node.pages.get(event.page, ()), event.keys
        new_set = set(keys)
        if len(new_set) != len(keys):
            keys = tuple(dict.fromkeys(keys))
        node.pages[event.page] = keys
        if node.member is not None and old != keys:
            old_set = set(old)
            self._show(node, [key for key in keys if key not in old_set])
            self._runs.remove(old)
            self._runs.add(keys)
            self._hide(node, [key for key in old if key not in new_set])
        self._seen(PagePath(event.node_id, event.page))

    def _drop_page(self, node_id: NodeId, page: int) -> None:
        self._seen(PagePath(node_id, page))
        node = self._nodes.get(node_id)
        if node is None:
            return
        keys = node.pages.pop(page, None)
        if keys is None:
            return
        if node.member is not None:
            self._runs.remove(keys)
            self._hide(node, keys)
        self._forget_if_empty(node_id, node)

    def _show(self, node: _Node, keys: Iterable[BlockKey]) -> None:
        holders = self._holders
        alone, (node_id,) = node.alone, node.alone
        for key in keys:
            current = holders.get(key)
            if current is None:
                holders[key] = alone
            elif node_id in current:
                node.repeated[key] = node.repeated.get(key, 0) + 1
            else:
                holders[key] = self._group((*current, node_id))

    def _hide(self, node: _Node, keys: Iterable[BlockKey]) -> None:
        holders, repeated = self._holders, node.repeated
        alone, (node_id,) = node.alone, node.alone
        for key in keys:
            if repeated and key in repeated:
                if repeated[key] == 1:
                    del repeated[key]
                else:
                    repeated[key] -= 1
                continue
            current = holders[key]
            if current == alone:
                del holders[key]
            else:
                holders[key] = self._group(tuple(holder for holder in current if holder != node_id))

    def _group(self, nodes: tuple[NodeId, ...]) -> tuple[NodeId, ...]:
        """Return the shared tuple for this set of holders, so that a replica costs no tuple of its own."""
        if len(nodes) == 1:
            return self._nodes[nodes[0]].alone
        if len(self._groups) >= _GROUPS_MAX:
            self._groups.clear()
        return self._groups.setdefault(nodes, nodes)

    def _node(self, node_id: NodeId) -> _Node:
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Node(node_id)
        return node

    def _forget_if_empty(self, node_id: NodeId, node: _Node) -> None:
        if node.member is None and not node.pages:
            del self._nodes[node_id]

    def _seen(self, entry: NodeId | PagePath) -> None:
        if self._unseen:
            self._unseen.discard(entry)


_GROUPS_MAX = 4096
"""Distinct sets of holders that are shared; beyond it the table starts over (only memory is at stake)."""
