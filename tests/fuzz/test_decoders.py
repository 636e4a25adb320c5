"""Whatever a peer sends is refused with a reason, or is a value that survives being sent again: no crash, no blow-up.

More than a million damaged inputs, the same ones every run, and hypothesis for shapes that nobody thought of.
"""

from __future__ import annotations

import contextlib
import resource
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.decoders import DECODERS, Decoder
from fuzz.mutations import INFLATED, mutants
from mooncake_store.errors import MooncakeError
from mooncake_store.transport.base import CmaOffer, LoopbackOffer, RegionDescriptor, ShmOffer, TcpOffer
from mooncake_store.transport.cma import CmaTransport
from mooncake_store.transport.loopback import LoopbackTransport
from mooncake_store.transport.memory import host_identity
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.transport.tcp import TcpTransport

INPUTS_MIN = 1_000_000
INPUTS_EACH = 51_000
SPARE_BYTES = 512 << 20
EXPANSION_MAX = 80
"""Bytes of memory per byte of input: a Python object for every byte, and the list it is in twice while it grows."""

each_decoder = pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)


def test_the_inputs_are_a_million():
    assert len(DECODERS) * INPUTS_EACH >= INPUTS_MIN


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let every allocation beyond SPARE_BYTES more than now fail."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def try_one(decoder: Decoder, data: bytes) -> bool:
    """Return whether the input was accepted; what is neither accepted nor refused properly fails the test."""
    try:
        again = decoder.decode(data)
    except decoder.refusals as error:
        assert str(error).strip(), "refused without a reason"
        return False
    except Exception as error:
        raise AssertionError(f"{decoder.name} is crashed by {data[:200].hex()}: {error!r}") from error
    assert decoder.decode(again) == again, data[:200].hex()
    return True


@each_decoder
def test_samples_are_accepted(decoder):
    accepted = [try_one(decoder, sample) for sample in decoder.samples]
    # an epoch is nobody's entry, and a fuzzed shm server serves no region
    assert all(accepted) or decoder.name == "directory-path" and accepted.count(False) == 1


@each_decoder
def test_damaged_inputs_are_refused_or_harmless(decoder):
    num_accepted = 0
    inputs = mutants(decoder.samples, codec=decoder.codec, head=decoder.head, count=INPUTS_EACH, seed=20_240_607)
    with little_memory():
        for data in inputs:
            num_accepted += try_one(decoder, data)
    assert 0 < num_accepted < INPUTS_EACH


@each_decoder
def test_no_input_takes_more_memory_than_its_size_explains(decoder):
    bombs = list(_bombs(decoder))
    assert bombs
    for data in bombs:
        tracemalloc.start()
        try:
            try_one(decoder, data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= EXPANSION_MAX * len(data) + (1 << 20), f"{data[:80].hex()}... of {len(data)}: {peak} bytes"


def _bombs(decoder: Decoder) -> Iterator[bytes]:
    """Yield inputs as long as the decoder reads, of the smallest values there are, wherever a value may be."""
    size = decoder.size_max_bytes - 200
    if decoder.codec == "raw":
        yield bytes(size)
        return
    if decoder.codec == "json":
        yield from (b'{"kv_transfer_params":{"remote_addresses":[' + b'"",' * (size // 3) + b'""]}}',
                    b'{"prompt":[' + b"0," * (size // 2) + b"0]}", b"[" * size, b'{"a":' * (size // 5))
        return
    count = size.to_bytes(4, "big")
    fills = (b"\xdd" + count + b"\x00" * size, b"\xdd" + (size // 2).to_bytes(4, "big") + b"\xc4\x00" * (size // 2),
             b"\xdd" + count + b"\xa0" * size, b"\xc6" + count + b"\x00" * size, b"\xdb" + count + b"a" * size,
             b"\x91" * size, b"\xdd" + (size // 4).to_bytes(4, "big") + b"\x93\x00\x01\x00" * (size // 4))
    for sample in decoder.samples:
        tree = msgspec.msgpack.decode(sample[decoder.head:])
        for place in range(len(tree)) if isinstance(tree, list) else list(tree):
            kept = tree[place]
            for fill in fills:
                tree[place] = msgspec.Raw(fill)
                yield sample[:decoder.head] + msgspec.msgpack.encode(tree)
            tree[place] = kept
        # a prefix that every one of many entries repeats
    yield b"\x01" + msgspec.msgpack.encode([b"x" * (size // 2), [b""] * 256])


TAGS = ("hello", "welcome", "acquire", "granted", "ready", "place", "shm", "cma", "tcp", "rdma", "verified", "offer")
scalars = (st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
           | st.binary(max_size=20) | st.sampled_from(TAGS))
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=7)
                     | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=30)


@each_decoder
@settings(max_examples=150, deadline=None)
@given(tree=trees, head=st.sampled_from([b"", b"\x01", b"\x02"]), tail=st.sampled_from([b"", b"\xc1", *INFLATED]))
def test_any_structure_is_refused_or_harmless(decoder, tree, head, tail):
    encode = msgspec.json.encode if decoder.codec == "json" else msgspec.msgpack.encode
    try_one(decoder, head + encode(tree) + tail)


def test_a_region_that_decodes_can_be_attached_to_without_a_crash():
    """Numbers, names and addresses that pass the decoder overflow nowhere behind it."""
    offers = (ShmOffer("nobody"), CmaOffer(2**22 + 5, 1, 1 << 40, 1 << 41), TcpOffer("127.0.0.1", 1),
              LoopbackOffer(1, 1))
    transports = (ShmTransport(), CmaTransport(), TcpTransport(), LoopbackTransport())
    num_tried = 0
    for offer, transport in zip(offers, transports, strict=True):
        sample = msgspec.msgpack.encode(RegionDescriptor(5, 1 << 20, host_identity(), (offer,)))
        for data in mutants((sample,), codec="msgpack", head=0, count=1500, seed=3):
            try:
                region = msgspec.msgpack.decode(data, type=RegionDescriptor)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                continue
            if any(isinstance(offer, TcpOffer) and offer.host != "127.0.0.1" for offer in region.offers):
                continue  # it would be looked up
            num_tried += 1
            with pytest.raises(MooncakeError) as caught:
                transport.attach(region, deadline_ns=time.monotonic_ns() + 1_000_000_000)
            assert caught.value.message
        transport.close()
    assert num_tried > 500


