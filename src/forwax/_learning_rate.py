"""From a learning rate tuned for backprop to one that suits a noisy estimate."""

import math
import operator
from typing import Any

import jax

from forwax import _tree
from forwax._checks import check_rate
from forwax._rule import check_rule
from forwax._rules import Rule


def suggest_learning_rate(rule: Rule, n: Any, backprop_rate: float) -> float:
    """Scale a learning rate by what the rule's law implies.

    A step along ĝ, of mean g and relative MSE M, is best shortened by E<ĝ, g> / E|ĝ|² = 1 / (1 +
    M): k/(n + k + 1) for the mean over k normal tangents, k/(n + k - 1) for signs, k/n for
    orthonormal ones; 1 for an exact gradient, a projection and a shrunk estimate. This is the best
    scale for gradient descent on an isotropic quadratic. Where few directions carry the curvature,
    larger rates are stable too; it is the safe end of a search. Without a rate for backprop, and
    often closer, `forwax.measure_curvature` finds one from the loss itself.

    Args:
        rule: the rule that will give the gradients.
        n: the number of real coordinates that the noise of one slope enters: all parameters for
            `forwax.WeightPerturbation` and `forwax.FiniteDifference`; for
            `forwax.ActivityPerturbation` the activities whose noise shares a slope, of one example
            where it has its own, which `forwax.explain` lists for each site; in `forwax.Safe` as
            for the rule inside. Rules without a law, those of feedback, give the rate back. Or
            the parameters themselves, a tree of arrays; or what `forwax.explain` returned for the
            rule, of which all coordinates with noise are counted: the safe end where slopes are
            told apart.
        backprop_rate: the learning rate of plain gradient descent (or momentum) tuned for exact
            gradients.

    Returns:
        The suggested learning rate.

    Raises:
        TypeError: when the rule, n or the rate is of another kind.
        ValueError: when n is not positive, the rate is negative or not finite, the tangents do not
            exist for n coordinates, or the error follows from more than n, as with
            `per_example=True` and the scales of `forwax.ActivityPerturbation`.

    Example:
        >>> import forwax as fx
        >>> rule = fx.WeightPerturbation(num_tangents=10)
        >>> fx.suggest_learning_rate(rule, n=91, backprop_rate=0.5)
        0.05
    """
    check_rule("suggest_learning_rate", rule)
    check_rate("suggest_learning_rate", "backprop_rate", backprop_rate)
    count = _count(rule, n)
    if count < 1:
        raise ValueError(
            f"suggest_learning_rate: expected the number of coordinates n >= 1, got {count}."
        )
    scale = rule.learning_rate_scale(count)
    if math.isnan(scale):
        raise ValueError(
            "suggest_learning_rate: expected a rule whose law follows from n alone, got "
            f"{rule!r}. Measure the error of its estimates with forwax.diagnose, whose rows have "
            "the scale of the rate that follows from it."
        )
    return backprop_rate * scale


def _count(rule: Rule, n: Any) -> int:
    """The coordinates that are meant by a count, a tree of parameters or an explanation."""
    if hasattr(n, "num_coordinates"):
        return n.num_coordinates(of_activities=rule.inner.perturbs_activities)
    if not isinstance(n, bool):
        try:
            return operator.index(n)
        except TypeError:
            pass
    leaves = jax.tree.leaves(n)
    if not leaves or not all(hasattr(leaf, "dtype") for leaf in leaves):
        raise TypeError(
            "suggest_learning_rate: expected n as an integer, the parameters, or what "
            f"forwax.explain returned, got {n!r}."
        )
    return _tree.num_coordinates(n)
