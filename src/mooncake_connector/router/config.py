"""Hold the router's settings.

Precedence: command line > the file given by ``--config`` (JSON or TOML) > default. The environment is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.index.blocks import CAPACITY_MAX
from mooncake_connector.router.index.endpoints import EventSockets
from mooncake_connector.router.messages import Role, Url

Port = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Count = Annotated[int, msgspec.Meta(ge=1)]
PolicyName = Literal["joint", "mooncake_paper", "prefix", "least_loaded", "least_work", "round_robin", "random"]
Key = Annotated[str, msgspec.Meta(min_length=8, max_length=512)]
EngineName = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=r"^(\*|https?://[^\s/]+)$")]
ClassName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]

RESTART_ONLY = (
    "host", "port", "placement", "directory", "cell", "kv_token_bytes", "link_bytes_per_s", "has_pool",
    "connect_timeout_s", "placement_ttl_s", "body_max_bytes", "connections_max", "kv_events", "index_blocks",
)  # fmt: skip
"""Settings that a running router cannot change."""
DEFAULT_CLASS = "default"
NO_PROMISE_S = 86_400.0
ORDER_TTFT_S = 30.0


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One holder of a key.

    Attributes:
        api_key: what its clients send as ``Authorization: Bearer ...``.
        service_class: the class of all its requests; empty when they may choose.
    """

    api_key: Key
    service_class: str = ""


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one router process.

    Attributes:
        prefill: base URLs of the engines that compute prompts, such as http://127.0.0.1:8100.
        decode: base URLs of the engines that generate.
        engine: base URLs of the engines that may do both.
        host: address where clients connect.
        port: port where clients connect; 0 takes a free one.
        directory: etcd://host:port[,host:port] where engines announce themselves, see docs/reference/http.md; empty =
            only those given here.
        cell: name of the engines' cell in it.
        placement: ZeroMQ address of the placement service; empty turns it off. Whoever reaches it can add engines.
        draining: engines that get no new requests; those that run there go on.
        policy: how engines are chosen: joint, mooncake_paper, prefix, least_loaded, least_work, round_robin or random.
        holding: queue holds a request until an engine is about to be free; early places or refuses it at once; none
            only places it.
        hold_above_s: an engine with more predicted work than this is not given another request.
        classes: what requests are promised, by name: ttft_s, tbt_s, weight, share. Without any nothing is refused
            for being late. The class default is for requests that name none.
        tenants: holders of keys, by name: api_key, service_class. With any, requests without a known key get 401.
        admission_rule: package.module:function that is asked about every request, see docs/reference/http.md.
        has_pool: whether engines get cached prefixes from each other.
        kv_events: where engines publish what they cache, by URL: endpoint, replay, num_ranks, topic, dialect. The name
            * is for every engine that has no entry and does not tell; see docs/reference/http.md.
        index_blocks: cached blocks that are remembered from these events, each engine's copy counted; some 100 bytes
            each, taken at the start if there are any.
        kv_token_bytes: KV of one token, all layers, for predicting transfers.
        link_bytes_per_s: network bandwidth of one engine, each way.
        engine_api_key: sent when the router itself asks an engine something, and instead of a tenant's key; where
            there are no tenants, clients' own keys are passed through.
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
        breaker_failures: requests that fail in a row on an engine before it is left alone.
        breaker_hold_s: for how long, the first time; twice as long each time it fails again.
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
    directory: Annotated[str, msgspec.Meta(pattern=r"^(etcd://\S+|memory)?$")] = ""
    cell: str = "default"
    placement: str = "tcp://127.0.0.1:8001"
    draining: tuple[Url, ...] = ()
    policy: PolicyName = "joint"
    holding: Literal["queue", "early", "none"] = "queue"
    hold_above_s: Seconds = 0.5
    classes: Mapping[ClassName, ServiceClass] = {}
    tenants: Mapping[ClassName, Tenant] = {}
    admission_rule: str = ""
    has_pool: bool = False
    kv_events: Mapping[EngineName, EventSockets] = {}
    index_blocks: Annotated[int, msgspec.Meta(ge=1024, le=CAPACITY_MAX)] = 1_000_000
    kv_token_bytes: Count = 131_072
    link_bytes_per_s: Count = 12_500_000_000
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
    breaker_failures: Count = 5
    breaker_hold_s: Seconds = 2.0
    introduction_timeout_s: Seconds = 60.0
    startup_wait_s: Seconds = 10.0
    drain_timeout_s: Seconds = 30.0
    placement_ttl_s: Seconds = 3600.0
    body_max_bytes: Count = 64 << 20
    requests_max: Count = 8192
    connections_max: Count = 16_384

    def service_classes(self) -> dict[str, ServiceClass]:
        """Return the classes as admission wants them: the one named ``""`` is for requests that name none."""
        promised = dict(self.classes)
        # Nobody promised anything, but who waits must be put in some order: shortest first, until one waited this long.
        ttft_s = NO_PROMISE_S if promised else ORDER_TTFT_S
        fallback = promised.get(DEFAULT_CLASS) or ServiceClass(ttft_s=ttft_s, tbt_s=NO_PROMISE_S)
        return {**promised, "": fallback}

    def engines(self) -> dict[str, Role]:
        """Return url -> role of the engines given by hand."""
        return {
            **dict.fromkeys(self.prefill, "prefill"),
            **dict.fromkeys(self.decode, "decode"),
            **dict.fromkeys(self.engine, "both"),
        }

    def problem(self) -> str:
        """Return what is wrong with the settings together; empty when nothing is."""
        urls = [*self.prefill, *self.decode, *self.engine]
        twice = next((url for url in urls if urls.count(url) > 1), "")
        if twice:
            return f"{twice} is given twice; name each engine once, in engine if it does both"
        for name, tenant in self.tenants.items():
            if tenant.service_class and tenant.service_class not in self.classes:
                return f"tenant {name} has the class {tenant.service_class!r}, which is not in classes"
        return ""
