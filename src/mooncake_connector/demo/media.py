"""Say which medium moved the bytes, and why that one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mooncake_connector.demo.status import MemberStatus, by_label

RULES = {
    "shm": "same machine, and the owner's memory is a memfd that the reader maps",
    "cma": "same machine, and the owner's memory is private: the reader copies it with process_vm_readv",
    "tcp": "another machine, or no permission to read the owner's memory",
    "local": "the reader's own segment",
    "inline": "small blocks, which come with the owner's answer",
}
"""What decides where no reader logged its reason."""

# Every process logs its choice once per peer; logging wraps nothing, so one line holds it.
_CHOICE = re.compile(r"medium (\w+) \((.+)\)")


def describe_media(statuses: Iterable[MemberStatus], logs: Iterable[Path]) -> dict[str, str]:
    """Return each medium that moved bytes, with how many and the reason that its readers logged."""
    moved: dict[str, float] = {}
    for status in statuses:
        for medium, value in by_label(status.samples, "mooncake_pull_bytes_total").items():     # hand-overs included
            moved[medium] = moved.get(medium, 0.0) + value
    reasons: dict[str, str] = {}
    for path in logs:
        reasons |= dict(_CHOICE.findall(path.read_text(errors="replace")))
    return {medium: f"{value / 1e6:.0f} MB; {reasons.get(medium) or RULES.get(medium, 'unknown')}"
            for medium, value in sorted(moved.items()) if value}
