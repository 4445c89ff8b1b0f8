"""Is the mean of an estimate the gradient? Exactly where noise can be listed, and by draws with a stated power."""

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
_LEAF_TOLERANCE = 0.5  # finds a leaf at zero or doubled


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

    Two checks. The basis sum: for weight and activity noise, the mean over all coordinate
    directions of the noise must equal the gradient to rounding; it finds any fault in the rule at
    once, but the rule's own tangents take no part in it: it is left out for `tangents.LowRank`,
    which is pushed by code of its own, and with `memory="replay"` it lists noise that is held,
    where signs and normals are drawn site by site. Draws: each coordinate's mean must equal the
    gradient's, and the projection <ĝ, g> / |g|² must have mean 1 for the whole estimate and for
    each leaf by itself, since a small common factor hides in every single coordinate, and a leaf
    left at zero, or doubled, hides in the whole.

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
        >>> shown = fx.testing.assert_unbiased(fx.WeightPerturbation(), lambda x: jnp.sum(x**2), [jnp.arange(3.0)])
        >>> shown.basis_sum, shown.detectable_bias <= 0.01
        (True, True)
    """
    key = jax.random.key(0) if key is None else key
    options = {"argnums": argnums, "has_aux": has_aux, "in_axes": in_axes}
    check = _Check(loss, tuple(args), kwargs or {}, options, key, reference, jit)
    fail, detect = _statistics.thresholds(false_alarm, power, check.n + len(check.names) + 1)
    basis_sum = check.basis_sum(rule)
    draw = check.sampler(rule)
    pilot = draw(jax.random.fold_in(key, 1), _PILOT)
    whole, leaves = pilot.deviation[0], pilot.deviation[1 : 1 + len(check.names)]
    wanted = (detect * max(whole / tolerance, leaves.max() / _LEAF_TOLERANCE)) ** 2
    num_draws = max(_PILOT, math.ceil(wanted))
    if num_draws > max_draws:
        raise ValueError(
            f"assert_unbiased: to find a bias of {tolerance:.2%}, and a leaf off by half, "
            f"{num_draws} draws are "
            f"needed, more than max_draws={max_draws}. Raise max_draws or tolerance, or test with "
            f"more tangents."
        )
    check.compare(draw(jax.random.fold_in(key, 2), num_draws), fail)
    scale = detect / math.sqrt(num_draws)
    return Unbiased(
        num_draws, scale * float(whole), scale * float(leaves.max()), power, false_alarm, basis_sum
    )


class _Check:
    """The true gradient, and an estimate's statistics against it: projections first, then all coordinates."""

    def __init__(self, loss, args, kwargs, options, key, reference, jit) -> None:
        def gradient(rule: Rule, key: Array) -> Tree:
            return value_and_grad(loss, rule, **options)(key, *args, **kwargs)[1]

        def once(rule: Rule) -> Tree:
            estimate = functools.partial(gradient, rule)
            return jax.device_get((jax.jit(estimate) if jit else estimate)(key))

        truth = once(reference)
        self.estimate, self.once, self.jit = gradient, once, jit
        self.problem = Signature(
            loss, options["argnums"], options["has_aux"], options["in_axes"]
        ).bind(args, kwargs)
        self.truth = [
            np.asarray(x, _tree.accumulation_dtype(x.dtype)) for x in _tree.to_real(truth)
        ]
        self.n = _tree.num_coordinates(truth)
        self.paths = [jax.tree_util.keystr(path) or "the gradient" for path, _ in _paths(truth)]
        self.rounding = _statistics.rounding([x.dtype for x in jax.tree.leaves(truth)])
        self.squares = np.array([float(np.sum(np.square(x, dtype=np.float64))) for x in self.truth])
        if not 0 < self.squares.sum() < np.inf:
            raise ValueError(
                f"assert_unbiased: expected a finite gradient other than zero, got squared norm "
                f"{self.squares.sum()}. "
                "Choose arguments at which the loss has a slope."
            )
        # A leaf whose share of the gradient is rounding has no direction to project on: its
        # coordinates are checked.
        self.seen = [
            i for i, s in enumerate(self.squares) if s > self.rounding**2 * self.squares.sum()
        ]
        self.names = [self.paths[i] for i in self.seen]

    def statistic(self, leaves: list[Array]) -> Array:
        wide = [x.astype(t.dtype) for x, t in zip(leaves, self.truth, strict=True)]
        products = [jnp.sum(x * t) for x, t in zip(wide, self.truth, strict=True)]
        whole = sum(products) / self.squares.sum()
        each = [products[i] / self.squares[i] for i in self.seen]
        return jnp.concatenate([jnp.stack([whole, *each]), _tree.join_flat(wide)])

    def sampler(self, rule: Rule) -> Callable[[Array, int], _statistics.Moments]:
        return _statistics.sampler(
            lambda k: self.statistic(_tree.to_real(self.estimate(rule, k))), self.jit
        )

    def basis_sum(self, rule: Rule) -> bool:
        listed = rule.basis(self.problem) if rule.unbiased else None
        if listed is None:
            return False
        mean = _tree.to_real(self.once(listed))
        for name, got, true in zip(self.paths, mean, self.truth, strict=True):
            error = float(np.linalg.norm((np.asarray(got, true.dtype) - true).ravel()))
            if not error <= self.rounding * math.sqrt(self.squares.sum()):
                raise AssertionError(
                    f"basis sum of {name}: the mean over all coordinate directions is off the "
                    f"gradient by {error:.3g}, "
                    f"where |gradient| = {math.sqrt(self.squares.sum()):.3g}. The rule is biased."
                )
        return True

    def compare(self, drawn: _statistics.Moments, fail: float) -> None:
        split = 1 + len(self.names)
        off = [
            f"{mean:.5f} ± {error:.5f}{' (it never changes)' if error == 0 else ''} for {name}"
            for name, mean, error in zip(
                ["the whole", *self.names], drawn.mean, drawn.error, strict=False
            )
            if not abs(mean - 1) <= fail * error + self.rounding
        ]
        if off:
            raise AssertionError(
                f"projection <ĝ, g>/|g|²: expected 1, got {'; '.join(off)} over {drawn.num_draws} "
                f"draws. The rule is "
                "biased."
            )
        self._compare_coordinates(drawn.mean[split:], drawn.error[split:], fail, drawn.num_draws)

    def _compare_coordinates(
        self, mean: np.ndarray, error: np.ndarray, fail: float, num_draws: int
    ) -> None:
        truth = np.concatenate([x.ravel() for x in self.truth]).astype(np.float64)
        excess = np.abs(mean - truth) - fail * error - self.rounding * np.abs(truth).max()
        worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
        if not excess[worst] <= 0:
            ends = np.cumsum([x.size for x in self.truth])
            name = self.paths[int(np.searchsorted(ends, worst, side="right"))]
            raise AssertionError(
                f"coordinate {worst} of {self.n} (in {name}): expected {truth[worst]:.5g}, got "
                f"{mean[worst]:.5g} ± "
                f"{error[worst]:.2g} over {num_draws} draws. The rule is biased."
            )


def _paths(tree: Tree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
