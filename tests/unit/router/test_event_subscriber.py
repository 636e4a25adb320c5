"""The sockets: live events, what was missed, restarts, garbage, and engines that vanish."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
import zmq
import zmq.asyncio

from mooncake_connector.router.engines import Engine, EngineTable, Introduction
from mooncake_connector.router.event_subscriber import EventSubscriber
from mooncake_connector.router.index.endpoints import EventSockets, of_rank, seen_from
from mooncake_connector.router.index.hashing import pack_tokens
from mooncake_connector.router.index.holdings import Holdings, Source
from mooncake_connector.router.index.lookup import Held
from mooncake_connector.router.metrics import ROUTER_METRICS
from mooncake_store.errors import ConfigError
from mooncake_store.metrics import Metrics

URL = "http://127.0.0.1:8000"
SOURCE = Source(URL)
TOKENS = list(range(100, 164))
END = (1 << 64) - 1
WAIT_S = 20.0


class Publisher:
    """An engine's publisher, as vLLM's is: a PUB socket, and a ROUTER that sends what is kept."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:0", replay: str = "tcp://127.0.0.1:0") -> None:
        self.context = zmq.asyncio.Context()
        self.live = self.context.socket(zmq.XPUB)
        self.live.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.live.bind(endpoint)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(replay)
        self.sockets = EventSockets(
            endpoint=self.live.getsockopt_string(zmq.LAST_ENDPOINT),
            replay=self.router.getsockopt_string(zmq.LAST_ENDPOINT),
        )
        self.kept: list[tuple[int, bytes]] = []
        self.number = 0
        self.num_asked = 0
        self.has_topic = True
        self.answering = asyncio.create_task(self.answer())

    def make(self, *events: object) -> list[bytes]:
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        number, self.number = self.number, self.number + 1
        self.kept.append((number, payload))
        return [b"", number.to_bytes(8, "big"), payload]

    async def publish(self, *events: object) -> None:
        await self.live.send_multipart(self.make(*events))

    async def answer(self) -> None:
        while True:
            sender, _, first = await self.router.recv_multipart()
            self.num_asked += 1
            for number, payload in [*self.kept, (END, b"")]:
                if number >= int.from_bytes(first, "big"):
                    topic = [b""] if self.has_topic else []
                    await self.router.send_multipart([sender, b"", *topic, number.to_bytes(8, "big"), payload])

    async def wait_subscribed(self) -> None:
        async with asyncio.timeout(WAIT_S):
            assert await self.live.recv() == b"\x01"

    async def close(self) -> None:
        self.answering.cancel()
        await asyncio.gather(self.answering, return_exceptions=True)
        self.context.destroy(linger=0)


def stored(first: int, last: int, *, seed: int = 0) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": [seed + block for block in range(first, last)],
        "parent_block_hash": seed + first - 1 if first else None,
        "token_ids": TOKENS[first * 16 : last * 16],
        "block_size": 16,
        "lora_id": None,
        "medium": "GPU",
    }


class Engines(EngineTable):
    """A table that holds nobody, and lets the tests below follow whom they want."""

    def __iter__(self):
        return iter([Engine(url=URL, role="both")])


@pytest.fixture
async def subscriber():
    holdings = Holdings(1024, secret=b"0123456789abcdef")
    made = EventSubscriber(holdings, Metrics(ROUTER_METRICS), table=Engines(), where={})
    running = asyncio.create_task(made.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await made.close()


@pytest.fixture
async def publisher():
    made = Publisher()
    yield made
    await made.close()


async def wait_for(subscriber: EventSubscriber, num_tokens: int, *, is_stale: bool = False) -> None:
    """Wait until the index knows just this much of ``TOKENS``."""
    holdings = subscriber.holdings
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                held = holdings.match(holdings.prompt(pack_tokens(TOKENS))).engines.get(URL, Held())
                if held.device == num_tokens and holdings.is_stale(SOURCE) == is_stale:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"{held} and stale={holdings.is_stale(SOURCE)} in the end; {holdings.counts}")


async def test_follows_live_events(subscriber, publisher):
    subscriber.follow(URL, publisher.sockets)
    await publisher.wait_subscribed()
    await publisher.publish(stored(0, 2))
    await wait_for(subscriber, 32)
    await publisher.publish(stored(2, 4), {"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"})
    await wait_for(subscriber, 48)
    await publisher.publish({"type": "AllBlocksCleared"})
    await wait_for(subscriber, 0)


@pytest.mark.parametrize("has_topic", [True, False])
async def test_learns_what_was_before_it_came(subscriber, publisher, has_topic):
    publisher.has_topic = has_topic
    publisher.make(stored(0, 1))
    publisher.make(stored(1, 4))
    subscriber.follow(URL, publisher.sockets)
    await wait_for(subscriber, 64)


async def test_asks_for_a_batch_that_got_lost(subscriber, publisher):
    subscriber.follow(URL, publisher.sockets)
    await publisher.wait_subscribed()
    await publisher.publish(stored(0, 1))
    await wait_for(subscriber, 16)
    publisher.make(stored(1, 2))
    await publisher.publish(stored(2, 3))
    await wait_for(subscriber, 48)
    assert publisher.num_asked >= 2


