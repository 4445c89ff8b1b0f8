"""The sections of the cost benchmark: each yields rows of the table and keeps points of plots."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import forwax as fx
from cost_measures import (
    BACKPROP,
    EIGHT,
    FORWARD,
    MIB,
    ONE,
    RANK_1,
    RULES,
    SIGNS,
    compile_times,
    gradients,
    held_signs,
    program,
    sampling_time,
    step_times,
    temporaries,
    times,
    torch_ratio,
    wide_products,
)
from cost_models import (
    Scenario,
    convolutional,
    deep,
    language_model,
    perceptron,
    stacked,
)
from step_time import WIDTHS

GOALS = {64: (0.75, 0.65, 1.9), 256: (0.63, 0.58, 2.0), 1024: (0.55, 0.52, 2.7)}
SAMPLING_GOAL = 0.05
DEEP = {
    "MLP by scan over layers, batch 1024": stacked,
    "MLP by scan over layers, batch 8192": functools.partial(stacked, batch=8192),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; a goal is the most that the figure should be."""

    what: str
    figure: float
    unit: str = "× backprop"
    goal: float | None = None

    def cells(self) -> list[str]:
        met = "" if self.goal is None else ("yes" if self.figure <= self.goal else "no")
        goal = "" if self.goal is None else f"≤ {self.goal:g}"
        return [self.what, f"{self.figure:.3g} {self.unit}", goal, met]


@dataclasses.dataclass
class Points:
    """What is plotted: by picture and line, the points (x, y)."""

    lines: dict[str, dict[str, list[tuple[float, float]]]] = dataclasses.field(
        default_factory=dict
    )

    def add(self, picture: str, line: str, x: float, y: float) -> None:
        self.lines.setdefault(picture, {}).setdefault(line, []).append((x, y))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int = 40
    batches: tuple[int, ...] = (64, 256, 1024)
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    tangents: tuple[int, ...] = (1, 2, 4, 8, 16)
    depths: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    layers: tuple[int, ...] = (8, 64, 512)
    images: tuple[int, ...] = (64, 256)
    compiled_layers: int = 24


QUICK = Sizes(4, (64,), (128, 256), (1, 4), (1, 5), (8, 64), (8,), 4)


def sampling(
    name: str, scenario: Scenario, k: int, seconds: float, sizes: Sizes
) -> Row:
    share = sampling_time(scenario, k, sizes.rounds) / seconds
    return Row(f"{name}: sampling", share, "of a step", SAMPLING_GOAL)


def by_batch(sizes: Sizes, points: Points) -> Iterator[Row]:
    for batch in sizes.batches:
        scenario, name = perceptron(batch), f"MLP 784-1024-1024-10, batch {batch}"
        floors = {
            f"the wide products of {each}": wide_products(scenario, k)
            for each, k in ((ONE, 1), (EIGHT, 8))
        }
        programs = gradients(scenario, RULES)
        found = times(scenario, programs, sizes.rounds, **floors)
        one, step, eight = GOALS[batch]
        goals = {ONE: one, EIGHT: eight}
        for each in (FORWARD, SIGNS, ONE, EIGHT):
            ratio = found[each] / found[BACKPROP]
            points.add("batch", each, batch, ratio)
            yield Row(f"{name}: {each}", ratio, goal=goals.get(each))
        for each in floors:
            yield Row(f"{name}: {each} alone", found[each] / found[BACKPROP])
        wide = f"the wide products of {ONE}"
        rated = {each: programs[each] for each in (BACKPROP, ONE)} | {
            wide: floors[wide].func
        }
        for each, compiled in rated.items():
            yield Row(
                f"{name}: {each}, rate",
                compiled.cost_analysis()["flops"] / found[each] / 1e9,
                "GFLOP/s",
            )
        steps = step_times(scenario, {ONE: RULES[ONE]}, sizes.rounds)
        yield Row(
            f"{name}: SGD step, donated, rank-1",
            steps[ONE] / steps[BACKPROP],
            goal=step,
        )
        yield sampling(f"{name}, rank-1", scenario, 1, found[ONE], sizes)
        yield sampling(f"{name}, eight rank-1", scenario, 8, found[EIGHT], sizes)


def by_width(sizes: Sizes, points: Points) -> Iterator[Row]:
    for width in sizes.widths:
        scenario = deep(3, 256, width)
        found = times(
            scenario,
            gradients(scenario, {SIGNS: RULES[SIGNS], ONE: RULES[ONE]}),
            sizes.rounds,
        )
        for each in (FORWARD, SIGNS, ONE):
            points.add("width", each, width, found[each] / found[BACKPROP])
        yield Row(
            f"three layers {width} wide, batch 256: rank-1",
            found[ONE] / found[BACKPROP],
        )


