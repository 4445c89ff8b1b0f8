"""What `forwax optimize` may be asked."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from forwax.lab.catalogue import menu
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
)

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
    RuleName = Literal[menu.WITHOUT_DATA]
    # what needs a guess of the gradient is left out: it would be a state, which plain descent
    # does not keep
    TangentsName = Literal[tuple(sorted({*menu.TANGENTS} - {"guided"}))]
    CombineName = Literal[tuple(sorted({*menu.COMBINES} - {"control-variate"}))]


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
