"""What gradients cost: `python -m benchmarks [--quick] [--only SECTION ...] [--out FOLDER]`.

Prints one markdown table, a line for each figure beside its goal where there is one, and saves it with plots and raw
points in a folder. Times are medians; all functions of a line run once per round, interleaved, so that a busy machine
slows all of them alike. A few minutes on a quiet machine, one with --quick.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the other scripts of this folder import one another by name

from cost_picture import draw
from cost_sections import QUICK, Points, Sizes
from cost_sections import SECTIONS as OTHERS
from cost_sequence import by_length
from forwax.lab import style
from timing import machine

SECTIONS = {**OTHERS, "sequence": by_length}
HEADER = ["| what | measured | goal | met |", "|---|---:|---:|---|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="some sections")
    parser.add_argument("--rounds", type=int, help="rounds of the shortest programs (40)")
    parser.add_argument("--out", type=Path, default=Path("runs/cost"), help="the folder of cost.md and cost.png")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    sizes = dataclasses.replace(sizes, rounds=options.rounds) if options.rounds else sizes
    points, lines = Points(), [f"{machine()}; medians of interleaved rounds.", "", *HEADER]
    print("\n".join(lines), flush=True)
    for name in options.only:
        for row in SECTIONS[name](sizes, points):
            lines.append("| " + " | ".join(row.cells()) + " |")
            print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (options.out / "points.json").write_text(json.dumps(points.lines, indent=1), encoding="utf-8")
    if points.lines:
        style.save(draw(points), options.out / "cost.png")
    print(f"\n{options.out}: cost.md, cost.png, points.json")


if __name__ == "__main__":
    main()
