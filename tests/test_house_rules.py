"""Hold the house limits that no linter holds: sizes, places and who may import what.

Every rule is a function from a parsed module to findings, so that each is also tested against a module that breaks it.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
INSTANCE_ATTRIBUTES_MAX = 20

BANNED_FILE_NAMES = frozenset({"utils.py", "util.py", "common.py", "manager.py", "helpers.py", "helper.py", "misc.py"})
ENVIRONMENT_READERS = frozenset({"mooncake_store/config.py", "mooncake_connector/config.py"})
PYVERBS_IMPORTERS = frozenset({"mooncake_store/transport/rdma/verbs.py"})

PURE_FORBIDDEN_IMPORTS = frozenset(
    {"asyncio", "random", "sglang", "socket", "subprocess", "threading", "time", "torch", "vllm", "zmq"}
)
# A module is pure when its docstring has "[pure]" or a line that starts with "Pure". These are, whatever it says.
PURE_MODULES = frozenset(
    {
        "mooncake_store/errors.py",
        "mooncake_store/types.py",
        "mooncake_store/directory/schema.py",
        "mooncake_store/directory/view.py",
        "mooncake_store/pool/allocator.py",
        "mooncake_store/pool/eviction.py",
        "mooncake_store/pull/planner.py",
        "mooncake_store/pull/session.py",
        "mooncake_store/pull/wire.py",
        "mooncake_store/transport/select.py",
        "mooncake_connector/kv/fingerprint.py",
        "mooncake_connector/kv/keys.py",
        "mooncake_connector/kv/layout.py",
        "mooncake_connector/kv/plan.py",
        "mooncake_connector/transfer/lifecycle.py",
    }
)


class Module(NamedTuple):
    """One parsed source file; `path` is relative to src and has forward slashes."""

    path: str
    text: str
    tree: ast.Module


class Finding(NamedTuple):
    """One broken rule at one place."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"src/{self.path}:{self.line}: {self.message}"


def check_name(module: Module) -> Iterator[Finding]:
    """A file is named after what is in it."""
    if module.path.rsplit("/", 1)[-1] in BANNED_FILE_NAMES:
        yield Finding(module.path, 1, "name the file after the concept it holds, not after its usefulness")


def check_file_length(module: Module) -> Iterator[Finding]:
    """A file fits one concept."""
    num_lines = module.text.count("\n")
    if num_lines > FILE_LINES_MAX:
        yield Finding(module.path, 1, f"{num_lines} lines, at most {FILE_LINES_MAX}")


def check_function_length(module: Module) -> Iterator[Finding]:
    """A function fits a screen."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > FUNCTION_LINES_MAX:
                message = f"{node.name} has {num_lines} lines, at most {FUNCTION_LINES_MAX}"
                yield Finding(module.path, node.lineno, message)


def check_instance_attributes(module: Module) -> Iterator[Finding]:
    """A class holds a bounded state: names assigned on self, and annotated fields in its body."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            names = {name for inner in ast.walk(node) for name in _self_targets(inner)}
            if len(names) > INSTANCE_ATTRIBUTES_MAX:
                message = f"{node.name} has {len(names)} attributes, at most {INSTANCE_ATTRIBUTES_MAX}"
                yield Finding(module.path, node.lineno, message)


def _self_targets(node: ast.AST) -> Iterator[str]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = [part for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Attribute)]
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    for target in targets:
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            yield target.attr


def check_environment(module: Module) -> Iterator[Finding]:
    """One module per package reads the environment."""
    if module.path in ENVIRONMENT_READERS:
        return
    for node in ast.walk(module.tree):
        is_attribute = isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "getenvb"}
        is_os = is_attribute and isinstance(node.value, ast.Name) and node.value.id == "os"  # type: ignore[attr-defined]
        is_import = isinstance(node, ast.ImportFrom) and node.module == "os" and any(
            alias.name.startswith(("environ", "getenv")) for alias in node.names
        )
        if is_os or is_import:
            yield Finding(module.path, node.lineno, "only mooncake_store/config.py reads the environment")


