"""What a rule is: a frozen value that says where the error signal comes from."""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._programs import ways_out
from forwax._signature import Problem, Signature, check_key
from forwax._tree import Tree
from forwax.combine import Combine
from forwax.tangents import Tangents
from forwax.tangents._base import typed_key


class Rule(abc.ABC):
    """How a gradient is estimated.

    A subclass is a frozen dataclass registered with `jax.tree_util.register_dataclass`: arrays are
    leaves, counts and flags static, so that a rule can be an argument of a jitted function and a
    new value never retraces.
    """

    reverse_mode: ClassVar[bool] = False
    """Whether the rule runs reverse mode."""

    has_slopes: ClassVar[bool] = False
    """Whether scalar slopes of the loss scale the whole estimate: `guarded` then acts on them."""

    perturbs_activities: ClassVar[bool] = False
    """Whether the coordinates of its law are those of activities, not of parameters."""

    learns: ClassVar[bool] = False
    """Whether the rule changes from step to step, as a `LearningRule` does."""

    @property
    def unbiased(self) -> bool:
        """Whether the mean of the estimate is the gradient."""
        return True

    @property
    def inner(self) -> "Rule":
        """What the rule wraps, as `forwax.Safe` does; the rule itself where it wraps nothing."""
        return self

    @property
    def replayed(self) -> "Rule | None":
        """The rule whose directions follow from a key alone: itself, or the one that it guards.

        None where there is none, so that `forwax.replay` cannot draw them again.
        """
        return None

    def law(self, problem: Problem) -> float | None:
        """The relative MSE E|ĝ - g|² / |g|² for this problem; None without a law.

        By default `relative_mse` of the number of parameters, counted in real coordinates. A rule
        whose `relative_mse` counts anything else overrides it.
        """
        n = _tree.num_coordinates(problem.params)
        law = self.relative_mse(n)
        return law if math.isfinite(law) else None

    def sites(self, problem: Problem) -> Any:
        """The sites that the rule finds in a problem, for `forwax.explain`; None without sites."""
        return None

    def basis(self, problem: Problem) -> "Rule | None":
        """This rule with each coordinate of its noise once, for `forwax.testing.assert_unbiased`.

        One estimate of it is the mean over all coordinate directions of the noise, and so the
        gradient, if the rule is unbiased. None where noise cannot be listed.
        """
        return None

    def in_chunks(self, problem: Problem) -> "dict[int, Rule]":
        """This rule with other chunk sizes that change its price alone.

        `forwax.diagnose` times them; by default none.
        """
        return {}

    @abc.abstractmethod
    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """One estimate.

        Args:
            key: a typed PRNG key.
            problem: the parameters and the objective as a function of them.

        Returns:
            `(value, aux, grads)`: the objective's own value and aux, and a tree of the structure,
            shapes and dtypes of the parameters.
        """

    def guarded(
        self, key: Array, problem: Problem, guard: Callable[[Array], Array]
    ) -> tuple[Array, Tree, Tree, Array]:
        """An estimate of which the slopes are guarded; see `forwax.Safe`.

        Args:
            key: a typed PRNG key.
            problem: the parameters and the objective as a function of them.
            guard: takes slopes to the slopes to use, elementwise.

        Returns:
            `(value, aux, grads, slopes)`, with the slopes before the guard. A rule without slopes
            guards the norm of its estimate instead, and gives this norm [1].
        """
        check_replicated(type(self).__name__, problem.params, _mesh.axes(key))
        value, aux, grads = self.estimate(key, problem)
        grads, norm = guarded_by_norm(grads, guard)
        return value, aux, grads, norm[None]

    @abc.abstractmethod
    def relative_mse(self, n: int) -> float:
        """The law E|ĝ - g|² / |g|² for n real coordinates.

        They are those of what the noise enters, in most rules the parameters.
        """

    @abc.abstractmethod
    def learning_rate_scale(self, n: int) -> float:
        """E<ĝ, g> / E|ĝ|².

        The part of a learning rate tuned for the exact gradient that suits this estimate.
        """


def guarded_by_norm(grads: Tree, guard: Callable[[Array], Array]) -> tuple[Tree, Array]:
    """An estimate whose norm is guarded as a slope is, and the norm before."""
    norm = jnp.sqrt(_tree.inner(grads, grads))
    used = guard(norm[None])[0]
    # An infinite norm that is not clipped would give ∞ / ∞.
    scale = jnp.where(norm == used, 1, used / jnp.where(norm == 0, 1, norm))

    def cut(x: Array) -> Array:
        scaled = x * scale.astype(x.dtype)
        # A skipped estimate is zero even where its entries are not finite.
        return jnp.where(used == 0, 0, scaled)

    return jax.tree.map(cut, grads), norm


