"""Make environments: refuse early what cannot work, show progress, reuse what is there, explain failures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from environment import make_env
from environment.make_env import EnvironmentFailed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(make_env, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def run(code: str, watch: Path, timeout_s: float = 30.0) -> None:
    make_env.run_step("step one", [sys.executable, "-c", code], watch=watch, timeout_s=timeout_s)


def test_old_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(EnvironmentFailed, match=r"3\.9\.2 is too old"):
        make_env.check_python()


def test_python_without_venv_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(EnvironmentFailed) as caught:
        make_env.check_python()
    assert f"apt install python3.{sys.version_info[1]}-venv" in caught.value.hint


def test_small_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_env, "DISK_BYTES", 1 << 60)
    with pytest.raises(EnvironmentFailed, match="GiB are needed"):
        make_env.check_disk(tmp_path)


def test_long_step_is_never_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_env, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(make_env, "POLL_S", 0.05)
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    run("import time; print('Collecting torch', flush=True); time.sleep(1)", tmp_path)
    beats = [line for line in capsys.readouterr().out.splitlines() if "MiB: Collecting torch" in line]
    assert beats and f"{tmp_path.name} 3 MiB" in beats[-1]


def test_failed_step_shows_its_output_and_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    with pytest.raises(EnvironmentFailed, match="exit code 3") as caught:
        run(f"import sys; print({message!r}); sys.exit(3)", tmp_path)
    assert message in capsys.readouterr().out
    assert "PIP_EXTRA_INDEX_URL" in caught.value.hint


def test_step_past_its_time_is_ended(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match="took too long"):
        run("import time; time.sleep(60)", tmp_path, timeout_s=0.5)


def test_step_does_not_see_our_python_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    run("import os; assert 'PYTHONPATH' not in os.environ", tmp_path)


def test_base_is_made_once_and_again_when_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    steps: list[str] = []

    def note(title: str, command: list[str], watch: Path) -> None:
        watch.mkdir(exist_ok=True)
        steps.append(title)

    monkeypatch.setattr(make_env, "run_step", note)
    monkeypatch.setattr(make_env, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("one")
    make_env.make_base(tmp_path / "venv")
    num_steps = len(steps)
    assert num_steps == 2
    make_env.make_base(tmp_path / "venv")
    assert len(steps) == num_steps, "reused"
    (tmp_path / "pyproject.toml").write_text("two")
    make_env.make_base(tmp_path / "venv")
    assert len(steps) == 2 * num_steps


def test_unfinished_environment_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def fail_once(title: str, command: list[str], watch: Path) -> None:
        watch.mkdir(exist_ok=True)
        steps.append(title)
        if len(steps) == 2:
            raise EnvironmentFailed("no network")

    monkeypatch.setattr(make_env, "run_step", fail_once)
    monkeypatch.setattr(make_env, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("one")
    with pytest.raises(EnvironmentFailed):
        make_env.make_base(tmp_path / "venv")
    (tmp_path / "venv" / "half").write_text("")
    make_env.make_base(tmp_path / "venv")
    assert len(steps) == 4
    assert not (tmp_path / "venv" / "half").exists(), "an unfinished environment was built upon"


def test_given_vllm_environment_is_only_looked_at(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match="VLLM_VENV"):
        make_env.make_vllm(tmp_path / "nothing")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(EnvironmentFailed, match="has no vllm"):
        make_env.make_vllm(tmp_path / "venv")


def test_given_model_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match=r"config\.json"):
        make_env.make_model(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    make_env.make_model(tmp_path, tmp_path)


def test_failure_is_told_in_two_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_env.py", "--vllm-venv", "/nonexistent", "vllm"])
    assert make_env.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("  do: ")
