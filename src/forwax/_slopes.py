"""Slopes on the wire: keys and a few numbers, from which a step of any size can be rebuilt.

That a step of zeroth order is a seed and a number is an idea of MeZO (Malladi et al. 2023, arXiv
2305.17333); FedKSeed (Qin et al. 2024, arXiv 2312.06353) and DeComFL (Li et al. 2025, arXiv
2405.15861) send them over networks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh
from forwax._signature import check_key
from forwax._tree import Tree
from forwax.tangents._base import typed_key

Form = tuple[str, ...]
"""What parameters are made of: for each leaf its path, dtype and shape."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Slopes:
    """What one step knows of a loss: keys, and the weights of the directions that they draw.

    The estimate is ĝ = Σ_ij weights_ij v_j(keys_i), which `forwax.replay` subtracts from any
    parameters, bit for bit as `forwax.update` does. So these few numbers can be sent, kept and
    summed in place of gradients: 4k bytes for k tangents, and 8 for a key.

    A pytree of two arrays: what no method does is arithmetic on `weights`, by
    `dataclasses.replace(slopes, weights=...)`.

    Attributes:
        keys: the data of s keys, uint32 [s, words], as `jax.random.key_data` gives them.
        weights: the slopes times the combination's factor, 1/k for `combine.Mean`: [s, k] in at
            least float32. With a slope for each of N examples [s, k, N], whose mean over examples
            it is.
        impl: the keys' generator, as `jax.random.key_impl` names it.
        form: the paths, dtypes and shapes of the parameters, which `replay` compares with its own;
            None where the slopes come from elsewhere, and nothing is compared.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w: jnp.sum(w**2)
        >>> value, slopes = fx.slopes(loss)(jax.random.key(0), jnp.ones(3))
        >>> slopes.keys.shape, slopes.weights.shape, slopes.impl
        ((1, 2), (1, 1), 'threefry2x32')
        >>> w = fx.replay(loss)(slopes, 0.1, jnp.ones(3))
        >>> expected = fx.update(loss, learning_rate=0.1)(jax.random.key(0), jnp.ones(3))[1]
        >>> bool(jnp.all(w == expected))
        True
    """

    keys: Array
    weights: Array
    impl: str = dataclasses.field(default="threefry2x32", metadata={"static": True})
    form: Form | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def typed_keys(self) -> Array:
        """The keys themselves [s]."""
        return jax.random.wrap_key_data(self.keys, impl=self.impl)

    def gather(self, axis: str | tuple[str, ...], key: Array | None = None) -> "Slopes":
        """Those of all W devices along mesh axes, as slopes of their mean: inside `jax.shard_map`.

        All that crosses the network are weights and keys, 4(k + 2) bytes from each device for one
        key of `threefry2x32`; with `key` 4k.

        Args:
            axis: the mesh axis, or several.
            key: a key that all devices share and of which theirs are `jax.random.fold_in(key,
                jax.lax.axis_index(axis))`: keys are then derived, not sent. Where a device has
                another one all weights are NaN, so that a mistake stops the run.

        Returns:
            Slopes [W · s, ...] in the order of the axis, the weights divided by W.

        Raises:
            ValueError: when keys are derived and a device has several.

        Example:
            >>> import jax, jax.numpy as jnp, forwax as fx
            >>> mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
            >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
            >>> def step(key, w, x):
            ...     own = jax.random.fold_in(key, jax.lax.axis_index("d"))
            ...     value, mine = fx.slopes(loss)(own, w, x)
            ...     world = mine.gather("d")
            ...     return jax.lax.pmean(value, "d"), fx.replay(loss)(world, 0.1, w, x)
            >>> P = jax.sharding.PartitionSpec
            >>> step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P())
            >>> value, w = jax.jit(step)(jax.random.key(0), jnp.ones(3), jnp.eye(3))
            >>> float(value)
            1.0
        """
        check_form("Slopes.gather", self)
        weights = self.weights
        if key is None:
            keys = _mesh.side_by_side(self.keys, axis)
        else:
            if len(self.keys) != 1:
                raise ValueError(
                    "Slopes.gather: expected one key on each device, which key= derives anew, got "
                    f"{len(self.keys)}. Leave key= out, so that keys are sent."
                )
            shared = typed_key(check_key(key, "Slopes.gather", "key="))
            # Made on every device, so that none need be sent.
            count = _mesh.size([axis] if isinstance(axis, str) else axis)
            keys = derived(shared, jnp.arange(count))
            own = keys[lax.axis_index(axis)]
            # No error can be raised here: what a device holds is not known yet.
            is_own = jnp.all(own == self.keys[0])
            weights = jnp.where(is_own, weights, jnp.nan)
        weights = _mesh.side_by_side(weights, axis)
        share = len(self.weights) / len(weights)  # 1/W
        return dataclasses.replace(self, keys=keys, weights=weights * share)

    def scaled(self, x: Any) -> "Slopes":
        """The same with weights times a number or an array that broadcasts to them.

        With a mask [N] over examples, for instance.

        Example:
            >>> import jax.numpy as jnp, forwax as fx
            >>> slopes = fx.Slopes(jnp.zeros((1, 2), jnp.uint32), jnp.ones((1, 3)))
            >>> slopes.scaled(0.5).weights.tolist()
            [[0.5, 0.5, 0.5]]
        """
        check_form("Slopes.scaled", self)
        factor = jnp.asarray(x, self.weights.dtype)
        factors = jnp.broadcast_to(factor, self.weights.shape)
        # Not by promotion of ranks or types, which users may forbid.
        return dataclasses.replace(self, weights=self.weights * factors)

    def concatenate(self, *others: "Slopes") -> "Slopes":
        """The slopes of all keys, whose estimate is the sum of theirs.

        Raises:
            ValueError: when generators, shapes or parameters are not the same.

        Example:
            >>> import jax.numpy as jnp, forwax as fx
            >>> slopes = fx.Slopes(jnp.zeros((1, 2), jnp.uint32), jnp.ones((1, 3)))
            >>> slopes.concatenate(slopes, slopes).weights.shape
            (3, 3)
        """
        parts = (self, *others)
        first = _signature_of(self)
        for part in parts:
            check_form("Slopes.concatenate", part)
            got = _signature_of(part)
            if got != first:
                raise ValueError(
                    "Slopes.concatenate: expected slopes of one generator and one shape but for "
                    f"the number of keys, {first}, got {got}. Take all with the same kind of key "
                    "and the same rule."
                )
        forms = {part.form for part in parts if part.form is not None}
        if len(forms) > 1:
            raise ValueError(
                "Slopes.concatenate: expected slopes of the same parameters, got "
                f"{len(forms)} kinds: {_difference(*list(forms)[:2])}."
            )
        return dataclasses.replace(
            self,
            keys=jnp.concatenate([part.keys for part in parts]),
            weights=jnp.concatenate([part.weights for part in parts]),
            form=next(iter(forms), None),
        )

    def mean(self) -> "Slopes":
        """The slopes of the mean over examples: weights [s, k] of [s, k, N].

        Raises:
            ValueError: when there is no axis of examples.

        Example:
            >>> import jax.numpy as jnp, forwax as fx
            >>> each = fx.Slopes(jnp.zeros((1, 2), jnp.uint32), jnp.arange(4.0).reshape(1, 1, 4))
            >>> each.mean().weights.tolist()
            [[1.5]]
        """
        check_form("Slopes.mean", self)
        if self.weights.ndim == 2:
            raise ValueError(
                "Slopes.mean: expected a slope for each example, weights [s, k, N], got "
                f"{list(self.weights.shape)}, which are those of the mean already. "
                "forwax.slopes(..., per_example=True) gives each example's."
            )
        return dataclasses.replace(self, weights=jnp.mean(self.weights, axis=2))


