"""Feedback alignment: errors come back through fixed random matrices (Lillicrap et al. 2016).

Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation
for deep learning", Nature Communications 7, 13276.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from forwax._rule import Rule
from forwax._signature import Problem, check_key
from forwax._sites.feedback import alignment
from forwax._sites.find import find_sites
from forwax._tree import Tree
from forwax.tangents._base import draw_in_one_axis, typed_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FeedbackAlignment(Rule):
    """Backprop in which errors cross dots and convolutions through a fixed B in place of W.

    What is done to a weight before it is used (a transpose, a reshape, a standardisation) is done
    to its feedback too; tied weights have tied feedback. All other operations, gains and look-ups
    included, are differentiated as they are, and so are parameters inside `cond`; `jax.custom_vjp`
    functions go back by their own rules. Needs no noise; the key is ignored. Reverse mode runs, so
    that a loss with a `while_loop` is rejected.

    Attributes:
        feedback: a pytree of the parameters' structure, None for a parameter that is its own
            feedback. Draw it once with `forwax.random_feedback` and keep it.

    Raises:
        ValueError: when the feedback has not the parameters' structure and shapes.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(x @ w["first"]) @ w["second"])
        >>> params = {"first": jnp.ones((2, 3)), "second": jnp.ones((3, 1))}
        >>> rule = fx.FeedbackAlignment({"first": None, "second": 2 * params["second"]})
        >>> grads = fx.grad(loss, rule)(jax.random.key(0), params, jnp.ones((1, 2)))
        >>> exact = fx.grad(loss, fx.Backprop())(jax.random.key(0), params, jnp.ones((1, 2)))
        >>> (grads["first"] / exact["first"]).tolist()[0]
        [2.0, 2.0, 2.0]
        >>> (grads["second"] / exact["second"]).tolist()[0]
        [1.0]
    """

    feedback: Tree

    reverse_mode: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        """False: the estimate only aligns with the gradient in the course of training."""
        return False

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The aligned gradient; see `Rule.estimate`."""
        name = type(self).__name__
        sites = find_sites(problem, name, None, exact_outputs=False, pushes=False)
        feedback = _matched(self.feedback, problem.params)

        def aligned(params: Tree) -> tuple[Array, Tree]:
            return alignment.aligned(sites, params, feedback)

        (value, aux), grads = jax.value_and_grad(aligned, has_aux=True)(problem.params)
        return value, aux, grads

    def relative_mse(self, n: int) -> float:
        """Not a number: no law is known."""
        return math.nan

    def learning_rate_scale(self, n: int) -> float:
        """1."""
        return 1.0


def random_feedback(key: Any, params: Tree) -> Tree:
    """Draw fixed feedback matrices for `forwax.FeedbackAlignment`.

    Args:
        key: PRNG key.
        params: the parameters, a pytree of floating arrays.

    Returns:
        A pytree of the parameters' structure: for leaves of two axes or more normal entries of the
        leaf's own root mean square (1/√(last axis) where the leaf is zero), so that errors keep
        their scale; None for the others.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
        >>> feedback = fx.random_feedback(jax.random.key(0), params)
        >>> feedback["w"].shape, feedback["b"]
        ((3, 4), None)
    """
    leaves, structure = jax.tree.flatten(params)
    key = check_key(
        key,
        "random_feedback",
        advice="Call random_feedback(jax.random.key(0), params).",
    )
    keys = jax.random.split(typed_key(key), len(leaves))
    drawn = [
        _like(k, jnp.asarray(leaf)) if jnp.ndim(leaf) >= 2 else None
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(drawn)


def _like(key: Array, leaf: Array) -> Array:
    if leaf.size == 0:
        return leaf
    root_mean_square = jnp.sqrt(jnp.mean(jnp.abs(leaf) ** 2))
    scale = jnp.where(root_mean_square > 0, root_mean_square, leaf.shape[-1] ** -0.5)
    return draw_in_one_axis(jax.random.normal, key, leaf.shape, leaf.dtype) * scale


def _matched(feedback: Tree, params: Tree) -> list[Array | None]:
    """One entry a parameter, checked.

    None among the parameters themselves stands for no parameter.
    """

    def is_none(x: Any) -> bool:
        return x is None

    matrices, structure = jax.tree.flatten(feedback, is_none)
    leaves, expected = jax.tree.flatten(params, is_none)
    if structure != expected:
        raise ValueError(
            f"FeedbackAlignment: expected feedback of the parameters' structure {expected}, got "
            f"{structure}. Draw it with forwax.random_feedback(key, params); None stands for a "
            "parameter that is its own feedback."
        )
    pairs = [(b, w) for b, w in zip(matrices, leaves, strict=True) if w is not None]
    for b, w in pairs:
        if b is not None and jnp.shape(b) != w.shape:
            raise ValueError(
                f"FeedbackAlignment: expected feedback of the parameter's shape {w.shape}, got "
                f"{jnp.shape(b)}. Draw it with forwax.random_feedback(key, params)."
            )
    return [b for b, _ in pairs]