async def test_is_stale_when_a_lost_batch_is_gone(subscriber, publisher):
    subscriber.follow(URL, publisher.sockets)
    await publisher.wait_subscribed()
    await publisher.publish(stored(0, 2))
    await wait_for(subscriber, 32)
    publisher.make({"type": "BlockRemoved", "block_hashes": [0], "medium": "GPU"})
    publisher.kept.clear()
    await publisher.publish(stored(0, 1))
    await wait_for(subscriber, 16, is_stale=True)


async def test_sees_another_process_at_the_same_address(subscriber, publisher):
    subscriber.follow(URL, publisher.sockets)
    await publisher.wait_subscribed()
    await publisher.publish(stored(0, 4))
    await wait_for(subscriber, 64)
    await publisher.close()
    again = Publisher(publisher.sockets.endpoint, publisher.sockets.replay)
    try:
        again.make(stored(0, 1, seed=1000))
        await wait_for(subscriber, 16)
    finally:
        await again.close()


async def test_garbage_ends_nothing(subscriber, publisher):
    subscriber.follow(URL, publisher.sockets)
    await publisher.wait_subscribed()
    await publisher.publish(stored(0, 1))
    await wait_for(subscriber, 16)
    for frames in ([b"x"], [b"", b"short", b"y"], [b""] * 7, [b"", bytes(8), b"\xc1"]):
        await publisher.live.send_multipart(frames)
    # The last one might have been a batch: what it said is lost.
    await wait_for(subscriber, 0, is_stale=True)
    await publisher.publish({"type": "AllBlocksCleared"}, stored(0, 2))
    await wait_for(subscriber, 32)
    assert subscriber.holdings.counts["malformed"] == 1


async def test_forgets_an_engine(subscriber, publisher):
    subscriber.follow(URL, publisher.sockets)
    publisher.make(stored(0, 1))
    await publisher.wait_subscribed()
    subscriber.unfollow(URL)
    assert not subscriber.holdings.sources() and subscriber.holdings.is_stale(SOURCE)
    subscriber.follow(URL, publisher.sockets)
    await wait_for(subscriber, 16)
    elsewhere = Publisher()
    try:
        subscriber.follow(URL, elsewhere.sockets)
        await elsewhere.wait_subscribed()
        await elsewhere.publish(stored(0, 3))
        await wait_for(subscriber, 48)
    finally:
        await elsewhere.close()


async def test_many_batches_arrive_in_order(subscriber, publisher):
    subscriber.follow(URL, publisher.sockets)
    await publisher.wait_subscribed()
    for turn in range(300):
        await publisher.publish({"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"}, stored(0, 4))
        if turn % 50 == 0:
            await asyncio.sleep(0)
    await publisher.publish({"type": "BlockRemoved", "block_hashes": [3, 2], "medium": "GPU"})
    await wait_for(subscriber, 32)


async def test_follows_who_is_in_the_table(publisher):
    table, holdings = EngineTable(), Holdings(1024, secret=b"0123456789abcdef")
    others = {"http://127.0.0.1:1": EventSockets(endpoint="ipc:///tmp/none", num_ranks=2)}
    where = others | {"*": publisher.sockets}
    follower = EventSubscriber(holdings, Metrics(ROUTER_METRICS), table=table, where=where)
    try:
        for url in (URL, "http://127.0.0.1:1", "http://127.0.0.1:2"):
            table.add(url, "both")
        follower.look()
        assert not holdings.sources()
        table.introduce(URL, Introduction(("m",)))
        table.introduce("http://127.0.0.1:1", Introduction(("m",)))
        told = EventSockets(endpoint="tcp://127.0.0.1:9", num_ranks=2)
        table.introduce("http://127.0.0.1:2", Introduction(("m",), events=told))
        for _ in range(2):
            follower.look()
            assert set(holdings.sources()) == {SOURCE, *(Source("http://127.0.0.1:2", rank) for rank in range(2))}
        table.remove("http://127.0.0.1:2")
        follower.look()
        assert holdings.sources() == (SOURCE,)
    finally:
        await follower.close()


def test_endpoints():
    told = EventSockets(endpoint="tcp://*:5557", replay="tcp://0.0.0.0:6000", num_ranks=3)
    seen = seen_from("http://engine-7:8000", told)
    assert (seen.endpoint, seen.replay) == ("tcp://engine-7:5557", "tcp://engine-7:6000")
    assert seen_from("http://[fd00::1]:8000", told).endpoint == "tcp://[fd00::1]:5557"
    assert seen_from("http://a:1", EventSockets(endpoint="tcp://b:5557")).endpoint == "tcp://b:5557"
    assert [of_rank(seen.endpoint, rank) for rank in range(3)] == [f"tcp://engine-7:{5557 + rank}" for rank in range(3)]
    assert of_rank("", 2) == ""
    with pytest.raises(ConfigError, match="no port"):
        of_rank("ipc:///run/events", 1)
