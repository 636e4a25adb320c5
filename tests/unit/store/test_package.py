"""The package's face: what it exports, what importing it costs, and bad input to its command."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

import mooncake_store
from mooncake_connector.cli import store


def test_every_public_name_can_be_had_and_no_other():
    for name in mooncake_store.__all__:
        assert getattr(mooncake_store, name) is not None
    assert set(mooncake_store.__all__) == set(mooncake_store._HOMES) and len(mooncake_store.__all__) <= 14
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mooncake_store.nonsense


def test_importing_the_package_loads_nothing_heavy():
    code = ("import sys, time; started = time.process_time(); import mooncake_store; "
            "took = time.process_time() - started; heavy = {'numpy', 'zmq', 'grpc', 'msgspec', 'prometheus_client'}; "
            "print(took < 0.05, sorted(heavy & set(sys.modules)))")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONPATH": next(iter(mooncake_store.__path__)).rsplit("/", 1)[0]})
    assert answer.stdout.strip() == "True []"


@pytest.mark.parametrize("options", [["--memory", "lots"], ["--memory", "0"], ["--directory", "http://x"],
                                     ["--media", "pigeon"], ["--host", "203.0.113.7"], ["--cell", "a/b"]], ids=" ".join)
def test_bad_input_is_refused_in_words(options, capsys, monkeypatch):
    monkeypatch.setattr(store.signal, "signal", lambda *_: None)
    parser = argparse.ArgumentParser()
    store.add_parser(parser.add_subparsers())
    defaults = [] if "--directory" in options else ["--directory", "off"]
    memory = [] if "--memory" in options else ["--memory", "1MiB"]
    args = parser.parse_args(["store", "serve", *defaults, *memory, *options])
    assert args.run(args) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "\n  do: " in captured.err and captured.out == ""
