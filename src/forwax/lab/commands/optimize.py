"""``forwax optimize``: descent on test functions, with backprop and with forward gradients."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import jax
from tyro.conf import Positional, arg

import forwax as fx
from forwax.lab import style
from forwax.lab.catalogue.options import check_room
from forwax.lab.catalogue.rules import COMBINES, RULES, TANGENTS, build_rule
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import (
    AtLeastOne,
    Chosen,
    Count,
    CountOrNot,
    Natural,
    NotNegative,
    PathOrNot,
    Positive,
    Range,
    UsageError,
    check_ranges,
    given,
)
from forwax.lab.keeping.disk import check_path
from forwax.lab.optimize.descent import Plan, descend, make_table, measure, summarise
from forwax.lab.pictures import descent as picture
from forwax.lab.report import print_tables, write_json
from forwax.lab.training.session import NOT_FINITE

DEFAULTS: dict[str, tuple[float, int]] = {
    "beale": (0.01, 1000),
    "rosenbrock": (5e-4, 25_000),
    "himmelblau": (0.003, 500),
    "ackley": (0.03, 1000),
    "rastrigin": (5e-4, 500),
    "styblinski-tang": (0.005, 500),
    "quadratic": (0.002, 2000),
}
"""Learning rate and iterations for n = 2: Baydin et al.'s for the first two, tested ones after.

From their starts Ackley's and Rastrigin's functions lead plain descent into a local minimum; at
Ackley's rate the noise of forward gradients jumps out of it again.
"""

Point = Annotated[
    tuple[float, ...],
    Range("one or more finite numbers", lambda x: x and all(map(math.isfinite, x))),
]

if TYPE_CHECKING:
    FunctionName = str
    RuleName = str
    TangentsName = str
    CombineName = str
else:
    FunctionName = Literal[tuple(sorted(DEFAULTS))]
    RuleName = Literal[
        tuple(sorted(x for x in RULES if x != "backprop" and not RULES[x].needs_data))
    ]
    # what needs a guess of the gradient is left out: it would be a state, which plain descent
    # does not keep
    TangentsName = Literal[tuple(sorted({*TANGENTS} - {"guided"}))]
    CombineName = Literal[tuple(sorted({*COMBINES} - {"control-variate"}))]


@dataclass(frozen=True)
class OptimizeOptions:
    """Descend a test function by backprop and by forward gradients from the same start.

    Prints a table and saves a picture of several runs each: both ways over the function's contours,
    loss against iterations, loss against seconds. The numbers are saved next to it as JSON. The
    seconds are those of one compiled, warm run.

    Example:
        ```sh
        forwax optimize                     # Beale's function, as Baydin et al. 2022 ran it
        forwax optimize rosenbrock          # 25,000 iterations
        forwax optimize himmelblau --tangents rademacher --runs 20
        forwax optimize rosenbrock --n 10 --num-tangents 4 --combine projection
        forwax optimize rosenbrock --n 100 --method gauss-newton --num-tangents 40
        ```
    """

    function: Positional[FunctionName] = "beale"
    """The function to descend."""
    n: CountOrNot = None
    """The number of variables; 2 by default, or as many as --start has."""
    start: Chosen[Point] = None
    """The first point; the function's usual start by default."""
    runs: Count = 10
    """The number of runs of each method, each with its own key."""
    iterations: CountOrNot = None
    """The number of steps; the default belongs to the function."""
    learning_rate: Chosen[Positive] = None
    """The rate of both methods; the default belongs to the function and shrinks like 4/(n + 2)."""
    decay: NotNegative = 0.0
    """k of the rate η exp(-k i) at step i; Baydin et al.'s Beale and Rosenbrock come with 0."""
    rule: Annotated[RuleName, arg(aliases=["--method"])] = "weight"
    """The rule that is compared with backprop; gauss-newton for sums of squares, without a rate."""
    tangents: TangentsName = "normal"
    """The distribution of the tangents; normal, as in the paper."""
    num_tangents: CountOrNot = None
    """How many tangents each step draws; 1 by default, of gauss-newton 64."""
    combine: CombineName = "mean"
    """How slopes and tangents become one estimate."""
    condition_number: AtLeastOne = 100.0
    """The condition number of the quadratic function."""
    seed: Natural = 0
    """The seed of all runs."""
    out: PathOrNot = None
    """Where the picture goes, .png, .svg or .pdf; runs/optimize-FUNCTION.png by default."""


