"""Run one router process: gateway, placement service and engine watch on one asyncio loop."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import resource
import secrets
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web

from mooncake_connector.router.admission import AdmissionQueue, Rule
from mooncake_connector.router.config import RESTART_ONLY, RouterConfig
from mooncake_connector.router.desk import PlacementDesk
from mooncake_connector.router.discovery import Discovery, open_cell
from mooncake_connector.router.dispatcher import Dispatcher
from mooncake_connector.router.engines import EngineTable
from mooncake_connector.router.event_subscriber import EventSubscriber
from mooncake_connector.router.gateway import Gateway
from mooncake_connector.router.ids import Ids
from mooncake_connector.router.index.holdings import Holdings
from mooncake_connector.router.index.told import Told
from mooncake_connector.router.legs import Legs
from mooncake_connector.router.lessons import Lessons
from mooncake_connector.router.messages import Role
from mooncake_connector.router.metrics import ROUTER_METRICS
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import make_policy
from mooncake_connector.router.predictor import Predictor
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_connector.router.reload import ConfigFile
from mooncake_connector.router.scheduler import Scheduler
from mooncake_connector.router.service import PlacementService
from mooncake_connector.router.watch import EngineWatch
from mooncake_store.errors import ConfigError
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

BACKLOG_MAX = 4096
CLIENT_KEEPALIVE_S = 75.0
CLOSE_TIMEOUT_S = 0.5
GC_OBJECTS = 20_000
HEADER_MAX_BYTES = 16 << 10


class RouterApp:
    """One router, for ``mooncake router`` and for tests.

    Threads: create, start and stop it on one running asyncio loop.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.metrics = Metrics(ROUTER_METRICS)
        self._index = PrefixIndex()
        holdings = Holdings(config.index_blocks, secret=secrets.token_bytes())
        self.dispatcher = make_dispatcher(config, self._index, self.metrics, told=Told(holdings))
        self.placer = self.dispatcher.placer
        self.events = EventSubscriber(
            holdings, self.metrics, table=self.placer.table, where=config.kv_events
        )
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
        self.discovery: Discovery | None = None
        self.url = ""
        self._runner: web.ServerRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []

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
        for url, role in self.config.engines().items():
            self.watch.add(url, role)
        self._run(self.events.run(), "KV events")
        if self.discovery is not None:
            self._run(self.discovery.follow(), "discovery")
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
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self.events.close()
        if self.discovery is not None:
            await asyncio.to_thread(self.discovery.close)
            self.discovery = None
        if self.service is not None:
            self.service.close()
            self.service = None
        self.dispatcher.close()
        await self.watch.close()
        await self._legs.close()

    def reconfigure(self, config: RouterConfig) -> None:
        """Go on with other settings; requests under way end by the old ones.

        Raises:
            ConfigError: a setting that needs a restart changed, or they do not fit together; nothing changes then.
        """
        changed = [name for name in RESTART_ONLY if getattr(config, name) != getattr(self.config, name)]
        if changed:
            raise ConfigError(f"changing {', '.join(changed)} needs a restart of the router", where=changed[0])
        check_config(config)
        rule = find_rule(config.admission_rule)
        before, self.config = self.config, config
        scheduler = self.dispatcher.scheduler
        scheduler.queue.reconfigure(config.service_classes(), rule)
        scheduler.reconfigure(
            mode=config.holding, is_rejecting=bool(config.classes), dispatch_below_s=config.hold_above_s
        )
        if config.policy != before.policy:
            self.placer.policy = make_policy(config.policy, self.placer.predictor)
        self._legs.reconfigure(config)
        self.watch.reconfigure(config)
        self.gateway.reconfigure(config)
        self._use_engines(before.engines(), config.engines())
        self.dispatcher.poke()

    def _use_engines(self, before: dict[str, Role], now: dict[str, Role]) -> None:
        if self.discovery is not None:
            self.discovery.keep(now)
        for url in before:
            if url not in now:
                self.watch.remove(url)
        for url, role in now.items():
            if before.get(url) != role:
                self.watch.add(url, role)

    def follow(self, file: ConfigFile) -> None:
        """Use what the file says, whenever it changes; until stopped."""
        self._run(file.follow(), "config file")

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_log_death)
        self._tasks.append(task)

    async def _listen(self) -> None:
        config = self.config
        if config.directory:
            directory = await open_cell(config, Metrics())
            self.discovery = Discovery(self.watch, directory, kept=config.engines())
        if config.placement:
            desk = PlacementDesk(self.watch, self.dispatcher, new_transfer_id=Ids().new)
            self.service = PlacementService(config.placement, desk=desk, placer=self.placer, metrics=self.metrics)
            self._run(self.service.run(), "placement service")
        server = self.gateway.server(
            access_log=None, keepalive_timeout=CLIENT_KEEPALIVE_S, max_field_size=HEADER_MAX_BYTES
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=CLOSE_TIMEOUT_S)
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


def make_dispatcher(
    config: RouterConfig, index: PrefixIndex, metrics: Metrics, *, told: Told | None = None
) -> Dispatcher:
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
        told=told,
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


def check_config(config: RouterConfig) -> None:
    """Raise ConfigError when settings do not fit together."""
    problem = config.problem()
    if problem:
        raise ConfigError(problem, where="mooncake router", hint="see docs/reference/http.md")


async def serve(
    config: RouterConfig, *, file: Path | None = None, load: Callable[[], RouterConfig] | None = None
) -> None:
    """Run a router until SIGTERM or Ctrl-C; a second signal does not wait for running requests.

    Args:
        config: settings to begin with.
        file: is followed, and read again at once on SIGHUP.
        load: reads it.

    Raises:
        ConfigError: when an address cannot be used.
    """
    check_config(config)
    _allow_many_files()
    app = RouterApp(config)
    await app.start()
    # What is there by now stays; and requests leave little behind, so that looking for it often only takes time.
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    hurried = asyncio.Event()

    def on_signal() -> None:
        (hurried if asked.is_set() else asked).set()

    handlers: dict[signal.Signals, Callable[[], object]] = {signal.SIGTERM: on_signal, signal.SIGINT: on_signal}
    if file is not None and load is not None:
        followed = ConfigFile(file, load=load, use=app.reconfigure, metrics=app.metrics)
        app.follow(followed)
        handlers[signal.SIGHUP] = followed.reload
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        await asked.wait()
        log.info("stopping; a second signal does not wait for running requests")
        stopping = asyncio.create_task(app.gateway.drain(app.config.drain_timeout_s))
        hurry = asyncio.create_task(hurried.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        hurry.cancel()
    finally:
        await app.stop(drain_timeout_s=0)
        for number in handlers:
            loop.remove_signal_handler(number)


def _allow_many_files() -> None:
    """Raise the limit of open files as far as it may go: every request needs up to three."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("%s ended; restart the router", task.get_name(), exc_info=task.exception())
