"""Whatever we write we read back; whatever anybody writes never raises."""

from hypothesis import given
from hypothesis import strategies as st

from mooncake_store.directory.schema import (
    PAGE_ENTRIES_MAX,
    CellPaths,
    MemberPut,
    PagePut,
    Rejected,
    decode_event,
    encode_member,
    encode_page,
)
from mooncake_store.types import HostIdentity, Member, block_key

PATHS = CellPaths("cell")
keys = st.builds(
    block_key, st.binary(min_size=16, max_size=16), st.integers(0, 65_535), st.binary(min_size=1, max_size=64)
)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@+~-]{0,60}", fullmatch=True)
members = st.builds(
    Member,
    names,
    st.sampled_from(["engine", "store"]),
    st.text(max_size=50),
    st.builds(HostIdentity, st.text(max_size=40), st.integers(0, 2**63 - 1)),
    st.integers(1, 2**31 - 1),
    st.integers(0, 2**63 - 1),
    st.text(max_size=20),
)


@given(names, st.integers(0, 2**32 - 1), st.lists(keys, max_size=PAGE_ENTRIES_MAX))
def test_pages_come_back(node_id, page, entries):
    value = encode_page(entries)
    assert decode_event(PATHS, PATHS.page(node_id, page), value) == PagePut(node_id, page, tuple(entries))


@given(members)
def test_members_come_back(member):
    value = encode_member(member)
    assert decode_event(PATHS, PATHS.member(member.node_id), value) == MemberPut(member.node_id, member)


@given(
    st.one_of(
        st.binary(max_size=60).map(lambda tail: PATHS.root + tail),
        st.binary(max_size=30).map(lambda tail: PATHS.root + b"page/" + tail),
        st.builds(PATHS.page, names, st.integers(0, 2**32 - 1)),
        st.builds(PATHS.member, names),
    ),
    st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda tail: b"\x01" + tail)),
)
def test_anything_decodes_or_is_rejected_with_a_reason(path, value):
    decoded = decode_event(PATHS, path, value)
    if isinstance(decoded, Rejected):
        assert decoded.reason.startswith("directory_") and decoded.detail


@given(st.lists(keys, min_size=1, max_size=8), st.data())
def test_a_damaged_page_never_raises(entries, data):
    value = bytearray(encode_page(entries))
    position = data.draw(st.integers(0, len(value) - 1))
    value[position] = data.draw(st.integers(0, 255))
    decode_event(PATHS, PATHS.page("a", 0), bytes(value))
    decode_event(PATHS, PATHS.page("a", 0), bytes(value[:position]))
