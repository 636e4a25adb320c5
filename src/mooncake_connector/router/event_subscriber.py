"""Follow the engines' KV-event sockets: one SUB socket per stream, and a DEALER socket for what was missed.

Threads: one asyncio loop. Bounds: ``MESSAGE_MAX_BYTES`` per message, ``QUEUE_MAX`` messages per stream; a stream that
overflows has a gap, which is asked for again. Work on the loop is cut into slices of ``SLICE_S``, because decisions are
made on the same loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from mooncake_connector.router.engines import EngineTable
from mooncake_connector.router.index.endpoints import EventSockets, of_rank, seen_from
from mooncake_connector.router.index.events import (
    END_NUMBER,
    MESSAGE_MAX_BYTES,
    NUMBER_BYTES,
    split_frames,
)
from mooncake_connector.router.index.holdings import Holdings, Source
from mooncake_connector.router.index.streams import Ask
from mooncake_store.errors import CapacityExceeded, ConfigError, RemoteProtocolError
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

QUEUE_MAX = 10_000
SLICE_S = 0.0005
FLUSH_EVERY_S = 0.005
TICK_S = 0.1
REPLAY_TIMEOUT_S = 5.0
ANY_ENGINE = "*"
RECONNECT_MIN_MS = 100
RECONNECT_MAX_MS = 5_000
GARBAGE_LOG_EVERY = 1000


class _Link:
    """The sockets and tasks of one stream."""

    def __init__(self, live: zmq.asyncio.Socket, replay_endpoint: str) -> None:
        self.live = live
        self.replay_endpoint = replay_endpoint
        self.tasks: list[asyncio.Task[None]] = []
        self.replay: asyncio.Task[None] | None = None


class EventSubscriber:
    """Feeds :class:`Holdings` from sockets.

    Args:
        holdings: what is fed; asked by others on the same loop.
        metrics: a Metrics with ROUTER_METRICS.
        table: the engines; those that were introduced are followed.
        where: url -> where it publishes; ``*`` is for those that have no entry and do not tell.
    """

    def __init__(
        self, holdings: Holdings, metrics: Metrics, *, table: EngineTable, where: Mapping[str, EventSockets]
    ) -> None:
        self.holdings = holdings
        self._table = table
        self._where = where
        self._refused: set[str] = set()
        self._metrics = metrics
        self._context = zmq.asyncio.Context()
        self._links: dict[Source, _Link] = {}
        self._sockets: dict[str, EventSockets] = {}
        self._counted: dict[str, int] = {}
        self._num_garbage = 0

    def follow(self, url: str, sockets: EventSockets) -> None:
        """Follow an engine's streams; of one that is followed already, only if they are elsewhere now.

        Raises:
            ConfigError: when an endpoint makes no sense, or there are too many; the engine is not followed then.
        """
        if self._sockets.get(url) == sockets:
            return
        self.unfollow(url)
        seen = seen_from(url, sockets)
        endpoints = [
            tuple(of_rank(each, rank) for each in (seen.endpoint, seen.replay)) for rank in range(sockets.num_ranks)
        ]
        try:
            for rank, (endpoint, replay) in enumerate(endpoints):
                self.holdings.add(Source(url, rank), sockets.dialect)
                self._connect(Source(url, rank), endpoint, replay, sockets.topic)
        except (zmq.ZMQError, CapacityExceeded) as error:
            self._drop(url)
            raise ConfigError(f"cannot follow {seen.endpoint}: {error}", where="kv_events") from error
        self._sockets[url] = sockets
        log.info("following KV events of %s at %s, %d ranks", url, seen.endpoint, seen.num_ranks)

    def unfollow(self, url: str) -> None:
        """Follow an engine no longer. Idempotent."""
        self._sockets.pop(url, None)
        self._drop(url)

    def _drop(self, url: str) -> None:
        for source in [each for each in self._links if each.url == url]:
            link = self._links.pop(source)
            for task in (*link.tasks, link.replay):
                if task is not None:
                    task.cancel()
            link.live.disable_monitor()
            link.live.close(linger=0)
        for source in [each for each in self.holdings.sources() if each.url == url]:
            self.holdings.remove(source)

    def look(self) -> None:
        """Follow the engines that came, and those that left no longer."""
        there = {engine.url: engine.introduction for engine in self._table}
        for url in [each for each in self._sockets if each not in there]:
            self.unfollow(url)
        self._refused &= there.keys()
        for url, introduction in there.items():
            if introduction is None or url in self._refused:
                continue
            sockets = self._where.get(url) or introduction.events or self._where.get(ANY_ENGINE)
            if sockets is None:
                continue
            try:
                self.follow(url, sockets)
            except ConfigError as error:
                self._refused.add(url)
                log.error("KV events of %s are not followed: %s", url, error)

    async def run(self) -> None:
        """Keep time until cancelled: give up what does not come, let what came count, publish counts."""
        loop = asyncio.get_running_loop()
        next_tick_s = 0.0
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            if self.holdings.num_gathered:
                self.holdings.flush()
            if loop.time() < next_tick_s:
                continue
            next_tick_s = loop.time() + TICK_S
            self.look()
            for source, ask in self.holdings.on_time(now_ns=int(loop.time() * 1e9)):
                self._ask(source, ask)
            self._publish_counts()

    async def close(self) -> None:
        """Close every socket. Idempotent."""
        tasks = [task for link in self._links.values() for task in (*link.tasks, link.replay) if task is not None]
        for url in list(self._sockets):
            self.unfollow(url)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    # ------------------------------------------------------------------ sockets

    def _connect(self, source: Source, endpoint: str, replay: str, topic: str) -> None:
        live: zmq.asyncio.Socket = self._context.socket(zmq.SUB)
        live.setsockopt(zmq.LINGER, 0)
        live.setsockopt(zmq.RCVHWM, QUEUE_MAX)
        live.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES)
        live.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MIN_MS)
        live.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        live.setsockopt_string(zmq.SUBSCRIBE, topic)
        link = self._links[source] = _Link(live, replay)
        monitor = live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        live.connect(endpoint)
        for name, work in (("events", self._read_live(source, link)), ("link", self._watch(source, monitor))):
            link.tasks.append(self._start(source, work, f"KV {name} of {source.url}"))

    async def _read_live(self, source: Source, link: _Link) -> None:
        loop = asyncio.get_running_loop()
        at_hand: zmq.Socket[bytes] = zmq.Socket.shadow(link.live.underlying)
        while True:
            await link.live.poll()
            slice_ends_s = loop.time() + SLICE_S
            while True:
                try:
                    frames: Sequence[bytes] = at_hand.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    break
                self._take(source, frames, is_replay=False)
                if loop.time() >= slice_ends_s:
                    break
            await asyncio.sleep(0)

    async def _watch(self, source: Source, monitor: zmq.asyncio.Socket) -> None:
        """Ask what was missed whenever the connection is new: the first time, too."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                event = parse_monitor_message(await monitor.recv_multipart())
                if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                    return
                ask = self.holdings.on_connected(source, now_ns=int(loop.time() * 1e9))
                if ask is not None:
                    self._ask(source, ask)
        finally:
            monitor.close(linger=0)

    def _ask(self, source: Source, ask: Ask) -> None:
        """Ask for a replay; one that is under way is answered no more."""
        link = self._links.get(source)
        if link is None or not link.replay_endpoint:
            return  # time will tell that nothing comes
        if link.replay is not None:
            link.replay.cancel()
        self._metrics.add("mooncake_router_event_replays_total")
        link.replay = self._start(source, self._read_replay(source, link, ask), f"KV replay of {source.url}")

    def _start(self, source: Source, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(lambda done: self._note_death(source, done))
        return task

    def _note_death(self, source: Source, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("%s ended: its blocks are known no more", task.get_name(), exc_info=task.exception())
            self.holdings.remove(source)

    async def _read_replay(self, source: Source, link: _Link, ask: Ask) -> None:
        # A socket for each question: no answer to an earlier one can come here.
        socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, QUEUE_MAX)
            socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES)
            socket.connect(link.replay_endpoint)
            await socket.send_multipart([b"", ask.first.to_bytes(NUMBER_BYTES, "big")])
            is_over = False
            while not is_over:
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    frames = await socket.recv_multipart()
                is_over = self._take(source, frames, is_replay=True)
                await asyncio.sleep(0)
        except TimeoutError:
            log.warning("KV events of %s: %s sends no replay", source.url, link.replay_endpoint)
        finally:
            socket.close(linger=0)

    # ------------------------------------------------------------------ messages

    def _take(self, source: Source, frames: Sequence[bytes], *, is_replay: bool) -> bool:
        """Hand on a message; tell whether it ends a replay."""
        now_ns = int(asyncio.get_running_loop().time() * 1e9)
        try:
            ask = self.holdings.on_message(source, frames, is_replay=is_replay, now_ns=now_ns)
            is_end = is_replay and split_frames(frames)[0] == END_NUMBER
        except RemoteProtocolError as error:
            self._note_garbage(source, error)
            return False
        if ask is not None:
            self._ask(source, ask)
        return is_end

    def _note_garbage(self, source: Source, error: RemoteProtocolError) -> None:
        self._metrics.add("mooncake_router_event_garbage_total")
        if self._num_garbage % GARBAGE_LOG_EVERY == 0:
            log.warning(
                "KV events of %s: rejected a message (%d so far): %s",
                source.url, self._num_garbage + 1, error.message[:200],
            )  # fmt: skip
        self._num_garbage += 1

    def _publish_counts(self) -> None:
        for kind, count in self.holdings.counts.items():
            grown = count - self._counted.get(kind, 0)
            if grown:
                self._counted[kind] = count
                self._metrics.add("mooncake_router_events_total", grown, kind=kind)
        self._metrics.set("mooncake_router_event_streams", len(self.holdings.sources()), state="followed")
        self._metrics.set("mooncake_router_event_streams", self.holdings.num_stale, state="stale")
        self._metrics.set("mooncake_router_indexed_blocks", self.holdings.blocks.num_live)

