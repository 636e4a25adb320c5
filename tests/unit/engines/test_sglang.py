"""What the SGLang adapter decides without SGLang: which releases, which caches, which bytes."""

import ctypes
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.engines.sglang import compat, describe
from mooncake_connector.engines.sglang.rows import MetadataRows
from mooncake_store.errors import ConfigError, RemoteProtocolError
from mooncake_store.types import Extent

PAGE_BYTES, PAGES = 64, 8


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.6.0", "1.0"])
def test_newer_releases_are_let_through(version):
    compat.require_supported_version(version)


@pytest.mark.parametrize("version", ["0.5.22", "0.5.9", "0.4.99", "0.5.22.post3"])
def test_older_releases_are_named_with_what_to_install(version):
    with pytest.raises(ConfigError, match=f"SGLang {version} is older than 0.5.23") as caught:
        compat.require_supported_version(version)
    assert "install sglang" in caught.value.hint


@pytest.fixture
def buffers():
    return [(ctypes.c_char * (PAGE_BYTES * PAGES))() for _ in range(4)]


def cache_args(buffers, **changes):
    return types.SimpleNamespace(**{
        "kv_data_ptrs": [ctypes.addressof(buffer) for buffer in buffers],
        "kv_data_lens": [PAGE_BYTES * PAGES] * len(buffers), "kv_item_lens": [PAGE_BYTES] * len(buffers),
        "page_size": 16, "kv_layout": None, "kv_cache_dtype_str": "auto", "state_types": [], "num_draft_entries": 0,
        **changes})


def server_args(model="org/model", **changes):
    return types.SimpleNamespace(**{"model_path": model, "revision": None, "dtype": "float32", "device": "cpu",
                                    "pp_size": 1, **changes})


def test_every_page_is_where_sglang_says(buffers):
    args = cache_args(buffers)
    cache = describe.cache_memory(describe.Buffers.of_transfer(args), server_args(), tensor_parallel=1)
    offsets = cache.layout.page_offsets([0, 3, PAGES - 1])
    for layer, address in enumerate(args.kv_data_ptrs):
        for column, page in enumerate((0, 3, PAGES - 1)):
            assert cache.address + int(offsets[layer, column]) == address + page * PAGE_BYTES
            assert any(span.offset <= offsets[layer, column]
                       and offsets[layer, column] + PAGE_BYTES <= span.offset + span.length for span in cache.spans)


def test_what_separates_two_caches_separates_their_names(buffers, tmp_path):
    def named(tp=1, server=None, **changes):
        found = describe.Buffers.of_transfer(cache_args(buffers, **changes))
        cache = describe.cache_memory(found, server or server_args(), tensor_parallel=tp)
        return cache.fingerprint.namespace()

    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    names = [named(), named(tp=2), named(kv_cache_dtype_str="fp8_e5m2"), named(page_size=32), named(kv_layout="hnd"),
             named(server=server_args("org/other")), named(server=server_args(dtype="bfloat16")),
             named(server=server_args(revision="v2")), named(server=server_args(quantization="fp8")),
             named(server=server_args(json_model_override_args='{"rope_theta": 2}')),
             named(server=server_args(str(tmp_path)))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("changes", "server", "is_mla", "word"), [
    ({}, {"device": "cuda"}, False, "on cuda"),
    ({"state_types": ["mamba"]}, {}, False, "mamba"),
    ({}, {}, True, "latent attention"),
    ({"num_draft_entries": 2}, {}, False, "speculative"),
    ({"kv_item_lens": [64, 64, 64, 128]}, {}, False, "different sizes"),
    ({}, {"pp_size": 2}, False, "--pp-size"),
    ({}, {"disaggregation_decode_allocation_policy": "prefill_complete"}, False, "allocation-policy"),
])
def test_what_cannot_be_handed_over_is_refused_at_start_by_name(buffers, changes, server, is_mla, word):
    with pytest.raises(ConfigError, match=word):
        describe.require_supported(cache_args(buffers, **changes), server_args(**server), is_mla=is_mla)


def device_pool(buffers, infos=None, error=None):
    def get_contiguous_buf_infos():
        if error:
            raise error
        return infos or ([ctypes.addressof(b) for b in buffers], [PAGE_BYTES * PAGES] * 4, [PAGE_BYTES] * 4)
    return types.SimpleNamespace(get_contiguous_buf_infos=get_contiguous_buf_infos, dtype="torch.float32")


def test_a_device_pool_is_read_the_same_way(buffers):
    found = describe.Buffers.of_pool(device_pool(buffers), 16)
    args = cache_args(buffers, kv_cache_dtype_str="torch.float32")
    assert found._replace(owner=None) == describe.Buffers.of_transfer(args)._replace(owner=None)


def test_a_device_pool_that_is_not_laid_out_by_layers_is_refused(buffers):
    with pytest.raises(ConfigError, match="layer by layer: page-major"):
        describe.Buffers.of_pool(device_pool(buffers, error=NotImplementedError("page-major")), 16)


def test_an_ordinary_cache_is_not_refused(buffers):
    describe.require_supported(cache_args(buffers), server_args(), is_mla=False)


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 20_000)), min_size=1, max_size=20), st.randoms())
def test_merged_spans_cover_every_buffer_and_no_gap_of_a_page_of_memory(pairs, rng):
    spans, offset = [], 0
    for length, gap in pairs:
        spans.append(Extent(offset, length))
        offset += length + gap
    total_gaps = sum(gap for _, gap in pairs[:-1] if gap < describe.MERGE_GAP_BYTES)
    shuffled = list(spans)
    rng.shuffle(shuffled)
    merged = describe.merge_spans(shuffled)
    for span in spans:
        assert any(m.offset <= span.offset and span.offset + span.length <= m.offset + m.length for m in merged)
    assert sum(m.length for m in merged) == sum(s.length for s in spans) + total_gaps


def rows_of(*lengths, num_rows=3):
    columns = [(ctypes.c_char * (length * num_rows))() for length in lengths]
    args = types.SimpleNamespace(aux_data_ptrs=[ctypes.addressof(c) for c in columns], aux_item_lens=list(lengths))
    return MetadataRows(args), columns


def test_a_row_arrives_in_another_engines_row_and_touches_no_other():
    source, columns = rows_of(4, 8)
    for column, text in zip(columns, (b"aaaabbbbcccc", b"AAAAAAAABBBBBBBBCCCCCCCC"), strict=True):
        column.raw = text
    target, found = rows_of(4, 8)
    target.write(2, source.read(1))
    assert [column.raw for column in found] == [bytes(8) + b"bbbb", bytes(16) + b"BBBBBBBB"]


def test_rows_of_another_shape_are_refused_and_nothing_is_written():
    source, _ = rows_of(4, 8)
    target, found = rows_of(4, 8, 8)
    with pytest.raises(RemoteProtocolError, match="have 12 bytes, ours 20"):
        target.write(0, source.read(0))
    assert not any(any(column.raw) for column in found)


def test_a_row_that_no_message_can_carry_is_refused_at_start():
    with pytest.raises(ConfigError, match="70000 bytes"):
        rows_of(70_000, num_rows=1)
