"""What gradients cost: `python -m benchmarks [--quick] [--only SECTION ...] [--out FOLDER]`.

Prints a line for each figure, beside its goal where there is one, and saves a table of goals, a
table of all other figures, plots and raw points in a folder. Times are medians; all functions of a
line run once per round, interleaved, so that a busy machine slows all of them alike. A few minutes
on a quiet machine, one with --quick.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # the other scripts of this folder import one another by name

from cost_picture import draw
from cost_sections import QUICK, Points, Sizes
from cost_sections import SECTIONS as OTHERS
from cost_sequence import by_length
from cost_update import fused_step
from forwax.lab import style
from timing import machine

SECTIONS = {**OTHERS, "sequence": by_length, "fused-step": fused_step}
GOALS = ["| what | measured | goal | met |", "|---|---:|---:|---|"]
OTHER_FIGURES = ["| what | measured |", "|---|---:|"]


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="some sections",
    )
    parser.add_argument(
        "--rounds", type=int, help="rounds of the shortest programs (40)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/cost"),
        help="the folder of cost.md and cost.png",
    )
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    sizes = (
        dataclasses.replace(sizes, rounds=options.rounds) if options.rounds else sizes
    )
    points, rows, title = Points(), [], f"{machine()}; medians of interleaved rounds."
    print("\n".join([title, "", *GOALS]), flush=True)
    for name in options.only:
        for row in SECTIONS[name](sizes, points):
            rows.append(row)
            print(line(row.cells()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    goals = [line(row.cells()) for row in rows if row.goal is not None]
    others = [line(row.cells()[:2]) for row in rows if row.goal is None]
    text = "\n".join([title, "", *GOALS, *goals, "", *OTHER_FIGURES, *others, ""])
    (options.out / "cost.md").write_text(text, encoding="utf-8")
    (options.out / "points.json").write_text(
        json.dumps(points.lines, indent=1), encoding="utf-8"
    )
    if points.lines:
        style.save(draw(points), options.out / "cost.png")
    print(f"\n{options.out}: cost.md, cost.png, points.json")


if __name__ == "__main__":
    main()
