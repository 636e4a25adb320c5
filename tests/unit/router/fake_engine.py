"""Mimic the part of a vLLM server that a router sees, in this process, with faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from typing import Any, NamedTuple

from aiohttp import web

_lives = itertools.count(1)
MODEL = "smollm2"


class Call(NamedTuple):
    """One completion request as the engine got it."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    at_s: float

    @property
    def params(self) -> dict[str, Any]:
        return self.body.get("kv_transfer_params") or {}


class FakeEngine:
    """An engine with knobs.

    Attributes:
        num_tokens: events of a streamed answer.
        first_byte_s, gap_s: delays before the first event and between events.
        padding: what every event has besides its token.
        prefill_s: delay of an answer to a prefill leg.
        fail_status: answer completions with this status.
        die_after: close the connection after so many events (0 = before the first).
        has_connector: whether it answers with kv_transfer_params.
        is_serial: prefill one prompt at a time.
        prompt_tokens, cached_tokens: what it says it counted; 0 = says nothing.
        needs_prefill: a set of transfer ids: a decode leg waits until its own is in it.
    """

    def __init__(self, **knobs: Any) -> None:
        self.num_tokens = 3
        self.first_byte_s = 0.0
        self.gap_s = 0.0
        self.prefill_s = 0.0
        self.fail_status = 0
        self.fail_prefill_status = 0
        self.die_after: int | None = None
        self.die_on_prefill = False
        self.has_connector = True
        self.is_done_missing = False
        self.is_serial = False
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.needs_prefill: set[str] | None = None
        self.prefilled: set[str] = set()
        self.health_status = 200
        self.health_s = 0.0
        self.calls: list[Call] = []
        self.num_cancelled = 0
        self.num_events = 0
        self.padding = ""
        self.num_open = 0
        self.engine_id = ""
        self.url = ""
        self.port = 0
        self._turn = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self.set(**knobs)

    def set(self, **knobs: Any) -> None:
        for name, value in knobs.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    @property
    def legs(self) -> list[Call]:
        return [call for call in self.calls if not call.params.get("introduce")]

    async def start(self) -> FakeEngine:
        """Listen on a free port, or on the same as before: a new life with a new engine id."""
        self.engine_id = f"engine-{next(_lives)}"
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        self.routes(app)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def routes(self, app: web.Application) -> None:
        """Add what another kind of engine has besides."""

    async def stop(self) -> None:
        """Die: every open connection is reset, new ones are refused."""
        if self._runner is not None:
            for connection in list(self._runner.server.connections if self._runner.server else ()):
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _request: web.Request) -> web.Response:
        await asyncio.sleep(self.health_s)
        return web.Response(status=self.health_status)

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 8192}]})

    def own_params(self) -> dict[str, Any] | None:
        if not self.has_connector:
            return None
        return {"remote_engine_id": self.engine_id, "remote_addresses": [f"tcp://127.0.0.1:{self.port + 1}"],
                "do_remote_prefill": True, "do_remote_decode": False, "block_size": 16}

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        call = Call(request.path, body, dict(request.headers), asyncio.get_running_loop().time())
        self.calls.append(call)
        self.num_open += 1
        try:
            return await self._answer(request, call)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1

    async def _answer(self, request: web.Request, call: Call) -> web.StreamResponse:
        if call.params.get("introduce"):
            return web.json_response(_completion("x", self.own_params()))
        if self.fail_status:
            return _error(self.fail_status)
        if call.params.get("do_remote_decode"):
            return await self._prefill(request, call)
        if self.needs_prefill is not None and call.params.get("do_remote_prefill"):
            while call.params["transfer_id"] not in self.needs_prefill:
                await asyncio.sleep(0.005)
        await asyncio.sleep(self.first_byte_s)
        if not call.body.get("stream"):
            if self.die_after is not None:
                _abort(request)
            await asyncio.sleep(self.gap_s * self.num_tokens)
            return web.json_response(_completion("abc", self.own_params() if call.params else None))
        return await self._stream(request)

    async def _prefill(self, request: web.Request, call: Call) -> web.StreamResponse:
        if self.fail_prefill_status:
            return _error(self.fail_prefill_status)
        async with self._turn if self.is_serial else contextlib.nullcontext():
            await asyncio.sleep(self.prefill_s)
        if self.die_on_prefill:
            _abort(request)
            return web.Response()
        self.prefilled.add(call.params["transfer_id"])
        answer = _completion("x", self.own_params())
        if self.prompt_tokens:
            details = {"cached_tokens": self.cached_tokens}
            answer["usage"] = {"prompt_tokens": self.prompt_tokens, "completion_tokens": 1,
                               "prompt_tokens_details": details}
        return web.json_response(answer)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for number in range(self.num_tokens):
            if self.die_after == number:
                _abort(request)
                return response
            event = {"object": "text_completion", "choices": [{"index": 0, "text": f"t{number} {self.padding}"}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.num_events += 1
            await asyncio.sleep(self.gap_s)
        if not self.is_done_missing:
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _completion(text: str, params: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "kv_transfer_params": params,
            "choices": [{"index": 0, "text": text, "finish_reason": "length"}]}


def _error(status: int) -> web.Response:
    return web.json_response({"error": {"message": "engine says no", "type": "X", "code": status}}, status=status)


def _abort(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


async def serve_process() -> None:
    """Be an engine in a process of its own, with the knobs that the first argument names as JSON; print the url."""
    engine = await FakeEngine(**json.loads(sys.argv[1])).start()
    print(engine.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve_process())
