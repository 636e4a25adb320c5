"""KVLayout: where pages lie, and what a layout refuses."""

import pytest

from mooncake_connector.kv.layout import KVLayout

LAYER_OUTER = KVLayout((0, 1000), block_stride=100, page_bytes=100, num_blocks=10, block_size=16, size_bytes=2000)
BLOCK_OUTER = KVLayout((0, 100), block_stride=200, page_bytes=100, num_blocks=10, block_size=16, size_bytes=2000)


def test_pages_of_both_orders():
    assert LAYER_OUTER.page_offsets([0, 3]).tolist() == [[0, 300], [1000, 1300]]
    assert BLOCK_OUTER.page_offsets([0, 3]).tolist() == [[0, 600], [100, 700]]
    assert BLOCK_OUTER.page_offsets([1], 1, 2).tolist() == [[300]]
    assert LAYER_OUTER.block_bytes == 200


@pytest.mark.parametrize("block_id", [-1, 10, 1 << 40])
def test_a_block_outside_the_cache_is_an_error_not_an_address(block_id):
    with pytest.raises(IndexError):
        LAYER_OUTER.page_offsets([0, block_id])


@pytest.mark.parametrize("change", [{"size_bytes": 1999}, {"num_blocks": 0}, {"layer_offsets": ()},
                                    {"layer_offsets": (-1, 0)}, {"page_bytes": 0}])
def test_an_impossible_layout_is_refused(change):
    fields = {name: getattr(LAYER_OUTER, name) for name in LAYER_OUTER.__struct_fields__}
    with pytest.raises(ValueError, match="layout"):
        KVLayout(**{**fields, **change})
