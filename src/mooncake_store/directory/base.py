"""Define where blocks are and who is in the cell: the metadata plane.

Architecture::

    EtcdDirectory   etcd: members under a TTL session, pages of block entries per member, one watch for everything
    MemoryDirectory the same contract inside one process, for tests and single-process use
      both keep a DirectoryView (view.py, pure): watch events in, replica index out

Memory model: every instance mirrors the whole cell; ``locate``/``match`` are dictionary probes, never I/O.

The directory is a hint, the owner is the truth: an entry may be stale, a stale entry costs one denied lease = one miss.

Failure model: losing the backing service never raises out of ``publish``/``withdraw``/``locate``/``match``. Our entries
are queued (bounded; beyond the bound the oldest publications are dropped and counted) and re-published after
reconnection; the mirror keeps answering with what it last knew. ``health()`` tells.

Threading model: every method may be called from any thread; none of the hot ones blocks on I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from mooncake_store.types import BlockKey, Member, NodeId


class DirectoryHealth(msgspec.Struct, frozen=True):
    """State of the link to the backing service. ``error`` is the last failure in one line, empty when connected."""

    connected: bool
    revision: int
    num_blocks: int
    num_members: int
    num_pending: int
    error: str


class Directory(Protocol):
    """Answers which members hold which blocks."""

    def join(self, member: Member) -> None:
        """Announce ourselves; kept alive until ``close``; re-announced with all our entries after any loss.

        Joining again with the same node id replaces the announcement.

        Raises:
            LocalProtocolError: for another node id, or one that cannot be part of a key.
        """
        ...

    def members(self) -> dict[NodeId, Member]:
        """Return the members that the mirror knows, ourselves included. A copy."""
        ...

    def publish(self, keys: Sequence[BlockKey]) -> None:
        """Announce that we hold these blocks. Written behind, in batches of some 20 ms. Idempotent.

        Ignored after ``close``.

        Raises:
            LocalProtocolError: before ``join``, or for a key of a length that ``block_key`` cannot produce.
        """
        ...

    def withdraw(self, keys: Sequence[BlockKey]) -> None:
        """Announce that we no longer hold these blocks. Unknown keys are ignored."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued so far is written and our own mirror shows it; False on timeout.

        Afterwards a peer that waits for our ``revision()`` sees it too.
        """
        ...

    def locate(self, keys: Sequence[BlockKey]) -> list[tuple[NodeId, ...]]:
        """Return who holds each key, same order; ``()`` is a miss. No I/O.

        Every node named here is in ``members()`` unless it left in between.
        """
        ...

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Return the prefix match: how many leading keys have at least one replica. No I/O."""
        ...

    def revision(self) -> int:
        """Return the revision of the last change that the mirror has applied.

        Grows monotonically while the backing service keeps its data. A number to pass to a peer's ``wait_revision``.
        """
        ...

    def wait_revision(self, revision: int, timeout_s: float) -> bool:
        """Wait until the mirror has applied ``revision`` (read-your-peer's view); False on timeout."""
        ...

    def health(self) -> DirectoryHealth:
        """Return the state of the link."""
        ...

    def close(self) -> None:
        """Leave the cell: our membership and entries disappear for everyone. Idempotent, bounded in time."""
        ...
