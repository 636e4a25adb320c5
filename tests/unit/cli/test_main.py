"""Pick the verb and end every way a command can end: exit code and three lines, never a traceback."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from mooncake_connector.cli import main as main_module
from mooncake_connector.cli.errors import Terminated
from mooncake_connector.cli.main import VERBS, Verb, format_help, main
from mooncake_store.errors import CapacityExceeded, ConfigError

Run = Callable[[argparse.Namespace], int]


@pytest.fixture(autouse=True)
def no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the variables of whoever runs the tests out of it."""
    for name in ("MOONCAKE_CONFIG", "MOONCAKE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Install a verb `test` that runs the given function."""

    def install(run: Run) -> None:
        module = types.ModuleType("mooncake_connector.cli.test")

        def add_parser(subparsers: Any) -> None:
            parser = subparsers.add_parser("test")
            parser.add_argument("--number", type=int)

        module.add_parser, module.run = add_parser, run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(main_module, "VERBS", (Verb("test", "Group", "help"),))
        monkeypatch.setattr(Verb, "exists", lambda self: True)

    return install


def raiser(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "errors go to standard error"
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 3 and lines[1].startswith("  where: ") and lines[2].startswith("  do: ")
    return lines


def test_exit_code_is_the_verbs(verb: Callable[[Run], None]) -> None:
    verb(lambda args: args.number)
    assert main(["test", "--number", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("bad", where="$.x", hint="mend"), 2), (CapacityExceeded("full"), 1), (ZeroDivisionError("oops"), 1)],
)
def test_errors_are_three_lines(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    verb(raiser(error))
    assert main(["test"]) == code
    assert str(error).splitlines()[0] in error_lines(capsys)[0]


def test_unexpected_error_names_its_place_and_how_to_see_more(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raiser(ZeroDivisionError("oops")))
    main(["test"])
    lines = error_lines(capsys)
    assert "test_main.py:" in lines[1]
    assert "MOONCAKE_DEBUG=1" in lines[2]


def test_debug_shows_the_traceback(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_DEBUG", "1")
    verb(raiser(ZeroDivisionError("oops")))
    assert main(["test"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_signals_end_quietly(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    verb(raiser(error))
    assert main(["test"]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["test", "--number", "x"], ["test", "--nmber", "1"], ["test", "extra"]])
def test_bad_arguments_blame_the_verb(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    verb(lambda args: 0)
    assert main(arguments) == 2
    assert error_lines(capsys)[1] == "  where: mooncake test"


def test_misspelt_option_is_corrected(verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(lambda args: 0)
    main(["test", "--nmber", "1"])
    assert "did you mean --number?" in error_lines(capsys)[0]


def test_bad_environment_is_found_before_the_verb_runs(
    verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_LEASE_S", "soon")
    verb(raiser(AssertionError("ran")))
    assert main(["test"]) == 2
    assert "MOONCAKE_LEASE_S" in error_lines(capsys)[1]


@pytest.mark.parametrize(("word", "near"), [("statsu", "mooncake status"), ("--cell", "status"), ("xyzzy", "status")])
def test_unknown_verb(capsys: pytest.CaptureFixture[str], word: str, near: str) -> None:
    assert main([word]) == 2
    lines = error_lines(capsys)
    assert word in lines[0] and near in lines[2]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_verbs_in_groups(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text == format_help()
    for verb in VERBS:
        assert (f"  {verb.name} " in text) == verb.exists()
    assert text.index("Run a deployment:") < text.index("etcd") < text.index("examples:")


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS if verb.exists()])
def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mooncake {verb}")


@pytest.mark.parametrize(("is_server", "level"), [(True, logging.INFO), (False, logging.ERROR)])
def test_only_a_server_narrates(verb: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch, is_server: bool,
                                level: int) -> None:
    """What a command prints is its answer, so its log is silent unless something is wrong."""
    verb(lambda args: 0)
    monkeypatch.setattr(main_module, "VERBS", (Verb("test", "Group", "help", is_server),))
    assert main(["test"]) == 0
    assert logging.getLogger("mooncake_store").level == level


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mooncake 0.")


def test_help_loads_no_verb_and_no_engine() -> None:
    """`mooncake --help` must answer at once: nothing heavy may be imported for it."""
    code = (f"import sys; sys.path[:0] = {sys.path!r}\n"
            "from mooncake_connector.cli.main import main\nmain(['--help'])\n"
            "print(sorted({'torch', 'vllm', 'grpc', 'numpy', 'zmq', 'aiohttp'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_reader_that_leaves_is_no_error() -> None:
    code = (f"import sys; sys.path[:0] = {sys.path!r}\n"
            "from mooncake_connector.cli.main import main\nsys.exit(main(['config', '--schema']))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0
