"""Direct feedback alignment: the output error through a fixed random map to every product's data.

Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", arXiv 1609.01596.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax import Array

from forwax._rule import Rule
from forwax._signature import Problem, check_key
from forwax._sites.feedback import direct, maps
from forwax._sites.feedback.find_routes import find_routes
from forwax._sites.feedback.inlets import Routes
from forwax._tree import Tree
from forwax.tangents._base import typed_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DirectFeedbackAlignment(Rule):
    """The exact error of the last products, sent straight to the others' data by a fixed map.

    Where a product of a parameter with data h is not a last one, h gets the error B e in place of
    its own, where e is the exact error of the last products (those after which none comes). All in
    between is differentiated exactly: (B e) ⊙ f′(a) for a layer h = f(a), as published. e is taken
    at the last products' values or at their data, whichever has fewer coordinates, or at what these
    data are made of where that has no more; products that share their data share a map, and so do
    positions along axes that the data has in common with the outputs. With `forwax.LocalLosses` a
    product hears only of outputs whose losses it reaches. Needs no noise; the key of the call is
    ignored.

    Unlike in the paper the last products' data get their exact error too, by the last weights, not
    by a map: with one hidden layer alone the estimate is the gradient.

    Attributes:
        feedback: a PRNG key, from which the same maps follow in every call: normal entries of
            variance 1 / (size of h); or the maps themselves, one [size of e, size of h] for each
            inlet, in the order of `forwax.explain`.

    Raises:
        ValueError: when no last product can be found, or the maps do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"])
        >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4)), "c": jnp.ones((4, 1))}
        >>> rule = fx.DirectFeedbackAlignment((jnp.ones((1, 3)),))
        >>> grads = fx.grad(loss, rule)(jax.random.key(0), params, jnp.ones(2))
        >>> slope = 1 - jnp.tanh(2.0) ** 2  # of the activation
        >>> bool(jnp.allclose(grads["a"], slope))
        True
    """

    feedback: Any

    reverse_mode: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        """False: the estimate only aligns with the gradient in the course of training."""
        return False

    def sites(self, problem: Problem) -> Routes:
        """The inlets and outlets of a problem under this rule."""
        return find_routes(problem, type(self).__name__)

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The directly aligned gradient; see `Rule.estimate`."""
        routes = self.sites(problem)
        used = self._maps(maps.map_shapes(routes))
        return direct.estimate(routes, lambda exact: maps.sent(routes, used, exact))

    def _maps(self, shapes: Sequence[tuple[int, int]]) -> list[Array]:
        if not isinstance(self.feedback, tuple | list):
            return self._drawn(shapes)
        if len(self.feedback) != len(shapes):
            raise ValueError(
                "DirectFeedbackAlignment: expected one map for each inlet, the data of products "
                f"that are not last ones, {len(shapes)} in all, got {len(self.feedback)}. "
                "forwax.explain lists them; pass a PRNG key to have the maps drawn."
            )
        for index, (through, shape) in enumerate(
            zip(self.feedback, shapes, strict=True)
        ):
            if through.shape != shape:
                raise ValueError(
                    f"DirectFeedbackAlignment: expected map {index} of shape {shape} (size of the "
                    f"output error, size of the product's data), got {through.shape}. Pass a PRNG "
                    "key to have the maps drawn."
                )
        return list(self.feedback)

    def _drawn(self, shapes: Sequence[tuple[int, int]]) -> list[Array]:
        advice = "Pass jax.random.key(0), or the maps as a tuple."
        key = check_key(self.feedback, "DirectFeedbackAlignment", "feedback", advice)
        drawn: list[Array] = []
        for index, (rows, columns) in enumerate(shapes):
            own = jax.random.fold_in(typed_key(key), index)
            entries = jax.random.normal(own, (rows, columns))
            drawn.append(entries / math.sqrt(max(columns, 1)))
        return drawn

    def relative_mse(self, n: int) -> float:
        """Not a number: no law is known."""
        return math.nan

    def learning_rate_scale(self, n: int) -> float:
        """1."""
        return 1.0
