"""Activity perturbation: noise on what sites put out, and each site's own derivative.

Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", arXiv 2210.03310.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._checks import check_count, register_checked, set_counts
from forwax._programs.evaluate import Values
from forwax._programs.program import Variable
from forwax._pushforward import over_tangents
from forwax._rule import Rule, check_directions, check_shared
from forwax._signature import Problem, Signature, check_key
from forwax._sites.balance import balanced, moments
from forwax._sites.fewer_weights import with_fewer_weights
from forwax._sites.find import find_sites, selection
from forwax._sites.model import Pass, Site, Sites
from forwax._sites.noise import Drawn, Held, draw_noise, num_coordinates
from forwax._sites.passes import keep
from forwax._sites.passes.replay import push_drawn, replay
from forwax._sites.scales import Scales, divided, scaled, scales_of
from forwax._sites.slopes import behind_slopes, credited, plus, told_apart, weighted
from forwax._sites.sources import of_a_step, shared_noise, with_slopes_of_loops
from forwax._tree import Tree
from forwax.combine import Combine, Mean, Shrinkage
from forwax.credit import Decay
from forwax.tangents import Coordinate, Rademacher, Tangents
from forwax.tangents._base import IndependentTangents, typed_key

_CHOICES = {"memory": ("keep", "replay", "shared"), "noise": ("activity", "auto")}


@register_checked
@dataclasses.dataclass(frozen=True)
class ActivityPerturbation(Rule):
    """Slopes along noise on the activities, assembled by each site's own reverse pass.

    A site is an operation z = φ(w, h) in which a parameter meets data; forwax finds the sites of
    any JAX program. Noise u enters at every z, one Jacobian-vector product carries all of it to the
    loss, and the slope c gives the parameter its estimate (∂z/∂w)ᵀ c·u. No error crosses two sites.
    With `in_axes` each example has a slope of its own, which takes the other examples' noise out of
    the estimate; with `forwax.LocalLosses` a site takes the slopes of the losses that it reaches.
    For a layer of fan-out q and batch N the squared error of the mean gradient is
    (q - 1)·mean|G_i|²/N with signs, against (pq - 1)|Ḡ|² under weight noise.

    With `in_axes` what is mapped is data, and other arrays, such as frozen weights and masks, are
    to a parameter what constants are; without, what the loss closes over is no data either, unless
    it is given no array but its parameters and keys.

    Sites after which no site comes get their exact error from reverse mode over the parameter-free
    rest of the loss, and no noise. Parameters inside `while_loop` and `cond` bodies, and in a
    scan's initial state, get weight noise. The estimate is unbiased all the same; `forwax.explain`
    shows which is which.

    Attributes:
        tangents: the distribution of the noise; where its coordinates depend on one another
            (`Orthonormal`, `Sphere`, `Coordinate`) each example of `in_axes` draws its own, of
            which the slope of a patch or group hears a part: their law there is about that of
            normals.
        num_tangents: the number k of noises.
        combine: `Mean`, or `Shrinkage` for each slope by itself.
        where: which parameters get activity noise: a regular expression searched in a parameter's
            path such as "['dense']['kernel']", or a function of that path; None for all. The others
            get weight noise.
        memory: "keep" the sites' inputs until the slopes are known, "replay" the forward pass then,
            or give all examples one "shared" slope, with which nothing is kept, at a much larger
            variance.
        exact_outputs: whether the last sites take their exact error; False for an estimate without
            any reverse pass through the loss.
        credit: `forwax.credit.Decay` where terms of the loss that stand further from a noise's own
            position are to count less (biased); None for all that a noise can change.
        scales: one positive number σ for each site with noise, in the order of `forwax.explain`: an
            array or a tuple. Noise σ·u enters and the error is c·u/σ, which is unbiased for any σ;
            `calibrate` finds those with the least error. None: all 1.
        noise: "activity", or "auto": weight noise, each example's own, on parameters that have
            fewer entries than the activities that they make, such as a gain that is used at many
            positions, of scale √(entries / activities); with `memory="shared"` one noise for all
            examples.

    Raises:
        ValueError: when a field has no such value, `where` selects no parameter, or the loss has no
            data, or as many sites with noise as there are scales.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> def loss(params, x, y):  # of one example
        ...     hidden = jnp.tanh(x @ params["first"])
        ...     return jnp.sum((hidden @ params["second"] - y) ** 2)
        >>> params = {"first": jnp.ones((3, 4)), "second": jnp.ones((4, 2))}
        >>> grad = fx.grad(loss, fx.ActivityPerturbation(), in_axes=(None, 0, 0))
        >>> grads = grad(jax.random.key(0), params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
        >>> grads["first"].shape, grads["second"].shape
        ((3, 4), (4, 2))
    """

    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    num_tangents: int = dataclasses.field(default=1, metadata={"static": True})
    combine: Combine = Mean()  # noqa: RUF009
    where: str | Callable[[str], bool] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    memory: Literal["keep", "replay", "shared"] = dataclasses.field(
        default="keep", metadata={"static": True}
    )
    exact_outputs: bool = dataclasses.field(default=True, metadata={"static": True})
    credit: Decay | None = None
    scales: Any = None
    noise: Literal["activity", "auto"] = dataclasses.field(
        default="activity", metadata={"static": True}
    )

    perturbs_activities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        set_counts(self, "num_tangents")
        check_directions("ActivityPerturbation", self.tangents, self.combine)
        if self.credit is not None and not isinstance(self.credit, Decay):
            raise TypeError(
                "ActivityPerturbation: expected credit such as forwax.credit.Decay(0.9), or None, "
                f"got {self.credit!r}."
            )
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(
                    f"ActivityPerturbation: expected {field} to be one of {choices}, "
                    f"got {value!r}."
                )
        if not isinstance(self.combine, Mean | Shrinkage):
            raise ValueError(
                "ActivityPerturbation: expected combine to be Mean() or Shrinkage(), got "
                f"{self.combine}. Slopes of single examples cannot be combined over all parameters."
            )

    @property
    def unbiased(self) -> bool:
        """Whether the combination keeps the estimate unbiased, and no term is made less of."""
        return self.combine.unbiased and (self.credit is None or self.credit.unbiased)

    def sites(self, problem: Problem) -> Sites:
        """The sites of a problem under this rule."""
        sites = self._sites(problem)
        if self.noise == "activity":
            return sites
        weights = with_fewer_weights(sites, own_slopes=self.memory != "shared")
        return self._sites(problem, weights) if weights else sites

    def _sites(
        self, problem: Problem, weights: Mapping[int, float] | None = None
    ) -> Sites:
        """The sites, with weight noise on the parameters at these places."""
        own_slopes = self.memory != "shared"
        sites = find_sites(
            problem,
            type(self).__name__,
            selection(self.where),
            self.exact_outputs,
            credit=own_slopes,
            weights=weights,
            own_weights=own_slopes,
        )
        # A replay visits one step of a loop after the other: its steps share their slopes.
        return with_slopes_of_loops(sites) if self.memory == "replay" else sites

    def basis(self, problem: Problem) -> "ActivityPerturbation":
        """This rule with each coordinate of its noise once: its estimate is the mean of all."""
        tangents = Coordinate(replace=False)
        own_slopes = self.memory != "shared"
        n = num_coordinates(self.sites(problem), tangents, own_slopes=own_slopes)
        return dataclasses.replace(self, tangents=tangents, num_tangents=max(1, n))

    def estimate(self, key: Array, problem: Problem) -> tuple[Array, Tree, Tree]:
        """One estimate; see `Rule.estimate`."""
        check_shared("ActivityPerturbation", self.tangents)
        # A key of its own gives each device an estimate of its own.
        over = _mesh.axes(key)
        params = jax.tree.map(lambda leaf: _mesh.vary(leaf, over), problem.params)
        sites = self.sites(dataclasses.replace(problem, params=params))
        scales = scales_of(sites, self.scales, "ActivityPerturbation")
        if self.memory == "replay" and sites.noisy:
            return self._replayed(key, sites, scales)
        noise = self._draw(key, sites, scales)
        out = keep.push(sites, noise, self.num_tangents)
        value = keep.value(sites, out.losses)
        if self.memory == "shared":
            return value, out.aux, self._shared(sites, scales, noise, out, over)
        slopes = self._slopes(sites, scales, out) if noise else {}
        return value, out.aux, self._assembled(sites, noise, slopes, out.records)

    def calibrate(
        self,
        loss: Callable[..., Any],
        *,
        argnums: int | Sequence[int] = 0,
        has_aux: bool = False,
        in_axes: Any = None,
        draws: int = 8,
    ) -> Callable[..., Self]:
        """Find the scales that give the estimate on this loss the least error.

        Sites share slopes, so that each hears the noise of the others. With error δ_s and local
        Jacobian J_s of site s the noise's second moment is (Σ σ_s²|δ_s|²)(Σ |J_s|²/σ_s²), least for
        σ_s² = |J_s|/|δ_s|. Where examples, positions or parts of the loss have slopes of their own
        it is Σ_st Q_st σ_t²/σ_s², with Q_st the part of t's noise that s hears, least where each
        site's row and column have one sum. A call multiplies σ_s² by √(row/column), which is the
        formula above where all share their slopes; called again it goes on from there.

        With S sites a draw costs 2S forward passes with slopes and 2S assemblies, about 2S steps of
        backprop, and the memory of `memory="keep"`; no error crosses two sites. One step is
        compiled and repeated; inside `jax.jit` that is a loop, which is slow on CPU if it holds
        convolutions.

        Args:
            loss: as for `forwax.value_and_grad`.
            argnums: as for `forwax.value_and_grad`.
            has_aux: as for `forwax.value_and_grad`.
            in_axes: as for `forwax.value_and_grad`.
            draws: over how many noises moments are averaged; each example counts by itself, so that
                few are enough with a batch.

        Returns:
            A function `f(key, *args, **kwargs)` that returns the rule with scales of geometric mean
            1, between 1e-4 and 1e4; a site whose moments are zero or not finite gets 1.

        Raises:
            ValueError: when `draws` is not a positive integer, or for a bad field.

        Example:
            >>> import jax, jax.numpy as jnp, forwax as fx
            >>> def loss(params, x):  # the second error is a hundredth of the first
            ...     first, second = jnp.tanh(params["a"] * x), jnp.tanh(params["b"] * x)
            ...     return jnp.sum((first + second / 100) @ params["out"])
            >>> params = {"a": jnp.zeros(3), "b": jnp.zeros(3), "out": jnp.ones((3, 2))}
            >>> calibrate = fx.ActivityPerturbation().calibrate(loss, in_axes=(None, 0))
            >>> rule = calibrate(jax.random.key(0), params, jnp.ones((5, 3)))
            >>> first, second = rule.scales  # σ² is as the error's inverse: 1 to 100
            >>> bool(8 < second / first < 12)
            True
        """
        name = "ActivityPerturbation.calibrate"
        draws = check_count(name, "draws", draws)
        signature = Signature(loss, argnums, has_aux, in_axes, name)

        def calibrated(key: Any, /, *args: Any, **kwargs: Any) -> Self:
            key = typed_key(check_key(key, name))
            sites = self.sites(signature.bind(args, kwargs))
            return self._calibrated(jax.random.split(key, draws), sites)

        return calibrated

    def _calibrated(self, keys: Array, sites: Sites) -> Self:
        """This rule with the next scales."""
        given = self.scales
        if given is None:
            given = [site.scale for site in sites.noisy]
        scales = scales_of(sites, given, "ActivityPerturbation")
        # The law is of second moments: signs have the least spread.
        signs = dataclasses.replace(
            self, tangents=Rademacher(), num_tangents=1, combine=Mean()
        )

        def draw(key: Array) -> list[Array]:
            return signs._draw(key, sites, scales)

        def errors(out: Pass, noise: Sequence[Array]) -> Values:
            slopes = signs._slopes(sites, scales, out, _mesh.axes(keys))
            pairs = zip(sites.noisy, noise, strict=True)
            return {s.variable: weighted(slopes[s.variable], u) for s, u in pairs}

        given = jnp.asarray(given, jnp.float32)
        found = balanced(given, *moments(sites, draw, errors, keys))
        return dataclasses.replace(self, scales=found)

    def _draw(self, key: Array, sites: Sites, scales: Scales) -> list[Array]:
        """The noise [k, ...] of all noisy sites."""
        own = self.memory != "shared"
        noise = draw_noise(sites, self.tangents, key, self.num_tangents, own_slopes=own)
        pairs = zip(sites.noisy, noise, strict=True)
        return [scaled(u, scales.get(site.variable)) for site, u in pairs]

    def _slopes(
        self,
        sites: Sites,
        scales: Scales,
        out: Pass,
        over: _mesh.Axes = frozenset(),
    ) -> dict[Variable, Array]:
        """For each noisy site what multiplies its noise: [k, ...], axes that broadcast to it.

        `over` are the mesh axes of each device's own key, which count where examples share slopes.
        """
        products = keep.products(sites, out) if sites.credit else []
        decay = None if self.credit is None else self.credit.rate
        # Sites that hear of the same have their slopes summed once.
        sums: dict[Any, Array] = {}
        slopes: dict[Variable, Array] = {}
        for site in sites.noisy:
            site_credits = tuple(sites.credit.get(site.variable, ()))
            hears = (
                site.reach,
                site.mapped,
                site.axes,
                site_credits,
                site.shape if site_credits else (),
            )
            if hears not in sums:
                if sites.credit:
                    sums[hears] = told_apart(site, site_credits, products, sites, decay)
                elif self.memory == "shared":
                    # One slope for all examples, as in `_shared`.
                    alike = dataclasses.replace(site, mapped=False, axes=over)
                    sums[hears] = credited(alike, out.slopes, sites)
                else:
                    sums[hears] = credited(site, out.slopes, sites)
            slope = sums[hears] * self._share(sites, scales, site)
            slopes[site.variable] = divided(slope, scales.get(site.variable))
        return slopes

    def _assembled(
        self,
        sites: Sites,
        noise: Sequence[Array],
        slopes: Mapping[Variable, Array],
        records: Values,
    ) -> Tree:
        """The gradient from each site's noise and slopes."""
        errors = keep.output_errors(sites, records)
        for site, u in zip(sites.noisy, noise, strict=True):
            errors[site.variable] = weighted(slopes[site.variable], u)
        return keep.assemble(sites, records, errors)

    def _replayed(
        self, key: Array, sites: Sites, scales: Scales
    ) -> tuple[Array, Tree, Tree]:
        """As `_assembled`, by a second evaluation with the same noise once the slopes are known."""
        first = self._source(key, sites, scales)
        if isinstance(first, Drawn):
            out = push_drawn(sites, first)
        else:
            noise = [first.values[site.variable] for site in sites.noisy]
            out = keep.push(sites, noise, self.num_tangents)
        exact = keep.output_errors(sites, out.records)
        slopes = self._slopes(sites, scales, out)
        slopes = {
            s.variable: of_a_step(sites, s, slopes[s.variable]) for s in sites.noisy
        }

        def error(site: Site, u: Array) -> Array:
            return weighted(slopes[site.variable], u)

        again = behind_slopes(sites, out.slopes)
        grads = replay(again, self._source(key, again, scales), exact, error)
        return keep.value(sites, out.losses), out.aux, grads

    def _source(self, key: Array, sites: Sites, scales: Scales) -> Drawn | Held:
        """The noise for `memory="replay"`: drawn site by site where the tangents allow it."""
        tangents = cast(IndependentTangents, self.tangents)
        is_independent = tangents.one_by_one and not tangents.joint
        if not is_independent or not tangents.coordinatewise:
            # The axis of the outermost loop lies behind [k], or [k, examples].
            has_examples = sites.num_examples is not None
            loop_axis = {
                s.variable: 1 + (s.mapped and has_examples) for s in sites.noisy
            }
            noise = self._draw(key, sites, scales)
            return Held(dict(zip(loop_axis, noise, strict=True)), loop_axis)

        def draw(key: Array, like: Any) -> Array:
            real = tangents.draw_one(key, _tree.real_specs([like]))
            return _tree.from_real(real, [like])[0]

        return Drawn(typed_key(key), draw, self.num_tangents, scales=scales)

    def _shared(
        self,
        sites: Sites,
        scales: Scales,
        noise: Sequence[Array],
        out: Pass,
        over: _mesh.Axes,
    ) -> Tree:
        """All examples with one slope.

        The noise's own gradient needs no slope, so that nothing is kept for later.
        """
        exact = keep.output_errors(sites, out.records)
        total = keep.assemble(sites, out.records, exact)

        def pulled_back(noise: Values) -> tuple[Tree, None]:
            errors = jax.tree.map(jnp.conj, noise)
            return keep.assemble(sites, out.records, errors), None

        for mask in dict.fromkeys(site.reach for site in sites.noisy):
            of_mask: Values = {}
            for site, u in zip(sites.noisy, noise, strict=True):
                if site.reach == mask:
                    of_mask[site.variable] = divided(u, scales.get(site.variable))
            first = next(site for site in sites.noisy if site.reach == mask)
            shared = dataclasses.replace(first, mapped=False, axes=over)
            slopes = credited(shared, out.slopes, sites)
            gradients, _ = over_tangents(pulled_back, of_mask, self.num_tangents)
            total = plus(total, slopes * self._share(sites, scales, first), gradients)
        return total

    def _share(self, sites: Sites, scales: Scales, site: Site) -> float | Array:
        """1/k, and for `Shrinkage` the factor that suits what a slope here hears."""
        k = self.num_tangents
        if not isinstance(self.combine, Shrinkage):
            return 1 / k
        own_slopes = self.memory != "shared"
        heard = [shared_noise(sites, site, other, own_slopes) for other in sites.noisy]
        n = max(math.ceil(sum(heard)), 1)
        # A slope may hear fewer coordinates than were drawn jointly: then the law is below zero.
        law = max(self.tangents.relative_mse(n, k), 0)
        if scales:  # what is heard counts as σ² here and there says
            powers = [jnp.square(scales[s.variable].astype(float)) for s in sites.noisy]
            own = jnp.square(scales[site.variable].astype(float))
            scaled_up = sum(h * p for h, p in zip(heard, powers, strict=True))
            law = law * scaled_up / (own * max(sum(heard), 1))
        return 1 / (k * (1 + law))

    def law(self, problem: Problem) -> float | None:
        """None: each slope's error grows with the noise that shares it, a number for each site."""
        return None

    def relative_mse(self, n: int) -> float:
        """The law of the tangents for n noise coordinates that share a slope (not parameters).

        NaN with scales: how much each site adds then matters, which `forwax.diagnose` measures.
        """
        if self.scales is not None:
            return math.nan
        mean = self.tangents.relative_mse(n, self.num_tangents)
        return self.combine.relative_mse(mean, n, self.num_tangents)

    def learning_rate_scale(self, n: int) -> float:
        """1 / (1 + M) for the law M of n noise coordinates that share a slope; NaN with scales."""
        if self.scales is not None:
            return math.nan
        return self.combine.learning_rate_scale(
            self.tangents.relative_mse(n, self.num_tangents)
        )
