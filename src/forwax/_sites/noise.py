"""The noise of all sites: held from the start, or drawn again where it is needed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._programs.order import behind
from forwax._programs.program import Variable
from forwax._sites.levels import Level, LoopPlan
from forwax._sites.model import Sites
from forwax._sites.scales import Scales, scaled
from forwax._tree import Spec
from forwax.tangents import Tangents
from forwax.tangents._base import sampler, typed_key


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Noise of which each site draws its own, from a key of its own; inside a loop, in each step.

    Attributes:
        key: a typed PRNG key.
        draw: takes a key and what the noise is like to one direction of it.
        num_tangents: the number k of directions.
        keys: the keys [k] of the sites of one level.
        scales: what multiplies a site's noise, where that is not 1.
    """

    key: Array
    draw: Callable[[Array, Any], Array]
    num_tangents: int
    keys: Mapping[Variable, Array] = dataclasses.field(default_factory=dict)
    scales: Scales = dataclasses.field(default_factory=dict)

    def at_level(self, level: Level) -> "Drawn":
        """With the keys of a level's sites, made in one go, which compiles faster."""
        numbers = [v for region in level.regions for v in region.outputs]
        if not numbers:
            return self
        of_sites = jax.vmap(jax.random.fold_in, (None, 0))
        site_keys = of_sites(self.key, jnp.array(numbers, jnp.uint32))  # [sites]
        of_directions = jax.vmap(of_sites, (0, None))
        keys = of_directions(site_keys, jnp.arange(self.num_tangents))  # [sites, k]
        return dataclasses.replace(self, keys=dict(zip(numbers, keys, strict=True)))

    def one(self, variable: Variable, like: Any, index: Any, after: Array) -> Array:
        """One direction of a site's noise, drawn once `after` is there, so that none is kept."""
        key = self.keys[variable][index]
        # Before `after` hides that shards share a key.
        key = _mesh.own_key(key, _mesh.axes(like) - _mesh.axes(key))
        data = behind(jax.random.key_data(key), [after])
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
        return scaled(self.draw(key, like), self.scales.get(variable))

    def all(self, variable: Variable, like: Any, after: Array) -> Array:
        """All directions [k, ...]."""
        if self.num_tangents == 1:
            return self.one(variable, like, 0, after)[None]
        direction = functools.partial(self.one, variable, like)
        return jax.vmap(direction, (0, None))(jnp.arange(self.num_tangents), after)

    def slices(self, plan: LoopPlan) -> Any:
        """What a loop is to scan over to give each step its noise."""
        return jnp.arange(plan.loop.length, dtype=jnp.uint32)

    def inside(self, plan: LoopPlan, counter: Any) -> "Drawn":
        """The noise of one step."""
        # Variables are unique over nested bodies, and no site is a loop's output.
        loop_key = jax.random.fold_in(self.key, plan.equation.outputs[0])
        step_key = jax.random.fold_in(loop_key, counter)
        return dataclasses.replace(self, key=step_key).at_level(plan.level)


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Noise that was drawn at the start, since its coordinates depend on one another.

    Attributes:
        values: by the variable that it enters at: [k, ...], then the examples, then the loops
            around it.
        loop_axis: for each of these the axis of the outermost loop.
    """

    values: Mapping[Variable, Array]
    loop_axis: Mapping[Variable, int]

    def at_level(self, level: Level) -> "Held":
        """Itself: the noise of all levels is there."""
        return self

    def all(self, variable: Variable, like: Any, after: Array) -> Array:
        """All directions [k, ...]."""
        return self.values[variable]

    def slices(self, plan: LoopPlan) -> Any:
        """What a loop is to scan over to give each step its noise."""
        sites = [v for region, _ in plan.level.all_regions() for v in region.outputs]
        noisy = [v for v in sites if v in self.values]
        return {v: jnp.moveaxis(self.values[v], self.loop_axis[v], 0) for v in noisy}

    def inside(self, plan: LoopPlan, values: Any) -> "Held":
        """The noise of one step."""
        return dataclasses.replace(self, values=values)


def draw_noise(
    sites: Sites,
    tangents: Tangents,
    key: Array,
    num_tangents: int,
    *,
    own_slopes: bool = True,
) -> list[Array]:
    """The noise [k, *spec] of all noisy sites.

    Args:
        sites: a program with its sites.
        tangents: the distribution.
        key: a PRNG key.
        num_tangents: the number k of directions.
        own_slopes: whether each example has slopes of its own.
    """
    axes = [site.axes for site in sites.noisy]
    if sites.num_examples is None or not _by_example(sites, tangents, own_slopes):
        return _draw(tangents, key, sites.specs(), axes, num_tangents)
    specs = [Spec(site.shape, site.dtype) for site in sites.noisy]
    keys = jax.random.split(typed_key(key), sites.num_examples)

    def of_example(key: Array) -> list[Array]:
        return _draw(tangents, key, specs, axes, num_tangents)

    return jax.vmap(of_example, out_axes=1)(keys)  # [k, examples, *shape]


def num_coordinates(
    sites: Sites, tangents: Tangents, *, own_slopes: bool = True
) -> int:
    """The number n of real coordinates of one direction that `draw_noise` draws."""
    if _by_example(sites, tangents, own_slopes):
        return sum(site.size for site in sites.noisy)
    return _tree.num_coordinates(sites.specs())


def _by_example(sites: Sites, tangents: Tangents, own_slopes: bool) -> bool:
    """Whether each example draws a direction of its own.

    Where coordinates depend on one another, a slope must hear a whole direction for the tangents'
    law to hold.
    """
    own = own_slopes and all(site.mapped for site in sites.noisy)
    return own and sites.num_examples is not None and not tangents.coordinatewise


def _draw(
    tangents: Tangents,
    key: Array,
    specs: Sequence[Spec],
    axes: Sequence[_mesh.Axes],
    num_tangents: int,
) -> list[Array]:
    """Noise [k, *spec] for each spec, in one draw.

    Specs of one shape are stacked, which compiles faster.
    """
    if not specs:
        return []
    places: dict[Any, list[int]] = {}
    for place, (spec, over) in enumerate(zip(specs, axes, strict=True)):
        places.setdefault((spec.shape, spec.dtype, over), []).append(place)
    stacked = [
        _mesh.like((len(stack), *shape), dtype, over)
        for (shape, dtype, over), stack in places.items()
    ]
    draw = sampler(tangents, key, stacked, num_tangents, hold=True)
    noise: dict[int, Array] = {}
    for stack, drawn in zip(
        places.values(), draw(jnp.arange(num_tangents)), strict=True
    ):
        for row, place in enumerate(stack):  # drawn: [k, stack, *shape]
            noise[place] = drawn[:, row]
    return [noise[place] for place in range(len(specs))]
