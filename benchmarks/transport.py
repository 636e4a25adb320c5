"""Read blocks of another process over shm, cma and tcp, against one memcpy, as `mooncake bench transport` does."""

from __future__ import annotations

from harness import parser, publish, run, say

from mooncake_connector.cli.bench import BLOCKS, NUM_REPS, NUM_REPS_QUICK, TOTAL, TOTAL_QUICK, describe, plan_cases
from mooncake_store.transport.bench import measure


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    cases = plan_cases(TOTAL_QUICK if args.quick else TOTAL, BLOCKS, "1")
    rows = []
    for done in measure(("shm", "cma", "tcp"), cases, num_reps=NUM_REPS_QUICK if args.quick else NUM_REPS):
        say(f"done: {describe(done[0])}")
        rows += [{"read": describe(row), "medium": row.medium, "us": round(row.seconds * 1e6),
                  "p99_us": round(row.p99_s * 1e6), "memcpy_us": round(row.memcpy_s * 1e6),
                  "x_memcpy": round(row.ratio, 2), "note": row.note} for row in done]
    publish(args, rows, title="Media against memcpy, blocks scattered at both ends")


if __name__ == "__main__":
    run(main)
