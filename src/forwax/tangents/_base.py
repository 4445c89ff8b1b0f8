"""What a distribution of tangents is, and how a rule draws from it."""

# pyright: strict, reportUnknownMemberType=false, reportUnnecessaryCast=false
# Whether a cast is needed hangs on the version of jax.

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from jax import Array

from forwax import _mesh, _tree
from forwax._signature import check_key
from forwax._tree import Spec, Tree


class Tangents(abc.ABC):
    """A distribution of random directions v with E[v vᵀ] = I over n real coordinates.

    Subclass `IndependentTangents` when the directions of one call can be drawn one by one, so that
    a rule holds one chunk of them, and this class when they are drawn jointly. A subclass is a
    frozen dataclass registered with `jax.tree_util.register_dataclass`.
    """

    coordinatewise: ClassVar[bool] = False
    """Whether a direction's entries are independent: each shard of a parameter can draw its own."""

    one_by_one: ClassVar[bool] = False
    """Whether `draw_at` draws directions of given indices alone: see `IndependentTangents`."""

    drawn_twice: ClassVar[bool] = False
    """Whether directions are worth drawing again from their key, as `forwax.update` does."""

    has_zeros: ClassVar[bool] = False
    """Whether entries may be zero: a slope that is not finite then stays with all others."""

    planned: ClassVar[Literal["signs", "factors"] | None] = None
    """As what `forwax.WeightPerturbation` follows directions that it draws and does not hold.

    "signs": a bit each, formed where a traced loss uses them; "factors": two thin matrices of signs
    whose product is never formed; None where what `draw` gives is held.
    """

    per_example: bool = False
    """Whether each example of `in_axes` has directions of its own; needs `planned` as "factors"."""

    @abc.abstractmethod
    def draw(
        self,
        key: Array,
        specs: Sequence[Spec],
        num_tangents: int,
    ) -> list[Array]:
        """Draw all directions of one call.

        Args:
            key: a typed PRNG key.
            specs: shape and dtype of each real leaf.
            num_tangents: the number k of directions.

        Returns:
            One array [k, *shape] per leaf, such that E[mean over j of v_j v_jᵀ] = I.
        """

    @abc.abstractmethod
    def relative_mse(self, n: int, num_tangents: int) -> float:
        """The exact E|ĝ - g|² / |g|² of ĝ = mean_j <g, v_j> v_j for n coordinates, k tangents."""

    def check(self, n: int, num_tangents: int) -> None:  # noqa: B027 (most refuse nothing)
        """Raise a ValueError when the distribution has no k directions for n real coordinates."""

    def sample(self, key: Array, like: Tree, num_tangents: int = 1) -> Tree:
        """Draw directions for a tree of parameters.

        Args:
            key: PRNG key, typed or legacy.
            like: a pytree of floating or complex arrays.
            num_tangents: the number k of directions.

        Returns:
            A pytree of the structure of `like`, each leaf [k, *leaf.shape] in the leaf's dtype.

        Example:
            >>> import jax, jax.numpy as jnp, forwax as fx
            >>> params = {"w": jnp.zeros((2, 3))}
            >>> fx.tangents.Rademacher().sample(jax.random.key(0), params, 4)["w"].shape
            (4, 2, 3)
        """
        key = check_key(
            key,
            "Tangents.sample",
            advice="Call tangents.sample(jax.random.key(0), like).",
        )
        directions = sampler(self, key, like, num_tangents, hold=True)
        return directions(jnp.arange(num_tangents))


class IndependentTangents(Tangents):
    """Directions that can be drawn one by one: direction j depends on the key and on j alone."""

    one_by_one: ClassVar[bool] = True

    joint: ClassVar[bool] = False
    """Whether directions of a call depend on one another: each needs the same key and its index."""

    @abc.abstractmethod
    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction: an array of shape and dtype `spec` per leaf."""

    def draw(
        self,
        key: Array,
        specs: Sequence[Spec],
        num_tangents: int,
    ) -> list[Array]:
        """Draw all directions of one call; see `Tangents.draw`."""
        return self.draw_at(key, specs, jnp.arange(num_tangents))

    def draw_at(
        self,
        key: Array,
        specs: Sequence[Spec],
        indices: Array,
    ) -> list[Array]:
        """Draw the directions of given indices [c] alone, the same for every cut into chunks."""
        return draw_each(self.draw_one, key, specs, indices)


def draw_each(
    draw_one: Callable[[Array, Sequence[Spec]], list[Array]],
    key: Array,
    specs: Sequence[Spec],
    indices: Array,
) -> list[Array]:
    """What `draw_one` draws for each of the indices [c], from a key of its own."""

    def one(index: Array) -> list[Array]:
        return draw_one(jax.random.fold_in(key, index), specs)

    if indices.shape[0] == 1:
        return [x[None] for x in one(indices[0])]
    if "rbg" in str(jax.random.key_impl(key)):
        # Under vmap this generator uses the first key of the batch alone.
        return cast(list[Array], jax.lax.map(one, indices))
    return jax.vmap(one)(indices)


def typed_key(key: Array) -> Array:
    """A legacy uint32 key as a typed one; typed keys pass through."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return cast(Array, jax.random.wrap_key_data(key))