class LearningRule(Rule):
    """A rule that changes from step to step; being a frozen value, it hands out its successor.

    A subclass says in `advance` what a step is; `forwax.value_and_grad` takes the rule as it is and
    changes nothing.
    """

    learns: ClassVar[bool] = True

    @abc.abstractmethod
    def advance(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree, Self]:
        """One estimate and what was learnt from it.

        Args:
            key: a typed PRNG key.
            problem: the parameters and the objective as a function of them.

        Returns:
            `(value, aux, grads, rule)`: those of `estimate`, and the rule of the next step.
        """

    def step(
        self,
        loss: Callable[..., Any],
        *,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        in_axes: Any = None,
    ) -> Callable[..., tuple[Any, Tree, Self]]:
        """Estimate, and learn from it.

        Takes the arguments of `forwax.value_and_grad`.

        Returns:
            A function `f(key, *args, **kwargs)` that returns `(value, grads, rule)`, with `has_aux`
            `((value, aux), grads, rule)`. Jit it with the rule as an argument.
        """
        name = f"{type(self).__name__}.step"
        signature = Signature(loss, argnums, has_aux, in_axes, name)

        def step_of_loss(
            key: Any, /, *args: Any, **kwargs: Any
        ) -> tuple[Any, Tree, Self]:
            key = typed_key(check_key(key, name))
            problem = signature.bind(args, kwargs)
            with ways_out.named(problem):
                value, aux, grads, rule = self.advance(key, problem)
            if has_aux:
                return (value, problem.restore(aux)), grads, rule
            return value, grads, rule

        return step_of_loss


class _Started(Protocol):
    """A rule that can be made ready for a problem before its first step."""

    def started(self, problem: Problem) -> Self:
        """The rule in the form that it has in all steps."""
        ...


S = TypeVar("S", bound=_Started)


def starter(
    rule: S,
    loss: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    in_axes: Any,
) -> Callable[..., S]:
    """What a rule's `init` returns: from the loss's own arguments to the rule made ready."""
    name = f"{type(rule).__name__}.init"
    signature = Signature(loss, argnums, has_aux, in_axes, name, keyed=False)

    def init_for(*args: Any, **kwargs: Any) -> S:
        return rule.started(signature.bind(args, kwargs))

    return init_for


def is_rule(value: object) -> bool:
    """Whether a value is a rule."""
    return isinstance(value, Rule)


def check_rule(name: str, rule: object) -> None:
    """Raise a TypeError for what is no rule."""
    if not is_rule(rule):
        raise TypeError(
            f"{name}: expected a rule, such as forwax.WeightPerturbation(), got {rule!r}. "
            "argnums, has_aux and in_axes are keyword arguments."
        )


def check_directions(name: str, tangents: object, combine: object = None) -> None:
    """Raise a TypeError unless a rule's fields are values of the right kind."""
    fields = (
        ("tangents", tangents, Tangents, "forwax.tangents.Rademacher()"),
        ("combine", combine, Combine, "forwax.combine.Mean()"),
    )
    for field, value, kind, example in fields:
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"{name}: expected {field} such as {example}, got {value!r}."
            )


def check_shared(name: str, tangents: Tangents) -> None:
    """Raise a ValueError for directions of each example's own.

    Weight perturbation alone can follow them.
    """
    if tangents.per_example:
        raise ValueError(
            f"{name}: expected tangents without per_example=True, which "
            f"forwax.WeightPerturbation alone can follow, got {tangents}. "
            "Use that rule, or per_example=False."
        )


def check_replicated(name: str, params: Tree, key_axes: frozenset[str]) -> None:
    """Raise a ValueError where parameters are sharded: no device then knows a whole slope."""
    # A key that varies gives each device an estimate, and so slopes, of its own.
    sharded = frozenset().union(*_mesh.tree_axes(params)) - key_axes
    if sharded:
        raise ValueError(
            f"{name}: slopes can be guarded where every device holds all parameters, but inside "
            f"shard_map they vary over {sorted(sharded)}. "
            "Replicate the parameters, or leave forwax.Safe out."
        )
