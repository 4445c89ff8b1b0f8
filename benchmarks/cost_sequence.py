"""The cost benchmark on sequences: temporaries of a recurrent network's gradient by its steps."""

from collections.abc import Iterator
from typing import Any

from cost_measures import BACKPROP, MIB, ONE, RULES, SIGNS, temporaries
from cost_models import recurrent
from cost_sections import Points, Row, Sizes

PICTURE = "memory, sequences"
NAME = "tanh-RNN 128 wide, batch 1024"


def lengths(sizes: Sizes) -> list[int]:
    """Powers of two from the shallowest to the deepest of the benchmark's networks."""
    first, last = sizes.layers[0], sizes.layers[-1]
    return [first * 2**i for i in range((last // first).bit_length())]


def by_length(sizes: Sizes, points: Points) -> Iterator[Row]:
    rules: dict[str, Any] = {BACKPROP: None, SIGNS: RULES[SIGNS], ONE: RULES[ONE]}
    found: dict[tuple[str, int], float] = {}
    first, *_, last = lengths(sizes)
    for length in lengths(sizes):
        scenario = recurrent(length)
        for each, rule in rules.items():
            found[each, length] = temporaries(scenario, rule) / MIB
            points.add(PICTURE, each, length, found[each, length])
            yield Row(
                f"{NAME}, {length} steps, {each}: temporaries",
                found[each, length],
                "MiB",
            )
    for each in (SIGNS, ONE):
        grows, share = (
            found[each, last] / found[each, first],
            found[each, last] / found[BACKPROP, last],
        )
        yield Row(
            f"{NAME}, {each}: temporaries at {last} steps",
            grows,
            f"× {first} steps",
            1.05,
        )
        yield Row(
            f"{NAME}, {each}: temporaries at {last} steps", share, "× backprop", 1 / 50
        )
