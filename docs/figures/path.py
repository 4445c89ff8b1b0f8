"""Draw the path from a loss to its gradient: `python docs/figures/path.py docs/_static/path.svg`.

Standard library alone, so that the figure of docs/design.md can be drawn anew anywhere.
"""

import pathlib
import sys
from html import escape

WIDTH, BOX, HEIGHT, GAP, LANE, TOP = 860, 118, 46, 24, 112, 34

Lane = tuple[str, str, list[tuple[str, str]]]

LANES: list[Lane] = [
    (
        "#3b6ea5",
        "directions of the weights, held: WeightPerturbation outside a trace, Exact",
        [
            ("loss, args", "the user's"),
            ("Problem", "_signature"),
            ("tangents v", "tangents/"),
            ("slopes ⟨g, v⟩", "_pushforward"),
            ("estimate", "combine"),
            ("gradient", "a tree"),
        ],
    ),
    (
        "#8a5a9e",
        "directions never formed: WeightPerturbation inside a trace, LowRank, update",
        [
            ("Problem", "_signature"),
            ("Traced", "_programs"),
            ("WeightPlan", "_directions/plan"),
            ("drawn signs", "_directions/signs"),
            ("slopes", "_directions/push"),
            ("gradient", "_directions/add"),
        ],
    ),
    (
        "#3d8361",
        "noise on activities and feedback, first half: from the program to its sites",
        [
            ("Traced", "_programs"),
            ("Kinds", "_sites/kinds"),
            ("Regions", "_sites/regions"),
            ("Level", "_sites/levels"),
            ("Tail, Sources", "outputs, sources"),
            ("Sites", "_sites/model"),
        ],
    ),
    (
        "#3d8361",
        "second half: from sites to the gradient",
        [
            ("Sites", "_sites/model"),
            ("Drawn or Held", "_sites/noise"),
            ("Pass", "_sites/passes"),
            ("slopes", "_sites/credit"),
            ("errors", "the rule"),
            ("gradient", "keep, replay"),
        ],
    ),
]


def text(x: float, y: float, words: str, size: int, colour: str, more: str = "") -> str:
    style = f'font-family="sans-serif" font-size="{size}" fill="{colour}" {more}'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def box(x: float, y: float, name: str, place: str, colour: str) -> list[str]:
    middle = x + BOX / 2
    shape = f'x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="7"'
    return [
        f'<rect {shape} fill="white" stroke="{colour}" stroke-width="1.6"/>',
        text(middle, y + 20, name, 14, "#222222", 'text-anchor="middle"'),
        text(middle, y + 36, place, 11, "#666666", 'text-anchor="middle"'),
    ]


def arrow(x: float, y: float, colour: str) -> str:
    tip = x + GAP - 3
    line = f'<path d="M{x + 3} {y} H{tip - 5}" stroke="{colour}" stroke-width="1.6"/>'
    return f'{line}<path d="M{tip} {y} l-8 -4 v8 z" fill="{colour}"/>'


def lane(y: float, colour: str, title: str, boxes: list[tuple[str, str]]) -> list[str]:
    parts = [text(12, y - 10, title, 13, colour, 'font-weight="bold"')]
    for i, (name, place) in enumerate(boxes):
        x = 12 + i * (BOX + GAP)
        parts += box(x, y, name, place, colour)
        if i + 1 < len(boxes):
            parts.append(arrow(x + BOX, y + HEIGHT / 2, colour))
    return parts


def drawing() -> str:
    """The whole figure as SVG."""
    height = TOP + LANE * len(LANES) - 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for i, (colour, title, boxes) in enumerate(LANES):
        parts += lane(TOP + i * LANE, colour, title, boxes)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(drawing(), encoding="utf-8")
