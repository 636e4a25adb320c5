"""Define what the placement service says over ZeroMQ, byte for byte.

Pure: no sockets, threads or clocks.

A frame is one version byte, then one msgpack array whose first item is the message's tag. Fields are positional; a
later version may only append fields that have defaults. The two ``kv_transfer_params`` travel as maps, so that a client
in any language can paste them into a request body unchanged. See docs/reference/placement.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from mooncake_store.errors import RemoteProtocolError

WIRE_VERSION = 1
FRAME_MAX_BYTES = 1 << 20
URL_MAX_CHARS = 512
TEXT_MAX_CHARS = 1024
ADDRESSES_MAX = 1024
HASHES_MAX = 65_536
ENGINES_EXCLUDED_MAX = 64
TOKENS_MAX = 1 << 40
TOKEN_BYTES = 4

Url = Annotated[str, msgspec.Meta(min_length=1, max_length=URL_MAX_CHARS, pattern="^https?://[^\\s/]+$")]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX_CHARS)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_MAX_CHARS)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=86_400_000)]
TokenIds = Annotated[bytes, msgspec.Meta(max_length=FRAME_MAX_BYTES)]
Addresses = Annotated[tuple[Name, ...], msgspec.Meta(max_length=ADDRESSES_MAX)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
Hash = Annotated[int, msgspec.Meta(ge=0)]
Hashes = Annotated[tuple[Hash, ...], msgspec.Meta(max_length=HASHES_MAX)]
ExcludedUrls = Annotated[tuple[Url, ...], msgspec.Meta(max_length=ENGINES_EXCLUDED_MAX)]
Role = Literal["prefill", "decode", "both"]
Leg = Literal["prefill", "decode", "both"]
EngineKind = Literal["vllm", "sglang"]
Outcome = Literal["ok", "failed", "aborted"]


class PrefillParams(msgspec.Struct, frozen=True):
    """``kv_transfer_params`` of a prefill request: compute, keep, and let a decode engine pull under this id."""

    do_remote_decode: bool
    do_remote_prefill: bool
    transfer_id: str


class DecodeParams(msgspec.Struct, frozen=True):
    """``kv_transfer_params`` of a decode request: pull from that prefill engine, one address per TP rank of it."""

    do_remote_prefill: bool
    do_remote_decode: bool
    transfer_id: str
    remote_engine_id: str
    remote_addresses: tuple[str, ...]


class Bootstrap(msgspec.Struct, frozen=True):
    """Where an SGLang pair meets: the prefill server's bootstrap service, and the room that names the transfer."""

    bootstrap_host: str
    bootstrap_port: int
    bootstrap_room: int


class Register(msgspec.Struct, frozen=True, array_like=True, tag="register"):
    """An engine that wants work. The router probes it before it relies on it.

    ``engine_id`` and ``addresses`` are optional: without them the router asks the engine itself.
    """

    url: Url
    role: Role
    model: Text = ""
    engine_id: Text = ""
    addresses: Addresses = ()


class Unregister(msgspec.Struct, frozen=True, array_like=True, tag="unregister"):
    """An engine that wants no more work. Requests already placed on it go on."""

    url: Url


