"""HiCache over the pool: what one server computed, another life of it finds, and nothing that is not the same."""

import json

import pytest

from engine.sglang.conftest import report
from engine.sglang.servers import PAGE_TOKENS, Pool, ask, ask_all, num_pages, server_spec, settle
from mooncake_connector.demo.processes import Supervisor, free_ports

MODULE = "mooncake_connector.engines.sglang.hicache"
FAULTS = {"SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.2", "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3"}


def hicache_flags(settings):
    extra = {"backend_name": "mooncake", "module_path": MODULE, "class_name": "PoolStorage", "interface_v1": 1,
             "prefetch_threshold": PAGE_TOKENS, "mooncake": settings}
    return ("--enable-hierarchical-cache", "--hicache-size", "1", "--hicache-io-backend", "direct",
            "--hicache-mem-layout", "page_first_direct", "--hicache-storage-prefetch-policy", "wait_complete",
            "--hicache-storage-backend", "dynamic", "--hicache-storage-backend-extra-config", json.dumps(extra))


class Server:
    """A server with HiCache in a cell of its own; one life after another."""

    def __init__(self, run_dir, prompts):
        self.supervisor = Supervisor(run_dir, report=report)
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.pool = Pool(self.supervisor, run_dir, prompts)

    def start(self, name, **environment):
        self.supervisor.start(server_spec(name, self.port, *hicache_flags(self.pool.settings), **environment))
        self.supervisor.wait_ready([name])


@pytest.fixture(scope="module")
def server(tmp_path_factory, reference):
    server = Server(tmp_path_factory.mktemp("hicache"), reference.prompts)
    with server.supervisor:
        yield server


def assert_same(answers, reference):
    assert [answer.tokens for answer in answers] == reference.tokens, [answer.text for answer in answers]


def test_delays_and_failures_of_the_storage_cost_hits_and_never_tokens(server, reference):
    server.start("faulty", **FAULTS)
    for _ in range(2):
        assert_same(ask_all(lambda prompt: ask(server.url, prompt), reference.prompts), reference)
        settle(server.url)
    server.pool.wait_stored(num_pages(reference.prompts) // 4)
    server.supervisor.stop("faulty")


def test_another_life_finds_what_was_computed_before_it(server, reference):
    server.start("second")
    answers = ask_all(lambda prompt: ask(server.url, prompt), reference.prompts)
    assert_same(answers, reference)
    stored = [(answer.meta.get("cached_tokens_details") or {}).get("storage", 0) for answer in answers]
    expected = [len(prompt) > PAGE_TOKENS for prompt in reference.prompts].count(True)
    assert sum(hit >= PAGE_TOKENS for hit in stored) >= expected // 4, stored
    best = answers[stored.index(max(stored))].meta["cached_tokens_details"]
    assert best["storage_backend"] == "PoolStorage", best
    settle(server.url)
    again = ask(server.url, reference.prompts[-1])
    assert again.tokens == reference.tokens[-1]
    assert again.meta["cached_tokens_details"]["storage"] >= PAGE_TOKENS, "emptied, and found in the pool"
