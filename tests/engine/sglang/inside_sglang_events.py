"""The router understands what this SGLang publishes: its structs, its signed hashes, its replay."""

from __future__ import annotations

from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    StorageMedium,
    ZmqEventPublisher,
)

from engine.event_follower import TOKENS, Follower, run


def stored(first: int, last: int, *, medium: StorageMedium = StorageMedium.GPU, salt: str | None = None) -> BlockStored:
    return BlockStored(
        block_hashes=[-1 - block for block in range(first, last)],
        parent_block_hash=-first if first else None,
        token_ids=TOKENS[first * 16 : last * 16],
        block_size=16,
        lora_id=None,
        medium=medium,
        cache_salt=salt,
    )


def test_live_and_replayed(tmp_path):
    async def check(follower: Follower) -> None:
        publisher = ZmqEventPublisher(0, follower.endpoint, follower.replay, topic="kv")

        def publish(clock: float, *events: object) -> None:
            publisher.publish(KVEventBatch(ts=clock, events=list(events)))

        try:
            publish(1.0, stored(0, 4))
            await follower.expect(64, 64)
            removed = BlockRemoved(block_hashes=[-3, -4], medium=StorageMedium.GPU)
            publish(2.0, stored(0, 4, medium=StorageMedium.CPU), removed)
            await follower.expect(32, 64)
            publish(3.0, AllBlocksCleared(), stored(0, 2, salt="pepper"))
            await follower.expect(0, 0)
            await follower.expect(32, 32, salt="pepper")
        finally:
            publisher.shutdown()

    run(check, tmp_path, "sglang")
