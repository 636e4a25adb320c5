"""List every decoder that reads what a peer sent, with valid samples of its input.

To have a new one fuzzed, add a row to ``DECODERS``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from mooncake_connector.engines.vllm.params import read_params
from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.layout import KVLayout
from mooncake_connector.kv.plan import Progress
from mooncake_connector.router import bodies
from mooncake_connector.router import messages as placement
from mooncake_connector.router.dialects import vllm
from mooncake_connector.router.dialects.select import DIALECTS
from mooncake_connector.router.index import events as kv_events
from mooncake_connector.transfer import messages as handoff
from mooncake_store.directory import schema
from mooncake_store.errors import MooncakeError, RemoteProtocolError
from mooncake_store.pull import wire
from mooncake_store.transport import shm, tcp_wire
from mooncake_store.transport.base import (
    CmaOffer,
    CudaOffer,
    LoopbackOffer,
    RdmaOffer,
    RegionDescriptor,
    ShmOffer,
    TcpOffer,
)
from mooncake_store.transport.rdma import wire as rdma_wire
from mooncake_store.types import HostIdentity, Member, NodeId, block_key

HOST = HostIdentity("0f0e0d0c-1111-2222-3333-444455556666", 4026531836)
REGION = RegionDescriptor(0x1234567, 1 << 30, HOST, (
    ShmOffer("mooncake-shm-77-0011223344556677"), CmaOffer(77, 99, 1 << 40, 1 << 41), RdmaOffer("10.0.0.1", 4001),
    TcpOffer("127.0.0.1", 4000), LoopbackOffer(77, 1 << 40),
    CudaOffer(77, 99, bytes(16), bytes(64), 1 << 20, 1 << 40, bytes(64), 8, 1 << 41)))
KEYS = tuple(block_key(b"0123456789abcdef", 3, bytes([n]) * 32) for n in range(8))


class NotAccepted(Exception):
    """A decoder said no; the message is its reason."""


class Decoder(NamedTuple):
    """One decoder.

    Attributes:
        decode: returns the value's bytes again, so that a second decode must give the same; raises ``refusals``.
        codec: what the input is, for changes of structure: ``msgpack`` behind ``head`` bytes, ``json``, or ``raw``.
        size_max_bytes: longest input it reads; the peak of memory may be a fixed multiple of it.
    """

    name: str
    samples: tuple[bytes, ...]
    decode: Callable[[bytes], bytes]
    codec: str = "msgpack"
    head: int = 1
    size_max_bytes: int = 1 << 20
    refusals: tuple[type[Exception], ...] = (MooncakeError, NotAccepted)


def _again(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: encode(decode(data))


# ------------------------------------------------------------------------------------------------ the store's messages
PULL = (
    wire.Hello(1, "engine-a", HOST, "0.1"), wire.Welcome(1, "engine-a", HOST, "0.1", REGION),
    wire.Acquire(2, KEYS, 5000), wire.Fetch(2, KEYS), wire.Fetched(2, (wire.FetchedBlock(99, b"abc"), None)),
    wire.Granted(2, 3, 5000, (wire.BlockEntry(4096, 10_000, 99), None, wire.BlockEntry(1 << 30, 1, 7))),
    wire.Denied(2, "busy", "later"), wire.Renew(3, 3, 5000), wire.Renewed(3, 3, 5000), wire.Release(3),
    wire.Report(KEYS[0], 1), wire.Offer(4, "n", "tcp://h:1", HOST, KEYS[:2], (10, 20)), wire.Accepted(4, 1, 0),
    wire.StatusRequest(5), wire.StatusReply(5, {"m": 1.0, "n": float("nan")}, {"a": "b"}),
)

# ---------------------------------------------------------------------------------------------------------- hand-overs
FINGERPRINT = Fingerprint(engine="vllm/lbhnc-4d", model="m", model_config="c", dtype="bfloat16", cache_dtype="auto",
                          layout="LBHNC", block_size=16, num_layers=4, page_bytes=4096, num_kv_heads=2, head_size=64,
                          tensor_parallel=1, pipeline_parallel=1, attention="CPU", isa="amx", hash_algorithm="sha256",
                          hash_seed="0")
LAYOUT = KVLayout((0, 1 << 20), 8192, 4096, 100, 16, 1 << 22)
TO_PREFILL = (
    handoff.Hello(FINGERPRINT, HOST, 77), handoff.Subscribe("t1"), handoff.Heartbeat(["t1", "t2"]), handoff.Done("t1"),
    handoff.VerifyRequest("t1", 3),
)
TO_DECODE = (
    handoff.Welcome(LAYOUT, (handoff.CachePart(0, REGION),), REGION, HOST, 77), handoff.Refused("no"),
    handoff.Ready("t1", 5, 7, Progress(128, 256, 3), [9, 8, 7]), handoff.Ready("t1", 5, 7, Progress(), None),
    handoff.Abort("t1", "gone"), handoff.Alive(), handoff.VerifyReply("t1", [1, 2, 3]),
)

# -------------------------------------------------------------------------------------------------------------- router
QUESTIONS = (
    placement.Register("http://10.0.0.1:8000", "prefill", "m", "e", ("tcp://10.0.0.1:1",)),
    placement.Unregister("http://10.0.0.1:8000"), placement.LoadReport("http://10.0.0.1:8000", 5, 6),
    placement.Place("r", 100, 10, "m", (1, 2, 3), ("http://10.0.0.1:8000",)), placement.Finished("t", "ok", "both"),
)
ANSWERS = (
    placement.Placed("r", "http://a:1", "http://b:1", "t", placement.PrefillParams(True, False, "t"),
                     placement.DecodeParams(True, False, "t", "e", ("tcp://a:2",))),
    placement.Refused("r", "full", "later"), placement.Accepted("t"),
)
INTRODUCTION = msgspec.json.encode({"id": "x", "choices": [{"text": "a"}], "kv_transfer_params": {
    "remote_engine_id": "e", "remote_addresses": ["tcp://10.0.0.1:1"], "block_size": 16, "do_remote_prefill": True}})
SERVER_INFO = msgspec.json.encode({"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 8998,
                                   "random_seed": 7, "startup_time": {"load": 1.5}, "internal_states": [{}]})
PARAMS = msgspec.msgpack.encode({
    "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": "t", "remote_engine_id": "e",
    "remote_addresses": ["tcp://10.0.0.1:1"], "publish": "layer", "introduce": False, "block_size": 16})
CHAT_BODY = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5,
                                 "stream": True, "n": 1, "best_of": None, "cache_salt": "s"})
COMPLETION_BODY = msgspec.json.encode({"model": "m", "prompt": [1, 2, 3], "max_completion_tokens": 5, "echo": False})


def _introduction(data: bytes) -> bytes:
    introduction = vllm.read_introduction(data, ("m",))
    if introduction is None:
        raise NotAccepted("not a completion")
    return msgspec.json.encode({"kv_transfer_params": {"remote_engine_id": introduction.engine_id,
                                                       "remote_addresses": introduction.addresses}})


def _server_info(data: bytes) -> bytes:
    told = DIALECTS["sglang"].read_probe(data, url="http://10.0.0.1:1", models=("m",))
    if told is None:
        raise NotAccepted("not SGLang's settings")
    port = int(told.addresses[0].rpartition(":")[2]) if told.addresses else 0
    return msgspec.json.encode({"disaggregation_mode": told.half or "null", "disaggregation_bootstrap_port": port})


def _params(data: bytes) -> bytes:
    try:
        raw = msgspec.msgpack.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise NotAccepted(f"not a map: {error}") from error  # the engine's own JSON parser is in between
    return msgspec.msgpack.encode(read_params(raw))


_STORED = {"type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": 7, "token_ids": [5, 6, 7, 8],
           "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": "a",
           "extra_keys": [["a", ["image", 3], "salt"], None], "group_idx": 1,
           "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 128, "locality": "LOCAL"}
_REMOVED = {"type": "BlockRemoved", "block_hashes": [b"0123456789abcdef" * 2, -5], "medium": "CPU", "group_idx": 1}
KV_MAPS = tuple(msgspec.msgpack.encode([1.5, [*events, {"type": "AllBlocksCleared"}], 0])
                for events in ([_STORED, _REMOVED], [{**_STORED, "token_ids": [[5, 6], [6, 7], [7, 8], [8, 9]]}]))
KV_ARRAYS = msgspec.msgpack.encode([1.5, [list(_STORED.values()), list(_REMOVED.values()), ["AllBlocksCleared"]]])
KV_SGLANG = msgspec.msgpack.encode([1.5, [["BlockStored", [-1], None, [5, 6], 2, None, "CPU_PINNED", "salt", "s"]]])


def _kv_events(dialect: kv_events.Dialect) -> Callable[[bytes], bytes]:
    def read(payload: bytes) -> bytes:
        batch = kv_events.decode_batch(payload, dialect)
        events: list[dict[str, Any]] = []
        for event in batch.events:
            if isinstance(event, kv_events.Cleared):
                events.append({"type": "AllBlocksCleared"})
                continue
            assert all(0 <= value < 1 << 64 for value in event.hashes)
            medium = {tier: name for name, tier in kv_events.TIERS.items()}[event.tier]
            told = {"block_hashes": list(event.hashes), "medium": medium}
            if isinstance(event, kv_events.Removed):
                group = {} if event.group == kv_events.ANY_GROUP else {"group_idx": event.group}
                events.append({"type": "BlockRemoved", **told, **group})
                continue
            assert not event.tokens or len(event.tokens) == len(event.hashes) * event.block_tokens
            events.append({"type": "BlockStored", **told, "parent_block_hash": event.parent,
                           "token_ids": list(event.tokens), "block_size": event.block_tokens,
                           "lora_name": event.lora, "cache_salt": event.salt, "group_idx": event.group})
        return msgspec.msgpack.encode([batch.time_s, events])
    return read


def _body(route: bodies.Route) -> Callable[[bytes], bytes]:
    def read(data: bytes) -> bytes:
        ask = bodies.read_ask(route, data)
        if isinstance(ask, bodies.Problem):
            raise NotAccepted(ask.message)
        assert ask.num_output_tokens >= 0 and ask.num_prompt_tokens >= 0
        bodies.prefill_body(ask, placement.PrefillParams(True, False, "t"))
        return bodies.decode_body(ask, None)
    return read


# ----------------------------------------------------------------------------------------------------------- directory
PATHS = schema.CellPaths("cell")
MEMBER = Member(NodeId("n"), "engine", "tcp://10.0.0.1:4000", HOST, 77, 1 << 30, "0.1")


def _event(path: bytes, encode: Callable[[Any], bytes]) -> Callable[[bytes], bytes]:
    def read(value: bytes) -> bytes:
        event = schema.decode_event(PATHS, path, value)
        if isinstance(event, schema.Rejected):
            raise NotAccepted(event.reason and event.detail)
        assert isinstance(event, schema.MemberPut | schema.PagePut)
        return encode(event)
    return read


def _path(path: bytes) -> bytes:
    event = schema.decode_event(PATHS, path, None)
    if event is None:
        raise NotAccepted("does not concern the view")
    assert isinstance(event, schema.MemberGone | schema.PageGone)
    again = PATHS.page(*event) if isinstance(event, schema.PageGone) else PATHS.member(event.node_id)
    assert again == path
    return path


# ---------------------------------------------------------------------------------------------------------------- media
_QUEUES = (rdma_wire.WireQueue(17, 99), rdma_wire.WireQueue(18, 100))
RDMA = (
    rdma_wire.Open(5, (rdma_wire.ReaderRail("ethernet", 0, 5, 16, (rdma_wire.WireGid(1, True, bytes(16)),), _QUEUES),)),
    rdma_wire.Opened(1 << 30, (rdma_wire.OwnerRail(0, 1, bytes(16), 0, True, 5, 16, 1 << 40, 77, _QUEUES),)),
    rdma_wire.Refused(True, "gone"),
)


def _exactly(size: int, decode: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Feed a decoder of fixed-size headers what a stream would: exactly that many bytes."""
    return lambda data: decode(data[:size].ljust(size, b"\0"))


