"""Speak with vLLM servers that run MooncakeKVConnector, or none.

Pure: no sockets, threads or clocks.

A server tells where its KV can be pulled in the ``kv_transfer_params`` of a one-token completion. Both legs carry
params of their own; the prefill leg generates one token that nobody needs. A decode server whose prefill dies notices
and computes the prompt itself.
"""

from __future__ import annotations

import msgspec

from mooncake_connector.router import bodies
from mooncake_connector.router.bodies import COMPLETIONS, Ask
from mooncake_connector.router.dialects.base import Probe, StreamFailure
from mooncake_connector.router.engines import Introduction
from mooncake_connector.router.messages import DecodeParams, EngineKind, Placed, PrefillParams


class _IntroductionParams(msgspec.Struct):
    introduce: bool = True


class _IntroductionBody(msgspec.Struct):
    model: str
    kv_transfer_params: _IntroductionParams
    prompt: str = "Hello"
    max_tokens: int = 1
    temperature: float = 0.0
    stream: bool = False


class _KvParams(msgspec.Struct):
    remote_engine_id: str = ""
    remote_addresses: tuple[str, ...] = ()


class _Completion(msgspec.Struct):
    kv_transfer_params: _KvParams | None = None


_completion_decoder = msgspec.json.Decoder(_Completion)


class VllmDialect:
    """What :class:`~mooncake_connector.router.dialects.base.Dialect` asks for, of vLLM."""

    kind: EngineKind = "vllm"
    connector = "MooncakeKVConnector"
    health_path = "/health"
    recovers = True
    unsplittable: frozenset[str] = frozenset()
    """Not that they could be split: each of its servers can run them whole."""

    def probe(self, models: tuple[str, ...]) -> Probe:
        """Return the one-token completion that our connector answers with its address."""
        body = _IntroductionBody(model=models[0], kv_transfer_params=_IntroductionParams())
        return Probe("POST", COMPLETIONS, msgspec.json.encode(body))

    def read_probe(self, answer: bytes, *, url: str, models: tuple[str, ...]) -> Introduction | None:
        """Return what a completion tells of the engine."""
        return read_introduction(answer, models)

    def pair(self, source: Introduction, transfer_id: str, placed: Placed) -> Placed:
        """Tell the prefill engine under which id to keep its KV, and the decode engine where to pull it."""
        return msgspec.structs.replace(
            placed,
            prefill_params=PrefillParams(do_remote_decode=True, do_remote_prefill=False, transfer_id=transfer_id),
            decode_params=DecodeParams(
                do_remote_prefill=True,
                do_remote_decode=False,
                transfer_id=transfer_id,
                remote_engine_id=source.engine_id,
                remote_addresses=source.addresses,
            ),
        )

    def prefill_body(self, ask: Ask, placed: Placed) -> bytes:
        """Return the same prompt for one token, not streamed."""
        assert placed.prefill_params is not None
        return bodies.prefill_body(ask, placed.prefill_params)

    def decode_body(self, ask: Ask, placed: Placed) -> bytes:
        """Return the client's body with our params, or without any when the request is not split."""
        return bodies.decode_body(ask, placed.decode_params)

    def stream_failure(self, first: bytes) -> StreamFailure | None:
        """Return None: vLLM answers with a status when it fails before the first token."""
        return None


def read_introduction(data: bytes, models: tuple[str, ...]) -> Introduction | None:
    """Return what a completion's ``kv_transfer_params`` tell of the engine; None when it is not a completion.

    An engine without our connector is introduced without id and addresses.
    """
    try:
        params = _completion_decoder.decode(data).kv_transfer_params
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if params is None:
        return Introduction(models=models)
    return Introduction(models=models, engine_id=params.remote_engine_id, addresses=params.remote_addresses)
