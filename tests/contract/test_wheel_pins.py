"""Build our wheel and show that installing it beside an engine changes none of the engine's packages.

What this shows, for each engine release below: (1) the engine alone is resolved from the package index as of today, for
Python 3.11 on Linux x86-64; (2) our wheel, built now from this tree, is resolved with every version of that set pinned.
That succeeds only if each of our requirements, and theirs in turn, is met by the version the engine has, so that `pip
install` of the wheel into an environment with that set has nothing to up- or downgrade; (3) what our wheel adds to the
set is exactly ADDED_MAX. Only metadata is fetched; nothing is installed or imported, so it says nothing about run time,
nor about vendor images that carry other versions, nor about our extras.
"""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240
PLATFORM = "x86_64-manylinux_2_34"

ENGINES = ("vllm==0.33.0", "sglang==0.5.23")
ADDED_MAX = {"mooncake-plugin", "etcd-sdk-python"}
"""The client of etcd is the one thing engines do not carry; what it needs in turn (grpcio, protobuf), both do."""

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)


def uv(*arguments: str, text: str = "") -> str:
    """Run uv from our environment, on the index that pip uses here; return its output."""
    command = [sys.executable, "-m", "uv", "--cache-dir", str(ROOT / ".cache" / "uv"), "--no-config", "--no-progress"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
                          input=text)
    assert done.returncode == 0, f"uv {' '.join(arguments)}:\n{done.stderr[-4000:]}"
    return done.stdout


def index_options() -> list[str]:
    """Return the index that pip is configured with, if it is not the default one."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ["--default-index", found.stdout.strip()] if found.returncode == 0 and found.stdout.strip() else []


def resolve(*requirements: str, pinned: Path | None = None) -> dict[str, str]:
    """Return name -> version of everything that the requirements need."""
    options = ["--constraints", str(pinned)] if pinned else []
    output = uv("pip", "compile", "--no-header", "--no-annotate", "--python-version", "3.11", "--python-platform",
                PLATFORM, *index_options(), *options, "-", text="\n".join(requirements))
    found = {}
    for line in output.splitlines():
        name, _, version = line.partition("==")
        name = canonicalize_name(name.partition(" @ ")[0].partition("[")[0].strip())
        found[name] = version.partition(";")[0].strip()
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return our wheel, built now."""
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--python", sys.executable, *index_options(), "--out-dir", str(folder), str(ROOT))
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_wheel_changes_no_pin_of_the_engine(engine: str, wheel: Path, tmp_path: Path) -> None:
    alone = resolve(engine)
    assert len(alone) > 50, f"{engine} resolved to {len(alone)} packages only"
    pins = tmp_path / "pins.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in alone.items()))
    ours = resolve(f"mooncake-plugin @ {wheel.as_uri()}", pinned=pins)
    assert "etcd-sdk-python" in ours, f"our wheel's own requirements were not resolved: {ours}"
    changed = {name: (alone[name], version) for name, version in ours.items() if alone.get(name, version) != version}
    assert not changed, f"installing our wheel would change {changed}"
    assert set(ours) - set(alone) <= ADDED_MAX


def test_a_pin_that_cannot_stay_is_found(wheel: Path, tmp_path: Path) -> None:
    """The method itself: an environment with an older pyzmq than our floor cannot keep it."""
    pins = tmp_path / "pins.txt"
    pins.write_text("pyzmq==24.0.1\n")
    with pytest.raises(AssertionError, match="pyzmq"):
        resolve(f"mooncake-plugin @ {wheel.as_uri()}", pinned=pins)


def test_wheel_is_pure_and_asks_for_floors_only(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(info))
        entry_points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert {name.split("/")[0] for name in names} == {"mooncake_connector", "mooncake_store", info.split("/")[0]}
    assert "mooncake_connector/py.typed" in names
    assert "mooncake = mooncake_connector.engines.vllm.plugin:register" in entry_points
    assert "mooncake = mooncake_connector.cli.main:main" in entry_points
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    runtime = [requirement for requirement in required if "extra" not in str(requirement.marker or "")]
    assert {canonicalize_name(requirement.name) for requirement in runtime} == {
        "aiohttp", "etcd-sdk-python", "msgspec", "numpy", "prometheus-client", "protobuf", "psutil",
        "pyzmq"}
    bounds = {specifier.operator for requirement in runtime for specifier in requirement.specifier}
    assert bounds <= {">="}, "a ceiling would make pip change the engine's packages"
