"""Run one router process: gateway, placement service and engine watch on one asyncio loop."""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
import uuid

from aiohttp import web

from mooncake_connector.router.admission import AdmissionQueue, Rule
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.desk import PlacementDesk
from mooncake_connector.router.dispatcher import Dispatcher
from mooncake_connector.router.engines import EngineTable
from mooncake_connector.router.gateway import Gateway
from mooncake_connector.router.legs import Legs
from mooncake_connector.router.lessons import Lessons
from mooncake_connector.router.metrics import ROUTER_METRICS
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import make_policy
from mooncake_connector.router.predictor import Predictor
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_connector.router.scheduler import Scheduler
from mooncake_connector.router.service import PlacementService
from mooncake_connector.router.watch import EngineWatch
from mooncake_store.errors import ConfigError
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

BACKLOG_MAX = 4096
CLIENT_KEEPALIVE_S = 75.0
CLOSE_TIMEOUT_S = 0.5
HEADER_MAX_BYTES = 16 << 10


class RouterApp:
    """One router, for ``mooncake router`` and for tests.

    Threads: create, start and stop it on one running asyncio loop.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.metrics = Metrics(ROUTER_METRICS)
        self._index = PrefixIndex()
        self.dispatcher = make_dispatcher(config, self._index, self.metrics)
        self.placer = self.dispatcher.placer
        self._legs = Legs(config)
        self.watch = EngineWatch(config, self.placer, self._legs, self.metrics)
        self.gateway = Gateway(
            config,
            watch=self.watch,
            legs=self._legs,
            dispatcher=self.dispatcher,
            index=self._index,
            metrics=self.metrics,
        )
        self.service: PlacementService | None = None
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._service_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen and begin to watch the configured engines; returns without waiting for any of them.

        Raises:
            ConfigError: when an address cannot be used; nothing is left open then.
        """
        try:
            await self._listen()
        except ConfigError:
            await self.stop(drain_timeout_s=0)
            raise
        for role, urls in (
            ("prefill", self.config.prefill),
            ("decode", self.config.decode),
            ("both", self.config.engine),
        ):
            for url in urls:
                self.watch.add(url, role)  # type: ignore[arg-type]
        placement = f", placement at {self.service.address}" if self.service else ""
        log.info("router listens at %s%s; %d engines given", self.url, placement, len(self.placer.table))

    async def stop(self, *, drain_timeout_s: float) -> None:
        """Let running requests end for at most ``drain_timeout_s``, then end the rest. Idempotent."""
        if self._runner is not None:
            if self.gateway.num_open:
                log.info("waiting up to %g s for %d requests", drain_timeout_s, self.gateway.num_open)
            if not await self.gateway.drain(drain_timeout_s):
                log.warning("%d requests are cut off", self.gateway.num_open)
            await self._runner.cleanup()
            self._runner = None
        if self._service_task is not None:
            self._service_task.cancel()
            await asyncio.gather(self._service_task, return_exceptions=True)
            self._service_task = None
        if self.service is not None:
            self.service.close()
            self.service = None
        self.dispatcher.close()
        await self.watch.close()
        await self._legs.close()

    async def _listen(self) -> None:
        config = self.config
        if config.placement:
            desk = PlacementDesk(self.watch, new_transfer_id=lambda: uuid.uuid4().hex)
            self.service = PlacementService(config.placement, desk=desk, placer=self.placer, metrics=self.metrics)
            self._service_task = asyncio.create_task(self.service.run(), name="placement service")
            self._service_task.add_done_callback(_log_death)
        self._runner = web.AppRunner(
            self.gateway.application(),
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=CLIENT_KEEPALIVE_S,
            shutdown_timeout=CLOSE_TIMEOUT_S,
            max_field_size=HEADER_MAX_BYTES,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, config.host, config.port, backlog=BACKLOG_MAX)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}",
                where="--host, --port",
                hint="choose a free port with --port",
            ) from error
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"


def make_dispatcher(config: RouterConfig, index: PrefixIndex, metrics: Metrics) -> Dispatcher:
    """Put together what decides about requests. Call it on the running loop.

    Raises:
        ConfigError: the operator's own admission rule cannot be found.
    """
    predictor = Predictor(kv_token_bytes=config.kv_token_bytes, link_bytes_per_s=config.link_bytes_per_s)
    placer = Placer(
        EngineTable(),
        index,
        ttl_ns=int(config.placement_ttl_s * 1e9),
        predictor=predictor,
        policy=make_policy(config.policy, predictor),
        can_fetch=config.has_pool,
    )
    queue = AdmissionQueue(config.service_classes(), rule=find_rule(config.admission_rule))
    scheduler = Scheduler(
        placer,
        queue,
        mode=config.holding,
        is_rejecting=bool(config.classes),
        dispatch_below_s=config.hold_above_s,
    )
    return Dispatcher(scheduler, Lessons(predictor), metrics)


def find_rule(name: str) -> Rule | None:
    """Return the operator's own admission rule, named ``package.module:function``; None for an empty name.

    Raises:
        ConfigError: there is no such function.
    """
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the admission rule {name!r} cannot be loaded: {error}",
            where="admission_rule",
            hint="name a function that can be imported, as package.module:function",
        ) from error
    if not callable(rule):
        raise ConfigError(f"the admission rule {name!r} cannot be called", where="admission_rule", hint="a function")
    return rule  # type: ignore[no-any-return]


async def serve(config: RouterConfig) -> None:
    """Run a router until SIGTERM or Ctrl-C; a second signal does not wait for running requests.

    Raises:
        ConfigError: when an address cannot be used.
    """
    app = RouterApp(config)
    await app.start()
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    hurried = asyncio.Event()

    def on_signal() -> None:
        (hurried if asked.is_set() else asked).set()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal)
    try:
        await asked.wait()
        log.info("stopping; a second signal does not wait for running requests")
        stopping = asyncio.create_task(app.gateway.drain(config.drain_timeout_s))
        hurry = asyncio.create_task(hurried.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        hurry.cancel()
    finally:
        await app.stop(drain_timeout_s=0)
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the placement service ended; restart the router", exc_info=task.exception())
