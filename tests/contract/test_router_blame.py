"""Whose fault it was: a request that the prefill engine finds wrong, and a client that left."""

from __future__ import annotations

import json
import logging
import time

import aiohttp
import pytest
from aiohttp import web

from unit.router.cell import eventually, running_cell


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_request_that_is_wrong_for_the_prefill_engine_is_answered_at_once(status: int, is_stream: bool) -> None:
    # The decode engine would wait for that prefill; its own patience must not decide when the client learns.
    async with running_cell(refused_grace_s=10.0) as cell:
        cell.prefill.set(fail_prefill_status=status)
        cell.decode.set(first_byte_s=15.0)
        started_s = time.monotonic()
        got, _headers, body = await cell.ask(stream=is_stream)
        assert got == status and json.loads(body)["error"]["message"]
        assert time.monotonic() - started_s < 5.0
        assert len(cell.decode.legs) == 1, "a wrong request is not sent anew"
        await eventually(lambda: cell.decode.num_cancelled == 1, 3, "the decode leg to be cancelled")


async def test_a_client_that_leaves_a_stream_is_no_error_of_ours(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A write may find the connection closed before the server has heard of it and cancelled the handler.
    async with running_cell() as cell:
        real_write = web.StreamResponse.write

        async def write(response: web.StreamResponse, data: bytes) -> None:
            if "x-mooncake-decode" in response.headers and b"[DONE]" in data:
                raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
            await real_write(response, data)

        monkeypatch.setattr(web.StreamResponse, "write", write)
        with caplog.at_level(logging.ERROR):
            async with cell.post(stream=True) as response:
                await response.read()
        assert not [record for record in caplog.records if record.exc_info]
        assert cell.sample("mooncake_router_disconnects_total") == 1
        assert cell.sample('mooncake_router_requests_total{outcome="client_gone"}') == 1
