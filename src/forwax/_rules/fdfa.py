"""Direct feedback alignment whose maps are learnt by activity noise (Bacho & Chu 2022).

Bacho, Chu, "Low-Variance Forward Gradients using Direct Feedback Alignment and Momentum", arXiv
2212.07282.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._rule import LearningRule, check_count, check_directions, check_shared
from forwax._signature import Problem, Signature
from forwax._sites.feedback import direct
from forwax._sites.find import find_sites
from forwax._sites.model import Sites
from forwax._sites.noise import draw_noise
from forwax._sites.passes import keep
from forwax._tree import Tree
from forwax.tangents import Rademacher, Tangents

Maps = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FDFA(LearningRule):
    """Forward direct feedback alignment: the output error through maps that slopes teach.

    As in `forwax.DirectFeedbackAlignment` a site z gets the error e·M in place of its own, where e
    is the exact ∂loss/∂z of the last sites (those after which no site comes). Here M is the running
    mean of (the output's slope along activity noise u) ⊗ u, whose mean is the Jacobian of the
    output with respect to z. Noise enters all sites at once; the slopes along it are those of the
    last sites' values, not of the loss, and are averaged over the examples. The estimate is the
    gradient when M is the Jacobian of every example: in a linear network, in the mean.

    `step` learns and estimates. `forwax.value_and_grad` takes the maps as they are; it needs no
    noise, and ignores the key. A rule is a frozen value, so that `step` returns the next one, to be
    carried through the training loop.

    Attributes:
        decay: how much of the maps is kept in each step, in [0, 1).
        tangents: the distribution of the noise.
        num_tangents: the number of noises in a step.
        maps: one [size of e, size of z] for each site that is not a last one, in the order of
            `forwax.explain` and with a part for each step of the loops around a site; or None until
            `init` or the first step makes zeros.

    Raises:
        ValueError: when a field has no such value, no last site can be found, or the maps are
            missing or do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w, x: jnp.sum(jnp.tanh(x @ w["first"]) @ w["second"])
        >>> params = {"first": jnp.ones((2, 3)), "second": jnp.ones((3, 1))}
        >>> rule = fx.FDFA().init(loss, in_axes=(None, 0))(params, jnp.ones((4, 2)))
        >>> [m.shape for m in rule.maps]
        [(1, 3)]
        >>> step = rule.step(loss, in_axes=(None, 0))
        >>> value, grads, rule = step(jax.random.key(0), params, jnp.ones((4, 2)))
        >>> grads["first"].shape
        (2, 3)
    """

    decay: float | Array = 0.99
    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    num_tangents: int = dataclasses.field(default=1, metadata={"static": True})
    maps: Maps | None = None

    reverse_mode: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("FDFA", "num_tangents", self.num_tangents)
        if isinstance(self.decay, int | float) and not 0 <= self.decay < 1:
            raise ValueError(f"FDFA: expected decay in [0, 1), got {self.decay}.")

    @property
    def unbiased(self) -> bool:
        """False: the estimate only aligns with the gradient in the course of training."""
        return False

    def sites(self, problem: Problem) -> Sites:
        """The sites of a problem under this rule."""
        return find_sites(problem, type(self).__name__, None, exact_outputs=True)

    def init(
        self,
        loss: Callable[..., Any],
        *,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        in_axes: Any = None,
    ) -> Callable[..., "FDFA"]:
        """The rule with maps of zeros, so that its structure stays the same in all steps.

        Takes the arguments of `forwax.value_and_grad`.

        Returns:
            A function of the loss's own arguments that returns the rule. Nothing is computed, the
            loss is only traced.
        """
        signature = Signature(loss, argnums, has_aux, in_axes, "FDFA.init", keyed=False)

        def init_for(*args: Any, **kwargs: Any) -> FDFA:
            sites = self.sites(signature.bind(args, kwargs))
            return dataclasses.replace(self, maps=self._zeros(sites))

        return init_for

    def advance(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree, "FDFA"]:
        """Learn the maps by one noise, then estimate by them; see `LearningRule.advance`."""
        check_directions("FDFA", self.tangents)
        check_shared("FDFA", self.tangents)
        over = _mesh.axes(
            key
        )  # a key of its own gives each device an estimate of its own
        params = jax.tree.map(lambda leaf: _mesh.vary(leaf, over), problem.params)
        sites = self.sites(dataclasses.replace(problem, params=params))
        rule = dataclasses.replace(self, maps=self._learnt(key, sites))
        return *rule._sent(sites), rule

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """The gradient by the maps as they are; see `Rule.estimate`."""
        return self._sent(self.sites(problem))

    def _sent(self, sites: Sites) -> tuple[Array, Tree, Tree]:
        maps = self._checked(sites)
        out = keep.push(sites)
        exact = keep.output_errors(sites, out.records)
        errors = dict(exact)
        for site, through in zip(sites.noisy, maps, strict=True):
            heard = direct.heard_by(site, sites, type(self).__name__)
            errors[site.variable] = direct.sent(site, sites, heard, exact, through)
        value = keep.value(sites, out.losses)
        return value, out.aux, keep.assemble(sites, out.records, errors)

    def _learnt(self, key: Array, sites: Sites) -> Maps:
        """The running mean with one more sample."""
        maps = self._zeros(sites) if self.maps is None else self._checked(sites)
        if not maps:
            return ()
        noise = draw_noise(sites, self.tangents, key, self.num_tangents)
        slopes = direct.push_outputs(sites, noise, self.num_tangents)
        outputs = [site.variable for site in direct.output_sites(sites)]
        slope_of = dict(zip(outputs, slopes, strict=True))
        samples = []
        for site, u in zip(sites.noisy, noise, strict=True):
            heard = direct.heard_by(site, sites, type(self).__name__)
            slopes_heard = [slope_of[output.variable] for output in heard]
            samples.append(_outer(slopes_heard, u, site.mapped, sites.num_examples))
        pairs = zip(maps, samples, strict=True)
        return tuple(self.decay * m + (1 - self.decay) * x for m, x in pairs)

    def _zeros(self, sites: Sites) -> Maps:
        shapes = direct.map_shapes(sites, type(self).__name__)
        dtypes = [
            _tree.accumulation_dtype(jnp.finfo(site.dtype).dtype)
            for site in sites.noisy
        ]
        return tuple(
            jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        )

    def _checked(self, sites: Sites) -> Maps:
        expected = direct.map_shapes(sites, type(self).__name__)
        got = None if self.maps is None else [m.shape for m in self.maps]
        if self.maps is None or got != expected:
            raise ValueError(
                f"FDFA: expected maps of shapes {expected} (size of the output error, size of the "
                f"site), got {got}. Make them with rule.init(loss)(*args), and let "
                "rule.step(loss)(key, *args) learn them."
            )
        return self.maps

    def relative_mse(self, n: int) -> float:
        """Not a number: no law is known."""
        return math.nan

    def learning_rate_scale(self, n: int) -> float:
        """1."""
        return 1.0


def _outer(
    slopes: Sequence[Array], noise: Array, mapped: bool, num_examples: int | None
) -> Array:
    """The mean over noises and examples of slope ⊗ noise, [size of e, size of z]."""
    lead = 1 if num_examples is None else 2
    t = jnp.concatenate([direct.coordinates(x, lead) for x in slopes], axis=-1)
    u = direct.coordinates(noise, 2 if mapped and lead == 2 else 1)
    if lead == 2 and not mapped:  # all examples have one noise
        t = jnp.mean(t, axis=1)
    t = t.reshape(-1, t.shape[-1])  # [k · examples, e]
    u = u.reshape(-1, u.shape[-1])  # [k · examples, z]
    dtype = _tree.accumulation_dtype(_tree.promoted(t.dtype, u.dtype))
    return t.astype(dtype).T @ u.astype(dtype) / t.shape[0]
