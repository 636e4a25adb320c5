"""Read blocks of another process over shm, cma, tcp and tcp under TLS, against one memcpy of the same bytes.

As `mooncake bench transport` does, and TLS besides, with the certificates of the tests.
"""

from __future__ import annotations

from pathlib import Path

from harness import parser, publish, run, say

from mooncake_connector.cli.bench import BLOCKS, NUM_REPS, NUM_REPS_QUICK, TOTAL, TOTAL_QUICK, describe, plan_cases
from mooncake_store.transport.bench import measure
from mooncake_store.transport.media import TransportSettings
from mooncake_store.transport.tls import TlsFiles

CERTIFICATES = Path(__file__).resolve().parents[1] / "tests" / "contract" / "certificates"
MEMBER = TlsFiles(*(str(CERTIFICATES / name) for name in ("member.pem", "member.key", "authority.pem")))
SETTINGS = {"": (("shm", "cma", "tcp"), TransportSettings()), " under TLS": (("tcp",), TransportSettings(tls=MEMBER))}


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    cases = plan_cases(TOTAL_QUICK if args.quick else TOTAL, BLOCKS, "1")
    num_reps = NUM_REPS_QUICK if args.quick else NUM_REPS
    rows = []
    for suffix, (media, settings) in SETTINGS.items():
        for done in measure(media, cases, num_reps=num_reps, settings=settings):
            say(f"done: {describe(done[0])}{suffix}")
            rows += [{"read": describe(row), "medium": row.medium + suffix, "us": round(row.seconds * 1e6),
                      "p99_us": round(row.p99_s * 1e6), "memcpy_us": round(row.memcpy_s * 1e6),
                      "x_memcpy": round(row.ratio, 2), "note": row.note} for row in done]
    publish(args, rows, title="Media against memcpy, blocks scattered at both ends")


if __name__ == "__main__":
    run(main)
