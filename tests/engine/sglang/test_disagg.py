"""A prefill and a decode server with our transfer backend, the prefill one with our cache linker: right tokens, clear
ends, nothing left over."""

import json
import os
import random
import re
import signal
import threading
import time

import pytest

from engine.sglang.conftest import report
from engine.sglang.servers import (
    FAILURE_MAX_S,
    PAGE_TOKENS,
    PROMPTS,
    Pool,
    ask,
    ask_all,
    num_pages,
    random_prompt,
    server_spec,
    settle,
)
from mooncake_connector.demo.processes import Supervisor, free_ports

BACKEND = ("--disaggregation-transfer-backend", "mooncake_pull")
LONG = 1200
HANDSHAKE_MAX_S = 20.0
"""SGLang asks a prefill server that does not answer fifteen times, a second apart, before any backend is involved."""


def linker_flags(settings):
    config = {"linker": "PoolLinker", "linker_module_path": "mooncake_connector.engines.sglang.linker",
              "linker_extra_config": settings}
    return ("--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic",
            "--unified-cache-external-linker-config", json.dumps(config))


class Pair:
    """A prefill and a decode server, and a pool for the prefill server."""

    def __init__(self, run_dir, prompts=PROMPTS):
        self.run_dir = run_dir
        self.supervisor = Supervisor(run_dir, report=report)
        self.pool = Pool(self.supervisor, run_dir, prompts)
        prefill, decode, self.bootstrap = free_ports(3)
        self.prefill, self.decode = f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}"
        self.specs = [
            server_spec("prefill", prefill, "--disaggregation-mode", "prefill", *BACKEND,
                        "--disaggregation-bootstrap-port", str(self.bootstrap), "--chunked-prefill-size", "64",
                        *linker_flags(self.pool.settings)),
            server_spec("decode", decode, "--disaggregation-mode", "decode", *BACKEND,
                        "--disaggregation-decode-enable-radix-cache",
                        "--disaggregation-decode-retraction-backup", "cpu_tensor"),
        ]

    def start(self):
        for spec in self.specs:
            self.supervisor.start(spec)
        self.supervisor.wait_ready()

    def heal(self):
        dead = [name for name, child in self.supervisor.children.items() if child.has_ended()]
        for name in dead:
            self.supervisor.restart(name, wait=False)
        self.supervisor.wait_ready(dead)

    def meeting(self, room=None):
        room = random.getrandbits(62) if room is None else room
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap, "bootstrap_room": room}

    def split(self, prompt, *, room=None, **more):
        """Send the request to both, as a router does; return both answers, the decode's last."""
        fields = {**self.meeting(room), **more}
        answers = {}
        threads = [threading.Thread(target=lambda url=url: answers.update({url: ask(url, prompt, **fields)}))
                   for url in (self.prefill, self.decode)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers[self.prefill], answers[self.decode]


@pytest.fixture(scope="module")
def servers(tmp_path_factory, reference):
    pair = Pair(tmp_path_factory.mktemp("pair"), reference.prompts)
    with pair.supervisor:
        pair.start()
        yield pair


@pytest.fixture
def pair(servers):
    servers.heal()
    yield servers
    servers.heal()
    for url in (servers.prefill, servers.decode):
        settle(url)


def at_once(*calls):
    """Run them at the same time; return their results in order."""
    results = [None] * len(calls)

    def run(index):
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_failed(answer, *words, within_s=FAILURE_MAX_S):
    assert answer.status == 500, answer
    assert answer.seconds < within_s, answer
    for word in words:
        assert word in answer.text, answer.text


def assert_same(answers, reference):
    assert [decode.tokens for _, decode in answers] == reference.tokens, [decode.text for _, decode in answers]
    assert [prefill.tokens for prefill, _ in answers] == [tokens[:1] for tokens in reference.tokens]


def whole_pages(prompt):
    """Return how many tokens of a prompt can be cached: of its last page at least one token is always computed."""
    return (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS


def test_tokens_are_those_of_a_server_that_does_both_cold_and_with_a_prefix_at_the_decode_server(pair, reference):
    answers = ask_all(lambda prompt: (pair.split(prompt), pair.split(prompt)), reference.prompts)
    assert_same([cold for cold, _ in answers], reference)
    assert_same([warm for _, warm in answers], reference)
    cached = [decode.meta["cached_tokens"] for _, (_, decode) in answers]
    assert all(found >= whole_pages(prompt) for prompt, found in zip(reference.prompts, cached, strict=True)), cached


def test_a_request_that_only_one_server_gets_ends(pair):
    decode, prefill, wrong, no_room = at_once(
        lambda: ask(pair.decode, random_prompt(60, 1), **pair.meeting()),
        lambda: ask(pair.prefill, random_prompt(60, 2), **pair.meeting()),
        lambda: ask(pair.decode, random_prompt(60, 3), **{**pair.meeting(), "bootstrap_port": free_ports(1)[0]}),
        lambda: ask(pair.decode, random_prompt(60, 4)))
    assert_failed(decode, "not handed over", "lease")
    assert_failed(prefill, "nobody fetched", "lease")
    assert_failed(wrong, within_s=HANDSHAKE_MAX_S)
    assert no_room.status == 400, no_room


def test_a_room_in_use_is_refused_and_its_request_unharmed(pair, reference):
    room, prompt = random.getrandbits(62), reference.prompts[-1]
    answers = at_once(lambda: pair.split(prompt, room=room), lambda: pair.split(prompt, room=room))
    refused, served = sorted((decode for _, decode in answers), key=lambda answer: answer.status == 200)
    assert_failed(refused, f"room {room} is in use")
    assert served.tokens == reference.tokens[-1]


class Middle:
    """A request whose prefill has begun: some of its chunks are there, and many are to come."""

    def __init__(self, pair, prompt, **decode_fields):
        self.pair, self.answers = pair, {}
        before, fields = self._num_batches(), pair.meeting()
        self.since = time.monotonic()
        self._threads = {url: threading.Thread(target=self._ask, args=(url, prompt, {**fields, **more}))
                         for url, more in ((pair.prefill, {}), (pair.decode, decode_fields))}
        for thread in self._threads.values():
            thread.start()
        deadline = time.monotonic() + 60
        while self._num_batches() < before + 3:
            assert time.monotonic() < deadline, "the prefill does not begin"
            time.sleep(0.02)
        self.since = time.monotonic()

    def _num_batches(self):
        return len(re.findall("Prefill batch", (self.pair.run_dir / "prefill.log").read_text(errors="replace")))

    def _ask(self, url, prompt, fields):
        answer = ask(url, prompt, **fields)
        self.answers[url] = answer._replace(seconds=time.monotonic() - self.since)

    def end(self, url):
        """Return its answer, timed from when this object was made."""
        self._threads[url].join(60)
        return self.answers[url]

    def end_once_computed(self, url):
        """Return its answer, timed from its last chunk: SGLang looks at a request's hand-over only behind that."""
        computed, count = self.since, self._num_batches()
        while self._threads[url].is_alive() and time.monotonic() < self.since + 120:
            if self._num_batches() > count:
                computed, count = time.monotonic(), self._num_batches()
            time.sleep(0.05)
        answer = self.answers[url]
        return answer._replace(seconds=answer.seconds - (computed - self.since))


def test_a_client_that_leaves_in_the_middle_ends_both_sides(pair):
    middle = Middle(pair, random_prompt(LONG, 3), timeout_s=1.0)
    assert middle.end(pair.decode).status == 0
    middle.end(pair.prefill)


def scheduler_pid(pair, name):
    for pid in pair.supervisor.children[name].pids():
        with open(f"/proc/{pid}/cmdline", errors="replace") as file:
            if "scheduler" in file.read():
                return pid
    raise AssertionError(f"no scheduler among the processes of {name}")


def test_a_prefill_server_that_hangs_in_the_middle_is_an_error_in_time(pair, reference):
    pid, middle = scheduler_pid(pair, "prefill"), Middle(pair, random_prompt(LONG, 5))
    os.kill(pid, signal.SIGSTOP)
    try:
        assert_failed(middle.end(pair.decode))
    finally:
        os.kill(pid, signal.SIGCONT)
    middle.end(pair.prefill)
    assert pair.split(reference.prompts[-1])[1].tokens == reference.tokens[-1]


def test_a_decode_server_killed_in_the_middle_frees_the_prefill(pair, reference):
    middle = Middle(pair, random_prompt(LONG, 4))
    pair.supervisor.kill("decode")
    assert_failed(middle.end_once_computed(pair.prefill), "nobody fetched", "gone")
    settle(pair.prefill)
    pair.heal()
    assert pair.split(reference.prompts[-1])[1].tokens == reference.tokens[-1]


def test_a_prefill_server_killed_in_the_middle_is_an_error_at_once_and_its_successor_finds_its_pages(pair, reference):
    pair.pool.wait_stored(num_pages(reference.prompts) // 2)
    middle = Middle(pair, random_prompt(LONG, 6))
    pair.supervisor.kill("prefill")
    assert_failed(middle.end(pair.decode), "process is gone")
    settle(pair.decode)
    pair.heal()
    answers = ask_all(pair.split, reference.prompts)
    assert_same(answers, reference)
    loaded = [(prefill.meta.get("cached_tokens_details") or {}).get("host", 0) for prefill, _ in answers]
    full = [found >= whole_pages(prompt) > 0 for prompt, found in zip(reference.prompts, loaded, strict=True)]
    assert full.count(True) >= len(full) // 2, loaded
