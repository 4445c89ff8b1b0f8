"""Reverse mode, the reference that every other rule is compared with."""

import dataclasses
from typing import ClassVar

import jax
from jax import Array

from forwax._rule import Rule
from forwax._signature import Problem
from forwax._tree import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Backprop(Rule):
    """`jax.value_and_grad` itself, so that a comparison is one argument apart.

    Needs no noise; the key is ignored.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> grad = fx.grad(lambda x: jnp.sum(x**2), fx.Backprop())
        >>> grad(jax.random.key(0), jnp.array([1.0, 2.0])).tolist()
        [2.0, 4.0]
    """

    reverse_mode: ClassVar[bool] = True

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The gradient; see `Rule.estimate`."""
        (value, aux), grads = jax.value_and_grad(problem.objective, has_aux=True)(
            problem.params
        )
        return value, aux, grads

    def relative_mse(self, n: int) -> float:
        """Zero: nothing is random."""
        return 0.0

    def learning_rate_scale(self, n: int) -> float:
        """One: the rate of the exact gradient."""
        return 1.0
