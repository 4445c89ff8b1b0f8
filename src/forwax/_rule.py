"""What a rule is: a frozen value that says where the error signal comes from."""

import abc
from typing import ClassVar

from jax import Array

from forwax._signature import Problem
from forwax._tree import Tree


class Rule(abc.ABC):
    """How a gradient is estimated.

    A subclass is a frozen dataclass registered with `jax.tree_util.register_dataclass`: arrays are leaves, counts and
    flags static, so that a rule can be an argument of a jitted function and a new value never retraces.
    """

    reverse_mode: ClassVar[bool] = False
    """Whether the rule runs reverse mode."""

    @property
    def unbiased(self) -> bool:
        """Whether the mean of the estimate is the gradient."""
        return True

    @abc.abstractmethod
    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """One estimate.

        Args:
            key: a typed PRNG key.
            problem: the parameters and the objective as a function of them.

        Returns:
            `(value, aux, grads)`: the objective's own value and aux, and a tree of the structure, shapes and dtypes of
            the parameters.
        """

    @abc.abstractmethod
    def relative_mse(self, n: int) -> float:
        """The law E|ĝ - g|² / |g|² for n real coordinates."""

    @abc.abstractmethod
    def learning_rate_scale(self, n: int) -> float:
        """E<ĝ, g> / E|ĝ|²: the part of a learning rate tuned for the exact gradient that suits this estimate."""


def check_count(name: str, field: str, value: object) -> None:
    """Raise a ValueError unless a static count is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected {field} to be a positive integer, got {value!r}.")
