"""Where the noise of sites that are visited one by one comes from: drawn there and then, or held since the start."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh
from forwax.sites.order import behind
from forwax.sites.plan import LoopPlan
from forwax.sites.program import Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Noise of which each site draws its own, from a key of its own; inside a loop, in each step.

    Attributes:
        key: a typed PRNG key.
        draw: takes a key, what the noise is like and the index of a direction to that direction.
        num_tangents: the number k of directions.
    """

    key: Array
    draw: Callable[[Array, Any, Any], Array]
    num_tangents: int

    def one(self, variable: Variable, like: Any, index: Any, after: Array) -> Array:
        """One direction of a site's noise, drawn once the value `after` is there, so that it need not be kept."""
        key = _mesh.own_key(self.key, _mesh.axes(like) - _mesh.axes(self.key))  # `after` would hide that shards differ
        return self.draw(jax.random.fold_in(key, behind(jnp.uint32(variable), [after])), like, index)

    def all(self, variable: Variable, like: Any, after: Array) -> Array:
        """All directions [k, ...]."""
        if self.num_tangents == 1:
            return self.one(variable, like, 0, after)[None]
        return jax.vmap(lambda index: self.one(variable, like, index, after))(jnp.arange(self.num_tangents))

    def slices(self, plan: LoopPlan) -> Any:
        """What a loop is to scan over to give each step its noise."""
        return jnp.arange(plan.loop.length, dtype=jnp.uint32)

    def inside(self, plan: LoopPlan, counter: Any) -> "Drawn":
        """The noise of one step. No site has the number of a loop, so that no two keys are the same."""
        loop_key = jax.random.fold_in(self.key, plan.equation.outputs[0])
        return dataclasses.replace(self, key=jax.random.fold_in(loop_key, counter))


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Noise that was drawn at the start, since its coordinates depend on one another.

    Attributes:
        values: by the variable that it enters at: [k, ...], then the examples, then the loops around it.
        loop_axis: for each of these the axis of the outermost loop.
    """

    values: Mapping[Variable, Array]
    loop_axis: Mapping[Variable, int]

    def all(self, variable: Variable, like: Any, after: Array) -> Array:
        """All directions [k, ...]."""
        return self.values[variable]

    def slices(self, plan: LoopPlan) -> Any:
        """What a loop is to scan over to give each step its noise."""
        inner = [v for region, _ in plan.level.all_regions() for v in region.outputs if v in self.values]
        return {v: jnp.moveaxis(self.values[v], self.loop_axis[v], 0) for v in inner}

    def inside(self, plan: LoopPlan, values: Any) -> "Held":
        """The noise of one step."""
        return dataclasses.replace(self, values=values)
