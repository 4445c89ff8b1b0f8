"""The step of `fx.update` beside a gradient that is held and subtracted, and beside older code.

    python benchmarks/update.py [--rounds 100] [--before ../before/src]

Prints a markdown table for the MLP 784-1024-1024-10: the median over the rounds of a step's time
over that of `fx.value_and_grad` with the same rule and a subtraction, parameters donated to both,
and the compiler's temporaries. With --before also beside `fx.update` of another tree of forwax:
`git worktree add --detach ../before 5c72f98^` is the last one that was not slopes, then replay. The
steps of a rule take turns, so that a busy machine slows them alike. About five minutes.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import forwax as fx
from step_time import WIDTHS, loss, mlp
from timing import interleaved, machine

BATCH = 64
RATE = 1e-9
"""So small that the loss stays what it is in all rounds."""

KEY = jax.random.key(0)


def rules(fx: ModuleType) -> dict[str, Any]:
    """The rules of a tree of forwax."""
    kinds = fx.tangents
    return {
        "signs": fx.WeightPerturbation(),
        "four signs in chunks of 1": fx.WeightPerturbation(
            num_tangents=4, chunk_size=1
        ),
        "normals": fx.WeightPerturbation(kinds.Normal()),
        "sparse": fx.WeightPerturbation(kinds.Sparse(0.1)),
        "rank-1": fx.WeightPerturbation(kinds.LowRank()),
        "eight of rank 1": fx.WeightPerturbation(kinds.LowRank(), 8),
        "differences, signs": fx.FiniteDifference(),
        "differences, normals": fx.FiniteDifference(kinds.Normal()),
        "differences, rank-1": fx.FiniteDifference(kinds.LowRank()),
    }


def fused(fx: ModuleType, rule: Any) -> Callable[..., Any]:
    return fx.update(loss, rule, learning_rate=RATE)


def subtracted(fx: ModuleType, rule: Any) -> Callable[..., Any]:
    gradient = fx.value_and_grad(loss, rule)

    def step(key: Any, params: Any, x: Any, y: Any) -> Any:
        value, grads = gradient(key, params, x, y)
        return value, jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    return step


class Steps:
    """A compiled step that goes on from its own parameters, which are donated."""

    def __init__(self, step: Callable[..., Any]):
        self.params = mlp(KEY)
        self.data = jax.random.normal(KEY, (BATCH, WIDTHS[0])), jnp.arange(BATCH) % 10
        lowered = jax.jit(step, donate_argnums=1).lower(KEY, self.params, *self.data)
        self.program: Any = lowered.compile()
        self.mib = self.program.memory_analysis().temp_size_in_bytes / 2**20

    def __call__(self) -> Any:
        _, self.params = self.program(KEY, self.params, *self.data)
        return self.params


@contextmanager
def other_tree(source: Path) -> Iterator[ModuleType]:
    """The forwax of another tree, in the place of ours."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    sys.path.insert(0, str(source))
    try:
        before = importlib.import_module("forwax")
        if not Path(str(before.__file__)).is_relative_to(source):
            raise SystemExit(f"expected a folder with forwax in it, got {source}.")
        yield before
    finally:
        sys.path.remove(str(source))
        for name in filter(is_ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(ours)


def is_ours(name: str) -> bool:
    return name.partition(".")[0] == "forwax"


def row(name: str, before: Path | None, rounds: int) -> list[str]:
    rule = rules(fx)[name]
    steps = {
        "update": Steps(fused(fx, rule)),
        "subtracted": Steps(subtracted(fx, rule)),
    }
    if before is not None:
        with other_tree(before) as other:
            steps["before"] = Steps(fused(other, rules(other)[name]))
    seconds = interleaved(steps, rounds)
    others = list(steps)[1:]
    medians = [np.median(seconds["update"] / seconds[other]) for other in others]
    held = [step.mib for step in steps.values()]
    return [name, *(f"{x:.2f}" for x in medians), *(f"{x:.1f}" for x in held)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--before", type=Path, help="the src of another tree of forwax")
    arguments = parser.parse_args()
    before = arguments.before and arguments.before.resolve()
    others = ["value_and_grad", *(["before"] if before else [])]
    columns = [f"time over {other}" for other in others]
    columns += [f"MiB, {each}" for each in ("update", *others)]
    print(f"Medians of {arguments.rounds} rounds, batch {BATCH}; {machine()}.\n")
    print(f"| tangents | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns))
    for name in rules(fx):
        print(f"| {' | '.join(row(name, before, arguments.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
