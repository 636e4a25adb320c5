"""Tell the demo how to run vLLM and how to read it."""

from __future__ import annotations

from collections.abc import Sequence

import aiohttp

from mooncake_connector.demo.client import Handoff, hand_over, introduce
from mooncake_connector.demo.cluster import Cell, EngineOptions, engine_options, probe_python
from mooncake_connector.demo.processes import ProcessSpec
from mooncake_connector.demo.status import by_label
from mooncake_connector.demo.ways import ServerName, Sources, Split


class VllmWays:
    """What :class:`~mooncake_connector.demo.ways.Ways` asks for, of vLLM."""

    name = "vllm"

    def options(self, python: str, model: str, *, dtype: str) -> EngineOptions:
        """Check an interpreter and a model folder and describe servers that use them. Raises: ConfigError."""
        return engine_options(python, model, dtype=dtype)

    def version(self, python: str) -> str:
        """Return vLLM's version."""
        return probe_python(python).vllm

    def server(self, cell: Cell, name: ServerName) -> ProcessSpec:
        """Describe one of the cell's two servers."""
        return cell.server(name)

    def sources(self, metrics: dict[str, float]) -> Sources:
        """Return where prompt tokens came from, as vLLM counts them."""
        found = by_label(metrics, "vllm:prompt_tokens_by_source_total")
        return Sources(found.get("local_cache_hit", 0), found.get("external_kv_transfer", 0),
                       found.get("local_compute", 0))

    def handoff_bytes(self, prefill: dict[str, float], members: dict[str, float]) -> dict[str, float]:
        """Return what readers counted: every engine worker is a member of the cell."""
        return by_label(members, "mooncake_handoff_bytes_total")

    async def splitter(self, http: aiohttp.ClientSession, cell: Cell, *, max_tokens: int) -> Split:
        """Ask the prefill server where it hands over; then both legs carry a transfer id. Raises: AskFailed."""
        peer = await introduce(http, cell.prefill_url)

        async def split(prompt: Sequence[int]) -> Handoff:
            return await hand_over(http, prefill_url=cell.prefill_url, decode_url=cell.decode_url, peer=peer,
                                   prompt=prompt, max_tokens=max_tokens)

        return split
