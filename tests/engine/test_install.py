"""Install the wheel with plain pip beside an untouched vLLM and turn it on by flags alone, in every documented way.

The environment is a new venv that sees the engine's packages through a .pth file: pip works as usual and the engine's
own environment stays as it is.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from engine.cluster import ROOT, checked, engine_python, model_folder, random_prompt, run
from mooncake_connector.demo.client import complete, hand_over, introduce
from mooncake_connector.demo.cluster import CONNECTOR, CONNECTOR_MODULE, EngineOptions, engine_spec, etcd_spec
from mooncake_connector.demo.processes import Supervisor, free_ports
from mooncake_connector.demo.status import by_label, difference, scrape, total

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPT_TOKENS = 300
POOLED_TOKENS = 256
FLAGS: dict[str, dict[str, object]] = {
    "flags": {"kv_connector": CONNECTOR, "kv_role": "kv_both"},
    "flags-too": {"kv_connector": CONNECTOR, "kv_role": "kv_both"},
    "module-path": {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_module_path": CONNECTOR_MODULE},
    "multi": {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": {"connectors": [
        {"kv_connector": CONNECTOR, "kv_role": "kv_both"}]}},
}
DEFAULT_ETCD_PORT = 2379


class Installed(NamedTuple):
    """Running servers, by how the connector was turned on."""

    supervisor: Supervisor
    urls: dict[str, str]
    etcd_port: int


def pip(python: Path, *arguments: str) -> str:
    """Run pip and return its output."""
    done = subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, f"pip {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a venv that has the engine's packages and our wheel."""
    folder = tmp_path_factory.mktemp("install")
    engine = engine_python()
    subprocess.run([engine, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = [Path(subprocess.run([str(path), "-c", where], capture_output=True, text=True, check=True,
                                   timeout=60).stdout.strip()) for path in (python, engine)]
    (purelib[0] / "engine.pth").write_text(f"{purelib[1]}\n")
    pip(Path(sys.executable), "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    before = pip(python, "freeze", "--all")
    # The engine's environment may have our wheel already (plain pip put it there): this one gets its own copy.
    pip(python, "install", "--ignore-installed", "--no-deps", *map(str, folder.glob("*.whl")))
    changed = {line for line in set(before.splitlines()) - set(pip(python, "freeze", "--all").splitlines())
               if not line.startswith("mooncake-plugin")}
    assert not changed, f"installing our wheel changed the engine's packages: {changed}"
    return python


@pytest.fixture(scope="module")
def installed(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Yield servers that were started while there was no etcd; then etcd comes up on the default port."""
    options = EngineOptions(python=str(environment), model=model_folder(), dtype="float32")
    folder = tmp_path_factory.mktemp("servers")
    ports = dict(zip(FLAGS, free_ports(len(FLAGS)), strict=True))
    if _listens(DEFAULT_ETCD_PORT):
        pytest.skip(f"something listens on etcd's default port {DEFAULT_ETCD_PORT}; this test needs it")
    with Supervisor(folder) as supervisor:
        for name, config in FLAGS.items():
            supervisor.start(engine_spec(name, ports[name], options=options, transfer_config=config))
        supervisor.wait_ready()
        supervisor.start(etcd_spec(DEFAULT_ETCD_PORT, folder / "etcd"))
        supervisor.wait_ready()
        yield Installed(supervisor, {name: f"http://127.0.0.1:{port}" for name, port in ports.items()},
                        DEFAULT_ETCD_PORT)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_without_etcd_one_line_says_what_to_start(installed: Installed) -> None:
    for name in FLAGS:
        log = installed.supervisor.children[name].log_path.read_text()
        lines = [line for line in log.splitlines() if "no etcd at" in line]
        assert lines, f"{name} does not say that etcd is missing"
        assert "mooncake etcd" in lines[0]
        # once in each of the engine's two processes, not once per attempt
        assert len(lines) <= 2, f"{name} says it {len(lines)} times"
        assert "Traceback" not in log


def test_servers_share_by_flags_alone(installed: Installed) -> None:
    """What the first server computed, the others load: through the flag, the module path and MultiConnector."""
    time.sleep(6)       # the servers find the etcd that came up after them

    async def ask(http: Any) -> dict[str, tuple[list[int], float, int]]:
        prompt = random_prompt(PROMPT_TOKENS, 1)
        found = {}
        for name, url in installed.urls.items():
            before = scrape(url)
            answer = checked(await complete(http, url, prompt, max_tokens=16))
            grown = difference(scrape(url), before)
            source = by_label(grown, "vllm:prompt_tokens_by_source_total")
            found[name] = (answer.token_ids, source.get("external_kv_transfer", 0), answer.cached_tokens)
            time.sleep(2)
        return found

    found = run(ask)
    first = found["flags"]
    assert first[1] == 0, "the first server had nobody to load from"
    for name in ("flags-too", "module-path", "multi"):
        assert found[name][0] == first[0], f"{name} answers differently"
        assert found[name][1] == POOLED_TOKENS, f"{name} loaded {found[name][1]:.0f} tokens"


def test_metrics_reach_the_engines_own_page(installed: Installed) -> None:
    run(lambda http: complete(http, installed.urls["multi"], random_prompt(PROMPT_TOKENS, 2), max_tokens=8))
    time.sleep(1)
    for name in ("flags-too", "multi"):
        samples = scrape(installed.urls[name])
        assert total(samples, "mooncake_pull_bytes_total") > 0, f"{name} shows no pulled bytes"


def test_servers_hand_over_by_flags_alone(installed: Installed) -> None:
    """Two servers with nothing but the flag also split prefill from decode."""
    async def ask(http: Any) -> Any:
        peer = await introduce(http, installed.urls["flags"])
        return await hand_over(http, prefill_url=installed.urls["flags"], decode_url=installed.urls["multi"], peer=peer,
                               prompt=random_prompt(PROMPT_TOKENS, 3), max_tokens=8)

    before = scrape(installed.urls["multi"])
    found = run(ask)
    assert not found.prefill_error and not found.decode.error
    assert total(difference(scrape(installed.urls["multi"]), before), "mooncake_handoff_bytes_total") > 0


def test_wheel_is_pure_and_registers_the_plugin(environment: Path) -> None:
    code = ("import importlib.metadata as m, json; print(json.dumps([[p.name, p.value] for p in "
            "m.entry_points(group='vllm.general_plugins') if p.name == 'mooncake']))")
    found = msgspec.json.decode(subprocess.run([str(environment), "-c", code], capture_output=True, text=True,
                                               check=True, timeout=60).stdout)
    assert found == [["mooncake", "mooncake_connector.engines.vllm.plugin:register"]]
    check = subprocess.run([str(environment.parent / "mooncake"), "--help"], capture_output=True, text=True, timeout=60,
                           check=False)
    assert check.returncode == 0, check.stderr