class LoadReport(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """What an engine has to do: tokens not yet computed (prefill) and tokens held by running requests (decode)."""

    url: Url
    prefill_tokens: Tokens
    decode_tokens: Tokens


class Place(msgspec.Struct, frozen=True, array_like=True, tag="place"):
    """A request that needs a pair of engines.

    Attributes:
        request_id: comes back in the reply, so that a client may have many questions open.
        num_prompt_tokens: exact or estimated.
        num_output_tokens: expected answer; 0 when unknown.
        model: as the client named it; empty means any.
        prefix_hashes: chained hashes of the prompt's leading chunks, nearest the start first; any stable 64-bit hash
            will do as long as one client always uses the same.
        excluded: engines not to use, e.g. because they just failed.
        token_ids: the prompt's token ids, 32 bits each, little-endian; lets the router use what engines tell of their
            caches. Empty when the client has none.
        cache_salt: what the client sends the engine as such; prompts with different salts share nothing.
    """

    request_id: Name
    num_prompt_tokens: Tokens
    num_output_tokens: Tokens = 0
    model: Text = ""
    prefix_hashes: Hashes = ()
    excluded: ExcludedUrls = ()
    token_ids: TokenIds = b""
    cache_salt: Text = ""


class Admit(msgspec.Struct, frozen=True, array_like=True, tag="admit"):
    """A request that may wait for its turn, and be told no because of what it or others were promised.

    Attributes:
        place: the request.
        service_class: its class; empty or unknown means the default one.
        tenant: whose it is, for fairness.
        ttft_ms: a tighter deadline than its class's; 0 for none.
        priority: each step doubles or halves its weight.
        num_reuses: requests to come that begin with this prompt.
        wait_ms: the answer comes no later than after this.
    """

    place: Place
    service_class: Text = ""
    tenant: Text = ""
    ttft_ms: Milliseconds = 0
    priority: Annotated[int, msgspec.Meta(ge=-8, le=8)] = 0
    num_reuses: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)] = 0
    wait_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)] = 30_000


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="finished"):
    """One leg or both legs of a placed request are over; their work no longer counts."""

    transfer_id: Name
    outcome: Outcome = "ok"
    leg: Leg = "both"


class Placed(msgspec.Struct, frozen=True, array_like=True, tag="placed"):
    """Where to send a request.

    ``prefill_url`` is empty, and params and ``bootstrap`` are None, when the request runs whole on ``decode_url``;
    ``reason`` says why. A pair of SGLang servers has ``bootstrap``, any other has params.
    """

    request_id: str
    prefill_url: str
    decode_url: str
    transfer_id: str
    prefill_params: PrefillParams | None = None
    decode_params: DecodeParams | None = None
    reason: str = ""
    bootstrap: Bootstrap | None = None


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """No: ``code`` is for programs, ``reason`` for people. ``subject`` is the request id or url it answers."""

    subject: str
    code: Literal["no_engine", "no_model", "full", "unknown", "malformed"]
    reason: str


class Busy(msgspec.Struct, frozen=True, array_like=True, tag="busy"):
    """Not now: come back after so many seconds. ``subject`` is the request id it answers."""

    subject: str
    reason: str
    retry_after_s: int


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag="accepted"):
    """Yes, for everything but Place. ``subject`` is the url or transfer id it answers."""

    subject: str


Question = Register | Unregister | LoadReport | Place | Admit | Finished
Answer = Placed | Refused | Busy | Accepted

_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_VERSION = bytes([WIRE_VERSION])


def encode(message: Question | Answer) -> bytes:
    """Return the frame of a message."""
    return _VERSION + _encoder.encode(message)


def decode_question(frame: bytes) -> Question:
    """Return what a client asks.

    Raises:
        RemoteProtocolError: for anything that is not exactly one well-formed question of our version.
    """
    try:
        return _questions.decode(_body(frame))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed question: {error}", hint="see docs/reference/placement.md") from error


def decode_answer(frame: bytes) -> Answer:
    """Return what the service answered; for clients.

    Raises:
        RemoteProtocolError: for anything that is not exactly one well-formed answer of our version.
    """
    try:
        return _answers.decode(_body(frame))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"malformed answer: {error}") from error


def _body(frame: bytes) -> memoryview:
    if not frame:
        raise RemoteProtocolError("empty frame")
    if len(frame) > FRAME_MAX_BYTES:
        raise RemoteProtocolError(f"frame has {len(frame)} bytes, more than {FRAME_MAX_BYTES}")
    if frame[0] != WIRE_VERSION:
        raise RemoteProtocolError(
            f"frame has version {frame[0]}, we speak {WIRE_VERSION}", hint="use the client of the router's version"
        )
    return memoryview(frame)[1:]
