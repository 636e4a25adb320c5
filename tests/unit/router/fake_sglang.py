"""Mimic the part of an SGLang server that a router sees, in this process, with faults on demand."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from aiohttp import web

from unit.router.fake_engine import MODEL, Call, FakeEngine, _abort, _completion

_lives = itertools.count(1)
FIELDS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


class Meeting:
    """What a prefill and a decode server share: the rooms whose prompt is computed."""

    def __init__(self) -> None:
        self.rooms: set[tuple[int, int]] = set()


class FakeSglang(FakeEngine):
    """A server in one of SGLang's three modes.

    Attributes:
        mode: ``null``, ``prefill`` or ``decode``.
        bootstrap_port: what a prefill server tells.
        lost_s: how long a decode server waits for its prefill before it gives up.
        fail_first_event: answer a stream with 200 and an error as its first event.
    """

    def __init__(self, mode: str, meeting: Meeting, **knobs: Any) -> None:
        self.mode = mode
        self.meeting = meeting
        self.model = MODEL
        self.bootstrap_port = 9000 + next(_lives)
        self.lost_s = 5.0
        self.fail_first_event = ""
        self.num_health = 0
        super().__init__(**knobs)

    def routes(self, app: web.Application) -> None:
        app.router.add_get("/ready", self._health)
        app.router.add_get("/server_info", self._server_info)

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "owned_by": "sglang"}]})

    async def _server_info(self, _request: web.Request) -> web.Response:
        return web.json_response({
            "disaggregation_mode": self.mode, "disaggregation_bootstrap_port": self.bootstrap_port, "random_seed": 5,
            "startup_time": {"load_model": self.engine_id}, "internal_states": [{"memory_usage": {}}], "version": "0"})

    async def _answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        if self.fail_status:
            return _error(self.fail_status, "engine says no")
        meeting = tuple(call.body.get(name) for name in FIELDS)
        if self.mode == "null":
            assert meeting == (None, None, None)
            return await super()._answer(request, call)
        if None in meeting:
            return _error(400, "Disaggregated request received without bootstrap room id")
        where = (int(meeting[1]), int(meeting[2]))
        if self.mode == "prefill":
            assert where[0] == self.bootstrap_port
            await asyncio.sleep(self.prefill_s)
            if self.fail_prefill_status:
                return _error(self.fail_prefill_status, "no prefill")
            if self.die_on_prefill:
                _abort(request)
                return web.Response()
            self.meeting.rooms.add(where)
            return web.json_response(_completion("x", None))
        if self.fail_first_event:
            return await self._fail_stream(request, self.fail_first_event)
        try:
            async with asyncio.timeout(self.lost_s):
                while where not in self.meeting.rooms:
                    await asyncio.sleep(0.005)
        except TimeoutError:
            if call.body.get("stream"):
                return await self._fail_stream(request, "the prefill was not handed over")
            return _error(500, "the prefill was not handed over")
        return await super()._answer(request, call)

    async def _fail_stream(self, request: web.Request, message: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        error = {"error": {"object": "error", "message": message, "type": "INTERNAL_SERVER_ERROR", "code": 500}}
        await response.write(b"data: " + json.dumps(error).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"object": "error", "message": message, "type": "X", "param": None, "code": status},
                             status=status)
