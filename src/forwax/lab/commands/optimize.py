"""``forwax optimize``: descent on test functions, with backprop and with forward gradients."""

import sys
from pathlib import Path

import jax

import forwax as fx
from forwax.lab import style
from forwax.lab.catalogue.options import check_room
from forwax.lab.catalogue.rules import RULES, build_rule
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import (
    UsageError,
    check_ranges,
    given,
)
from forwax.lab.keeping.disk import check_path
from forwax.lab.optimize.descent import Plan, descend, make_table, measure, summarise
from forwax.lab.options.optimize import DEFAULTS, OptimizeOptions
from forwax.lab.pictures import descent as picture
from forwax.lab.report import print_tables, write_json
from forwax.lab.training.session import NOT_FINITE


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
