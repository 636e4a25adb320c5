"""Fingerprint: every field separates namespaces, and a mismatch names all of them."""

import msgspec
import pytest

from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.keys import PromptKeys
from mooncake_store.errors import FingerprintMismatch

ONE = Fingerprint(
    engine="vllm", model="m", model_config="c", dtype="bfloat16", cache_dtype="auto", layout="LBHNC", block_size=128,
    num_layers=30, page_bytes=98304, num_kv_heads=3, head_size=64, tensor_parallel=1, pipeline_parallel=1,
    attention="None", isa="vec", hash_algorithm="sha256", hash_seed="s",
)


@pytest.mark.parametrize("field", Fingerprint.__struct_fields__)
def test_every_field_separates(field):
    value = getattr(ONE, field)
    other = msgspec.structs.replace(ONE, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert other.namespace() != ONE.namespace()
    assert [item.field for item in ONE.differences(other)] == [field]


def test_a_mismatch_lists_all_fields_with_both_values():
    other = msgspec.structs.replace(ONE, dtype="float16", block_size=16)
    with pytest.raises(FingerprintMismatch) as caught:
        ONE.require_equal(other, where="peer")
    assert "2 of 17 fields differ" in caught.value.message
    assert "dtype: ours bfloat16, theirs float16; block_size: ours 128, theirs 16" in caught.value.message


def test_the_namespace_is_stable_across_processes():
    # golden: a change here silently empties every pool on upgrade, so it must be a decision
    assert ONE.namespace().hex() == msgspec_namespace(ONE)


def msgspec_namespace(one):
    import hashlib

    fields = {name: getattr(one, name) for name in one.__struct_fields__}
    return hashlib.blake2b(msgspec.msgpack.encode(fields), digest_size=16).hexdigest()


def test_prompt_keys_grow_and_differ_by_part():
    keys = PromptKeys(ONE.namespace(), 2)
    keys.extend([b"a" * 32])
    keys.extend([b"a" * 32, b"b" * 32])
    assert len(keys) == 2
    assert keys.part(0) != keys.part(1)
    assert keys.part(0, 1, 2) == [ONE.namespace() + b"\x00\x00" + b"b" * 32]
