"""Test functions for optimisers, each with its minima, its usual start and its source.

Each function is a frozen value that is called on one array of shape [n] and returns a scalar of the
same dtype::

    beale, himmelblau                           two dimensions
    rosenbrock, ackley, rastrigin,
    styblinski_tang, quadratic(condition)       any n: `rosenbrock.in_dimensions(10)`

The facts (minima, start, domain) that a value carries are plain Python numbers, so that they have
no dtype: under `jax_enable_x64` they become float64 arrays, otherwise float32. Ackley's function
has no gradient at its minimum; see `ackley`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Function",
    "ackley",
    "beale",
    "by_name",
    "himmelblau",
    "quadratic",
    "rastrigin",
    "rosenbrock",
    "styblinski_tang",
]

Point = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Function:
    """A test function f: R^n -> R and the facts about it; call it on an array of shape [n].

    It is hashable and compares by value, so it can be a static argument of `jax.jit`. For many
    points use `jax.vmap`.

    Attributes:
        name: The name in snake_case, as `by_name` takes it.
        formula: The function itself, from an array [n] to a scalar.
        minima: Every global minimiser, a tuple of points.
        minimum: The least value, f at each of `minima`.
        start: The usual start of an optimiser.
        lower: The lower corner of the domain that pictures show, one number for all coordinates or
            a point.
        upper: Its upper corner.
        source: Where the function comes from.
        any_dimension: True where the formula holds for every n.
        residuals: From an array [n] to the array of which f is the sum of squares; None where f is
            not known as one.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> print(beale(jnp.array([3.0, 0.5])))
    0.0
    >>> rosenbrock.minima
    ((1.0, 1.0),)
    >>> print(jax.grad(rosenbrock)(jnp.array([-1.0, 0.0])))
    [-404. -200.]
    """

    name: str
    formula: Callable[[jax.Array], jax.Array]
    minima: tuple[Point, ...]
    minimum: float
    start: Point
    lower: Point
    upper: Point
    source: str
    any_dimension: bool = False
    residuals: Callable[[jax.Array], jax.Array] | None = None

    @property
    def n(self) -> int:
        """The number of dimensions of `start` and `minima`."""
        return len(self.start)

    def __call__(self, x: jax.typing.ArrayLike) -> jax.Array:
        """Return f(x), a scalar of x's floating dtype, for x of shape [n].

        Raises:
            ValueError: When x is not one point of n coordinates.
        """
        x = jnp.asarray(x)
        if x.ndim != 1 or (x.size != self.n and not self.any_dimension) or x.size < 1:
            wanted = "[n]" if self.any_dimension else f"[{self.n}]"
            raise ValueError(
                f"{self.name} takes one point, an array of shape {wanted}, but got shape "
                f"{list(x.shape)}; for many points use jax.vmap."
            )
        return self.formula(x)

    def in_dimensions(self, n: int) -> "Function":
        """Return the same function with the facts for n dimensions.

        Minima, start and domain repeat their coordinates; the least value grows with n where the
        function is a sum.

        Raises:
            ValueError: When the function is defined in its own dimension only, or n is not
                positive.

        >>> rosenbrock.in_dimensions(4).start
        (-1.0, 0.0, -1.0, 0.0)
        """
        if n == self.n:
            return self
        if not self.any_dimension:
            raise ValueError(
                f"{self.name} is a function of {self.n} variables, so it cannot have n={n}."
            )
        if n < 1:
            raise ValueError(f"A function needs n >= 1 variables, but got {n=}.")
        return dataclasses.replace(
            self,
            minima=tuple(_repeat(point, n) for point in self.minima),
            # That of a sum grows with n; all others are 0.
            minimum=self.minimum * n / self.n,
            start=_repeat(self.start, n),
            lower=_repeat(self.lower, n),
            upper=_repeat(self.upper, n),
        )

    def distance(self, x: jax.Array) -> jax.Array:
        """Return the Euclidean distance from x of shape [n] to the nearest global minimiser.

        >>> print(himmelblau.distance(jnp.array([3.0, 1.0])))
        1.0
        """
        minima = jnp.asarray(self.minima, x.dtype)
        return jnp.min(jnp.linalg.norm(minima - x[None, :], axis=-1))


def by_name(name: str) -> Function:
    """Return the function of that name, in two dimensions; "quadratic" has condition number 100.

    Raises:
        ValueError: When there is no such function; the message lists the names.

    >>> by_name("beale").minima
    ((3.0, 0.5),)
    """
    known = {
        f.name: f
        for f in (
            beale,
            rosenbrock,
            himmelblau,
            ackley,
            rastrigin,
            styblinski_tang,
            quadratic(),
        )
    }
    if name not in known:
        raise ValueError(
            f"There is no test function {name!r}; choose one of {', '.join(known)}."
        )
    return known[name]


def _repeat(point: Point, n: int) -> Point:
    """Return n coordinates: the point's own, over and over."""
    return tuple(point[i % len(point)] for i in range(n))


