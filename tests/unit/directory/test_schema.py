"""The bytes in etcd: golden values, and every way to be refused."""

import msgspec
import pytest

from mooncake_store.directory.schema import (
    KEY_MAX_BYTES,
    PAGE_ENTRIES_MAX,
    CellPaths,
    MemberGone,
    MemberPut,
    PageGone,
    PagePath,
    PagePut,
    Rejected,
    check_name,
    decode_event,
    encode_member,
    encode_page,
)
from mooncake_store.errors import LocalProtocolError
from mooncake_store.testing.directory import make_keys
from mooncake_store.types import HostIdentity, Member, block_key

PATHS = CellPaths("default")
MEMBER = Member("node-1", "engine", "tcp://127.0.0.1:40123", HostIdentity("boot", 4026531836), 42, 1 << 30, "0.1.0")
KEYS = tuple(block_key(b"0123456789abcdef", 1, content) for content in (b"\xaa\x01", b"\xaa\x02\x03", b"\xaa"))


def test_golden_paths():
    assert PATHS.root == b"/mooncake/1/default/"
    assert PATHS.root_end == b"/mooncake/1/default0"
    assert PATHS.epoch == b"/mooncake/1/default/epoch"
    assert PATHS.member("node-1") == b"/mooncake/1/default/member/node-1"
    assert PATHS.page("node-1", 0xBEEF) == b"/mooncake/1/default/page/node-1/0000beef"


def test_golden_member():
    expected = (
        b"\x01\x98\xa6node-1\xa6engine\xb5tcp://127.0.0.1:40123\x92\xa4boot\xce\xef\xff\xff\xfc\x2a"
        b"\xce\x40\x00\x00\x00\xa50.1.0\xa0"
    )
    expected = expected.replace(b"\xef\xff\xff\xfc", (4026531836).to_bytes(4, "big"))
    assert encode_member(MEMBER) == expected
    assert decode_event(PATHS, PATHS.member("node-1"), expected) == MemberPut("node-1", MEMBER)


def test_golden_page():
    expected = b"\x01\x92\xc4\x130123456789abcdef\x00\x01\xaa\x93\xc4\x01\x01\xc4\x02\x02\x03\xc4\x00"
    assert encode_page(KEYS) == expected
    assert decode_event(PATHS, PATHS.page("node-1", 7), expected) == PagePut("node-1", 7, KEYS)


def test_an_empty_page():
    assert encode_page(()) == b"\x01\x92\xc4\x00\x90"
    assert decode_event(PATHS, PATHS.page("a", 0), encode_page(())) == PagePut("a", 0, ())


def test_the_prefix_is_stored_once():
    keys = make_keys(PAGE_ENTRIES_MAX)
    assert len(encode_page(keys)) < PAGE_ENTRIES_MAX * 34 + 32
    assert decode_event(PATHS, PATHS.page("a", 0), encode_page(keys)) == PagePut("a", 0, tuple(keys))


def test_deletions():
    assert decode_event(PATHS, PATHS.member("a"), None) == MemberGone("a")
    assert decode_event(PATHS, PATHS.page("a", 3), None) == PageGone("a", 3)
    assert decode_event(PATHS, PATHS.epoch, None) is None
    assert decode_event(PATHS, PATHS.epoch, b"0123456789abcdef") is None
    assert decode_event(PATHS, PATHS.root + b"unknown", None) is None


