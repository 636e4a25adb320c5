"""Name every etcd key of a cell and code every value [pure].

Layout (``/mooncake/1/<cell>/`` is the root of one cell; 1 is :data:`LAYOUT_VERSION`)::

    epoch                      16 random bytes, created once: tells one life of the data from the next
    member/<node_id>           Member, bound to the member's lease
    page/<node_id>/<8 hex>     up to PAGE_ENTRIES_MAX block keys that this node holds, bound to the same lease

A value is one version byte followed by msgpack. Whatever does not decode is *rejected with a reason*, never raised into
the watch: another version or a stray ``etcdctl put`` under our root must not take a mirror down.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from mooncake_store.errors import LocalProtocolError
from mooncake_store.types import CONTENT_MAX_BYTES, NAMESPACE_BYTES, PART_BYTES, BlockKey, Member, NodeId

LAYOUT_VERSION = 1
VALUE_VERSION = 1
PAGE_ENTRIES_MAX = 256
KEY_MIN_BYTES = NAMESPACE_BYTES + PART_BYTES + 1
KEY_MAX_BYTES = NAMESPACE_BYTES + PART_BYTES + CONTENT_MAX_BYTES
EPOCH_BYTES = 16
NAME_MAX_CHARS = 200
VALUE_MAX_BYTES = 64 << 10
"""A full page takes 22 KB. A larger value is not decoded: what it expands to has no bound."""

RejectReason = Literal[
    "directory_path",
    "directory_version",
    "directory_malformed",
    "directory_mismatch",
    "directory_oversize",
    "directory_key",
]
"""Closed set; the label of ``mooncake_protocol_errors_total``."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+~-]*")
_PAGE_HEX_CHARS = 8
_PAGE_HEX = re.compile(rb"[0-9a-f]{8}")
_VERSION_BYTE = bytes([VALUE_VERSION])


class MemberPut(NamedTuple):
    """A member announced itself, or changed its announcement."""

    node_id: NodeId
    member: Member


class MemberGone(NamedTuple):
    """A member left, or its session expired."""

    node_id: NodeId


class PagePut(NamedTuple):
    """A page of a node now holds exactly these keys."""

    node_id: NodeId
    page: int
    keys: tuple[BlockKey, ...]


class PageGone(NamedTuple):
    """A page of a node no longer exists."""

    node_id: NodeId
    page: int


Event = MemberPut | MemberGone | PagePut | PageGone


class Rejected(NamedTuple):
    """A key or value that we cannot accept, and why.

    Attributes:
        reason: one of a closed set, for counting.
        detail: one line for the log: what, where.
        instead: what the mirror should assume: the entry is gone (a miss is better than a stale guess); None when the
            path itself is unknown.
    """

    reason: RejectReason
    detail: str
    instead: MemberGone | PageGone | None


class PagePath(NamedTuple):
    """Names one page."""

    node_id: NodeId
    page: int


class _PageValue(msgspec.Struct, frozen=True, array_like=True):
    """Wire form of a page: the bytes that all keys begin with, then the rest of each key."""

    prefix: bytes
    suffixes: tuple[bytes, ...]


