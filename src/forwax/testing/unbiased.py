"""Is the mean of an estimate the gradient?

Exactly where noise can be listed, and by draws with a stated power.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _tree
from forwax._rules import Exact, Rule
from forwax._signature import Signature
from forwax._transforms import value_and_grad
from forwax._tree import Tree
from forwax.testing import _statistics

_PILOT = 2048
_LEAF_TOLERANCE = 0.5
"""Finds a leaf at zero or doubled."""


@dataclasses.dataclass(frozen=True)
class Unbiased:
    """What `assert_unbiased` has shown.

    Attributes:
        num_draws: the number of estimates drawn.
        detectable_bias: the relative bias of the whole estimate along the gradient that would have
            failed.
        detectable_leaf_bias: the same for the leaf that is hardest to see.
        power: the probability with which biases of that size would have failed.
        false_alarm: the probability that an unbiased rule would have failed.
        basis_sum: whether the mean over listed noise equals the gradient too; False where noise was
            not listed.
    """

    num_draws: int
    detectable_bias: float
    detectable_leaf_bias: float
    power: float
    false_alarm: float
    basis_sum: bool


def assert_unbiased(
    rule: Rule,
    loss: Callable[..., Any],
    args: Sequence[Any],
    *,
    key: Array | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    in_axes: Any = None,
    kwargs: dict[str, Any] | None = None,
    reference: Rule = Exact(),  # noqa: B008 (a frozen value)
    tolerance: float = 0.01,
    power: float = 0.99,
    false_alarm: float = 1e-6,
    max_draws: int = 4_000_000,
    jit: bool = True,
) -> Unbiased:
    """Assert that the mean of a rule's estimate is the gradient.

    Two checks. The basis sum: where the rule has a `Rule.basis`, as for weight and activity noise,
    the mean over all coordinate directions of the noise must equal the gradient to rounding; it
    finds any fault in the rule at once, but the rule's own tangents take no part in it: it is left
    out for `tangents.LowRank`, which is pushed by code of its own, and with `memory="replay"` it
    lists noise that is held, where signs and normals are drawn site by site. Draws: each
    coordinate's mean must equal the gradient's, and the projection <ĝ, g> / |g|² must have mean 1
    for the whole estimate and for each leaf by itself, since a small common factor hides in every
    single coordinate, and a leaf left at zero, or doubled, hides in the whole.

    A pilot of 2,048 draws measures the deviations, from which the number of draws follows: enough
    to find a common factor of 1 ± `tolerance`, and a leaf off by half, with probability `power`. In
    bfloat16 and float16 rounding limits what can be found to about 2 %.

    Args:
        rule: the rule under test.
        loss: the loss, as for `forwax.value_and_grad`.
        args: the loss's positional arguments.
        key: PRNG key; `jax.random.key(0)` by default.
        argnums: as for `forwax.value_and_grad`.
        has_aux: as for `forwax.value_and_grad`.
        in_axes: as for `forwax.value_and_grad`.
        kwargs: keyword arguments of the loss.
        reference: the rule that gives the true gradient; forward mode along the basis by default,
            so that losses which reverse mode rejects can be checked.
        tolerance: the relative bias to be found.
        power: the probability with which it is found.
        false_alarm: the probability that an unbiased rule fails any check.
        max_draws: the most draws.
        jit: whether to compile all estimates, and batch the draws; False for a loss that branches
            on concrete values.

    Returns:
        What was shown: the draws, and the biases that would have failed.

    Raises:
        AssertionError: when the rule is biased; the text names the leaf and the figures.
        ValueError: when `max_draws` are too few for the wanted power, or the gradient is zero.

    Example:
        >>> import jax.numpy as jnp, forwax as fx
        >>> rule = fx.WeightPerturbation()
        >>> shown = fx.testing.assert_unbiased(rule, lambda x: jnp.sum(x**2), [jnp.arange(3.0)])
        >>> shown.basis_sum, shown.detectable_bias <= 0.01
        (True, True)
    """
    key = jax.random.key(0) if key is None else key
    kwargs = kwargs or {}

    def estimate(rule: Rule, key: Array) -> Tree:
        both = value_and_grad(
            loss, rule, argnums=argnums, has_aux=has_aux, in_axes=in_axes
        )
        return both(key, *args, **kwargs)[1]

    def once(rule: Rule) -> Tree:
        run = functools.partial(estimate, rule)
        return jax.device_get((jax.jit(run) if jit else run)(key))

    truth = _Truth.of(once(reference))
    problem = Signature(loss, argnums, has_aux, in_axes).bind(tuple(args), kwargs)
    listed = rule.basis(problem) if rule.unbiased else None
    if listed is not None:
        truth.check_basis_sum(once(listed))

    num_projections = 1 + len(truth.seen)
    fail, detect = _statistics.thresholds(false_alarm, power, num_projections + truth.n)
    draw = _statistics.sampler(lambda each: truth.statistic(estimate(rule, each)), jit)
    pilot = draw(jax.random.fold_in(key, 1), _PILOT)
    whole = pilot.deviation[0]
    hardest_leaf = pilot.deviation[1:num_projections].max()
    # The standard error falls with the root of the draws.
    wanted = (detect * max(whole / tolerance, hardest_leaf / _LEAF_TOLERANCE)) ** 2
    num_draws = max(_PILOT, math.ceil(wanted))
    if num_draws > max_draws:
        raise ValueError(
            f"assert_unbiased: to find a bias of {tolerance:.2%}, and a leaf off by half, "
            f"{num_draws} draws are needed, more than max_draws={max_draws}. "
            "Raise max_draws or tolerance, or test with more tangents."
        )
    # Draws of their own: the pilot's chose how many there are.
    truth.check_draws(draw(jax.random.fold_in(key, 2), num_draws), fail)
    scale = detect / math.sqrt(num_draws)
    return Unbiased(
        num_draws=num_draws,
        detectable_bias=scale * float(whole),
        detectable_leaf_bias=scale * float(hardest_leaf),
        power=power,
        false_alarm=false_alarm,
        basis_sum=listed is not None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Truth:
    """The true gradient, and what estimates are compared with.

    Attributes:
        leaves: its real leaves, in at least float32.
        paths: what each leaf is called.
        squares: the squared norm of each leaf [leaves].
        rounding: a relative tolerance for what rounding alone can do.
    """

    leaves: list[np.ndarray]
    paths: list[str]
    squares: np.ndarray
    rounding: float

    @classmethod
    def of(cls, gradient: Tree) -> "_Truth":
        """The truth that a gradient is.

        Raises:
            ValueError: when it is zero or not finite.
        """
        named = jax.tree_util.tree_leaves_with_path(gradient)
        real = _tree.to_real(gradient)
        leaves = [np.asarray(x, _tree.accumulation_dtype(x.dtype)) for x in real]
        squares = np.array(
            [float(np.sum(np.square(x, dtype=np.float64))) for x in leaves]
        )
        if not 0 < squares.sum() < np.inf:
            raise ValueError(
                "assert_unbiased: expected a finite gradient other than zero, got squared norm "
                f"{squares.sum()}. Choose arguments at which the loss has a slope."
            )
        return cls(
            leaves=leaves,
            paths=[jax.tree_util.keystr(path) or "the gradient" for path, _ in named],
            squares=squares,
            rounding=_statistics.rounding([x.dtype for _, x in named]),
        )

    @property
    def n(self) -> int:
        """The number of real coordinates."""
        return sum(x.size for x in self.leaves)

    @property
    def seen(self) -> list[int]:
        """The positions of the leaves to project on.

        A leaf whose share of the gradient is rounding has no direction: its coordinates are checked
        all the same.
        """
        least = self.rounding**2 * self.squares.sum()
        return [i for i, square in enumerate(self.squares) if square > least]

    def statistic(self, estimate: Tree) -> Array:
        """Projections on the whole gradient and on each seen leaf, then all coordinates."""
        pairs = zip(_tree.to_real(estimate), self.leaves, strict=True)
        wide = [x.astype(true.dtype) for x, true in pairs]
        products = [
            jnp.sum(x * true) for x, true in zip(wide, self.leaves, strict=True)
        ]
        whole = sum(products) / self.squares.sum()
        each = [products[i] / self.squares[i] for i in self.seen]
        return jnp.concatenate([jnp.stack([whole, *each]), _tree.join_flat(wide)])

    def check_basis_sum(self, mean: Tree) -> None:
        """Raise an AssertionError unless the mean over listed noise is the gradient."""
        norm = math.sqrt(self.squares.sum())
        for path, got, true in zip(
            self.paths, _tree.to_real(mean), self.leaves, strict=True
        ):
            difference = np.asarray(got, true.dtype) - true
            error = float(np.linalg.norm(difference.ravel()))
            # Written so that what is no number fails.
            if not error <= self.rounding * norm:
                raise AssertionError(
                    f"basis sum of {path}: the mean over all coordinate directions is off the "
                    f"gradient by {error:.3g}, where |gradient| = {norm:.3g}. The rule is biased."
                )

    def check_draws(self, drawn: _statistics.Moments, fail: float) -> None:
        """Raise an AssertionError where the mean of `statistic` is not what it should be."""
        names = ["the whole", *(self.paths[i] for i in self.seen)]
        off = []
        for name, mean, error in zip(names, drawn.mean, drawn.error, strict=False):
            if not abs(mean - 1) <= fail * error + self.rounding:
                constant = " (it never changes)" if error == 0 else ""
                off.append(f"{mean:.5f} ± {error:.5f}{constant} for {name}")
        if off:
            raise AssertionError(
                f"projection <ĝ, g>/|g|²: expected 1, got {'; '.join(off)} over {drawn.num_draws} "
                "draws. The rule is biased."
            )
        split = len(names)
        self._check_coordinates(
            drawn.mean[split:], drawn.error[split:], fail, drawn.num_draws
        )

    def _check_coordinates(
        self,
        mean: np.ndarray,
        error: np.ndarray,
        fail: float,
        num_draws: int,
    ) -> None:
        truth = np.concatenate([x.ravel() for x in self.leaves]).astype(np.float64)
        allowed = fail * error + self.rounding * np.abs(truth).max()
        excess = np.abs(mean - truth) - allowed
        # Not a number is the worst of all, though it compares as no excess.
        worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
        if not excess[worst] <= 0:
            ends = np.cumsum([x.size for x in self.leaves])
            path = self.paths[int(np.searchsorted(ends, worst, side="right"))]
            raise AssertionError(
                f"coordinate {worst} of {self.n} (in {path}): expected {truth[worst]:.5g}, got "
                f"{mean[worst]:.5g} ± {error[worst]:.2g} over {num_draws} draws. "
                "The rule is biased."
            )