_FACTORS = " in factors "


def form_of(params: Tree, splits: Sequence[Any] | None = None) -> Form:
    """Path, dtype and shape of each leaf, and the axes of its two factors where it has some."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    # Text, as it is compared, shown in errors and kept as a static part of a pytree.
    form: list[str] = []
    for i, (path, leaf) in enumerate(leaves):
        text = f"{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}"
        split = splits[i] if splits else None
        if split is not None:
            left, right = split
            text += f"{_FACTORS}{sorted(left)} x {sorted(right)}"
        form.append(text)
    return tuple(form)


def without_factors(form: Form) -> Form:
    """Paths, dtypes and shapes alone."""
    return tuple(text.partition(_FACTORS)[0] for text in form)


def check_params(
    name: str,
    form: Form | None,
    params: Tree,
    splits: Sequence[Any] | None = None,
) -> None:
    """Raise a ValueError where slopes are those of other parameters, or of another loss."""
    if form is None:
        return
    got = form_of(params, splits)
    expected = without_factors(form) if splits is None else form
    if got == expected:
        return
    raise ValueError(
        f"{name}: expected parameters such as the slopes were taken of, got others: "
        f"{_difference(expected, got)}. Each leaf's path, dtype and shape decide on the directions "
        "that a key draws, and so do the factors in which the loss uses it."
    )


def check_form(name: str, slopes: Any) -> None:
    """Raise for what is no `Slopes` of keys [s, words] and weights [s, k] or [s, k, N]."""
    if not isinstance(slopes, Slopes):
        got = type(slopes).__name__
        raise TypeError(f"{name}: expected forwax.Slopes, got {got}.")
    keys = slopes.keys
    weights = slopes.weights
    is_data = keys.dtype == jnp.uint32 and keys.ndim == 2
    is_real = jnp.issubdtype(weights.dtype, jnp.floating) and weights.ndim in (2, 3)
    if is_data and is_real and len(keys) == len(weights):
        return
    shown = [f"{x.dtype}{list(x.shape)}" for x in (keys, weights)]
    raise ValueError(
        f"{name}: expected the data of keys, uint32[s, words], and weights [s, k] or [s, k, N] in "
        f"a floating type, got {shown[0]} and {shown[1]}. The data of typed keys [s] are "
        "jax.random.key_data(keys)."
    )


def derived(key: Array, numbers: Array) -> Array:
    """The data of `jax.random.fold_in` of a key and each of some numbers: [s, words]."""

    def one(number: Array) -> Array:
        own = jax.random.fold_in(key, number)
        return jax.random.key_data(own)

    if "rbg" in str(jax.random.key_impl(key)):
        # Under vmap this generator uses the first key of the batch alone.
        return lax.map(one, numbers)
    return jax.vmap(one)(numbers)


def _signature_of(slopes: Slopes) -> tuple[str, list[int], list[int]]:
    """What slopes must have in common to stand side by side."""
    return slopes.impl, list(slopes.keys.shape[1:]), list(slopes.weights.shape[1:])


def _difference(first: Form, second: Form) -> str:
    """The first leaf that two forms do not share."""
    for one, other in zip(first, second, strict=False):
        if one != other:
            return f"{one!r} and {other!r}"
    return f"{len(first)} and {len(second)} leaves"
