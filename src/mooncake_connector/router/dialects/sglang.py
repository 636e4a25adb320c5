"""Speak with SGLang servers: pairs of ``--disaggregation-mode`` prefill and decode, and plain ones.

Pure: no sockets, threads or clocks.

Both legs are the client's own body and carry the same three fields: where the prefill server's bootstrap service
listens, and a random *room*, which names the transfer. The prefill server samples the first token, so nothing that
bears on sampling may be left out of its leg; the decode server's answer has it. The transfer backend is the servers'
business.

A server of a pair does only its half. It cannot run a whole request, and a decode server that lost its prefill cannot
compute the prompt; then both legs are sent anew. Checked against SGLang 0.5.23.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from mooncake_connector.router.bodies import Ask
from mooncake_connector.router.dialects.base import Probe, StreamFailure
from mooncake_connector.router.engines import Introduction
from mooncake_connector.router.index.endpoints import RANKS_MAX, EventSockets
from mooncake_connector.router.messages import Bootstrap, EngineKind, Placed

Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
_DROPPED_FROM_PREFILL = ("stream_options",)
_FALSE = msgspec.Raw(b"false")
_ERROR_EVENT = b'data: {"error"'
_encoder = msgspec.json.Encoder()


class _KvEvents(msgspec.Struct):
    """How SGLang describes its publishers: ports, on the host that we know it by."""

    endpoint_port_base: Port
    replay_endpoint_port_base: Port = 0
    dp_size: Annotated[int, msgspec.Meta(ge=1, le=RANKS_MAX)] = 1
    topic: Annotated[str, msgspec.Meta(max_length=512)] = ""


class _ServerInfo(msgspec.Struct):
    """The part of ``GET /server_info`` that we read; ``startup_time`` differs from life to life."""

    disaggregation_mode: Literal["null", "prefill", "decode"]
    disaggregation_bootstrap_port: Port = 0
    random_seed: int | None = None
    startup_time: msgspec.Raw = msgspec.Raw(b"")
    kv_events: _KvEvents | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: int = 500


class _ErrorEvent(msgspec.Struct):
    error: _Error


class SglangDialect:
    """What :class:`~mooncake_connector.router.dialects.base.Dialect` asks for, of SGLang."""

    kind: EngineKind = "sglang"
    connector = "--disaggregation-mode"
    health_path = "/ready"
    """Not ``/health``: that one generates a token and takes a second."""
    recovers = False
    unsplittable = frozenset({"n"})
    """All choices would meet in one room."""

    def probe(self, models: tuple[str, ...]) -> Probe:
        """Return the question for its settings, which costs no token."""
        return Probe("GET", "/server_info")

    def read_probe(self, answer: bytes, *, url: str, models: tuple[str, ...]) -> Introduction | None:
        """Return which half it serves, and where its bootstrap service listens: on the host we know it by."""
        try:
            info = msgspec.json.decode(answer, type=_ServerInfo)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        life = hashlib.blake2b(bytes(info.startup_time) + str(info.random_seed).encode(), digest_size=8).hexdigest()
        half = "" if info.disaggregation_mode == "null" else info.disaggregation_mode
        addresses = (f"{urlsplit(url).hostname}:{info.disaggregation_bootstrap_port}",) if half == "prefill" else ()
        return Introduction(
            models=models,
            engine_id=f"sglang-{life}",
            addresses=addresses,
            kind=self.kind,
            half=half,
            events=None if info.kv_events is None else _sockets(info.kv_events),
        )

    def pair(self, source: Introduction, transfer_id: str, placed: Placed) -> Placed:
        """Let both servers meet at the prefill server's bootstrap service."""
        host, _, port = source.addresses[0].rpartition(":")
        return msgspec.structs.replace(placed, bootstrap=Bootstrap(host, int(port), room_of(transfer_id)))

    def prefill_body(self, ask: Ask, placed: Placed) -> bytes:
        """Return the client's body with the meeting point, not streamed: nobody reads the answer."""
        body = {name: value for name, value in ask.body.items() if name not in _DROPPED_FROM_PREFILL}
        return _meeting_body({**body, "stream": _FALSE}, placed)

    def decode_body(self, ask: Ask, placed: Placed) -> bytes:
        """Return the client's body with the meeting point, or without one when the request is not split."""
        return _meeting_body(dict(ask.body), placed)

    def stream_failure(self, first: bytes) -> StreamFailure | None:
        """Return the error that takes the place of the first token when a hand-over failed."""
        if not first.startswith(_ERROR_EVENT):
            return None
        event = first.split(b"\n\n", 1)[0].removeprefix(b"data: ")
        try:
            error = msgspec.json.decode(event, type=_ErrorEvent).error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return StreamFailure(error.code, error.message)


def _sockets(told: _KvEvents) -> EventSockets:
    replay = f"tcp://*:{told.replay_endpoint_port_base}" if told.replay_endpoint_port_base else ""
    endpoint = f"tcp://*:{told.endpoint_port_base}"
    return EventSockets(
        endpoint=endpoint, replay=replay, num_ranks=told.dp_size, topic=told.topic, dialect="sglang"
    )


def room_of(transfer_id: str) -> int:
    """Return the room of a transfer: 63 bits, as random as the id is, and the same for whoever knows it."""
    return int.from_bytes(hashlib.blake2b(transfer_id.encode(), digest_size=8).digest(), "big") >> 1


def _meeting_body(body: dict[str, msgspec.Raw], placed: Placed) -> bytes:
    if placed.bootstrap is not None:
        for name, value in msgspec.structs.asdict(placed.bootstrap).items():
            body[name] = msgspec.Raw(_encoder.encode(value))
    return _encoder.encode(body)