def _beale(x: jax.Array) -> jax.Array:
    u, v = x
    return (
        (1.5 - u + u * v) ** 2
        + (2.25 - u + u * v**2) ** 2
        + (2.625 - u + u * v**3) ** 2
    )


def _beale_residuals(x: jax.Array) -> jax.Array:
    u, v = x
    return jnp.stack([1.5 - u + u * v, 2.25 - u + u * v**2, 2.625 - u + u * v**3])


def _rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def _rosenbrock_residuals(x: jax.Array) -> jax.Array:
    return jnp.concatenate([10.0 * (x[1:] - x[:-1] ** 2), 1.0 - x[:-1]])


def _himmelblau(x: jax.Array) -> jax.Array:
    u, v = x
    return (u**2 + v - 11.0) ** 2 + (u + v**2 - 7.0) ** 2


def _himmelblau_residuals(x: jax.Array) -> jax.Array:
    u, v = x
    return jnp.stack([u**2 + v - 11.0, u + v**2 - 7.0])


def _ackley(x: jax.Array) -> jax.Array:
    square = jnp.mean(x**2)
    # The inner `where` keeps sqrt's infinite slope at 0 out of the derivative, which would be 0 *
    # inf = NaN.
    radius = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    # mean(cos 2πx) - 1 = -2 mean(sin² πx), and expm1 for exp: exactly 0 at the minimum, and no
    # cancellation near it.
    ripple = -2.0 * jnp.mean(jnp.sin(math.pi * x) ** 2)
    return -20.0 * jnp.expm1(-0.2 * radius) - math.e * jnp.expm1(ripple)


def _rastrigin(x: jax.Array) -> jax.Array:
    # 10 - 10 cos 2πx = 20 sin² πx, without the cancellation.
    return jnp.sum(x**2 + 20.0 * jnp.sin(math.pi * x) ** 2)


