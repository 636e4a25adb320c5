"""The router understands what this vLLM publishes: its structs, its hashes, its replay."""

from __future__ import annotations

import msgspec
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

from engine.event_follower import TOKENS, Follower, run
from mooncake_connector.router.index.events import decode_batch


def stored(first: int, last: int, *, medium: str = "GPU", names: str = "int", tokens: bool = True) -> BlockStored:
    def name(block: int) -> object:
        content = bytes(24) + (block + 1).to_bytes(8, "big")
        return content if names == "bytes" else block + 1

    return BlockStored(
        block_hashes=[name(block) for block in range(first, last)],
        parent_block_hash=name(first - 1) if first else None,
        token_ids=TOKENS[first * 16 : last * 16] if tokens else [],
        block_size=16 if tokens else 0,
        lora_id=None,
        medium=medium,
        lora_name=None,
        group_idx=0,
        kv_cache_spec_kind="full_attention",
    )


def publish(publisher: ZmqEventPublisher, *events: object) -> None:
    publisher.publish(KVEventBatch(ts=publish.clock, events=list(events)))
    publish.clock += 1.0


publish.clock = 1.0


def test_live_and_replayed(tmp_path):
    async def check(follower: Follower) -> None:
        publisher = ZmqEventPublisher(0, follower.endpoint, follower.replay, topic="kv")
        try:
            publish(publisher, stored(0, 4))
            await follower.expect(64, 64)
            publish(publisher, stored(4, 6), BlockRemoved(block_hashes=[6], medium="GPU", group_idx=0))
            await follower.expect(80, 80)
            publish(publisher, stored(5, 6, medium="CPU"), stored(0, 2, medium="CPU", tokens=False))
            await follower.expect(80, 96)
            publish(publisher, AllBlocksCleared())
            await follower.expect(0, 0)
            publish(publisher, stored(0, 3, names="bytes"))
            publish(publisher, BlockRemoved(block_hashes=[3], medium="GPU", group_idx=0))
            await follower.expect(32, 32)
        finally:
            publisher.shutdown()

    run(check, tmp_path, "vllm")


def test_every_field_is_read_or_left_alone():
    """A field that we do not know must not make a batch unreadable."""
    event = stored(0, 1)
    for field in msgspec.structs.fields(BlockStored):
        assert hasattr(event, field.name)
    batch = KVEventBatch(ts=1.0, events=[event, BlockRemoved(block_hashes=[1], medium="GPU"), AllBlocksCleared()])
    assert len(decode_batch(msgspec.msgpack.encode(batch)).events) == 3
