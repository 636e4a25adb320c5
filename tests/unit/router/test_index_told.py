"""What engines tell decides where requests go: in the placer, through the gateway, and by message."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from mooncake_connector.router.bodies import CHAT, COMPLETIONS, Ask, cache_salt_of, read_ask, token_ids_of
from mooncake_connector.router.dialects.sglang import SglangDialect
from mooncake_connector.router.engines import EngineEvent, EngineTable, Introduction
from mooncake_connector.router.index.endpoints import EventSockets
from mooncake_connector.router.index.holdings import Holdings, Source
from mooncake_connector.router.index.told import Told
from mooncake_connector.router.messages import Place
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import make_policy
from mooncake_connector.router.predictor import Predictor
from mooncake_connector.router.prefix_index import PrefixIndex
from unit.router.cell import eventually, running_cell
from unit.router.test_event_subscriber import Publisher, stored

TOKENS = list(range(100, 164))
TOKEN_IDS = np.array(TOKENS, "<u4").tobytes()
URLS = ["http://a:1", "http://b:1"]


def batch(number: int, *events: object) -> list[bytes]:
    return [b"", number.to_bytes(8, "big"), msgspec.msgpack.encode([number + 1.0, events, 0])]


class Setup:
    """A placer over two engines that do both, and what they tell."""

    def __init__(self) -> None:
        self.holdings = Holdings(1024, secret=b"0123456789abcdef")
        self.told = Told(self.holdings)
        self.index = PrefixIndex()
        table, predictor = EngineTable(), Predictor()
        policy = make_policy("prefix", predictor)
        self.placer = Placer(table, self.index, ttl_ns=1000, predictor=predictor, policy=policy, told=self.told)
        for url in URLS:
            table.add(url, "both")
            self.placer.introduce(url, Introduction(("m",), "life-1", (f"tcp://{url[7:]}",)))
            table.observe(url, EngineEvent.HEALTHY)

    def follow(self, url: str) -> None:
        self.holdings.add(Source(url))

    def tell(self, url: str, *frames: list[bytes]) -> None:
        for each in frames:
            self.holdings.on_message(Source(url), each, is_replay=False, now_ns=0)
        self.holdings.flush()

    def prefers(self, **fields: object) -> str:
        place = Place("r", 64, model="m", **fields)  # type: ignore[arg-type]
        choice = self.placer.propose(place, now_ns=0, colocated_reason="n")
        assert choice.start is not None  # type: ignore[union-attr]
        return choice.start.engine.url if choice.start.prefix_tokens else ""  # type: ignore[union-attr]


def test_an_engine_is_taken_at_its_word():
    setup = Setup()
    setup.index.insert(URLS[0], (1, 2, 3, 4))
    assert setup.prefers(prefix_hashes=(1, 2, 3, 4), token_ids=TOKEN_IDS) == URLS[0]
    for url in URLS:
        setup.follow(url)
    setup.tell(URLS[0], batch(0, stored(0, 1), {"type": "AllBlocksCleared"}))
    setup.tell(URLS[1], batch(0, stored(0, 2)))
    assert setup.holdings.told == set(URLS)
    assert setup.prefers(prefix_hashes=(1, 2, 3, 4), token_ids=TOKEN_IDS) == URLS[1]
    # Without tokens nothing but the belief is left.
    assert setup.prefers(prefix_hashes=(1, 2, 3, 4)) == URLS[0]


def test_a_stale_engine_may_hold_more_than_it_told():
    setup = Setup()
    setup.follow(URLS[0])
    setup.tell(URLS[0], batch(5, stored(0, 1)))  # what was before is not known
    assert setup.holdings.told == set()
    setup.index.insert(URLS[0], (1, 2, 3, 4))
    setup.follow(URLS[1])
    setup.tell(URLS[1], batch(0, stored(0, 2)))
    assert setup.prefers(prefix_hashes=(1, 2, 3, 4), token_ids=TOKEN_IDS) == URLS[0]


def test_a_new_process_holds_nothing():
    setup = Setup()
    setup.follow(URLS[1])
    setup.tell(URLS[1], batch(0, stored(0, 2)))
    assert setup.prefers(token_ids=TOKEN_IDS) == URLS[1]
    setup.placer.introduce(URLS[1], Introduction(("m",), "life-2", ("tcp://b:1",)))
    assert setup.prefers(token_ids=TOKEN_IDS) == ""


def test_salts_and_adapters_share_nothing():
    setup = Setup()
    setup.follow(URLS[0])
    setup.tell(URLS[0], batch(0, stored(0, 2) | {"cache_salt": "s", "lora_name": "m"}))
    assert setup.prefers(token_ids=TOKEN_IDS) == ""
    assert setup.prefers(token_ids=TOKEN_IDS, cache_salt="s") == URLS[0]
    setup = Setup()
    setup.follow(URLS[0])
    setup.tell(URLS[0], batch(0, stored(0, 2) | {"lora_name": "adapter"}))
    assert setup.prefers(token_ids=TOKEN_IDS) == ""


def test_a_waiting_request_is_hashed_once(monkeypatch):
    setup = Setup()
    setup.follow(URLS[0])
    setup.tell(URLS[0], batch(0, stored(0, 2)))
    calls = []
    hashed = type(setup.holdings._hash).prefixes
    monkeypatch.setattr(
        type(setup.holdings._hash), "prefixes", lambda *args: calls.append(args) or hashed(*args)
    )
    assert [setup.prefers(token_ids=TOKEN_IDS) for _ in range(3)] == [URLS[0]] * 3
    assert len(calls) == 1
    # The same id for another prompt is another prompt.
    assert setup.prefers(token_ids=TOKEN_IDS[4:]) == ""


def ask(**body: object) -> Ask:
    read = read_ask(COMPLETIONS if "prompt" in body else CHAT, msgspec.json.encode({"model": "m", **body}))
    assert isinstance(read, Ask)
    return read


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(TOKENS, TOKEN_IDS), ("text", b""), (["text"], b""), ([[1, 2], [3]], b""), ([-1], b""), ([1 << 32], b"")],
)
def test_tokens_of_a_body(prompt, expected):
    assert token_ids_of(ask(prompt=prompt)) == expected


def test_a_chat_has_no_tokens():
    assert token_ids_of(ask(messages=[{"role": "user", "content": "hi"}])) == b""


@pytest.mark.parametrize(("salt", "expected"), [("s", "s"), (None, ""), (5, "")])
def test_salt_of_a_body(salt, expected):
    assert cache_salt_of(ask(prompt="p", cache_salt=salt)) == expected


def test_sglang_tells_where_it_publishes():
    info = {"disaggregation_mode": "null", "kv_events": {
        "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": 5557, "topic": "t", "block_size": 64,
        "dp_size": 2, "replay_endpoint_port_base": 5561}}  # fmt: skip
    read = SglangDialect().read_probe(msgspec.json.encode(info), url=URLS[0], models=("m",))
    assert read is not None
    assert read.events == EventSockets(
        endpoint="tcp://*:5557", replay="tcp://*:5561", num_ranks=2, topic="t", dialect="sglang"
    )
    del info["kv_events"]
    read = SglangDialect().read_probe(msgspec.json.encode(info), url=URLS[0], models=("m",))
    assert read is not None and read.events is None


async def test_the_router_follows_engines_and_goes_where_the_prefix_is():
    publishers = [Publisher(), Publisher()]
    try:
        async with running_cell(num_prefills=0, num_decodes=0, num_both=2, policy="prefix") as cell:
            # Where engines publish is only known now; the running router looks at its table ten times a second.
            urls = [engine.url for engine in cell.decodes]
            cell.app.events._where = {url: each.sockets for url, each in zip(urls, publishers, strict=True)}
            holdings = cell.app.events.holdings
            await publishers[1].wait_subscribed()
            await publishers[0].wait_subscribed()
            await publishers[0].publish({"type": "AllBlocksCleared"})
            await publishers[1].publish(stored(0, 4))
            await eventually(lambda: holdings.told == set(urls) and not holdings.num_gathered, 10, "told")
            for _ in range(3):
                status, headers, _ = await cell.ask(prompt=TOKENS, n=2)
                assert status == 200
                assert headers["x-mooncake-decode"] == urls[1]
            await eventually(lambda: cell.sample("mooncake_router_indexed_blocks") == 4, 10, "metrics")
    finally:
        for each in publishers:
            await each.close()