def draw_in_one_axis(
    draw: Callable[..., Array], key: Array, shape: tuple[int, ...], dtype: Any
) -> Array:
    """The numbers of `draw(key, shape, dtype)`, which XLA's CPU compiles in a tenth of the time.

    Up to three axes are left as they are: stacks of matrices may be drawn in shards, and cost less.
    """
    if len(shape) <= 3:
        return draw(key, shape, dtype)
    return draw(key, (math.prod(shape),), dtype).reshape(shape)


def sampler(
    tangents: Tangents,
    key: Array,
    like: Tree,
    num_tangents: int,
    *,
    hold: bool = False,
) -> Callable[[Array], Tree]:
    """How a rule gets at its directions: a function from indices [c] to a tree with leading axis c.

    Directions that can be drawn one by one are drawn when asked for, unless `hold`; joint ones are
    held.
    """
    key = typed_key(key)
    specs = _tree.real_specs(like)
    tangents.check(_tree.num_coordinates(like), num_tangents)
    groups = _groups(tangents, like, _mesh.axes(key))

    def draw(
        key: Array,
        specs: Sequence[Spec],
        indices: Array,
    ) -> list[Array]:
        if tangents.one_by_one:
            return cast(IndependentTangents, tangents).draw_at(key, specs, indices)
        return tangents.draw(key, specs, num_tangents)

    def at(indices: Array) -> Tree:
        drawn: dict[int, Array] = {}
        for number, (over, members) in enumerate(groups):
            group_key = key
            # What varies over no further axes takes the key itself, as it does without a mesh.
            if over or number:
                group_key = _mesh.own_key(jax.random.fold_in(key, number), over)
            leaves = draw(group_key, [specs[i] for i in members], indices)
            drawn.update(zip(members, leaves, strict=True))
        in_order = [drawn[i] for i in range(len(specs))]
        return _tree.from_real(in_order, like, lead=1)

    if tangents.one_by_one and not hold:
        return at
    # What is drawn jointly is drawn once, whatever the chunks.
    held = at(jnp.arange(num_tangents))

    def held_at(indices: Array) -> Tree:
        if indices.shape[0] >= num_tangents:
            return held
        leaves = [x[indices] for x in jax.tree.leaves(held)]
        return _tree.with_leaves(held, leaves)

    return held_at


def sampler_of_examples(
    tangents: Tangents,
    key: Array,
    like: Tree,
    num_tangents: int,
    num_examples: int,
) -> Callable[[Array], Tree]:
    """As `sampler`, for each example from a key of its own: leading axes [c, examples]."""
    keys = jax.random.split(key, num_examples)

    def at(indices: Array) -> Tree:
        def one(key: Array) -> Tree:
            return sampler(tangents, key, like, num_tangents)(indices)

        # Under vmap the generator rbg uses the first key of the batch alone.
        is_rbg = "rbg" in str(jax.random.key_impl(key))
        drawn = cast(Tree, jax.lax.map(one, keys)) if is_rbg else jax.vmap(one)(keys)
        # [examples, c, *shape] -> [c, examples, *shape]
        leaves: list[Array] = jax.tree.leaves(drawn)
        return _tree.with_leaves(like, [jnp.swapaxes(x, 0, 1) for x in leaves])

    if tangents.one_by_one:
        return at
    held = at(jnp.arange(num_tangents))
    leaves: list[Array] = jax.tree.leaves(held)
    return lambda indices: _tree.with_leaves(like, [x[indices] for x in leaves])


def _groups(
    tangents: Tangents,
    like: Tree,
    key_axes: _mesh.Axes,
) -> list[tuple[_mesh.Axes, list[int]]]:
    """Leaves that vary over the same mesh axes beyond the key's; each group has its own key."""
    # An axis over which the key varies gives independent noise already.
    members: dict[_mesh.Axes, list[int]] = {}
    for i, over in enumerate(_mesh.tree_axes(like)):
        members.setdefault(over - key_axes, []).append(i)
    if len(members) > 1 and not tangents.coordinatewise:
        raise ValueError(
            f"{type(tangents).__name__} couples all coordinates of a direction, so inside "
            "shard_map all parameters must vary over the same mesh axes, got "
            f"{sorted(map(sorted, members))}. Use tangents.Rademacher() or tangents.Normal(), "
            "whose coordinates are independent."
        )

    def names(group: tuple[_mesh.Axes, list[int]]) -> list[str]:
        return sorted(group[0])

    return sorted(members.items(), key=names)
