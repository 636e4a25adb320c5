"""What the reference pages say of settings, states and messages is what the code does."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from mooncake_connector.router.answers import TYPES
from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.engines import TRANSITIONS, EngineEvent
from mooncake_connector.router.messages import Answer, Question
from mooncake_store.config import describe_fields
from unit.router.cell import running_cell
from unit.router.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[3]
HTTP = (ROOT / "docs/reference/http.md").read_text()
PLACEMENT = (ROOT / "docs/reference/placement.md").read_text()


def test_every_setting_is_listed_with_its_default() -> None:
    described = describe_fields(RouterConfig)  # type: ignore[arg-type]
    for field in msgspec.structs.fields(RouterConfig):
        is_made = field.default is msgspec.NODEFAULT
        default = msgspec.json.encode(field.default_factory() if is_made else field.default).decode()
        assert f"| `{field.name}` | `{default}` | {described[field.name]} |" in HTTP


def test_every_error_code_is_listed() -> None:
    listed = set(re.findall(r"^\| (\d{3}) \|", HTTP, re.MULTILINE))
    assert listed <= {str(status) for status in TYPES}
    assert {"400", "401", "404", "408", "413", "429", "502", "503", "504"} == listed


def test_the_state_table_is_the_code() -> None:
    for state, row in TRANSITIONS.items():
        cells = " | ".join(row[event].value for event in EngineEvent)
        assert f"| {state.value} | {cells} |" in PLACEMENT


def test_every_message_is_listed_with_its_fields_in_order() -> None:
    for kind in (*get_args(Question), *get_args(Answer)):
        line = next(line for line in PLACEMENT.splitlines() if line.startswith(f"| `{kind.__struct_config__.tag}` |"))
        fields = line.split("|")[2]
        positions = [fields.index(f"`{name}`") for name in kind.__struct_fields__]
        assert positions == sorted(positions), kind


@pytest.mark.parametrize("num_decodes", [1, 0])
async def test_the_example_client_works(num_decodes: int) -> None:
    async with running_cell(placement="tcp://127.0.0.1:0", num_decodes=num_decodes) as cell:
        assert cell.app.service is not None
        source = (ROOT / "examples/router_client/place.py").read_text()
        assert source.count("\n") <= 45
        source = source.replace("tcp://127.0.0.1:8001", cell.app.service.address)
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", source, "Once upon a time", env={"PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(client.communicate(), 20)
        assert (client.returncode, output.decode().strip()) == (0, "abc")
        engine: FakeEngine
        for engine in cell.engines:
            assert len(engine.legs) == 1
        if num_decodes:
            assert cell.prefill.legs[0].body["max_tokens"] == 1
