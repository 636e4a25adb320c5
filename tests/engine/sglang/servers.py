"""Run real SGLang servers for tests: started, killed and restarted at will; two at a time fit beside other work."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mooncake_connector.demo.cluster import etcd_spec, store_spec
from mooncake_connector.demo.processes import ProcessSpec, Supervisor, free_ports
from mooncake_connector.demo.status import CellStatus, total

ROOT = Path(__file__).resolve().parents[3]
ANSWER_TIMEOUT_S = 120.0
FAILURE_MAX_S = 15.0
READY_TIMEOUT_S = 420.0
PAGE_TOKENS = 16
PAGE_MAX_MIB = 1
NEW_TOKENS = 4
CLIENTS = 6

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
FLAGS = ("--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--host", "127.0.0.1",
         "--page-size", str(PAGE_TOKENS), "--mem-fraction-static", "0.5", "--max-total-tokens", "4096",
         "--max-running-requests", "8", "--context-length", "2048", "--skip-server-warmup", "--sleep-on-idle")
_PROBE = """
import importlib.metadata as m
m.version("sglang")
assert any(point.name == "mooncake" for point in m.entry_points(group="sglang.srt.plugins")), "our plugin is missing"
"""


def sglang_python() -> str:
    """Return the interpreter that has SGLang and our plugin; fails the test where there is none."""
    path = Path(os.environ.get("SGLANG_VENV") or ROOT / ".venv-sglang") / "bin" / "python"
    if not path.is_file():
        pytest.fail("no SGLang: run `make test-sglang`, or set SGLANG_VENV to an environment that has it")
    found = subprocess.run([str(path), "-c", _PROBE], capture_output=True, text=True, timeout=60, cwd="/")
    if found.returncode != 0:
        pytest.fail(f"{path} lacks SGLang or our plugin: {found.stderr[-300:]}")
    return str(path)


def server_spec(name: str, port: int, *flags: str, **environment: str) -> ProcessSpec:
    """Describe one server."""
    from engine.cluster import model_folder

    command = (sglang_python(), "-m", "sglang.launch_server", "--model-path", model_folder(), *FLAGS,
               "--port", str(port), *flags)
    return ProcessSpec(name=name, command=command, environment={**ENVIRONMENT, **environment}, stop_order=1,
                       ready_url=f"http://127.0.0.1:{port}/health", ready_timeout_s=READY_TIMEOUT_S,
                       hint="each server needs some 2 GiB of memory; the log says what it missed")


class Answer(NamedTuple):
    """What a server said: ``status`` 0 means that the connection broke."""

    status: int
    tokens: list[int]
    text: str
    seconds: float
    meta: dict[str, Any]


def ask(url: str, prompt: Sequence[int], *, timeout_s: float = ANSWER_TIMEOUT_S, new_tokens: int = NEW_TOKENS,
        **fields: Any) -> Answer:
    """Ask one server for some tokens."""
    body = {"input_ids": list(prompt), **fields,
            "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            answer = json.load(reply)
            return Answer(reply.status, answer["output_ids"], "", time.monotonic() - began, answer["meta_info"])
    except urllib.error.HTTPError as error:
        return Answer(error.code, [], error.read().decode(errors="replace"), time.monotonic() - began, {})
    except OSError as error:
        return Answer(0, [], repr(error), time.monotonic() - began, {})


def ask_all(play: Callable[[Sequence[int]], Any], prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Call ``play`` with every prompt, a few at a time; return its results in order."""
    results: list[Any] = [None] * len(prompts)
    left = list(enumerate(prompts))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not left:
                    return
                index, prompt = left.pop(0)
            results[index] = play(prompt)

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def settle(url: str, timeout_s: float = 40.0) -> None:
    """Empty the server's cache; it refuses while any page or request is left over, and ends itself on a leak."""
    deadline, text = time.monotonic() + timeout_s, ""
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/flush_cache", method="POST"), timeout=20):
                return
        except OSError as error:
            text = str(error)
        time.sleep(0.5)
    raise AssertionError(f"{url} still holds something after {timeout_s} s: {text}")


def random_prompt(length: int, seed: int) -> list[int]:
    """Return token ids; the same seed gives the same prompt."""
    rng = random.Random(seed)
    return [rng.randint(100, 40_000) for _ in range(length)]


EDGES = (2, 5, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 66, 80, 97, 128, 129, 144, 160, 191)
"""Lengths around the edges of pages (16 tokens) and of prefill chunks (64)."""


def make_prompts(count: int) -> list[list[int]]:
    """Return prompts: one of each length of EDGES, then others, of which a third continues an earlier one."""
    rng = random.Random(1)
    prompts = [random_prompt(length, length) for length in EDGES[:count]]
    while len(prompts) < count:
        shared = rng.choice(prompts)[: rng.randint(1, 120)] if rng.random() < 1 / 3 else []
        prompts.append(shared + random_prompt(rng.randint(1, 120), 1000 + len(prompts)))
    return prompts


PROMPTS = make_prompts(len(EDGES))


def num_pages(prompts: Sequence[Sequence[int]]) -> int:
    """Count the whole pages of these prompts, shared ones again and again."""
    return sum(len(prompt) // PAGE_TOKENS for prompt in prompts)


class Pool:
    """A cell's etcd and store node, with room for all prompts."""

    def __init__(self, supervisor: Supervisor, run_dir: Path, prompts: Sequence[Sequence[int]]) -> None:
        [port] = free_ports(1)
        self.directory = f"etcd://127.0.0.1:{port}"
        supervisor.start(etcd_spec(port, run_dir / "etcd"))
        supervisor.wait_ready(["etcd"])
        memory = f"{512 + 2 * num_pages(prompts) * PAGE_MAX_MIB}MiB"
        supervisor.start(store_spec("store", directory=self.directory, memory=memory))

    @property
    def settings(self) -> dict[str, str]:
        """Return what a server needs to be told."""
        return {"directory": self.directory, "segment_bytes": "256MiB"}

    def wait_stored(self, num_blocks: int) -> None:
        """Wait until the store node has that many blocks."""
        status, deadline, held = CellStatus(self.directory), time.monotonic() + 60, 0.0
        try:
            while time.monotonic() < deadline:
                stores = [member for member in status.ask() if member.member.kind == "store"]
                held = sum(total(member.samples, "mooncake_segment_blocks") for member in stores)
                if held >= num_blocks:
                    return
                time.sleep(0.5)
        finally:
            status.close()
        raise AssertionError(f"{held} of {num_blocks} blocks reached the store node")
