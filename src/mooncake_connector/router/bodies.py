"""Read an OpenAI-style request body just far enough to place it, and write the bodies of its two legs.

Pure: no sockets, threads or clocks.

A body is kept as field name -> raw JSON, so that every field that we do not know, and every value that we do not need,
reaches the engines byte for byte.
"""

from __future__ import annotations

import array
import sys
from typing import Literal, TypeVar

import msgspec

from mooncake_connector.router.answers import Problem
from mooncake_connector.router.messages import DecodeParams, PrefillParams
from mooncake_connector.router.prefix_index import prompt_chain

Route = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Route = "/v1/chat/completions"
COMPLETIONS: Route = "/v1/completions"

BYTES_PER_TOKEN = 4
"""Of English text, roughly; prompts are only estimated here, the router has no tokenizer."""

_SCOPE_FIELDS = ("model", "tools", "cache_salt", "chat_template", "chat_template_kwargs")
_PREFILL_DROPPED = ("stream_options", "min_tokens", "n", "logprobs", "top_logprobs", "kv_transfer_params")
_ENGINE_FIELDS = frozenset(
    ("kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "disagg_prefill_dp_rank")
)
"""Never taken from a client: they could make an engine connect to any address."""
_TRUE = b"true"
_NULL = b"null"
_ONE = msgspec.Raw(b"1")
_FALSE = msgspec.Raw(b"false")

Body = dict[str, msgspec.Raw]
T = TypeVar("T")
_body_decoder = msgspec.json.Decoder(Body)
_encoder = msgspec.json.Encoder()


class Ask(msgspec.Struct, frozen=True):
    """One client request.

    Attributes:
        body: every field, raw.
        data: the whole body as it came; empty when it cannot go to an engine as it is.
        is_stream: whether the client wants server-sent events.
        num_prompt_tokens: estimated.
        num_output_tokens: the most it may generate; 0 when the client set no limit.
        prefix_hashes: chain of the prompt, see :mod:`mooncake_connector.router.prefix_index`.
        colocated_reason: why it must run whole on one engine; empty when it may be split.
    """

    route: Route
    body: Body
    model: str
    is_stream: bool
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_hashes: tuple[int, ...]
    colocated_reason: str
    data: bytes = b""


def read_ask(route: Route, data: bytes, *, min_split_tokens: int = 0) -> Ask | Problem:
    """Return what the client asks, or what is wrong with its body.

    Args:
        route: where it was sent.
        data: the body.
        min_split_tokens: prompts estimated to be shorter than this run whole on one engine.
    """
    try:
        data.decode()  # raw values are not checked by the JSON decoder
        body = _body_decoder.decode(data)
        is_clean = _ENGINE_FIELDS.isdisjoint(body)
        if not is_clean:
            body = {name: value for name, value in body.items() if name not in _ENGINE_FIELDS}
        model = _read(body, "model", str) or ""
        is_stream = _read(body, "stream", bool) or False
        num_output = _read(body, "max_completion_tokens", int) or _read(body, "max_tokens", int) or 0
        prompt_field = "messages" if route == CHAT else "prompt"
        prompt = bytes(body.get(prompt_field, b""))
        reason = _colocated_reason(route, body, prompt)
    except UnicodeDecodeError:
        return Problem(400, "the body is not valid UTF-8")
    except (msgspec.MsgspecError, RecursionError) as error:
        return Problem(400, f"the body is not a valid JSON request: {error}")
    if prompt in (b"", _NULL) and "prompt_embeds" not in body:
        return Problem(400, f"the request has no {prompt_field!r}", param=prompt_field)
    num_prompt = _estimate_tokens(route, prompt)
    if not reason and num_prompt < min_split_tokens:
        reason = "short_prompt"
    scope = b"\0".join(bytes(body.get(name, b"")) for name in _SCOPE_FIELDS)
    return Ask(
        route=route,
        body=body,
        model=model,
        is_stream=is_stream,
        num_prompt_tokens=num_prompt,
        num_output_tokens=max(0, num_output),
        prefix_hashes=prompt_chain(scope, prompt),
        colocated_reason=reason,
        data=data if is_clean else b"",
    )


def token_ids_of(ask: Ask) -> bytes:
    """Return the prompt's token ids, 32 bits each, little-endian; empty when it came as text or is no single prompt."""
    prompt = bytes(ask.body.get("prompt", b""))
    if ask.route != COMPLETIONS or prompt[:1] != b"[" or b'"' in prompt[:16]:
        return b""
    try:
        token_ids = array.array("I", msgspec.json.decode(prompt, type=list[int]))
    except (msgspec.MsgspecError, OverflowError):
        return b""
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tobytes()


def cache_salt_of(ask: Ask) -> str:
    """Return the client's cache salt; empty when it has none."""
    try:
        return _read(ask.body, "cache_salt", str) or ""
    except msgspec.ValidationError:
        return ""


def prefill_body(ask: Ask, params: PrefillParams) -> bytes:
    """Return the body of the prefill leg: the same prompt, one token, not streamed."""
    body = {name: value for name, value in ask.body.items() if name not in _PREFILL_DROPPED}
    body["max_tokens"] = _ONE
    if ask.route == CHAT or "max_completion_tokens" in body:
        body["max_completion_tokens"] = _ONE
    body["stream"] = _FALSE
    body["kv_transfer_params"] = msgspec.Raw(_encoder.encode(params))
    return _encoder.encode(body)


def decode_body(ask: Ask, params: DecodeParams | None) -> bytes:
    """Return the body of the decode leg: the client's, with our ``kv_transfer_params`` or none.

    A client's own ``kv_transfer_params`` are dropped: they could make an engine connect to any address.
    """
    if params is None and ask.data:
        return ask.data
    body = dict(ask.body)
    if params is not None:
        body["kv_transfer_params"] = msgspec.Raw(_encoder.encode(params))
    return _encoder.encode(body)


def hide_params(answer: bytes) -> bytes:
    """Return an engine's JSON answer with ``kv_transfer_params`` set to null: addresses are nobody's business."""
    if b'"kv_transfer_params":{' not in answer and b'"kv_transfer_params": {' not in answer:
        return answer
    try:
        body = _body_decoder.decode(answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return answer
    if "kv_transfer_params" not in body:
        return answer  # the text itself speaks of them
    body["kv_transfer_params"] = msgspec.Raw(_NULL)
    return _encoder.encode(body)


def _colocated_reason(route: Route, body: Body, prompt: bytes) -> str:
    """Say why a split would change the answer; empty when it would not."""
    if (_read(body, "n", int) or 1) > 1 or (_read(body, "best_of", int) or 1) > 1:
        return "n"
    if bytes(body.get("use_beam_search", b"")) == _TRUE:
        return "beam_search"
    if bytes(body.get("echo", b"")) == _TRUE:
        return "echo"
    if bytes(body.get("prompt_logprobs", _NULL)) != _NULL:
        return "prompt_logprobs"
    if route == COMPLETIONS:
        if bytes(body.get("prompt_embeds", _NULL)) != _NULL:
            return "prompt_embeds"
        if prompt[:1] == b"[" and _num_prompts(prompt) != 1:
            return "prompt_list"
    return ""


def _num_prompts(prompt: bytes) -> int:
    """Return how many prompts a JSON list holds: token ids are one prompt, strings and lists are one each."""
    items = msgspec.json.decode(prompt, type=list[msgspec.Raw])
    if not items or bytes(items[0])[:1] not in (b'"', b"["):
        return 1
    return len(items)


def _estimate_tokens(route: Route, prompt: bytes) -> int:
    if route == COMPLETIONS and prompt[:1] == b"[" and b'"' not in prompt[:16]:
        return prompt.count(b",") + 1
    return max(1, len(prompt) // BYTES_PER_TOKEN)


def _read(body: Body, name: str, kind: type[T]) -> T | None:
    raw = body.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=kind | None)
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(f"{error} - at `$.{name}`") from error
