"""A prefill and a decode server with our transfer backend: right tokens, clear ends, nothing left over."""

import random
import threading
import time

import pytest

from engine.sglang.conftest import report
from engine.sglang.servers import FAILURE_MAX_S, PROMPTS, ask, ask_all, random_prompt, server_spec, settle
from mooncake_connector.demo.processes import Supervisor, free_ports

BACKEND = ("--disaggregation-transfer-backend", "mooncake_pull")
LONG = 1200


class Pair:
    """A prefill and a decode server."""

    def __init__(self, run_dir):
        self.supervisor = Supervisor(run_dir, report=report)
        prefill, decode, self.bootstrap = free_ports(3)
        self.prefill, self.decode = f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}"
        self.specs = [
            server_spec("prefill", prefill, "--disaggregation-mode", "prefill", *BACKEND,
                        "--disaggregation-bootstrap-port", str(self.bootstrap), "--chunked-prefill-size", "64"),
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
def servers(tmp_path_factory, expected):
    pair = Pair(tmp_path_factory.mktemp("pair"))
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


def assert_failed(answer, *words):
    assert answer.status == 500, answer
    assert answer.seconds < FAILURE_MAX_S, answer
    for word in words:
        assert word in answer.text, answer.text


def test_tokens_are_those_of_a_server_that_does_both(pair, expected):
    answers = ask_all(pair.split, PROMPTS)
    assert [decode.tokens for _, decode in answers] == expected, [decode.text for _, decode in answers]
    assert [prefill.tokens for prefill, _ in answers] == [tokens[:1] for tokens in expected]


def test_tokens_are_the_same_where_the_decode_server_has_the_prefix_already(pair, expected):
    for _ in range(2):
        answers = ask_all(pair.split, PROMPTS)
        assert [decode.tokens for _, decode in answers] == expected
    cached = [decode.meta["cached_tokens"] for _, decode in answers]
    assert cached[-1] >= 160, "the second time only the tail moves"


def test_a_prefill_that_nobody_fetches_ends(pair):
    assert_failed(ask(pair.prefill, random_prompt(60, 1), **pair.meeting()), "nobody fetched", "lease")


def test_a_decode_that_nobody_prefills_ends(pair):
    assert_failed(ask(pair.decode, random_prompt(60, 2), **pair.meeting()), "not handed over", "lease")


def test_a_room_in_use_is_refused_and_its_request_unharmed(pair, expected):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(pair.split(PROMPTS[-1], room=7))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused, served = sorted((decode for _, decode in answers), key=lambda answer: answer.status == 200)
    assert_failed(refused, "room 7 is in use")
    assert served.tokens == expected[-1]


def test_a_client_that_leaves_ends_both_sides(pair):
    fields, prompt = pair.meeting(), random_prompt(LONG, 3)
    first = threading.Thread(target=lambda: ask(pair.prefill, prompt, **fields))
    first.start()
    assert ask(pair.decode, prompt, timeout_s=3.0, **fields).status == 0
    first.join(60)
    assert not first.is_alive()


def killed_in_the_middle(pair, name, url):
    fields, prompt = pair.meeting(), random_prompt(LONG, 4)
    answers = []

    def wait():
        began = time.monotonic()
        answers.append((ask(url, prompt, **fields), began))

    other = pair.decode if url == pair.prefill else pair.prefill
    lost = threading.Thread(target=lambda: ask(other, prompt, **fields))
    kept = threading.Thread(target=wait)
    lost.start()
    kept.start()
    time.sleep(3.0)
    assert kept.is_alive(), "the request ended before the kill"
    killed_at = time.monotonic()
    pair.supervisor.kill(name)
    kept.join(60)
    lost.join(60)
    [(answer, began)] = answers
    return answer._replace(seconds=began + answer.seconds - killed_at)


def test_a_prefill_server_killed_in_the_middle_is_an_error_at_once_and_its_successor_is_found(pair, expected):
    answer = killed_in_the_middle(pair, "prefill", pair.decode)
    assert_failed(answer, "process is gone")
    settle(pair.decode)
    pair.heal()
    assert pair.split(PROMPTS[-1])[1].tokens == expected[-1]


def test_a_decode_server_killed_in_the_middle_frees_the_prefill(pair, expected):
    answer = killed_in_the_middle(pair, "decode", pair.prefill)
    assert_failed(answer, "nobody fetched", "gone")
    settle(pair.prefill)
    pair.heal()
    assert pair.split(PROMPTS[-1])[1].tokens == expected[-1]
