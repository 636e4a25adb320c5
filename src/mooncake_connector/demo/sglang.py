"""Tell the demo how to run SGLang on a CPU and how to read it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp
import msgspec

from mooncake_connector.demo.client import Handoff, both_legs
from mooncake_connector.demo.cluster import (
    ENGINE_READY_TIMEOUT_S,
    SERVED_NAME,
    Cell,
    EngineOptions,
    ask_python,
    require_model,
)
from mooncake_connector.demo.processes import ProcessSpec
from mooncake_connector.demo.status import by_label, total
from mooncake_connector.demo.ways import ServerName, Sources, Split
from mooncake_store.errors import ConfigError

# CPU engines that share few cores: one compute thread each. Sending a cached prefix early needs CUDA events (0.5.23).
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "false"}
CACHE_TOKENS = 8192
CHUNK_TOKENS = 4096
"""A whole prompt: on a CPU, SGLang computes the attention of a chunk anew over everything before it."""
PAGE_TOKENS = 16
MIB = 1 << 20

LINKER = {"linker": "PoolLinker", "linker_module_path": "mooncake_connector.engines.sglang.linker"}
# The fraction bounds what loading may seem to take while other processes start; the cache is as large as its tokens.
COMMON_FLAGS = (
    "--host", "127.0.0.1", "--device", "cpu", "--attention-backend", "torch_native", "--page-size", str(PAGE_TOKENS),
    "--mem-fraction-static", "0.5", "--max-total-tokens", str(CACHE_TOKENS), "--max-running-requests", "8",
    "--chunked-prefill-size", str(CHUNK_TOKENS), "--enable-metrics", "--enable-cache-report",
    "--disaggregation-transfer-backend", "mooncake_pull")  # fmt: skip
# The default for retracted requests is pinned host memory, which a CPU build of torch has not.
DECODE_FLAGS = ("--disaggregation-decode-retraction-backup", "cpu_tensor")

# Asks another interpreter what it has, without importing the engine.
_PROBE = """
import importlib.metadata as m, json
names = {d.metadata["Name"].lower(): d.version for d in m.distributions() if d.metadata["Name"]}
print(json.dumps({"sglang": names.get("sglang") or "",
                  "has_plugin": "mooncake" in [p.name for p in m.entry_points(group="sglang.srt.plugins")]}))
"""


class SglangPython(msgspec.Struct, frozen=True):
    """What an interpreter offers: SGLang's version and whether our plugin is installed next to it."""

    sglang: str
    has_plugin: bool


class SglangWays:
    """What :class:`~mooncake_connector.demo.ways.Ways` asks for, of SGLang."""

    name = "sglang"

    def options(self, python: str, model: str, *, dtype: str) -> EngineOptions:
        """Check an interpreter and a model folder and describe servers that use them. Raises: ConfigError.

        ``auto`` is float32: SGLang's torch fallbacks are slower in bfloat16.
        """
        require_model(model)
        found = _probe(python)
        if not found.has_plugin:
            raise ConfigError(f"{python} lacks our plugin", where="--python",
                              hint=f"{python} -m pip install mooncake-plugin")
        return EngineOptions(python=python, model=model, dtype="float32" if dtype == "auto" else dtype)

    def version(self, python: str) -> str:
        """Return SGLang's version."""
        return _probe(python).sglang

    def server(self, cell: Cell, name: ServerName) -> ProcessSpec:
        """Describe one of the cell's two servers; only the prefill server, which computes prompts, uses the pool."""
        options = cell.options
        port = cell.prefill_port if name == "prefill" else cell.decode_port
        command = [options.python, "-m", "sglang.launch_server", "--model-path", options.model, "--served-model-name",
                   SERVED_NAME, "--port", str(port), "--dtype", options.dtype, "--context-length",
                   str(options.context_tokens), *COMMON_FLAGS, "--disaggregation-mode", name, *options.extra]
        if name == "prefill":
            linker = {**LINKER, "linker_extra_config": cell.connector}
            command += ["--disaggregation-bootstrap-port", str(cell.spare_port),
                        "--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic",
                        "--unified-cache-external-linker-config", json.dumps(linker)]
        else:
            command += DECODE_FLAGS
        return ProcessSpec(name=name, command=tuple(command), environment={**ENVIRONMENT, **options.environment},
                           stop_order=1, ready_url=f"http://127.0.0.1:{port}/ready",
                           ready_timeout_s=ENGINE_READY_TIMEOUT_S,
                           hint="two servers need some 5 GiB of memory; the log says what the server missed")

    def sources(self, metrics: dict[str, float]) -> Sources:
        """Return where prompt tokens came from; what the linker loaded SGLang counts as the host's."""
        cached = by_label(metrics, "sglang:cached_tokens_total")
        device = cached.get("device", 0)
        pool = cached.get("host", 0) + cached.get("storage", 0)
        return Sources(device, pool, total(metrics, "sglang:prompt_tokens_total") - device - pool)

    def handoff_bytes(self, prefill: dict[str, float], members: dict[str, float]) -> dict[str, float]:
        """Return what the prefill server counted as handed over; SGLang does not tell by which medium."""
        return by_label(members, "mooncake_handoff_bytes_total") or {
            "": total(prefill, "sglang:kv_transfer_total_mb_sum") * MIB}

    async def splitter(self, http: aiohttp.ClientSession, cell: Cell, *, max_tokens: int) -> Split:
        """Return what sends both legs with a room of their own."""

        async def split(prompt: Sequence[int]) -> Handoff:
            meeting = {"bootstrap_host": urlsplit(cell.prefill_url).hostname, "bootstrap_port": cell.spare_port,
                       "bootstrap_room": random.getrandbits(63)}
            return await both_legs(http, prefill_url=cell.prefill_url, decode_url=cell.decode_url, prompt=prompt,
                                   max_tokens=max_tokens, prefill_fields=meeting, decode_fields=meeting)

        return split


def _probe(python: str) -> SglangPython:
    try:
        found = msgspec.json.decode(ask_python(python, _PROBE), type=SglangPython)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{python} is no Python interpreter that works: {error}", where="--python",
                          hint="name a Python interpreter that has SGLang, e.g. .venv-sglang/bin/python") from error
    if not found.sglang:
        raise ConfigError(f"{python} has no SGLang", where="--python",
                          hint="`make demo-sglang` builds one for CPUs; or name another interpreter")
    return found