def check_broad_except(module: Module) -> Iterator[Finding]:
    """A broad except logs with a traceback, hands the exception object on, or raises."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _is_loud(node):
            yield Finding(module.path, node.lineno, "broad except: log it with its traceback, or re-raise")


def _is_broad(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(name, ast.Name) and name.id in {"Exception", "BaseException"} for name in names)


def _is_loud(handler: ast.ExceptHandler) -> bool:
    for node in ast.walk(ast.Module(body=handler.body, type_ignores=[])):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"exception", "print_exc", "print_exception"}:
                return True
            # handed on as an object, for another thread to raise
            hands_on = any(isinstance(argument, ast.Name) and argument.id == handler.name for argument in node.args)
            if called in {"append", "put", "set_exception"} and hands_on:
                return True
            if any(keyword.arg == "exc_info" for keyword in node.keywords):
                return True
    return False


def check_imports(module: Module) -> Iterator[Finding]:
    """The pyverbs binding, each engine and the pure modules keep to their places."""
    is_pure = module.path in PURE_MODULES or _says_pure(module)
    for line, name in _imported(module.tree):
        root = name.split(".")[0]
        if root == "pyverbs" and module.path not in PYVERBS_IMPORTERS:
            yield Finding(module.path, line, "only mooncake_store/transport/rdma/verbs.py imports pyverbs")
        if root in {"vllm", "sglang"} and not module.path.startswith(f"mooncake_connector/engines/{root}/"):
            yield Finding(module.path, line, f"only mooncake_connector/engines/{root} imports {root}")
        if is_pure and root in PURE_FORBIDDEN_IMPORTS:
            yield Finding(module.path, line, f"a pure module imports {root}; take what it gives as an argument")


def _says_pure(module: Module) -> bool:
    lines = (ast.get_docstring(module.tree) or "").splitlines()
    return any(line.startswith("Pure") or "[pure]" in line for line in lines)


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


RULES: tuple[Callable[[Module], Iterator[Finding]], ...] = (
    check_name,
    check_file_length,
    check_function_length,
    check_instance_attributes,
    check_environment,
    check_broad_except,
    check_imports,
)


def parse(path: str, text: str) -> Module:
    return Module(path, text, ast.parse(text, filename=path))


@functools.cache
def source_modules() -> list[Module]:
    paths = sorted(SRC.rglob("*.py"))
    return [parse(path.relative_to(SRC).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule: Callable[[Module], Iterator[Finding]]) -> None:
    modules = source_modules()
    assert len(modules) > 20, "the sources were not found"
    findings = [str(finding) for module in modules for finding in rule(module)]
    assert not findings, "\n" + "\n".join(findings)


LONG_FUNCTION = "def long() -> None:\n" + "    print()\n" * FUNCTION_LINES_MAX
MANY_ATTRIBUTES = "class Bag:\n    def __init__(self):\n" + "".join(
    f"        self.a{i} = {i}\n" for i in range(INSTANCE_ATTRIBUTES_MAX + 1)
)

BREAKERS = [
    (check_name, "mooncake_store/utils.py", ""),
    (check_file_length, "mooncake_store/x.py", "\n" * (FILE_LINES_MAX + 1)),
    (check_function_length, "mooncake_store/x.py", LONG_FUNCTION),
    (check_instance_attributes, "mooncake_store/x.py", MANY_ATTRIBUTES),
    (check_environment, "mooncake_store/x.py", "import os\nx = os.environ['A']"),
    (check_environment, "mooncake_store/x.py", "import os\nx = os.getenv('A')"),
    (check_environment, "mooncake_connector/cli/config.py", "from os import environ"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept Exception:\n    pass"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept:\n    log.warning('no traceback')"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept (OSError, BaseException):\n    x = 1"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept Exception as e:\n    log.warning('x', e)"),
    (check_imports, "mooncake_store/transport/tcp.py", "import pyverbs.device"),
    (check_imports, "mooncake_connector/engines/sglang/x.py", "def f():\n    from vllm.config import VllmConfig"),
    (check_imports, "mooncake_store/pull/session.py", "import time"),
    (check_imports, "mooncake_connector/kv/plan.py", "from threading import Lock"),
    (check_imports, "mooncake_store/x.py", '"""Decide.\n\nPure: no clocks.\n"""\nimport time'),
]


@pytest.mark.parametrize(("rule", "path", "text"), BREAKERS)
def test_rule_finds_its_breach(rule: Callable[[Module], Iterator[Finding]], path: str, text: str) -> None:
    assert list(rule(parse(path, text)))


KEEPERS = [
    (check_function_length, "mooncake_store/x.py", LONG_FUNCTION.replace("    print()\n", "", 1)),
    (check_environment, "mooncake_store/config.py", "import os\nx = os.environ"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept Exception:\n    log.exception('x')"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept BaseException:\n    close()\n    raise"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept OSError:\n    pass"),
    (check_broad_except, "mooncake_store/x.py", "try:\n    pass\nexcept Exception as e:\n    errors.append(e)"),
    (check_imports, "mooncake_connector/engines/vllm/x.py", "import vllm"),
    (check_imports, "mooncake_store/pull/puller.py", "import time"),
]


@pytest.mark.parametrize(("rule", "path", "text"), KEEPERS)
def test_rule_accepts_what_is_allowed(rule: Callable[[Module], Iterator[Finding]], path: str, text: str) -> None:
    assert not list(rule(parse(path, textwrap.dedent(text))))


def test_every_listed_pure_module_exists() -> None:
    missing = [path for path in sorted(PURE_MODULES) if not (SRC / path).is_file()]
    assert not missing, f"PURE_MODULES names files that are gone: {missing}"
