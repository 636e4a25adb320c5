"""Share what the tests compare with: the answers of one plain server, which is stopped before others start."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from engine.sglang.servers import PROMPTS, ask, ask_all, make_prompts, server_spec
from mooncake_connector.demo.processes import Supervisor, free_ports


class Reference(NamedTuple):
    """Prompts, and what a plain server answers to each."""

    prompts: list[list[int]]
    tokens: list[list[int]]


def pytest_addoption(parser):
    parser.addoption("--requests", type=int, default=len(PROMPTS),
                     help="prompts to compare with a plain server, in every way that SGLang's tests have one served")


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@pytest.fixture(scope="session")
def reference(request, tmp_path_factory):
    """Yield what a server without our plugin's help answers."""
    prompts = make_prompts(max(len(PROMPTS), request.config.getoption("--requests", default=0)))
    [port] = free_ports(1)
    with Supervisor(tmp_path_factory.mktemp("plain"), report=report) as supervisor:
        supervisor.start(server_spec("plain", port))
        supervisor.wait_ready()
        answers = ask_all(lambda prompt: ask(f"http://127.0.0.1:{port}", prompt), prompts)
    assert [answer.status for answer in answers] == [200] * len(prompts), answers
    return Reference(prompts, [answer.tokens for answer in answers])


@pytest.fixture(scope="session")
def expected(reference):
    """Yield what that server answers to each of PROMPTS, with which all prompts begin."""
    return reference.tokens[: len(PROMPTS)]


def pytest_collection_modifyitems(items):
    """Give everything here the time that a start on two cores takes."""
    for item in items:
        if "tests/engine/sglang/" in item.nodeid:
            item.add_marker(pytest.mark.timeout(900))
