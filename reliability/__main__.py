"""Check the promises of docs/reliability.md in full, or in part.

    python -m reliability                      all goals, with their full counts
    python -m reliability kill signals         these goals
    python -m reliability kill --count 20      fewer cases
    python -m reliability --table              print the table, check nothing

Results are kept in runs/reliability/: an interrupted command continues. Delete GOAL.jsonl there to check a goal again.
Exits 1 if a check failed.
"""

from __future__ import annotations

import argparse

from normfree.suggest import unknown
from reliability.goals import GOALS
from reliability.page import printed, summaries, write_page
from reliability.records import run_goal


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("goals", nargs="*", metavar="GOAL", help=f"default: all of {', '.join(GOALS)}")
    parser.add_argument("--count", type=int, help="default: the full count of each goal")
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    for name in arguments.goals:
        if name not in GOALS:
            parser.error(unknown("goal", name, GOALS))
    try:
        for name in () if arguments.table else arguments.goals or GOALS:
            goal = GOALS[name]
            run_goal(name, goal, arguments.count or goal.full)
    finally:
        found = summaries()
        if not arguments.table:
            write_page()
        print(printed(found))
    failed = sum(
        line["wanted"] - line["passed"] for goal in found.values() for line in goal["checks"].values()
    )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
