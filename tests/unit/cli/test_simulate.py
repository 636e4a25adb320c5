"""Replay a trace by the command: a table, JSON, a plot; and a clear no to what cannot be replayed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mooncake_connector.cli.main import main
from mooncake_connector.router.policy import POLICIES

LINE = '{"timestamp": %d, "input_length": 3000, "output_length": 20, "hash_ids": [0, %d]}\n'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(LINE % (number * 50, number % 7 + 1) for number in range(60)) + "\n")
    return path


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["simulate", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_policies_are_shown_side_by_side_at_every_load(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), "--policies", ",".join(POLICIES), "--load", "1,2", "--prefill", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("policy") and len(lines) == 1 + 2 * len(POLICIES)
    assert [line.split()[0] for line in lines[1:]] == [*POLICIES, *POLICIES]


def test_the_same_command_writes_the_same_report(trace: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("a.json", "b.json"):
        assert main(["simulate", str(trace), "--load", "3", "--json", str(tmp_path / name), "--seed", "5"]) == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    report = json.loads(texts[0])
    assert report["trace"] == "trace.jsonl" and report["settings"]["seed"] == 5
    assert report["cluster"]["num_prefill"] == 8 and len(report["rows"]) == 3


def test_promises_classes_and_the_cluster_are_options(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ("--policies", "joint", "--load", "4", "--prefill", "1", "--decode", "1")
    (tight,) = rows(capsys, str(trace), *one, "--ttft", "1")
    (loose,) = rows(capsys, str(trace), *one, "--ttft", "60")
    assert tight["goodput"] < loose["goodput"] == 1.0 and tight["rejected"] > 0
    (unlimited,) = rows(capsys, str(trace), *one, "--ttft", "1", "--no-reject")
    assert unlimited["rejected"] == 0 and unlimited["admission"] == "queue*"
    (classes,) = rows(capsys, str(trace), *one, "--paid", "0.5", "--ttft", "2")
    assert set(classes["goodput_by_class"]) == {"", "paid"}
    (part,) = rows(capsys, str(trace), *one, "--part", "0.5:1", "--no-pool")
    assert part["num_requests"] == 30


@pytest.mark.parametrize(("options", "words"), [
    (["--policies", "best"], "no policy 'best'"),
    (["--policies", ","], "no policy"),
    (["--load", "fast"], "not a list of numbers"),
    (["--load", "0"], "above 0"),
    (["--load", "nan"], "above 0"),
    (["--part", "1:0"], "not a part"),
    (["--part", "0.5"], "not a part"),
    (["--paid", "2"], "between 0 and 1"),
    (["--ttft", "-1"], "no such class"),
    (["--prefill", "0"], "no such cluster"),
    (["--link", "0"], "no such cluster"),
    (["--noise", "9"], "no such cluster"),
    (["--load", ",".join(["1"] * 400)], "more than 1000 runs"),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(trace: Path, options, words, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


@pytest.mark.parametrize(("content", "words"), [
    (b"", "has no requests"),
    (b"\n\n", "has no requests"),
    (b"hello\n", ":1"),
    (b'{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"timestamp": 1}\n', ":2"),
    (b'{"timestamp": -1, "input_length": 5, "output_length": 1}\n', "timestamp"),
    (b'{"timestamp": 0, "input_length": 0, "output_length": 1}\n', "input_length"),
    (b'{"timestamp": 0, "input_length": 1e99, "output_length": 1}\n', "input_length"),
    (b'{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": "abc"}\n', "hash_ids"),
    (b"[" * 100_000 + b"\n", ":1"),
    (b"\xff\xfe\x00\n", ":1"),
])  # fmt: skip
def test_a_file_that_is_no_trace_is_named_with_its_line(tmp_path: Path, content, words, capsys) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert main(["simulate", str(path)]) != 0
    error = capsys.readouterr().err
    assert "bad.jsonl" in error and words in error and "Traceback" not in error


def test_a_file_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(tmp_path / "none.jsonl")]) != 0
    assert "cannot read the trace" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace), "--load", "1", "--json", str(trace / "x.json")]) != 0
    assert "cannot write" in capsys.readouterr().err


def test_a_plot_needs_matplotlib_and_says_so(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", str(trace), "--load", "1", "--png", str(tmp_path / "x.png")]) != 0
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_plot_is_a_picture(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert main(["simulate", str(trace), "--load", "1,2", "--png", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