def run(options: OptimizeOptions) -> int:
    """Run the comparison, print the table, save the picture and the numbers.

    Returns:
        The exit code: 0, also when some runs left the numbers, and the table says how many; 3
        where all of them did, and nothing is written.

    Raises:
        UsageError: when options do not go together or lie out of range.

    Example:
        ```sh
        forwax optimize beale --out beale.png
        ```
    """
    plan = make_plan(options)
    rule = make_rule(options, len(plan.start))
    if options.rule == "gauss-newton" and plan.function.residuals is None:
        raise UsageError(
            f"--method gauss-newton takes sums of squares: beale, himmelblau or rosenbrock, not "
            f"{options.function}."
        )
    path = options.out or Path("runs") / f"optimize-{options.function}.png"
    check_path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out must end in .png, .svg or .pdf, got {str(path)!r}.")
    name = "forward" if options.rule == "weight" else options.rule
    rules = {"backprop": fx.Backprop(), name: rule}
    keys = jax.random.split(jax.random.key(options.seed), options.runs)
    descents = {name: descend(plan, rule, keys) for name, rule in rules.items()}
    if all(each.non_finite == options.runs for each in descents.values()):
        print(
            f"forwax: all runs left the numbers at --learning-rate {plan.learning_rate:g}: nothing "
            "is written. Try a smaller one.",
            file=sys.stderr,
        )
        return NOT_FINITE
    timings = measure(plan, rules, keys[0])
    numbers = summarise(plan, rules, descents, timings, options.seed)
    print_tables(make_table(numbers))
    style.save(picture.draw(plan, descents, timings), path)
    beside = path.with_suffix(".json")
    write_json(beside, numbers)
    print(f"Picture: {path}\nNumbers: {beside}")
    return 0


def make_plan(options: OptimizeOptions) -> Plan:
    """Fill in the function's defaults.

    Raises:
        UsageError: when a number is out of range, or the function does not have that many
            variables.

    >>> make_plan(OptimizeOptions(function="rosenbrock", n=6)).learning_rate
    0.00025
    """
    check_ranges(options)
    n = options.n or (len(options.start) if options.start else 2)
    try:
        if options.function == "quadratic":
            function = fx.functions.quadratic(options.condition_number)
        else:
            function = fx.functions.by_name(options.function.replace("-", "_"))
        function = function.in_dimensions(n)
    except ValueError as error:
        raise UsageError(str(error)) from error
    start = options.start or function.start
    if len(start) != n:
        raise UsageError(f"--start must have n = {n} numbers, got {len(start)}.")
    rate, iterations = DEFAULTS[options.function]
    # forward gradients with one normal tangent stay stable up to a rate that shrinks like 1/(n + 2)
    rate = options.learning_rate or 4 * rate / (n + 2)
    return Plan(function, start, options.iterations or iterations, rate, options.decay)


def make_rule(options: OptimizeOptions, n: int) -> fx.Rule:
    """Build the rule that the options name, for n variables.

    Raises:
        UsageError: when the library refuses the combination, or n variables have no room for that
            many tangents.

    >>> make_rule(OptimizeOptions(tangents="sphere"), n=2).tangents
    Sphere()
    """
    chosen = given(options, ("rule", "tangents", "num_tangents", "combine"))
    settings = Settings(**RULES[options.rule].own | chosen)
    rule = build_rule(settings)
    check_room(settings, rule, n)
    return rule
