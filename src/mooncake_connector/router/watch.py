"""Watch the engines: get each introduced, check its health, and notice when another process took its place.

Threads: one asyncio loop.

Per engine one task: ``GET /v1/models`` and its dialect's health check every few seconds, and its dialect's introduction
when the engine is new, came back, or failed a leg.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

import aiohttp
import msgspec

from mooncake_connector.router.breaker import Breaker
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.dialects.base import Dialect
from mooncake_connector.router.dialects.select import DEFAULT, DIALECTS, recognise
from mooncake_connector.router.engines import Engine, EngineEvent, EngineState, Introduction
from mooncake_connector.router.legs import Legs, PrefillDone
from mooncake_connector.router.messages import Role
from mooncake_connector.router.placer import Placer
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

FAILURES_MAX = 3
AWAY_INTERVAL_S = 0.5
WAKE_PAUSE_S = 0.1
PROGRESS_EVERY_S = 15.0
MODELS_MAX = 1024


class _ModelCard(msgspec.Struct):
    id: str


class _ModelsAnswer(msgspec.Struct):
    data: list[msgspec.Raw]


class _Checked(NamedTuple):
    """Result of one check: ``problem`` is empty when the engine is healthy."""

    problem: str
    is_gone: bool
    cards: dict[str, bytes]
    dialect: Dialect = DIALECTS[DEFAULT]


class EngineWatch:
    """Keeps the engine table true.

    Args:
        config: intervals, timeouts, the engines' API key.
        placer: owner of the engine table.
        legs: connections to engines.
        metrics: counts introductions.
    """

    def __init__(self, config: RouterConfig, placer: Placer, legs: Legs, metrics: Metrics) -> None:
        self.placer = placer
        self._config = config
        self._legs = legs
        self._metrics = metrics
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self._cards: dict[str, dict[str, bytes]] = {}
        self._first_rounds: set[str] = set()
        self._breakers: dict[str, Breaker] = {}
        self._settled = asyncio.Event()
        self._headers: dict[str, str] = {}
        self.reconfigure(config)

    def reconfigure(self, config: RouterConfig) -> None:
        """Use other intervals, limits and engines' key from now on, and drain what it says."""
        self._config = config
        self._headers = {"Authorization": f"Bearer {config.engine_api_key}"} if config.engine_api_key else {}
        self.placer.table.drain(config.draining)

    def add(self, url: str, role: Role) -> Engine:
        """Start to watch an engine; a known one takes the new role.

        Raises:
            CapacityExceeded: when the engine table is full.
        """
        engine = self.placer.table.add(url, role)
        engine.is_draining = url in self._config.draining
        if url not in self._tasks:
            self._wake[url] = asyncio.Event()
            if not self._settled.is_set():
                self._first_rounds.add(url)
            self._tasks[url] = asyncio.create_task(self._watch(url), name=f"watch {url}")
        return engine

    def remove(self, url: str) -> bool:
        """Forget an engine; False when it is not known."""
        task = self._tasks.pop(url, None)
        if task is not None:
            task.cancel()
        self._wake.pop(url, None)
        self._cards.pop(url, None)
        self._breakers.pop(url, None)
        return self.placer.remove(url)

    @property
    def is_settled(self) -> bool:
        """Tell whether every engine given at the start was asked once."""
        return self._settled.is_set() or not self._first_rounds

    async def wait_settled(self, timeout_s: float) -> None:
        """Wait until every engine given at the start was asked once, so that the first clients are not refused."""
        if self.is_settled:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError:
            pass  # an engine is slow to introduce itself; go on with what there is

    async def close(self) -> None:
        """Stop watching. Idempotent."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def note_failure(self, url: str, message: str) -> None:
        """A leg to this engine failed: it is suspect until it introduces itself anew, which is asked for at once."""
        self._observe(url, EngineEvent.FAILED, message)
        wake = self._wake.get(url)
        if wake is None:
            return  # not watched any more
        wake.set()
        breaker = self._breakers.get(url)
        if breaker is None:
            config = self._config
            breaker = self._breakers[url] = Breaker(failures_max=config.breaker_failures, hold_s=config.breaker_hold_s)
        if breaker.fail(asyncio.get_running_loop().time()):
            self._metrics.add("mooncake_router_breaker_opened_total")
            log.warning("engine %s failed %d requests in a row; it is left alone for a while",
                        url, self._config.breaker_failures)  # fmt: skip

    def note_success(self, url: str) -> None:
        """A leg to this engine went well."""
        if self._breakers:
            self._breakers.pop(url, None)

    def _is_left_alone(self, url: str) -> bool:
        breaker = self._breakers.get(url)
        return breaker is not None and breaker.is_open(asyncio.get_running_loop().time())

    def note_prefill_answer(self, done: PrefillDone) -> None:
        """A prefill leg told who answered it; another id than the one we know means another process."""
        engine = self.placer.table.get(done.url)
        told = done.introduction
        if engine is None or engine.introduction is None or told is None or not told.has_connector:
            return
        if told.engine_id != engine.introduction.engine_id:
            self._introduce(engine, msgspec.structs.replace(told, models=engine.introduction.models))

    def model_cards(self) -> dict[str, bytes]:
        """Return every model that a usable engine serves, with its card as the first engine told it (JSON)."""
        cards: dict[str, bytes] = {}
        for engine in self.placer.table:
            if engine.is_usable:
                for name, card in self._cards.get(engine.url, {}).items():
                    cards.setdefault(name, card)
        return cards

    async def _watch(self, url: str) -> None:
        wake = self._wake[url]
        loop = asyncio.get_running_loop()
        num_failures = 0
        next_progress_s = loop.time()
        while True:
            wake.clear()
            checked = await self._check(url)
            engine = self.placer.table.get(url)
            if engine is None:
                return
            if checked.problem:
                num_failures += 1
                is_lost = checked.is_gone or num_failures >= FAILURES_MAX
                self._observe(url, EngineEvent.LOST if is_lost else EngineEvent.FAILED, checked.problem)
                if is_lost:
                    self._end_silent(url)
                if engine.state is EngineState.UNKNOWN and loop.time() >= next_progress_s:
                    log.info("waiting for engine %s (%s): %s", url, engine.role, checked.problem)
                    next_progress_s = loop.time() + PROGRESS_EVERY_S
            else:
                num_failures = 0
                await self._note_healthy(engine, checked)
            self._note_round(url)
            await self._rest(wake, is_away=engine.state in (EngineState.UNKNOWN, EngineState.DOWN))

    def _end_silent(self, url: str) -> None:
        """End what waits for an engine that is gone; its process may be stopped, and then no connection breaks."""
        num_ended = self._legs.abort_silent(url, silent_s=self._config.health_timeout_s)
        if num_ended:
            log.warning("engine %s answers no checks and says nothing: %d requests there are ended", url, num_ended)

    def _note_round(self, url: str) -> None:
        self._first_rounds.discard(url)
        if not self._first_rounds:
            self._settled.set()

    async def _rest(self, wake: asyncio.Event, *, is_away: bool) -> None:
        """Wait until the next check is due, or a failed leg asks for one."""
        rest_s = self._config.health_interval_s
        if is_away:
            rest_s = min(rest_s, AWAY_INTERVAL_S)
        try:
            async with asyncio.timeout(rest_s):
                await wake.wait()
            # One breath, so that a dying engine is not asked in a tight loop.
            await asyncio.sleep(min(WAKE_PAUSE_S, rest_s))
        except TimeoutError:
            pass

    async def _note_healthy(self, engine: Engine, checked: _Checked) -> None:
        self._cards[engine.url] = checked.cards
        models = tuple(checked.cards)
        if engine.state in (EngineState.UNKNOWN, EngineState.SUSPECT, EngineState.DOWN):
            if self._is_left_alone(engine.url):
                return
            introduction = await self._ask_introduction(engine, models, checked.dialect)
            if introduction is None:
                return
            self._introduce(engine, introduction)
        elif engine.introduction is not None and engine.introduction.models != models:
            engine.introduction = msgspec.structs.replace(engine.introduction, models=models)
        self._observe(engine.url, EngineEvent.HEALTHY, "")

    async def _check(self, url: str) -> _Checked:
        """Ask an engine whether it is well and what it serves."""
        try:
            async with asyncio.timeout(self._config.health_timeout_s):
                async with self._legs.session.get(f"{url}/v1/models", headers=self._headers) as response:
                    if response.status != 200:
                        return _Checked(f"/v1/models answers {response.status}", False, {})
                    data = await response.read()
                raw_cards = msgspec.json.decode(data, type=_ModelsAnswer).data[:MODELS_MAX]
                dialect = DIALECTS[recognise(bytes(raw_cards[0])) if raw_cards else DEFAULT]
                path = dialect.health_path
                async with self._legs.session.get(url + path, headers=self._headers) as response:
                    if response.status != 200:
                        return _Checked(f"{path} answers {response.status}", False, {})
            cards = {msgspec.json.decode(raw, type=_ModelCard).id: bytes(raw) for raw in raw_cards}
            return _Checked("", False, cards, dialect)
        except aiohttp.ClientConnectorError as error:
            return _Checked(str(error), True, {})
        except TimeoutError:
            return _Checked(f"no answer within {self._config.health_timeout_s:g} s", False, {})
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _Checked(f"{type(error).__name__}: {error}", False, {})

    async def _ask_introduction(
        self, engine: Engine, models: tuple[str, ...], dialect: Dialect
    ) -> Introduction | None:
        """Make an engine tell who it is; None when it did not answer properly, or cannot do what it was given for."""
        url = engine.url
        if not models:
            log.warning("engine %s serves no model; waiting for one", url)
            return None
        probe = dialect.probe(models)
        problem = f"its answer to {probe.path} makes no sense"
        introduction = None
        try:
            async with (
                asyncio.timeout(self._config.introduction_timeout_s),
                self._legs.session.request(
                    probe.method, url + probe.path, data=probe.body, headers=self._headers
                ) as response,
            ):
                data = await response.read()
                if response.status == 200:
                    introduction = dialect.read_probe(data, url=url, models=models)
                else:
                    problem = f"HTTP {response.status}: {data[:200]!r}"
        except TimeoutError:
            problem = f"no answer within {self._config.introduction_timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
        if introduction is not None and introduction.half and engine.role not in ("both", introduction.half):
            problem = f"it is given as --{engine.role} and runs as a {introduction.half} server"
            introduction = None
        if introduction is None:
            self._metrics.add("mooncake_router_introductions_total", result="failed")
            log.warning("engine %s could not be introduced: %s", url, problem)
        return introduction

    def _introduce(self, engine: Engine, introduction: Introduction) -> None:
        is_same = engine.introduction == introduction and engine.state is not EngineState.DOWN
        is_new_life = self.placer.introduce(engine.url, introduction)
        result = "connector" if introduction.has_connector else "plain"
        self._metrics.add("mooncake_router_introductions_total", result=result)
        models = ", ".join(introduction.models[:4])
        if not introduction.has_connector:
            log.info(
                "engine %s (%s, %s) runs without %s: it serves %s, whole requests only, no hand-over",
                engine.url, introduction.kind, engine.role, DIALECTS[introduction.kind].connector, models,
            )  # fmt: skip
        elif not is_same:
            log.info(
                "engine %s (%s, %s) %s: serves %s, hands over at %s",
                engine.url, introduction.kind, engine.role,
                "came back as a new process" if is_new_life else "is introduced", models,
                ", ".join(introduction.addresses[:4]) or "no address of its own",
            )  # fmt: skip

    def _observe(self, url: str, event: EngineEvent, message: str) -> None:
        transition = self.placer.table.observe(url, event)
        if transition is not None and transition.is_change:
            because = f": {message}" if message else ""
            log.info("engine %s is %s (was %s)%s", url, transition.after.value, transition.before.value, because)
