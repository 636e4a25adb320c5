"""Check what the demo makes of servers' answers and figures."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from mooncake_connector.demo.client import AskFailed, chat, complete, hand_over, introduce, session
from mooncake_connector.demo.cluster import choose_dtype, engine_options, probe_python
from mooncake_connector.demo.media import describe_media
from mooncake_connector.demo.report import Report, format_report, format_table, write_json
from mooncake_connector.demo.scenes import HandoffNote, Scene
from mooncake_connector.demo.status import by_label, difference, scrape, total
from mooncake_store.errors import ConfigError


def sse(*chunks: object) -> bytes:
    """Encode chunks as a server-sent stream."""
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


async def ask(play: object, **routes: object) -> object:
    """Run ``play(http, url)`` against a server with these handlers."""
    app = web.Application()
    for name, handler in routes.items():
        method, path = ("GET", f"/{name}") if name == "metrics" else ("POST", "/v1/" + name.replace("_", "/"))
        app.router.add_route(method, path, handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with session() as http:
            return await play(http, f"http://127.0.0.1:{port}")  # type: ignore[operator]
    finally:
        await runner.cleanup()


async def test_a_streamed_answer_is_taken_apart() -> None:
    async def completions(request: web.Request) -> web.Response:
        assert (await request.json())["temperature"] == 0
        return web.Response(body=sse(
            {"choices": [{"text": "Pa", "token_ids": [7]}]}, {"choices": [{"text": "", "token_ids": [8]}]},
            {"choices": [{"text": "ris", "token_ids": [9], "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}}))

    answer = await ask(lambda http, url: complete(http, url, [1], max_tokens=3), completions=completions)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Paris", [7, 8, 9], "stop")
    assert (answer.prompt_tokens, answer.cached_tokens, len(answer.times), answer.error) == (5, 4, 3, "")
    assert 0 < answer.ttft_s <= answer.ended - answer.began


@pytest.mark.parametrize(("status", "body", "wanted"), [
    (503, b'{"error": {"message": "no prefill engine"}}', "no prefill engine"),
    (200, sse({"error": {"message": "lost a block", "code": 500}}), "lost a block")])
async def test_errors_are_kept_whether_http_or_in_the_stream(status: int, body: bytes, wanted: str) -> None:
    async def chat_completions(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    answer = await ask(lambda http, url: chat(http, url, [], max_tokens=3), chat_completions=chat_completions)
    assert wanted in answer.error
    assert answer.status == status and answer.times == []


async def test_both_legs_carry_one_transfer_id_and_a_failed_prefill_is_no_exception() -> None:
    seen: list[dict[str, object]] = []

    async def completions(request: web.Request) -> web.Response:
        body = await request.json()
        params = body["kv_transfer_params"]
        seen.append(params)
        if params.get("do_remote_decode"):
            return web.Response(status=500, text="out of memory")
        return web.Response(body=sse({"choices": [{"text": "x", "token_ids": [1]}]}))

    found = await ask(lambda http, url: hand_over(http, prefill_url=url, decode_url=url, prompt=[1, 2], max_tokens=1,
                                                  peer={"remote_engine_id": "e"}, prefill_params={"publish": "step"}),
                      completions=completions)
    assert "out of memory" in found.prefill_error and found.decode.token_ids == [1]
    prefill, decode = sorted(seen, key=lambda params: bool(params["do_remote_prefill"]))
    assert prefill["transfer_id"] == decode["transfer_id"] and prefill["publish"] == "step"
    assert decode["remote_engine_id"] == "e"


async def test_an_engine_without_the_connector_cannot_introduce_itself() -> None:
    async def completions(request: web.Request) -> web.Response:
        return web.json_response({"choices": [], "kv_transfer_params": None})

    with pytest.raises(AskFailed, match="does not introduce itself"):
        await ask(introduce, completions=completions)


async def test_metrics_are_summed_over_labels_but_sources_stay_apart() -> None:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text='# TYPE a counter\n'
                                 'a_total{engine="0",source="x"} 2\na_total{engine="1",source="x"} 3\n'
                                 '# TYPE b gauge\nb{engine="0"} 1\nb{engine="1"} 4\n')

    samples = await ask(lambda http, url: asyncio.to_thread(scrape, url), metrics=metrics)
    assert samples == {'a_total{source="x"}': 5, "b": 5}
    assert by_label(samples, "a_total") == {"x": 5}
    assert total(samples, "a_total") == 5 and total(samples, "a") == 0
    assert difference({"a": 3, "new": 2}, {"a": 1}) == {"a": 2, "new": 2}


def test_media_quote_the_logged_reason(tmp_path: Path) -> None:
    class Status(msgspec.Struct):
        samples: dict[str, float]

    log = tmp_path / "decode.log"
    log.write_text("x prefill worker tcp://a: medium cma (same host, private memory)\n")
    found = describe_media([Status({'mooncake_pull_bytes_total{medium="cma"}': 3e6}),
                            Status({'mooncake_pull_bytes_total{medium="cma"}': 1e6})], [log])  # type: ignore[list-item]
    assert found == {"cma": "4 MB; same host, private memory"}


def test_report_shows_every_scene_and_survives_json(tmp_path: Path) -> None:
    scene = Scene(name="c document", title="t", num_requests=5, prompt_tokens=900, device_tokens=700, pool_tokens=100,
                  computed_tokens=100, ttft_cold_s=4.0, ttft_reused_s=0.5, handoff_bytes={"cma": 5_000_000})
    report = Report(machine={"cores": 2}, versions={}, model="m", media={"cma": "why"}, seconds=1.0, rows=[scene],
                    handoff=[HandoffNote(64, [0.03, 0.05, 0.04])])
    text = format_report(report)
    assert "c document" in text and "5 MB cma" in text and "64 tokens +40 ms" in text and "cma: why" in text
    write_json(report, tmp_path / "demo.json")
    assert json.loads((tmp_path / "demo.json").read_text())["rows"][0]["pool_tokens"] == 100


def test_table_aligns_columns() -> None:
    assert format_table(["name", "n"], [["a", 10], ["longer", 5]]) == (
        "name     n\n------  --\na       10\nlonger   5")


def test_unusable_engine_settings_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Python interpreter that works"):
        probe_python(str(tmp_path / "no-python"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        engine_options("python3", str(tmp_path))
    assert choose_dtype("float32") == "float32" and choose_dtype("auto") in ("float32", "bfloat16")