_member_decoder = msgspec.msgpack.Decoder(Member)
_page_decoder = msgspec.msgpack.Decoder(_PageValue)
_encoder = msgspec.msgpack.Encoder()


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it may be part of an etcd key.

    Raises:
        LocalProtocolError: it is empty, too long or has a character that could be mistaken for a separator.
    """
    if len(name) <= NAME_MAX_CHARS and _NAME.fullmatch(name):
        return name
    raise LocalProtocolError(
        f"{what} {name[:NAME_MAX_CHARS]!r} cannot be part of an etcd key",
        hint=f"use 1 to {NAME_MAX_CHARS} letters, digits and . _ : @ + ~ - , beginning with a letter or digit",
    )


class CellPaths:
    """Builds and parses the etcd keys of one cell.

    Args:
        cell: name of the cell.

    Raises:
        LocalProtocolError: the name cannot be part of a key.
    """

    def __init__(self, cell: str) -> None:
        check_name(cell, "cell")
        self.root = f"/mooncake/{LAYOUT_VERSION}/{cell}/".encode()
        self.root_end = self.root[:-1] + bytes([self.root[-1] + 1])
        self.epoch = self.root + b"epoch"
        self._member = self.root + b"member/"
        self._page = self.root + b"page/"

    def member(self, node_id: NodeId) -> bytes:
        """Return the key of a member. Raises LocalProtocolError for an id that cannot be part of a key."""
        return self._member + check_name(node_id, "node id").encode()

    def page(self, node_id: NodeId, page: int) -> bytes:
        """Return the key of a page. Raises LocalProtocolError for a bad id or a page outside 0..2**32-1."""
        if not 0 <= page < 1 << 4 * _PAGE_HEX_CHARS:
            raise LocalProtocolError(f"page {page} does not fit {_PAGE_HEX_CHARS} hex digits")
        return b"%s%s/%08x" % (self._page, check_name(node_id, "node id").encode(), page)

    def parse(self, path: bytes) -> NodeId | PagePath | None:
        """Return the node of a member key, the page of a page key, None for anything else."""
        if path.startswith(self._page):
            node, _, page = path[len(self._page) :].rpartition(b"/")
            name = _ascii_name(node)
            if name is None or not _PAGE_HEX.fullmatch(page):
                return None
            return PagePath(name, int(page, 16))
        if path.startswith(self._member):
            return _ascii_name(path[len(self._member) :])
        return None


def encode_member(member: Member) -> bytes:
    """Return the value of a member key."""
    return _VERSION_BYTE + _encoder.encode(member)


def encode_page(keys: Sequence[BlockKey]) -> bytes:
    """Return the value of a page.

    The longest common prefix is stored once: keys of one cache share namespace and part, which is a third of the bytes.

    Raises:
        LocalProtocolError: more than PAGE_ENTRIES_MAX keys, or a key of impossible length.
    """
    if len(keys) > PAGE_ENTRIES_MAX:
        raise LocalProtocolError(f"page with {len(keys)} entries, at most {PAGE_ENTRIES_MAX} fit")
    if not keys:
        return _VERSION_BYTE + _encoder.encode(_PageValue(b"", ()))
    for key in keys:
        check_key(key)
    first, last = min(keys), max(keys)
    num_common = 0
    for left, right in zip(first, last, strict=False):
        if left != right:
            break
        num_common += 1
    suffixes = tuple(key[num_common:] for key in keys)
    return _VERSION_BYTE + _encoder.encode(_PageValue(first[:num_common], suffixes))


def check_key(key: bytes) -> None:
    """Raise LocalProtocolError unless the key's length is one that ``block_key`` can produce."""
    if not KEY_MIN_BYTES <= len(key) <= KEY_MAX_BYTES:
        raise LocalProtocolError(
            f"block key of {len(key)} bytes", hint="build keys with mooncake_store.types.block_key"
        )


def decode_event(paths: CellPaths, path: bytes, value: bytes | None) -> Event | Rejected | None:
    """Return what a put (``value``) or delete (None) of ``path`` means; None when it does not concern the view."""
    target = paths.parse(path)
    if target is None:
        if path == paths.epoch or value is None:
            return None
        return Rejected("directory_path", f"unknown key {path!r}", None)
    if isinstance(target, PagePath):
        gone = PageGone(target.node_id, target.page)
        return gone if value is None else _decode_page(gone, path, value)
    if value is None:
        return MemberGone(target)
    return _decode_member(target, path, value)


def _decode_member(node_id: NodeId, path: bytes, value: bytes) -> MemberPut | Rejected:
    gone = MemberGone(node_id)
    if len(value) > VALUE_MAX_BYTES:
        return Rejected("directory_oversize", f"{path!r}: {len(value)} bytes", gone)
    if value[:1] != _VERSION_BYTE:
        return Rejected("directory_version", f"{path!r}: {_describe_version(value)}", gone)
    try:
        member = _member_decoder.decode(memoryview(value)[1:])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        return Rejected("directory_malformed", f"{path!r}: {error}", gone)
    if member.node_id != node_id:
        return Rejected("directory_mismatch", f"{path!r}: the value names node {member.node_id[:40]!r}", gone)
    return MemberPut(node_id, member)


def _decode_page(gone: PageGone, path: bytes, value: bytes) -> PagePut | Rejected:
    if len(value) > VALUE_MAX_BYTES:
        return Rejected("directory_oversize", f"{path!r}: {len(value)} bytes", gone)
    if value[:1] != _VERSION_BYTE:
        return Rejected("directory_version", f"{path!r}: {_describe_version(value)}", gone)
    try:
        page = _page_decoder.decode(memoryview(value)[1:])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        return Rejected("directory_malformed", f"{path!r}: {error}", gone)
    prefix, suffixes = page.prefix, page.suffixes
    if len(suffixes) > PAGE_ENTRIES_MAX:
        return Rejected("directory_oversize", f"{path!r}: {len(suffixes)} entries", gone)
    if len(prefix) > KEY_MAX_BYTES:
        return Rejected("directory_key", f"{path!r}: keys of {len(prefix)} bytes and more", gone)
    keys = tuple([BlockKey(prefix + suffix) for suffix in suffixes])
    if keys:
        lengths = set(map(len, keys))
        if min(lengths) < KEY_MIN_BYTES or max(lengths) > KEY_MAX_BYTES:
            return Rejected("directory_key", f"{path!r}: key of {min(lengths)} to {max(lengths)} bytes", gone)
    return PagePut(gone.node_id, gone.page, keys)


def _describe_version(value: bytes) -> str:
    return f"version {value[0]}, we read {VALUE_VERSION}" if value else "empty value"


def _ascii_name(raw: bytes) -> NodeId | None:
    try:
        name = raw.decode("ascii")
    except UnicodeDecodeError:
        return None
    return NodeId(name) if len(name) <= NAME_MAX_CHARS and _NAME.fullmatch(name) else None