def _styblinski_tang(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(x**4 - 16.0 * x**2 + 5.0 * x)


@dataclasses.dataclass(frozen=True)
class _Quadratic:
    """½ Σ λ_i x_i², with λ spaced evenly in the logarithm from 1 to the condition number."""

    condition_number: float

    def __call__(self, x: jax.Array) -> jax.Array:
        eigenvalues = jnp.asarray(
            np.geomspace(1.0, self.condition_number, x.size), x.dtype
        )
        return 0.5 * jnp.sum(eigenvalues * x**2)


beale = Function(
    name="beale",
    formula=_beale,
    minima=((3.0, 0.5),),
    minimum=0.0,
    start=(0.0, 0.5),
    lower=(-4.5, -4.5),
    upper=(4.5, 4.5),
    source="Beale 1958, On an iterative method for finding a local minimum of a function of more "
    "than one variable",
    residuals=_beale_residuals,
)
"""Beale's function, (1.5 - x + xy)² + (2.25 - x + xy²)² + (2.625 - x + xy³)².

Its least value is 0 at (3, 0.5). The start (0, 0.5) is that of Baydin et al. 2022; Moré, Garbow and
Hillstrom 1981 start at (1, 1), where f = 14.203125.
"""

rosenbrock = Function(
    name="rosenbrock",
    formula=_rosenbrock,
    minima=((1.0, 1.0),),
    minimum=0.0,
    start=(-1.0, 0.0),
    lower=(-2.0, -1.0),
    upper=(2.0, 3.0),
    source="Rosenbrock 1960, An automatic method for finding the greatest or least value of a "
    "function",
    any_dimension=True,
    residuals=_rosenbrock_residuals,
)
"""Rosenbrock's function, Σ 100 (x_{i+1} - x_i²)² + (1 - x_i)²; least value 0 at (1, ..., 1).

The start (-1, 0) is that of Baydin et al. 2022; the classical one is (-1.2, 1), where f = 24.2. For
n = 4 and more there is also a local minimum near (-1, 1, ..., 1). With n = 1 the sum is empty and f
is 0.
"""

himmelblau = Function(
    name="himmelblau",
    formula=_himmelblau,
    minima=(
        (3.0, 2.0),
        (-2.805118086952745, 3.1313125182505730),
        (-3.779310253377747, -3.283185991286169),
        (3.584428340330492, -1.848126526964404),
    ),
    minimum=0.0,
    start=(0.0, 0.0),
    lower=(-5.0, -5.0),
    upper=(5.0, 5.0),
    source="Himmelblau 1972, Applied Nonlinear Programming",
    residuals=_himmelblau_residuals,
)
"""Himmelblau's function, (x² + y - 11)² + (x + y² - 7)².

Its least value is 0 at four points, (3, 2) among them. The origin, the start here, lies near the
local maximum f(-0.270845, -0.923039) ≈ 181.617.
"""

ackley = Function(
    name="ackley",
    formula=_ackley,
    minima=((0.0, 0.0),),
    minimum=0.0,
    start=(2.0, 1.5),
    lower=(-5.0, -5.0),
    upper=(5.0, 5.0),
    source="Ackley 1987, A Connectionist Machine for Genetic Hillclimbing; for any n, Bäck 1996",
    any_dimension=True,
)
"""Ackley's function, -20 exp(-0.2 √mean x²) - exp(mean cos 2πx) + 20 + e.

Its least value is 0 at the origin. At the origin it is a cone: it has no gradient there. Every
automatic derivative of this implementation is 0 at that one point (a subgradient) instead of NaN;
next to it the gradient's length is about 4/√n. Its usual domain is ±32.768; there is no usual
start, and (2, 1.5) leaves several local minima on the way.
"""

rastrigin = Function(
    name="rastrigin",
    formula=_rastrigin,
    minima=((0.0, 0.0),),
    minimum=0.0,
    start=(2.2, 1.3),
    lower=(-5.12, -5.12),
    upper=(5.12, 5.12),
    source="Rastrigin 1974, Systems of Extremal Control; for any n, Mühlenbein, Schomisch and Born "
    "1991",
    any_dimension=True,
)
"""Rastrigin's function, 10 n + Σ x_i² - 10 cos 2πx_i.

Its least value is 0 at the origin; there are local minima near all integers.
There is no usual start; plain descent from (2.2, 1.3) ends in the local minimum near (2, 1).
"""

styblinski_tang = Function(
    name="styblinski_tang",
    formula=_styblinski_tang,
    minima=((-2.903534027771177, -2.903534027771177),),
    minimum=-78.33233140754283,
    start=(0.0, 0.0),
    lower=(-5.0, -5.0),
    upper=(5.0, 5.0),
    source="Styblinski and Tang 1990, Experiments in nonconvex optimization, Neural Networks 3",
    any_dimension=True,
)
"""The Styblinski-Tang function, ½ Σ x_i⁴ - 16 x_i² + 5 x_i.

Its least value is -39.166166 n where each x_i = -2.903534. It has 2ⁿ local minima; gradient descent
from the origin, the start here, ends in the global one.
"""


def quadratic(condition_number: float = 100.0, n: int = 2) -> Function:
    """Return ½ Σ λ_i x_i² with eigenvalues λ from 1 to the condition number.

    They are spaced evenly in the logarithm.

    Args:
        condition_number: The largest eigenvalue over the smallest, which is 1; at least 1.
        n: The number of variables. With n = 1 the one eigenvalue is 1.

    Raises:
        ValueError: When the condition number is below 1, or n is not positive.

    >>> print(quadratic(100.0, n=3)(jnp.ones(3)))
    55.5
    """
    if not condition_number >= 1 or math.isinf(condition_number):
        raise ValueError(
            f"A condition number is finite and at least 1, but got {condition_number=}."
        )
    function = Function(
        name="quadratic",
        formula=_Quadratic(float(condition_number)),
        minima=((0.0, 0.0),),
        minimum=0.0,
        start=(1.0, 1.0),
        lower=(-1.5, -1.5),
        upper=(1.5, 1.5),
        source="the model problem of gradient descent",
        any_dimension=True,
    )
    return function.in_dimensions(n)