def by_tangents(sizes: Sizes, points: Points) -> Iterator[Row]:
    scenario = perceptron(256)
    rules: dict[str, fx.Rule] = {
        str(k): fx.WeightPerturbation(RANK_1, k) for k in sizes.tangents
    }
    found = times(scenario, gradients(scenario, rules), sizes.rounds)
    for k in sizes.tangents:
        points.add("tangents", ONE, k, found[str(k)] / found[BACKPROP])
        yield Row(
            f"MLP 784-1024-1024-10, batch 256: {k} rank-1",
            found[str(k)] / found[BACKPROP],
        )
    scenario = perceptron(64)
    few = [k for k in sizes.tangents if k <= 8]
    programs = gradients(
        scenario,
        {f"{k} packed signs": fx.WeightPerturbation(num_tangents=k) for k in few},
    )
    programs |= {
        f"{k} signs, all held": program(held_signs(scenario, k), scenario) for k in few
    }
    found = times(scenario, programs, max(4, sizes.rounds // 4))
    for each in list(programs)[2:]:
        name = f"MLP 784-1024-1024-10, batch 64: {each}"
        yield Row(name, found[each] / found[BACKPROP])
        yield Row(
            f"{name}, temporaries",
            programs[each].memory_analysis().temp_size_in_bytes / MIB,
            "MiB",
        )


def eight_layers(sizes: Sizes, points: Points) -> Iterator[Row]:
    scenario = deep(8, 256)
    programs = gradients(scenario, {EIGHT: RULES[EIGHT]})
    found = times(scenario, programs, max(4, sizes.rounds // 2))
    yield Row(
        "8×1024 MLP, batch 256: eight rank-1",
        found[EIGHT] / found[FORWARD],
        "forwards",
        8.5,
    )
    memory = programs[EIGHT].memory_analysis().temp_size_in_bytes / MIB
    yield Row("8×1024 MLP, batch 256: eight rank-1, temporaries", memory, "MiB", 40)
    yield sampling(
        "8×1024 MLP, batch 256, eight rank-1", scenario, 8, found[EIGHT], sizes
    )


def by_depth(sizes: Sizes, points: Points) -> Iterator[Row]:
    for depth in sizes.depths:
        scenario = deep(depth, 64)
        found = step_times(
            scenario,
            {ONE: RULES[ONE]},
            max(min(8, sizes.rounds), sizes.rounds * 5 // (depth + 5)),
        )
        forward, backward = (
            found[ONE] / found[FORWARD],
            found[BACKPROP] / found[FORWARD],
        )
        for line, y in {
            "R_f, rank-1": forward,
            "R_b": backward,
            "R_f/R_b": forward / backward,
        }.items():
            points.add("depth", line, depth, y)
        name = f"{depth} layer{'' if depth == 1 else 's'} 1024 wide, batch 64, SGD step"
        yield Row(f"{name}: R_f", forward, "evaluations")
        yield Row(f"{name}: R_b", backward, "evaluations")
        yield Row(
            f"{name}: R_f/R_b",
            forward / backward,
            "",
            0.85 if depth in (50, 100) else None,
        )


def architectures(sizes: Sizes, points: Points) -> Iterator[Row]:
    cases = {
        f"CNN of Baydin et al., batch {images}": convolutional(images)
        for images in sizes.images
    }
    cases["6-layer transformer, sequence 128, batch 8"] = language_model(6, 8, 128, 256)
    for name, scenario in cases.items():
        found = step_times(scenario, {ONE: RULES[ONE]}, max(4, sizes.rounds // 4))
        yield Row(f"{name}: SGD step, rank-1", found[ONE] / found[BACKPROP], goal=0.75)
        yield sampling(name, scenario, 1, found[ONE], sizes)


def compilation(sizes: Sizes, points: Points) -> Iterator[Row]:
    scenario = language_model(sizes.compiled_layers, 8, 32, 64)
    found = compile_times(
        scenario, {BACKPROP: None, ONE: RULES[ONE]}, max(1, sizes.rounds // 20)
    )
    name = f"{sizes.compiled_layers}-layer transformer: trace and compile"
    yield Row(f"{name}, backprop", found[BACKPROP], "s")
    yield Row(f"{name}, rank-1", found[ONE] / found[BACKPROP], goal=1.8)


def memory(sizes: Sizes, points: Points) -> Iterator[Row]:
    rules: dict[str, Any] = {BACKPROP: None, SIGNS: RULES[SIGNS], ONE: RULES[ONE]}
    first, last = sizes.layers[0], sizes.layers[-1]
    for name, make in DEEP.items():
        found = {
            (each, n): temporaries(make(n), rule)
            for n in sizes.layers
            for each, rule in rules.items()
        }
        for (each, n), count in found.items():
            points.add(f"memory, {name}", each, n, count / MIB)
        for each in (SIGNS, ONE):
            grows, share = (
                found[each, last] / found[each, first],
                found[each, last] / found[BACKPROP, last],
            )
            yield Row(
                f"{name}, {each}: temporaries at depth {last}",
                grows,
                f"× depth {first}",
                1.05,
            )
            yield Row(
                f"{name}, {each}: temporaries at depth {last}",
                share,
                "× backprop",
                1 / 50,
            )


def peer(sizes: Sizes, points: Points) -> Iterator[Row]:
    for batch in sizes.batches:
        ratio = torch_ratio(batch, WIDTHS, sizes.rounds)
        if ratio is None:
            print("torch is not installed, so torch.func.jvp is not measured.\n")
            return
        yield Row(
            f"torch.func.jvp, MLP 784-1024-1024-10, batch {batch}",
            ratio,
            "× torch's backprop",
        )


SECTIONS = {
    "batch": by_batch,
    "width": by_width,
    "tangents": by_tangents,
    "eight-layers": eight_layers,
    "depth": by_depth,
    "architectures": architectures,
    "compilation": compilation,
    "memory": memory,
    "peer": peer,
}
