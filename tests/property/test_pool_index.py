"""The block index against a plain model, under every order of reserve, commit, revoke, pin, unpin and drop."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mooncake_store.pool.index import BlockIndex
from mooncake_store.types import BlockKey

UNIT = 4096
NUM_UNITS = 12
KEYS = st.integers(0, 15).map(lambda number: BlockKey(b"k%02d" % number))


class IndexMachine(RuleBasedStateMachine):
    """Model: contents by key, plus who holds what."""

    def __init__(self):
        super().__init__()
        self.index = BlockIndex(NUM_UNITS * UNIT)
        self.reserved = []
        self.pins = []  # one entry per pin
        self.stored = {}  # key -> (block, checksum)
        self.extents_in_use = {}  # block -> extent, while somebody may touch it

    @rule(key=KEYS, units=st.integers(1, NUM_UNITS + 1))
    def reserve(self, key, units):
        result = self.index.reserve(key, units * UNIT)
        for gone in result.evicted:
            block, _ = self.stored.pop(gone)
            assert block not in self.pins, "evicted a block in use"
        if result.result == "reserved":
            assert key not in self.stored
            assert all(block.key != key for block in self.reserved)
            self.reserved.append(result.block)
        elif result.result == "stored":
            assert key in self.stored
        elif result.result == "busy":
            assert any(block.key == key for block in self.reserved)
        elif result.result == "too_large":
            assert units > NUM_UNITS
        else:
            assert result.result == "full"
            assert all(block in self.pins for block, _ in self.stored.values()), "full although a block was evictable"

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), checksum=st.integers(0, 9))
    def commit(self, data, checksum):
        block = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.index.commit(block, checksum)
        self.stored[block.key] = (block, checksum)
        self.pins.append(block)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def revoke(self, data):
        self.index.revoke(self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1))))

    @rule(keys=st.lists(KEYS, max_size=4))
    def pin(self, keys):
        for key, block in zip(keys, self.index.pin(keys), strict=True):
            assert (block is not None) == (key in self.stored)
            if block is not None:
                assert (block, block.checksum) == self.stored[key]
                self.pins.append(block)

    @precondition(lambda self: self.pins)
    @rule(data=st.data(), count=st.integers(1, 3))
    def unpin(self, data, count):
        count = min(count, len(self.pins))
        going = [self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))) for _ in range(count)]
        self.index.unpin(going)

    @rule(key=KEYS)
    def drop(self, key):
        assert self.index.drop(key) == (key in self.stored)
        self.stored.pop(key, None)

    @rule(keys=st.lists(KEYS, max_size=4))
    def touch(self, keys):
        self.index.touch(keys)

    @invariant()
    def books_balance(self):
        self.index.check()
        assert set(self.index.keys()) == set(self.stored)
        assert self.index.num_pinned == len(set(self.pins))
        # the bytes under a reader or a writer belong to nobody else
        in_use = {block: block.extent for block in [*self.reserved, *self.pins, *(b for b, _ in self.stored.values())]}
        spans = sorted((extent.offset, extent.offset + extent.length) for extent in in_use.values())
        assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))

    def teardown(self):
        self.index.unpin(self.pins)
        for block in self.reserved:
            self.index.revoke(block)
        for key in list(self.index.keys()):
            self.index.drop(key)
        assert self.index.used_bytes == 0


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestIndex = IndexMachine.TestCase
