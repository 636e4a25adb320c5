"""Speak to one etcd server: the few calls that a directory needs, with deadlines and our own errors.

Built on pyetcd's generated stubs. pyetcd's client is not used: its watcher ends at the first disconnect without
resuming, and its endpoint fail-over blacks a server out for minutes.

Threads: an :class:`EtcdRpc` belongs to one thread; ``close`` and ``Watch.cancel`` may come from any.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import grpc
from pyetcd import etcdrpc

from mooncake_store.directory.endpoints import Endpoint
from mooncake_store.errors import DirectoryUnavailable

RPC_TIMEOUT_S = 2.0
LIST_KEYS_MAX = 64
"""Keys per listing call: at most 64 pages of 22 KiB."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # Each channel reconnects on our schedule, not on that of another channel to the same server.
    ("grpc.use_local_subchannel_pool", 1),
    # Notice a server that vanished without closing the connection; etcd refuses pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
)
# A server cut off from its quorum ends the watch instead of going silent.
_REQUIRE_LEADER = (("hasleader", "true"),)


class LeaseLost(DirectoryUnavailable):
    """The lease we write under no longer exists."""


class RevisionCompacted(DirectoryUnavailable):
    """The revision we asked for was compacted away: list again."""


class Entry(NamedTuple):
    """One key as listed or as watched; ``value`` is None when it was deleted."""

    path: bytes
    value: bytes | None
    revision: int


class EpochReply(NamedTuple):
    """Identity of the data's present life, and the service's revision."""

    epoch: bytes
    revision: int


class Write(NamedTuple):
    """Put ``value`` at ``path``; delete it when None."""

    path: bytes
    value: bytes | None


class Watch:
    """A running watch of one key range.

    Iterate over it from the thread that owns it: each item is a list of entries, oldest first; an empty list says that
    the watch was established.

    Raises (from iteration):
        RevisionCompacted: the start revision is gone.
        DirectoryUnavailable: the stream ended.
    """

    def __init__(self, call: Any, done: threading.Event) -> None:
        self._call = call
        self._done = done

    def __iter__(self) -> Iterator[list[Entry]]:
        try:
            for response in self._call:
                if response.compact_revision:
                    raise RevisionCompacted(f"revisions before {response.compact_revision} were compacted")
                if response.canceled:
                    raise DirectoryUnavailable(f"etcd ended the watch: {response.cancel_reason or 'no reason given'}")
                yield [_watched(event) for event in response.events]
        except grpc.RpcError as error:
            raise _translate(error) from error
        finally:
            self.cancel()
        raise DirectoryUnavailable("etcd closed the watch stream")

    def cancel(self) -> None:
        """End the watch. Idempotent, any thread."""
        self._done.set()
        self._call.cancel()


class EtcdRpc:
    """One connection to one server.

    Every call raises DirectoryUnavailable when the server does not answer in time.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._channel = grpc.insecure_channel(str(endpoint), options=_CHANNEL_OPTIONS)
        self._kv = etcdrpc.KVStub(self._channel)
        self._lease = etcdrpc.LeaseStub(self._channel)
        self._watch = etcdrpc.WatchStub(self._channel)

    def ensure_epoch(self, path: bytes, candidate: bytes) -> EpochReply:
        """Return the value of ``path``, created as ``candidate`` if it did not exist."""
        is_absent = etcdrpc.Compare(
            key=path, target=etcdrpc.Compare.CREATE, result=etcdrpc.Compare.EQUAL, create_revision=0
        )
        put = etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=path, value=candidate))
        get = etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=path))
        reply = self._call(self._kv.Txn, etcdrpc.TxnRequest(compare=[is_absent], success=[put], failure=[get]))
        epoch = candidate if reply.succeeded else reply.responses[0].response_range.kvs[0].value
        return EpochReply(epoch, reply.header.revision)

    def list_range(self, start: bytes, end: bytes) -> Iterator[tuple[list[Entry], int]]:
        """Yield the entries of [start, end) in portions, all as of one revision, which comes with each."""
        revision = 0
        while True:
            request = etcdrpc.RangeRequest(key=start, range_end=end, limit=LIST_KEYS_MAX, revision=revision)
            reply = self._call(self._kv.Range, request)
            revision = revision or reply.header.revision
            yield [Entry(kv.key, kv.value, kv.mod_revision) for kv in reply.kvs], revision
            if not reply.more:
                return
            start = reply.kvs[-1].key + b"\0"

    def watch(self, start: bytes, end: bytes, revision: int) -> Watch:
        """Watch [start, end) from ``revision`` on."""
        request = etcdrpc.WatchRequest(
            create_request=etcdrpc.WatchCreateRequest(key=start, range_end=end, start_revision=revision)
        )
        done = threading.Event()

        def requests() -> Iterator[Any]:
            yield request
            done.wait()

        return Watch(self._watch.Watch(requests(), metadata=_REQUIRE_LEADER), done)

    def grant(self, ttl_s: int) -> int:
        """Return a new lease."""
        return int(self._call(self._lease.LeaseGrant, etcdrpc.LeaseGrantRequest(TTL=ttl_s)).ID)

    def keep_alive(self, lease: int, timeout_s: float) -> bool:
        """Prolong a lease; False when it no longer exists."""
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        try:
            for reply in self._lease.LeaseKeepAlive(iter((request,)), timeout=timeout_s):
                return bool(reply.TTL > 0)
        except grpc.RpcError as error:
            raise _translate(error) from error
        raise DirectoryUnavailable("etcd closed the keep-alive stream")

    def revoke(self, lease: int, timeout_s: float) -> None:
        """End a lease: everything written under it disappears at once."""
        self._call(self._lease.LeaseRevoke, etcdrpc.LeaseRevokeRequest(ID=lease), timeout_s)

    def commit(self, writes: Iterable[Write], lease: int) -> int:
        """Write all in one transaction under ``lease``; return its revision.

        Raises:
            LeaseLost: the lease does not exist.
        """
        operations = [
            etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=path))
            if value is None
            else etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=path, value=value, lease=lease))
            for path, value in writes
        ]
        return int(self._call(self._kv.Txn, etcdrpc.TxnRequest(success=operations)).header.revision)

    def compact(self, revision: int) -> None:
        """Forget the history before ``revision``. Operators and tests only."""
        self._call(self._kv.Compact, etcdrpc.CompactionRequest(revision=revision, physical=True))

    def close(self) -> None:
        """Close the connection; calls in flight end with DirectoryUnavailable. Any thread."""
        self._channel.close()

    def _call(self, method: Any, request: Any, timeout_s: float = RPC_TIMEOUT_S) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _translate(error) from error
        except ValueError as error:  # "Cannot invoke RPC on closed channel!"
            raise DirectoryUnavailable(str(error)) from error


def _watched(event: Any) -> Entry:
    kv = event.kv
    return Entry(kv.key, None if event.type == _DELETE else kv.value, kv.mod_revision)


_DELETE = 1  # mvccpb.Event.DELETE


def _translate(error: grpc.RpcError) -> DirectoryUnavailable:
    """Return our error for gRPC's; the text is one line."""
    code = error.code() if hasattr(error, "code") else None
    details = " ".join(str(error.details() if hasattr(error, "details") else error).split())
    if "requested lease not found" in details:
        return LeaseLost(details)
    if "compacted" in details:
        return RevisionCompacted(details)
    return DirectoryUnavailable(f"{code.name if code else type(error).__name__}: {details}")
