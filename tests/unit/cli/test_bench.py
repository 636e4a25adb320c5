"""Say what is measured, refuse what cannot be, and show figures and obstacles side by side."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mooncake_connector.cli import bench
from mooncake_connector.cli.errors import UsageError
from mooncake_connector.cli.main import main
from mooncake_store.transport.bench import Case, Row


def row(medium: str, block_bytes: int, ratio: float, note: str = "", num_threads: int = 1) -> Row:
    return Row(medium=medium, total_bytes=1 << 20, block_bytes=block_bytes, is_scattered=True, num_threads=num_threads,
               num_reads=3, seconds=1e-3 * ratio, p99_s=2e-3, memcpy_s=1e-3, ratio=ratio, note=note)


def test_every_size_is_read_with_every_number_of_threads_and_one_small_block_alone() -> None:
    cases = bench.plan_cases("4MiB", "1MiB,64KiB", "1,2")
    assert [(case.block_bytes >> 10, case.num_threads) for case in cases] == [
        (1024, 1), (1024, 2), (64, 1), (64, 2), (4, 1)]
    assert {case.total_bytes for case in cases[:-1]} == {4 << 20} and cases[-1].total_bytes == 4096


@pytest.mark.parametrize("case", [Case(1 << 20, 4096), Case(1 << 20, 4096, num_threads=3), Case(4096, 4096),
                                  Case(1 << 20, 65536, is_scattered=False)])
def test_a_case_reads_every_block_once(case: Case) -> None:
    batches = case.batches(1000)
    assert len(batches) == case.num_threads
    for name, start in (("remote_offsets", 0), ("local_addresses", 1000)):
        places = np.sort(np.concatenate([getattr(batch, name) for batch in batches]))
        assert places.tolist() == list(range(start, start + case.total_bytes, case.block_bytes))
    if not case.is_scattered:
        assert (np.diff(batches[0].remote_offsets.astype(np.int64)) > 0).all()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--media", "shm,ipx"], "unknown medium 'ipx'"),
    (["--blocks", "3MiB"], "cannot be read in blocks"),
    (["--blocks", "many"], "many"),
    (["--threads", "9", "--total", "4MiB"], "9 threads for 4 blocks"),
    (["--threads", "two"], "two"),
    (["--reps", "0"], "must be at least 1"),
    ([], "PART"),
])
def test_what_cannot_be_measured_is_refused_before_anything_starts(arguments: list[str], words: str,
                                                                   monkeypatch: pytest.MonkeyPatch,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "measure", lambda *args, **options: pytest.fail("it started"))
    assert main(["bench", *(["transport"] if arguments else []), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_table_shows_memcpy_once_per_case_and_why_a_medium_has_no_figures() -> None:
    text = bench.format_rows([row("shm", 1 << 16, 1.5), row("rdma", 1 << 16, 0.0, "no device"), row("shm", 4096, 9.0)])
    lines = text.splitlines()
    assert [line.split()[5] for line in lines[2:7]] == ["memcpy", "shm", "rdma", "memcpy", "shm"]
    assert lines[3].endswith("1.50") and lines[4].split()[-4:] == ["-"] * 4
    assert lines[-1] == "rdma: no device"


def test_one_medium_that_fails_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("shm", 1 << 16, 1.5), row("rdma", 1 << 16, 0.0, "no device")]
    monkeypatch.setattr(bench, "measure", lambda *args, **options: iter([rows]))
    path = tmp_path / "out.json"
    assert main(["bench", "transport", "--media", "shm,rdma", "--json", str(path)]) == 1
    written = json.loads(path.read_text())
    assert written["machine"]["cores"] and [line["note"] for line in written["rows"]] == ["", "no device"]
    assert "no device" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_plot_but_a_word_about_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(bench, "measure", lambda *args, **options: iter([[row("shm", 1 << 16, 1.5)]]))
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: refuse(name) if "matplotlib" in name else real(
        name, *rest))
    assert main(["bench", "transport", "--png", str(tmp_path / "out.png")]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out


real = importlib.import_module


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    rows = [row("shm", 1 << 16, 1.5), row("shm", 1 << 16, 1.2, num_threads=2), row("rdma", 1 << 16, 0.0, "no device")]
    assert bench.write_plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_usage_has_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        bench.plan_cases("4MiB", "1MiB", "0")
    assert "one thread per block" in caught.value.hint
