"""Ask OpenAI-compatible servers and note when each token came."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from mooncake_connector.demo.cluster import SERVED_NAME
from mooncake_store.errors import MooncakeError

ASK_TIMEOUT_S = 240.0
LINE_MAX_BYTES = 4 << 20


class AskFailed(MooncakeError):
    """A server answered with an error, or not at all."""


class Answer(msgspec.Struct, kw_only=True):
    """One streamed answer. Times are ``time.monotonic()`` seconds.

    Attributes:
        began: when the request was sent.
        times: when each chunk with content came.
        text: what was generated.
        token_ids: generated tokens, where the server gives them.
        prompt_tokens: length of the prompt, from the server's usage.
        cached_tokens: how many of them were not computed, from the server's usage.
        finish_reason: why it ended.
        error: the server's error, empty when there was none.
        status: HTTP status; 0 when there was no answer.
        ended: when the answer was complete.
    """

    began: float
    times: list[float] = []
    text: str = ""
    token_ids: list[int] = []
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    error: str = ""
    status: int = 0
    ended: float = 0.0

    @property
    def ttft_s(self) -> float:
        """Return the time to the first token; NaN when none came."""
        return self.times[0] - self.began if self.times else float("nan")

    @property
    def step_s(self) -> float:
        """Return the mean time between tokens; NaN when fewer than two came."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else float("nan")


def session() -> aiohttp.ClientSession:
    """Open a client session for asking; close it with ``async with``."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S), read_bufsize=LINE_MAX_BYTES)


async def chat(http: aiohttp.ClientSession, url: str, messages: Sequence[dict[str, str]], *, max_tokens: int,
               **body: Any) -> Answer:
    """Ask for one streamed chat answer, greedily."""
    return await _stream(http, f"{url}/v1/chat/completions",
                         {"messages": list(messages), "max_tokens": max_tokens, **body})


async def complete(http: aiohttp.ClientSession, url: str, prompt: Sequence[int] | str, *, max_tokens: int,
                   **body: Any) -> Answer:
    """Ask for one streamed completion, greedily, with token ids."""
    return await _stream(http, f"{url}/v1/completions",
                         {"prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": max_tokens,
                          "return_token_ids": True, **body})


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    """Post JSON and return the JSON answer.

    Raises:
        AskFailed: for any other status than 200.
    """
    async with http.post(url, json=body, headers=headers) as reply:
        if reply.status != 200:
            raise AskFailed(f"HTTP {reply.status}: {(await reply.text())[:500]}", where=url)
        answer: dict[str, Any] = await reply.json()
        return answer


class Handoff(msgspec.Struct):
    """One prompt prefilled on one engine and decoded on another, asked directly, without a router.

    Attributes:
        prefill: parsed answer of the prefill leg; empty when it failed.
        prefill_error: why the prefill leg failed.
        prefill_ended: when its answer came.
        decode: the decode leg.
    """

    prefill: dict[str, Any]
    prefill_error: str
    prefill_ended: float
    decode: Answer

    @property
    def exposed_s(self) -> float:
        """Return the decode engine's first token minus the prefill's completion: what the hand-over costs a user."""
        return self.decode.times[0] - self.prefill_ended if self.decode.times else float("nan")


async def introduce(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """Ask an engine where its workers answer.

    Returns:
        its ``remote_engine_id`` and ``remote_addresses``.

    Raises:
        AskFailed: if it has no connector of ours.
    """
    answer = await post(http, f"{url}/v1/completions", {
        "model": SERVED_NAME, "prompt": [1], "max_tokens": 1, "kv_transfer_params": {"introduce": True}})
    found = answer.get("kv_transfer_params")
    if not found:
        raise AskFailed("the engine does not introduce itself", where=url, hint="start it with the MooncakeKVConnector")
    return {key: found[key] for key in ("remote_engine_id", "remote_addresses")}


async def hand_over(http: aiohttp.ClientSession, *, prefill_url: str, decode_url: str, peer: dict[str, Any],
                    prompt: Sequence[int], max_tokens: int, prefill_delay_s: float = 0.0, decode_delay_s: float = 0.0,
                    prefill_params: dict[str, Any] | None = None, decode_params: dict[str, Any] | None = None,
                    **body: Any) -> Handoff:
    """Send both legs of one request at the same time, as the router does.

    Args:
        http: client session.
        prefill_url: engine that computes the prompt.
        decode_url: engine that generates.
        peer: where the prefill engine answers, see :func:`introduce`; or any engine's decode parameters.
        prompt: token ids.
        max_tokens: tokens to generate.
        prefill_delay_s: send the prefill leg this much later.
        decode_delay_s: send the decode leg this much later.
        prefill_params: more ``kv_transfer_params`` of the prefill leg, e.g. ``{"publish": "step"}``.
        decode_params: more ``kv_transfer_params`` of the decode leg.
        body: more fields of both requests.
    """
    transfer_id = uuid.uuid4().hex
    prefill = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id,
               **(prefill_params or {})}
    decode = {"do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer_id, **peer,
              **(decode_params or {})}
    return await both_legs(http, prefill_url=prefill_url, decode_url=decode_url, prompt=prompt, max_tokens=max_tokens,
                           prefill_delay_s=prefill_delay_s, decode_delay_s=decode_delay_s,
                           prefill_fields={"max_tokens": 1, "kv_transfer_params": prefill, **body},
                           decode_fields={"kv_transfer_params": decode, **body}, **{"X-data-parallel-rank": "0"})


async def both_legs(http: aiohttp.ClientSession, *, prefill_url: str, decode_url: str, prompt: Sequence[int],
                    max_tokens: int, prefill_fields: dict[str, Any], decode_fields: dict[str, Any],
                    prefill_delay_s: float = 0.0, decode_delay_s: float = 0.0, **prefill_headers: str) -> Handoff:
    """Send one prompt to two engines, with what each must be told."""

    async def prefill_leg() -> tuple[dict[str, Any], str, float]:
        await asyncio.sleep(prefill_delay_s)
        answer: dict[str, Any] = {}
        error = ""
        try:
            answer = await post(http, f"{prefill_url}/v1/completions", {
                "model": SERVED_NAME, "prompt": list(prompt), "temperature": 0, "max_tokens": max_tokens,
                **prefill_fields}, **prefill_headers)
        except (AskFailed, aiohttp.ClientError, TimeoutError) as failure:
            error = str(failure) or type(failure).__name__
        return answer, error, time.monotonic()

    async def decode_leg() -> Answer:
        await asyncio.sleep(decode_delay_s)
        return await complete(http, decode_url, prompt, max_tokens=max_tokens, **decode_fields)

    (answer, error, ended), decode = await asyncio.gather(prefill_leg(), decode_leg())
    return Handoff(answer, error, ended, decode)


async def _stream(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    answer = Answer(began=time.monotonic())
    request = {"model": SERVED_NAME, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
               **body}
    try:
        async with http.post(url, json=request) as reply:
            answer.status = reply.status
            if reply.status != 200:
                answer.error = (await reply.text())[:2000]
            else:
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        _note(answer, msgspec.json.decode(line[6:]))
    except (aiohttp.ClientError, TimeoutError) as failure:
        answer.error = f"{type(failure).__name__}: {failure}"
    answer.ended = time.monotonic()
    return answer


def _note(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.error = msgspec.json.encode(chunk["error"]).decode()
        return
    usage = chunk.get("usage")
    if usage:
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in chunk.get("choices", ()):
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        token_ids = choice.get("token_ids") or []
        if text or token_ids:
            answer.times.append(time.monotonic())
        answer.text += text
        answer.token_ids += token_ids
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
