"""SGLang's own router, and ours, in front of a pair with our transfer backend: every request answered, right tokens."""

import itertools
import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from engine.sglang.servers import FAILURE_MAX_S, NEW_TOKENS, PROMPTS, ask, ask_all, random_prompt, settle, sglang_python
from engine.sglang.test_disagg import LONG, Pair
from mooncake_connector.demo.cluster import SERVED_NAME, router_spec
from mooncake_connector.demo.processes import ProcessSpec, free_ports

NUM_REQUESTS = 50
ASKED = list(itertools.islice(itertools.cycle(range(len(PROMPTS))), NUM_REQUESTS))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, expected):
    pair = Pair(tmp_path_factory.mktemp("routed"))
    with pair.supervisor:
        pair.start()
        yield pair


@pytest.fixture(scope="module")
def ours(pair):
    """Yield the address of ``mooncake router``."""
    [port] = free_ports(1)
    pair.supervisor.start(router_spec(port, prefill=[pair.prefill], decode=[pair.decode], placement=""))
    pair.supervisor.wait_ready()
    yield f"http://127.0.0.1:{port}"
    pair.supervisor.stop("router")


def complete(url, prompt, *, max_tokens=NEW_TOKENS, **more):
    """Ask for a completion; return the status and the answer, JSON or as it is."""
    body = {"model": SERVED_NAME, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **more}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            data = reply.read()
            return reply.status, data.decode() if more.get("stream") else json.loads(data)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def models(url):
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as reply:
        return [card["id"] for card in json.load(reply)["data"]]


def test_sglangs_own_router(pair, expected):
    port, metrics_port = free_ports(2)
    pair.supervisor.start(ProcessSpec(
        name="sglang-router", ready_url=f"http://127.0.0.1:{port}/readiness", ready_timeout_s=90.0,
        command=(sglang_python(), "-m", "sglang_router.launch_router", "--pd-disaggregation", "--host", "127.0.0.1",
                 "--port", str(port), "--prefill", pair.prefill, str(pair.bootstrap), "--decode", pair.decode,
                 "--policy", "round_robin", "--disable-retries", "--prometheus-host", "127.0.0.1",
                 "--prometheus-port", str(metrics_port)),
        hint="is sglang-router installed beside SGLang? The log says"))
    try:
        pair.supervisor.wait_ready(["sglang-router"])
        answers = ask_all(lambda index: ask(f"http://127.0.0.1:{port}", PROMPTS[index]), ASKED)
    finally:
        pair.supervisor.stop("sglang-router")
    assert [answer.status for answer in answers] == [200] * NUM_REQUESTS, answers
    assert [answer.tokens for answer in answers] == [expected[index] for index in ASKED]


def test_our_router(pair, ours, expected):
    [name] = models(ours)
    answers = ask_all(lambda index: complete(ours, PROMPTS[index], model=name), ASKED)
    assert [status for status, _ in answers] == [200] * NUM_REQUESTS, answers
    assert [answer["choices"][0]["token_ids"] for _, answer in answers] == [expected[index] for index in ASKED]


def test_our_router_streams_the_same(pair, ours, expected):
    [name] = models(ours)
    status, stream = complete(ours, PROMPTS[-1], model=name, stream=True)
    assert status == 200 and stream.endswith("data: [DONE]\n\n"), stream
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    tokens = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or []]
    assert tokens == expected[-1], stream


def test_our_router_tells_why_when_the_prefill_dies_and_takes_it_back(pair, ours, expected):
    [name] = models(ours)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(complete(ours, random_prompt(LONG, 9), model=name)))
    asking.start()
    time.sleep(3.0)
    assert asking.is_alive(), "the request ended before the kill"
    killed_at = time.monotonic()
    pair.supervisor.kill("prefill")
    asking.join(60)
    assert time.monotonic() - killed_at < FAILURE_MAX_S
    [(status, text)] = answers
    assert status == 502 and pair.prefill in text, text
    status, text = complete(ours, PROMPTS[-1], model=name)
    assert status in (502, 503) and pair.prefill in text, text
    settle(pair.decode)
    pair.supervisor.restart("prefill")
    deadline = time.monotonic() + 30
    while True:
        status, answer = complete(ours, PROMPTS[-1], model=name)
        if status == 200 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert status == 200, answer
    assert answer["choices"][0]["token_ids"] == expected[-1]
    for url in (pair.prefill, pair.decode):
        settle(url)
