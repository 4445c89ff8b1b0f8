"""Direct feedback alignment: the output error through one fixed random map to every site.

Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", arXiv 1609.01596.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
from jax import Array

from forwax._rule import Rule
from forwax._signature import Problem, check_key
from forwax._sites.feedback import direct
from forwax._sites.find import find_sites
from forwax._sites.model import Sites
from forwax._sites.passes import keep
from forwax._tree import Tree
from forwax.tangents._base import typed_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DirectFeedbackAlignment(Rule):
    """The exact error of the last sites, sent straight to every other site by a fixed random map.

    A site z = φ(w, h) gets the error B e in place of its own, where e is ∂loss/∂z of the last sites
    (those after which no site comes), and its parameters get (∂z/∂w)ᵀ B e. The last sites keep
    their exact gradient. The same map serves every step of a loop; with `forwax.LocalLosses` a site
    hears only of outputs whose losses it reaches. Needs no noise; the key of the call is ignored.

    Attributes:
        feedback: a PRNG key, from which the same maps follow in every call: normal entries of
            variance 1 / (size of z); or the maps themselves, one [size of e, size of z] for each
            site that is not a last one, in the order of `forwax.explain`.

    Raises:
        ValueError: when no last site can be found, or the maps do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(x @ w["first"]) @ w["second"])
        >>> params = {"first": jnp.ones((2, 3)), "second": jnp.ones((3, 1))}
        >>> rule = fx.DirectFeedbackAlignment((jnp.ones((1, 3)),))
        >>> fx.grad(loss, rule)(jax.random.key(0), params, jnp.ones(2))["first"].tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    feedback: Any

    reverse_mode: ClassVar[bool] = False

    @property
    def unbiased(self) -> bool:
        """False: the estimate only aligns with the gradient in the course of training."""
        return False

    def sites(self, problem: Problem) -> Sites:
        """The sites of a problem under this rule."""
        return find_sites(problem, type(self).__name__, None, exact_outputs=True)

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The directly aligned gradient; see `Rule.estimate`."""
        sites = self.sites(problem)
        self._check_count(len(sites.noisy))
        out = keep.push(sites)
        exact = keep.output_errors(sites, out.records)
        errors = dict(exact)
        for index, site in enumerate(sites.noisy):
            heard = direct.heard_by(site, sites, type(self).__name__)
            rows = sum(output.size for output in heard)
            through = self._map(index, rows, direct.step_size(site, sites))
            errors[site.variable] = direct.sent(site, sites, heard, exact, through)
        value = keep.value(sites, out.losses)
        return value, out.aux, keep.assemble(sites, out.records, errors)

    def _check_count(self, expected: int) -> None:
        if isinstance(self.feedback, tuple | list) and len(self.feedback) != expected:
            raise ValueError(
                "DirectFeedbackAlignment: expected one map for each site that is not a last one, "
                f"{expected} in all, got {len(self.feedback)}. forwax.explain lists the sites; "
                "pass a PRNG key to have the maps drawn."
            )

    def _map(self, index: int, rows: int, columns: int) -> Array:
        if isinstance(self.feedback, tuple | list):
            if self.feedback[index].shape != (rows, columns):
                raise ValueError(
                    f"DirectFeedbackAlignment: expected map {index} of shape {(rows, columns)} "
                    f"(size of the output error, size of the site), got "
                    f"{self.feedback[index].shape}. Pass a PRNG key to have the maps drawn."
                )
            return self.feedback[index]
        advice = "Pass jax.random.key(0), or the maps as a tuple."
        key = check_key(self.feedback, "DirectFeedbackAlignment", "feedback", advice)
        key = jax.random.fold_in(typed_key(key), index)
        return jax.random.normal(key, (rows, columns)) / math.sqrt(max(columns, 1))

    def relative_mse(self, n: int) -> float:
        """Not a number: no law is known."""
        return math.nan

    def learning_rate_scale(self, n: int) -> float:
        """1."""
        return 1.0