ENCODED_PAGE = msgspec.msgpack.encode
REJECTED_PAGES = [
    ("directory_version", b""),
    ("directory_version", b"\x02\x92\xc4\x00\x90"),
    ("directory_malformed", b"\x01"),
    ("directory_malformed", b"\x01\x92\xc4\x00"),
    ("directory_malformed", b"\x01\x92\xc4\x00\x90\x00"),
    ("directory_malformed", b"\x01" + ENCODED_PAGE({"prefix": b"", "suffixes": []})),
    ("directory_malformed", b"\x01" + ENCODED_PAGE([b"", ["text"]])),
    ("directory_malformed", b"\x01" + ENCODED_PAGE([b"", [3]])),
    ("directory_oversize", b"\x01" + ENCODED_PAGE([b"x" * 20, [b""] * (PAGE_ENTRIES_MAX + 1)])),
    ("directory_key", b"\x01" + ENCODED_PAGE([b"x" * 18, [b"y", b""]])),
    ("directory_key", b"\x01" + ENCODED_PAGE([b"x" * KEY_MAX_BYTES, [b"", b"y"]])),
]


@pytest.mark.parametrize(("reason", "value"), REJECTED_PAGES)
def test_rejected_pages_count_as_gone(reason, value):
    rejected = decode_event(PATHS, PATHS.page("a", 3), value)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == reason
    assert rejected.instead == PageGone("a", 3)
    assert "page/a/00000003" in rejected.detail


@pytest.mark.parametrize(
    ("reason", "value"),
    [
        ("directory_version", b""),
        ("directory_version", b"\x00" + encode_member(MEMBER)[1:]),
        ("directory_malformed", encode_member(MEMBER)[:-1]),
        ("directory_malformed", b"\x01" + msgspec.msgpack.encode(["node-1", "engine"])),
        ("directory_mismatch", encode_member(msgspec.structs.replace(MEMBER, node_id="node-2"))),
    ],
)
def test_rejected_members_count_as_gone(reason, value):
    rejected = decode_event(PATHS, PATHS.member("node-1"), value)
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.instead) == (reason, MemberGone("node-1"))


@pytest.mark.parametrize(
    "tail",
    [
        b"member/", b"member/a/b", b"member/\xff", b"member/a b", b"page/", b"page/a", b"page/a/", b"page/a/1",
        b"page/a/0000000G", b"page/a/0000000A", b"page/a/ 0000001", b"page/a/-0000001", b"page/a/0x000001",
        b"page//00000001", b"page/a/b/00000001", b"other", b"", b"epoch/x", b"member/" + b"x" * 201,
    ],
)  # fmt: skip
def test_unknown_paths(tail):
    rejected = decode_event(PATHS, PATHS.root + tail, encode_page(()))
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.instead) == ("directory_path", None)
    assert decode_event(PATHS, PATHS.root + tail, None) is None


def test_trailing_fields_of_a_later_minor_version_are_ignored():
    value = b"\x01" + msgspec.msgpack.encode([KEYS[0], [b""], "later"])
    assert decode_event(PATHS, PATHS.page("a", 0), value) == PagePut("a", 0, KEYS[:1])


def test_paths_parse_back():
    assert PATHS.parse(PATHS.member("a.b:c@d")) == "a.b:c@d"
    assert PATHS.parse(PATHS.page("a", 2**32 - 1)) == PagePath("a", 2**32 - 1)


def test_we_refuse_to_write_what_we_would_reject():
    with pytest.raises(LocalProtocolError):
        PATHS.page("a", 2**32)
    with pytest.raises(LocalProtocolError):
        PATHS.page("a", -1)
    with pytest.raises(LocalProtocolError):
        PATHS.page("a/b", 1)
    with pytest.raises(LocalProtocolError):
        encode_page(make_keys(PAGE_ENTRIES_MAX + 1))
    with pytest.raises(LocalProtocolError):
        encode_page([b"x" * (KEY_MAX_BYTES + 1)])


@pytest.mark.parametrize("name", ["", "/", "a/b", ".a", "-a", "a b", "ä", "a\n", "x" * 201])
def test_bad_names(name):
    with pytest.raises(LocalProtocolError, match="letters, digits"):
        check_name(name, "cell")


@pytest.mark.parametrize("name", ["a", "A-1._:@+~", "x" * 200, "host:1234-abcdef"])
def test_good_names(name):
    assert check_name(name, "cell") == name
