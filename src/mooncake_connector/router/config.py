"""Hold the router's settings.

Precedence: command line > the file given by ``--config`` (JSON or TOML) > default. The environment is not read.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from mooncake_connector.router.messages import Url

Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one router process.

    Attributes:
        prefill: base URLs of the engines that compute prompts, such as http://127.0.0.1:8100.
        decode: base URLs of the engines that generate.
        engine: base URLs of the engines that may do both.
        host: address where clients connect.
        port: port where clients connect; 0 takes a free one.
        placement: ZeroMQ address of the placement service; empty turns it off. Whoever reaches it can add engines.
        engine_api_key: sent when the router itself asks an engine something; clients' own keys are passed through.
        min_split_tokens: prompts estimated shorter than this run whole on one engine; 0 = always split.
        connect_timeout_s: longest wait for a connection to an engine.
        first_byte_timeout_s: longest wait for the first byte of a streamed answer.
        total_timeout_s: longest time one request may take.
        body_timeout_s: longest time a client may take to send its body.
        decode_recovery_s: how long a decode engine whose prefill engine died may take to show its first byte before
            the request is sent to it again as a plain one.
        refused_grace_s: the same after a prefill engine that is alive refused its leg.
        decode_token_s: for answers that are not streamed, added to both per token that the answer may have, because a
            healthy decode engine shows nothing until the last one.
        health_interval_s: how often each engine is checked.
        health_timeout_s: how long an engine may take to answer a check.
        introduction_timeout_s: longest wait for the one-token request that asks an engine who it is.
        startup_wait_s: how long the first requests wait until every engine was asked once.
        drain_timeout_s: how long running requests may go on after SIGTERM.
        placement_ttl_s: a placement that no client finished stops counting after this.
        body_max_bytes: largest request body.
        requests_max: requests served at once; more get 503.
        connections_max: connections to engines.
    """

    prefill: tuple[Url, ...] = ()
    decode: tuple[Url, ...] = ()
    engine: tuple[Url, ...] = ()
    host: str = "127.0.0.1"
    port: Port = 8000
    placement: str = "tcp://127.0.0.1:8001"
    engine_api_key: str = ""
    min_split_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    connect_timeout_s: Seconds = 5.0
    first_byte_timeout_s: Seconds = 300.0
    total_timeout_s: Seconds = 1800.0
    body_timeout_s: Seconds = 60.0
    decode_recovery_s: Seconds = 10.0
    refused_grace_s: Seconds = 1.0
    decode_token_s: Seconds = 0.1
    health_interval_s: Seconds = 2.0
    health_timeout_s: Seconds = 5.0
    introduction_timeout_s: Seconds = 60.0
    startup_wait_s: Seconds = 10.0
    drain_timeout_s: Seconds = 30.0
    placement_ttl_s: Seconds = 3600.0
    body_max_bytes: Count = 64 << 20
    requests_max: Count = 8192
    connections_max: Count = 16_384
