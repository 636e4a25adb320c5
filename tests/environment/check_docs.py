"""Check the documentation: links lead somewhere, commands exist, generated parts are current.

    check_docs.py [--write]

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; ``--write`` brings it up to date.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from mooncake_connector.cli.config import format_value
from mooncake_connector.cli.errors import CommandParser, UsageError
from mooncake_connector.cli.main import VERBS
from mooncake_connector.config import ConnectorConfig
from mooncake_connector.metrics import CONNECTOR_METRICS
from mooncake_connector.router.metrics import ROUTER_METRICS
from mooncake_store import errors
from mooncake_store.config import describe_fields, environment_name
from mooncake_store.metrics import STORE_METRICS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\!)\[[^\]\n]+\]\(([^)\s]+)\)")


# ---- generated parts


def config_table() -> str:
    """Return one row per setting."""
    lines = ["| key | environment | default | meaning |", "|---|---|---|---|"]
    defaults, descriptions = ConnectorConfig(), describe_fields(ConnectorConfig)
    for key in ConnectorConfig.__struct_fields__:
        value = format_value(key, getattr(defaults, key))
        lines.append(f"| `{key}` | `{environment_name(key)}` | `{value}` | {descriptions.get(key, '')} |")
    return "\n".join(lines)


def metrics_table() -> str:
    """Return one table per kind of process."""
    parts = []
    tables = (("Every member", STORE_METRICS), ("Engines", CONNECTOR_METRICS), ("Router", ROUTER_METRICS))
    for title, table in tables:
        parts += [f"## {title}", "", "| metric | kind | labels | meaning |", "|---|---|---|---|"]
        for name, spec in table.items():
            labels = ", ".join(f"`{label}`" for label in spec.labels)
            parts.append(f"| `{name}` | {spec.kind} | {labels} | {spec.help} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def errors_list() -> str:
    """Return one paragraph per error class."""
    lines = []
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.MooncakeError) and kind is not errors.MooncakeError:
            text = re.sub(r"\s+", " ", inspect.getdoc(kind) or "")
            lines += [f"## {name}", "", f"{text} {'Retryable.' if kind.retryable else 'Not retryable.'}", ""]
    return "\n".join(lines).rstrip()


def cli_list() -> str:
    """Return every verb with its options."""
    lines: list[str] = []
    for name, parser in verbs().items():
        lines += list(_verb_lines(f"mooncake {name}", parser))
    return "\n".join(lines).rstrip()


def _verb_lines(title: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    nested = _nested(parser)
    if not nested:
        yield from (f"## {title}", "", parser.description or "", "")
        options = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        if options:
            yield from ("| option | meaning |", "|---|---|")
        for action in options:
            names = ", ".join(action.option_strings) or action.dest
            value = action.metavar or "|".join(map(str, action.choices or ()))
            value = f" {value}" if value and action.nargs != 0 else ""
            cells = (f"`{names}{value}`", action.help or "")
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        yield ""
    for name, child in nested.items():
        yield from _verb_lines(f"{title} {name}", child)


def modules_list() -> str:
    """Return one line per module, by folder."""
    lines: list[str] = []
    folder = None
    for path in sorted((ROOT / "src").rglob("*.py"), key=lambda path: (path.parent.as_posix(), path.name)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.name in ("__init__.py", "__main__.py"):
            continue
        if path.parent != folder:
            folder = path.parent
            title = folder.relative_to(ROOT / "src").as_posix()
            lines += ["", f"### {title}", "", "| module | what it does |", "|---|---|"]
        summary = re.sub(r":class:`~?[\w.]*?(\w+)`", r"\1", text.partition("\n\n")[0]).replace("\n", " ")
        is_pure = any(line.startswith("Pure") or "[pure]" in line for line in text.splitlines()) or "Pure:" in summary
        summary = summary.replace(" [pure]", "").replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{path.name}` | {summary}{' *Pure.*' if is_pure and not summary.endswith('Pure.') else ''} |")
    return "\n".join(lines).strip()


PARTS: dict[str, Callable[[], str]] = {
    "config": config_table,
    "metrics": metrics_table,
    "errors": errors_list,
    "cli": cli_list,
    "modules": modules_list,
}


# ---- checks


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Return verb -> its parser, for those that exist."""
    commands = CommandParser(prog="mooncake").add_subparsers()
    for verb in VERBS:
        if verb.exists():
            importlib.import_module(verb.module).add_parser(commands)
    return dict(commands.choices)


def _nested(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices) if actions else {}


def check_links(path: Path, text: str) -> Iterator[str]:
    """Relative links lead to a file, and their anchor to a heading."""
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if not linked.exists():
            yield f"no such file: {target}"
        elif anchor and linked.suffix == ".md" and anchor not in anchors(linked.read_text(encoding="utf-8")):
            yield f"no such heading: {target}"


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_commands(path: Path, text: str, known: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    """Commands in code fences, and `mooncake ...` in running text, can be parsed."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    fenced = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:mooncake|make) [^`\n]+)`", FENCE.sub("", text))
    for line in (*fenced, *inline):
        words = shlex.split(re.sub(r"\s(#|&|\|).*$", "", line), posix=True) if _is_ours(line) else []
        if words[:1] == ["make"]:
            named = [word for word in words[1:] if "=" not in word]
            yield from (f"make has no verb {word!r}: {line}" for word in named if word not in targets)
        elif words[:1] == ["mooncake"] and len(words) > 1 and not re.search(r"[A-Z]{4}|\.\.\.|…", words[1]):
            yield from _check_verb(words, known)


def _is_ours(line: str) -> bool:
    return re.match(r"(mooncake|make)( |$)", line) is not None and "{" not in line and line.count("'") % 2 == 0


def _check_verb(words: list[str], known: dict[str, argparse.ArgumentParser]) -> Iterator[str]:
    name = words[1]
    if name.startswith("-") and name in ("--help", "--version"):
        return
    if name not in known:
        yield f"there is no command: {' '.join(words)}"
        return
    parser, rest = known[name], words[2:]
    if _nested(parser) and not rest:
        return
    try:
        _, unknown = parser.parse_known_args([word for word in rest if word not in ("--help", "-h")])
        if unknown:
            yield f"{' '.join(words)}: it knows no {' '.join(unknown)}"
    except UsageError as error:
        if "required" not in error.message:  # running text may leave arguments out
            yield f"{' '.join(words)}: {error.message}"


def main() -> int:
    """Check every document; return 1 when something is wrong."""
    parser = argparse.ArgumentParser(description="Check the documentation.")
    parser.add_argument("--write", action="store_true", help="bring generated parts up to date")
    args = parser.parse_args()
    known = verbs()
    findings = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        current = GENERATED.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)
        name = path.relative_to(ROOT)
        if current != text:
            if args.write:
                path.write_text(current, encoding="utf-8")
                print(f"wrote {name}")
            else:
                findings.append(f"{name}: a generated part is out of date; run `make docs`")
        findings += [f"{name}: {finding}" for finding in check_links(path, current)]
        findings += [f"{name}: {finding}" for finding in check_commands(path, current, known)]
    print("\n".join(findings) or f"{len(DOCUMENTS)} documents: links, commands and generated parts are fine")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
