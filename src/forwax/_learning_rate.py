"""From a learning rate tuned for backprop to one that suits a noisy estimate."""

import math

from forwax._rules import Rule


def suggest_learning_rate(rule: Rule, n: int, backprop_rate: float) -> float:
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
            for the rule inside. Rules without a law, those of feedback, give the rate back.
        backprop_rate: the learning rate of plain gradient descent (or momentum) tuned for exact
            gradients.

    Returns:
        The suggested learning rate.

    Raises:
        ValueError: when n is not positive, the tangents do not exist for n coordinates, or the
            error follows from more than n, as with `per_example=True` and the
            scales of `forwax.ActivityPerturbation`.

    Example:
        >>> import forwax as fx
        >>> rule = fx.WeightPerturbation(num_tangents=10)
        >>> fx.suggest_learning_rate(rule, n=91, backprop_rate=0.5)
        0.05
    """
    if n < 1:
        raise ValueError(
            f"suggest_learning_rate: expected the number of coordinates n >= 1, got {n}."
        )
    scale = rule.learning_rate_scale(n)
    if math.isnan(scale):
        raise ValueError(
            "suggest_learning_rate: expected a rule whose law follows from n alone, got "
            f"{rule!r}. Measure the error of its estimates with forwax.diagnose, whose rows have "
            "the scale of the rate that follows from it."
        )
    return backprop_rate * scale
