"""Serve the OpenAI-compatible HTTP API in front of the engines.

Threads: one asyncio loop. A client that disconnects cancels its handler, and with it both legs.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mooncake_connector.router.admission import ServiceClass
from mooncake_connector.router.answers import Problem, problem_json
from mooncake_connector.router.bodies import CHAT, COMPLETIONS, Ask, Route, read_ask
from mooncake_connector.router.callers import Caller, find_tenant, read_caller
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.dispatcher import Dispatcher
from mooncake_connector.router.engines import Engine, EngineState
from mooncake_connector.router.exchange import RETRY_AFTER_S, Exchange, Services
from mooncake_connector.router.ids import Ids
from mooncake_connector.router.legs import JSON, Legs
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_connector.router.recovery import Patience
from mooncake_connector.router.watch import EngineWatch
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

# Hop-by-hop headers (RFC 9110, 7.6.1), and those that describe the body or the connection, which we write ourselves.
_DROPPED_HEADERS = frozenset(
    (
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te",
        "trailer", "transfer-encoding", "upgrade", "host", "content-length", "content-type", "content-encoding",
        "accept-encoding", "expect", "x-request-id",
    )  # fmt: skip
)
UNAUTHORIZED = Problem(401, "no tenant has this key; send Authorization: Bearer KEY with one that the router knows")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _ModelList(msgspec.Struct):
    data: list[msgspec.Raw]
    object: str = "list"


class _Readiness(msgspec.Struct):
    status: str
    engines: dict[str, str]


class Gateway:
    """The HTTP side of one router.

    Args:
        config: limits and timeouts.
        watch: the engines.
        legs: connections to engines.
        dispatcher: says which request goes where, and when.
        index: what engines hold, for its size.
        metrics: a Metrics with ROUTER_METRICS.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        watch: EngineWatch,
        legs: Legs,
        dispatcher: Dispatcher,
        index: PrefixIndex,
        metrics: Metrics,
    ) -> None:
        self._watch = watch
        self._dispatcher = dispatcher
        self._index = index
        self._metrics = metrics
        self._legs = legs
        self._ids = Ids()
        self._routes: dict[str, tuple[str, Handler]] = {
            CHAT: ("POST", partial(self._serve, route=CHAT)),
            COMPLETIONS: ("POST", partial(self._serve, route=COMPLETIONS)),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._show_metrics),
        }
        self.reconfigure(config)
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    def reconfigure(self, config: RouterConfig) -> None:
        """Serve new requests by other settings; those under way keep theirs."""
        self._config = config
        self._services = Services(
            watch=self._watch,
            legs=self._legs,
            dispatcher=self._dispatcher,
            metrics=self._metrics,
            patience=Patience(config.decode_recovery_s, config.refused_grace_s, config.decode_token_s),
            total_timeout_s=config.total_timeout_s,
            new_transfer_id=self._ids.new,
        )

    @property
    def num_open(self) -> int:
        """Return how many client requests are being served."""
        return self._num_open

    def server(self, **options: Any) -> web.Server:
        """Return the aiohttp server, to be run with these options.

        It is aiohttp's low-level one: its routes and middlewares cost as much as all that we do for a request.
        """
        loop, body_max_bytes = asyncio.get_running_loop(), self._config.body_max_bytes

        def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=body_max_bytes)

        return web.Server(self._answer, request_factory=request, handler_cancellation=True, **options)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Find the handler; turn every error into OpenAI's shape. What nobody foresaw is logged, never shown."""
        try:
            path = request.path
            method, handler = self._routes.get(path, ("", None))
            if handler is None:
                return _refusal(Problem(404, f"{request.method} {path}: there is nothing here"))
            if request.method != method:
                return _refusal(Problem(405, f"{request.method} {path}: use {method}"))
            return await handler(request)
        except web.HTTPException as error:
            return _refusal(Problem(error.status, f"{request.method} {request.path}: {error.reason}"))
        except (ConnectionResetError, asyncio.CancelledError):
            raise
        except Exception:  # the border of the process: one bad request must not look like a dead router
            log.exception("request %s %s failed inside the router", request.method, request.path)
            return _refusal(Problem(500, "the router failed on this request; its log says why"))

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some still run after ``timeout_s``."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _serve(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        request_id = self._request_id(request)
        if self._is_draining:
            return self._refuse(Problem(503, "the router is shutting down", retry_after_s=RETRY_AFTER_S), request_id)
        if self._num_open >= self._config.requests_max:
            problem = Problem(503, f"{self._num_open} requests are being served", retry_after_s=RETRY_AFTER_S)
            return self._refuse(problem, request_id)
        tenant = self._tenant(request)
        if tenant is None:
            return self._refuse(UNAUTHORIZED, request_id, outcome="unauthorized")
        self._num_open += 1
        self._idle.clear()
        try:
            ask = await self._read_ask(request, route)
            if not self._watch.is_settled:
                await self._watch.wait_settled(self._config.startup_wait_s)
            if isinstance(ask, Problem):
                return self._refuse(ask, request_id, outcome="bad_request")
            caller = self._read_caller(request, ask, tenant)
            if isinstance(caller, Problem):
                return self._refuse(caller, request_id, outcome="bad_request")
            exchange = Exchange(
                self._services,
                ask,
                caller=caller,
                promise=self._promise(caller),
                request_id=request_id,
                headers=self._engine_headers(request, request_id),
            )
            try:
                return await exchange.run(request)
            finally:
                self._metrics.add("mooncake_router_requests_total", outcome=exchange.outcome)
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    def _request_id(self, request: web.BaseRequest) -> str:
        given = request.headers.get("X-Request-Id", "")
        return given if given and _REQUEST_ID.fullmatch(given) else self._ids.new()

    def _tenant(self, request: web.BaseRequest) -> str | None:
        """Return whose key a request has; empty when there are no keys, None when it has none of them."""
        tenants = self._config.tenants
        return find_tenant(tenants, request.headers.get("Authorization", "")) if tenants else ""

    def _read_caller(self, request: web.BaseRequest, ask: Ask, tenant: str) -> Caller | Problem:
        config = self._config
        own_class = config.tenants[tenant].service_class if tenant else ""
        return read_caller(request.headers, ask.body, classes=config.classes, tenant=tenant, tenant_class=own_class)

    def _promise(self, caller: Caller) -> ServiceClass | None:
        if not self._config.classes:
            return None
        return self._dispatcher.scheduler.queue.service_class(caller.service_class)

    def _engine_headers(self, request: web.BaseRequest, request_id: str) -> Mapping[str, str]:
        """Return what both engines get."""
        has_tenants = bool(self._config.tenants)
        headers: CIMultiDict[str] = CIMultiDict(
            (name, value)
            for name, value in request.headers.items()
            # A tenant's key is the router's business; engines know only ours.
            if (lower := name.lower()) not in _DROPPED_HEADERS and not (has_tenants and lower == "authorization")
        )
        headers["X-Request-Id"] = request_id
        if has_tenants and self._config.engine_api_key:
            headers["Authorization"] = f"Bearer {self._config.engine_api_key}"
        return headers

    async def _read_ask(self, request: web.BaseRequest, route: Route) -> Ask | Problem:
        limit_bytes = self._config.body_max_bytes
        try:
            if request.content.is_eof():  # all of it came with the head
                data = await request.read()
            else:
                async with asyncio.timeout(self._config.body_timeout_s):
                    data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return Problem(413, f"the body has more than {limit_bytes} bytes, the router's body_max_bytes")
        except TimeoutError:
            return Problem(408, f"the body did not arrive within {self._config.body_timeout_s:g} s")
        return read_ask(route, data, min_split_tokens=self._config.min_split_tokens)

    def _refuse(self, problem: Problem, request_id: str, *, outcome: str = "refused") -> web.Response:
        self._metrics.add("mooncake_router_requests_total", outcome=outcome)
        response = _refusal(problem)
        response.headers["x-request-id"] = request_id
        if self._is_draining or problem.status in (408, 413):
            response.force_close()
        return response

    async def _models(self, request: web.BaseRequest) -> web.Response:
        if self._tenant(request) is None:
            return self._refuse(UNAUTHORIZED, self._request_id(request), outcome="unauthorized")
        cards = [msgspec.Raw(card) for card in self._watch.model_cards().values()]
        return web.Response(body=msgspec.json.encode(_ModelList(cards)), content_type=JSON)

    async def _health(self, _request: web.BaseRequest) -> web.Response:
        return web.Response()

    async def _ready(self, _request: web.BaseRequest) -> web.Response:
        engines = {each.url: _state_of(each) for each in self._watch.placer.table}
        is_ready = not self._is_draining and any(each.is_usable for each in self._watch.placer.table)
        status = "ready" if is_ready else "draining" if self._is_draining else "no engine is up"
        body = msgspec.json.encode(_Readiness(status, engines))
        return web.Response(status=200 if is_ready else 503, body=body, content_type=JSON)

    async def _show_metrics(self, _request: web.BaseRequest) -> web.Response:
        self._note_engines()
        self._note_predictions()
        self._metrics.set("mooncake_router_open_requests", self._num_open)
        self._metrics.set("mooncake_router_prefix_entries", self._index.num_entries())
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _note_engines(self) -> None:
        placer = self._watch.placer
        for leg, tokens in (
            ("prefill", sum(each.prefill_tokens for each in placer.table)),
            ("decode", sum(each.decode_tokens for each in placer.table)),
        ):
            self._metrics.set("mooncake_router_outstanding_tokens", tokens, leg=leg)
        states: dict[EngineState, int] = placer.table.count()
        for state, count in states.items():
            self._metrics.set("mooncake_router_engines", count, state=state.value)
        self._metrics.set("mooncake_router_open_placements", placer.num_open)

    def _note_predictions(self) -> None:
        dispatcher = self._dispatcher
        predictor = dispatcher.placer.predictor
        for what, error in (
            ("prefill", predictor.prefill_error),
            ("step", predictor.step_error),
            ("ttft", dispatcher.lessons.ttft_error),
        ):
            self._metrics.set("mooncake_router_prediction_error", error.mean, what=what)
            self._metrics.set("mooncake_router_prediction_bias", error.bias, what=what)
        self._metrics.set("mooncake_router_held_requests", dispatcher.num_held)
        self._metrics.set("mooncake_router_drain_seconds", dispatcher.drain_s())


def _refusal(problem: Problem) -> web.Response:
    headers = {"Retry-After": str(problem.retry_after_s)} if problem.retry_after_s else None
    return web.Response(status=problem.status, body=problem_json(problem), content_type=JSON, headers=headers)


def _state_of(engine: Engine) -> str:
    if not engine.is_draining:
        return engine.state.value
    return f"draining, {engine.num_open} open" if engine.num_open else "drained"