def _tcp_request(data: bytes) -> bytes:
    request = tcp_wire.unpack_request(data)
    return tcp_wire.pack_request(request, np.empty((0, 2), np.uint64))


def _tcp_response(data: bytes) -> bytes:
    return tcp_wire.pack_response(tcp_wire.unpack_response(data))


def _tcp_reads(data: bytes) -> bytes:
    reads = np.frombuffer(data[:len(data) // 16 * 16], "<u8").reshape(-1, 2)[:tcp_wire.FRAME_READS_MAX]
    status = tcp_wire.check_reads(reads, 1 << 20)
    if status != tcp_wire.OK:
        raise NotAccepted(tcp_wire.STATUS_TEXT[status])
    assert all(length > 0 and offset + length <= 1 << 20 for offset, length in reads.tolist())
    return reads.tobytes()


def _shm_reply(data: bytes) -> bytes:
    # the descriptors stand for any two; none is opened or closed here
    memfd, guard, guard_offset = shm._unpack(data, [101, 102], "shm")
    assert (memfd, guard) == (101, 102) and 0 <= guard_offset <= shm.PAGE_BYTES - 8
    return shm.REPLY.pack(shm.MAGIC, shm.VERSION, shm.GRANTED, 0, guard_offset)


def _shm_request(data: bytes) -> bytes:
    server = shm._FdServer.__new__(shm._FdServer)
    server._regions = {}
    status, entry = server._decide(data, 0)
    assert entry is None
    if status == shm.BAD_REQUEST:
        raise NotAccepted("the request is malformed")
    assert status == shm.UNKNOWN_REGION
    return data


def _pull_stream(data: bytes) -> bytes:
    """Read a stream to its end; what it was cut into is what it holds, but for an unfinished message."""
    inbox = wire.Inbox()
    inbox.feed(data)
    taken = b""
    while (message := inbox.take()) is not None:
        taken += wire.frame(message)
    assert len(inbox) <= wire.LENGTH_BYTES + wire.MESSAGE_MAX_BYTES
    return taken


def _rdma_header(data: bytes) -> bytes:
    return rdma_wire.HEADER.pack(rdma_wire.MAGIC, rdma_wire.VERSION, 0, rdma_wire.unpack_header(data))


def _region(data: bytes) -> bytes:
    try:
        region = msgspec.msgpack.decode(data, type=RegionDescriptor)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed region: {error}") from error  # as the messages around it do
    return msgspec.msgpack.encode(region)


def _encoded(messages: tuple[Any, ...], encode: Callable[[Any], bytes]) -> tuple[bytes, ...]:
    return tuple(encode(message) for message in messages)


DECODERS = (
    Decoder("pull", _encoded(PULL, wire.encode), _again(wire.decode, wire.encode)),
    Decoder("pull-stream", (b"".join(map(wire.frame, PULL)), *map(wire.frame, PULL)), _pull_stream, codec="raw"),
    Decoder("handoff-to-prefill", _encoded(TO_PREFILL, handoff.encode),
            _again(handoff.decode_to_prefill, handoff.encode), size_max_bytes=handoff.MESSAGE_MAX_BYTES),
    Decoder("handoff-to-decode", _encoded(TO_DECODE, handoff.encode), _again(handoff.decode_to_decode, handoff.encode),
            size_max_bytes=handoff.MESSAGE_MAX_BYTES),
    Decoder("placement-question", _encoded(QUESTIONS, placement.encode),
            _again(placement.decode_question, placement.encode)),
    Decoder("placement-answer", _encoded(ANSWERS, placement.encode), _again(placement.decode_answer, placement.encode)),
    Decoder("introduction", (INTRODUCTION,), _introduction, codec="json"),
    Decoder("server-info", (SERVER_INFO,), _server_info, codec="json"),
    Decoder("transfer-params", (PARAMS,), _params, head=0, size_max_bytes=64 << 10),
    Decoder("kv-events-maps", KV_MAPS, _kv_events("vllm"), head=0, size_max_bytes=kv_events.MESSAGE_MAX_BYTES),
    Decoder("kv-events-arrays", (KV_ARRAYS,), _kv_events("vllm"), head=0, size_max_bytes=kv_events.MESSAGE_MAX_BYTES),
    Decoder("kv-events-sglang", (KV_SGLANG,), _kv_events("sglang"), head=0,
            size_max_bytes=kv_events.MESSAGE_MAX_BYTES),
    Decoder("chat-body", (CHAT_BODY,), _body(bodies.CHAT), codec="json"),
    Decoder("completion-body", (COMPLETION_BODY,), _body(bodies.COMPLETIONS), codec="json"),
    Decoder("directory-page", (schema.encode_page(KEYS), schema.encode_page(())),
            _event(PATHS.page(NodeId("n"), 1), lambda event: schema.encode_page(event.keys))),
    Decoder("directory-member", (schema.encode_member(MEMBER),),
            _event(PATHS.member(NodeId("n")), lambda event: schema.encode_member(event.member))),
    Decoder("directory-path", (PATHS.page(NodeId("n"), 1), PATHS.member(NodeId("n")), PATHS.epoch), _path, codec="raw"),
    Decoder("region", (msgspec.msgpack.encode(REGION),), _region, head=0),
    Decoder("tcp-request", (tcp_wire.pack_request(tcp_wire.Request(1, 2, 3, 4), np.empty((0, 2), np.uint64)),),
            _exactly(tcp_wire.HEADER_BYTES, _tcp_request), codec="raw"),
    Decoder("tcp-reads", (struct.pack("<6Q", 0, 4096, 8192, 100, 1 << 19, 1),), _tcp_reads, codec="raw"),
    Decoder("tcp-response", (tcp_wire.pack_response(tcp_wire.Response(0, 2, 3, 4096)),),
            _exactly(tcp_wire.HEADER_BYTES, _tcp_response), codec="raw"),
    Decoder("rdma-header", (rdma_wire.pack(RDMA[0])[:rdma_wire.HEADER.size],),
            _exactly(rdma_wire.HEADER.size, _rdma_header), codec="raw"),
    Decoder("rdma-body", tuple(rdma_wire.pack(message)[rdma_wire.HEADER.size:] for message in RDMA),
            _again(rdma_wire.unpack_body, msgspec.msgpack.encode), head=0, size_max_bytes=rdma_wire.BODY_MAX_BYTES),
    Decoder("shm-request", (shm.REQUEST.pack(shm.MAGIC, shm.VERSION, 5),), _shm_request, codec="raw"),
    Decoder("shm-reply", (shm.REPLY.pack(shm.MAGIC, shm.VERSION, shm.GRANTED, 4096, 8),), _shm_reply, codec="raw"),
)
