"""Share what the tests compare with: the answers of one plain server, which is stopped before others start."""

from __future__ import annotations

import sys

import pytest

from engine.sglang.servers import PROMPTS, ask, ask_all, server_spec
from mooncake_connector.demo.processes import Supervisor, free_ports


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """Yield the tokens that a server without our plugin's help gives for each of PROMPTS."""
    [port] = free_ports(1)
    with Supervisor(tmp_path_factory.mktemp("plain"), report=report) as supervisor:
        supervisor.start(server_spec("plain", port))
        supervisor.wait_ready()
        answers = ask_all(lambda prompt: ask(f"http://127.0.0.1:{port}", prompt), PROMPTS)
    assert [answer.status for answer in answers] == [200] * len(PROMPTS), answers
    return [answer.tokens for answer in answers]


def pytest_collection_modifyitems(items):
    """Give everything here the time that a start on two cores takes."""
    for item in items:
        if "tests/engine/sglang/" in item.nodeid:
            item.add_marker(pytest.mark.timeout(900))
