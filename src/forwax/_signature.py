"""The user's signature, normalised once: argnums, has_aux, in_axes and LocalLosses become one kind of function.

Behind this door there is only `Problem`: parameters, and an objective that takes them to a scalar.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _mesh
from forwax._tree import Tree, describe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalLosses:
    """Losses of a program's parts, whose sum is the objective.

    Return it from a loss in place of a scalar: a rule may then credit each part with the losses
    that it can reach.

    Attributes:
        tree: a pytree of real floating arrays of any shapes; the objective is the sum of all their
            entries.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> loss = lambda w: fx.LocalLosses({"first": w**2, "second": jnp.sum(w)})
        >>> value, grads = fx.value_and_grad(loss, fx.Exact())(jax.random.key(0), jnp.array([1.0, 2.0]))
        >>> float(value), grads.tolist()
        (8.0, [3.0, 5.0])
    """

    tree: Tree


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a rule gets: the differentiated arguments and the objective as a function of them alone.

    Attributes:
        params: the differentiated argument, or the tuple of them when `argnums` is a sequence.
        objective: takes params to `(value, aux)`, a real floating scalar and a pytree of arrays.
        restore: takes the objective's aux to the user's own, in which leaves need not be arrays.
        example: takes params and one example's mapped leaves to `(losses, aux)`: the loss of one
            example, or of the whole batch when nothing is mapped, as the list of its parts, whose
            sum it is.
        mapped: the arrays of all examples.
        mapped_axes: the axis of examples of each of them.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, forwax as fx
        >>> @dataclasses.dataclass(frozen=True)
        ... class Doubled(fx.Exact):
        ...     def estimate(self, key, problem):
        ...         value, aux = problem.objective(problem.params)
        ...         return value, aux, jax.tree.map(lambda x: 2 * x, problem.params)
        >>> fx.grad(lambda x: jnp.sum(x**2), Doubled())(jax.random.key(0), jnp.array([1.0, 2.0])).tolist()
        [2.0, 4.0]
    """

    params: Tree
    objective: Callable[[Tree], tuple[Array, Tree]]
    restore: Callable[[Tree], Tree]
    example: Callable[..., tuple[list[Array], Tree]]
    mapped: tuple[Array, ...] = ()
    mapped_axes: tuple[int, ...] = ()

    @property
    def num_examples(self) -> int | None:
        """The number of examples; None without `in_axes`."""
        return self.mapped[0].shape[self.mapped_axes[0]] if self.mapped else None

    def example_specs(self) -> list[Any]:
        """One example's mapped leaves, to trace with: shapes and dtypes, or inside `shard_map` the first example."""

        def one(x: Array, axis: int) -> Any:
            shape = list(x.shape)
            del shape[axis]
            if _mesh.axes(x):  # a spec cannot say over which mesh axes a value varies
                return jax.lax.index_in_dim(x, 0, axis, keepdims=False)
            return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

        return [one(x, axis) for x, axis in zip(self.mapped, self.mapped_axes, strict=True)]


@dataclasses.dataclass(frozen=True)
class Signature:
    """How the user's loss is called: the arguments of `forwax.value_and_grad` but for the rule.

    Attributes:
        loss: the user's function.
        argnums: which of its arguments are differentiated.
        has_aux: whether it returns `(loss, aux)`.
        in_axes: which of its arguments are mapped.
        name: the function that the user called, for errors.
        keyed: whether what that returned takes a key before the loss's arguments.
    """

    loss: Callable[..., Any]
    argnums: int | Sequence[int]
    has_aux: bool
    in_axes: Any
    name: str = "value_and_grad"
    keyed: bool = True

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(
                f"{self.name}: expected a function as the loss, got {type(self.loss).__name__}."
            )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        """Fix everything but the differentiated arguments; raises on a bad call before the loss is run."""
        numbers = self._numbers(len(args))
        in_axes = self._in_axes(args, numbers)
        for number in numbers:
            _check_leaves(args[number])
        params = tuple(jax.tree.map(jnp.asarray, args[number]) for number in numbers)
        statics = _Statics()

        def one(*full: Any) -> tuple[Array, Tree]:
            value, aux = self._call(full, kwargs)
            return objective_value(value), statics.split(aux)

        def objective(params: Tree) -> tuple[Array, Tree]:
            chosen = params if isinstance(self.argnums, Sequence) else (params,)
            full = list(args)
            for number, value in zip(numbers, chosen, strict=True):
                full[number] = value
            if in_axes is None:
                return one(*full)
            values, aux = jax.vmap(one, in_axes)(*full)
            return jnp.mean(values), aux

        mapped, axes, rebuild = _split_mapped(args, in_axes)

        def example(params: Tree, *slices: Array) -> tuple[list[Array], Tree]:
            chosen = params if isinstance(self.argnums, Sequence) else (params,)
            full = rebuild(slices)
            for number, value in zip(numbers, chosen, strict=True):
                full[number] = value
            out, aux = self._call(full, kwargs)
            return loss_parts(out), statics.split(aux)

        chosen = params if isinstance(self.argnums, Sequence) else params[0]
        return Problem(chosen, objective, statics.join, example, mapped, axes)

    def _numbers(self, num_args: int) -> tuple[int, ...]:
        numbers = tuple(self.argnums) if isinstance(self.argnums, Sequence) else (self.argnums,)
        for number in numbers:
            if not -num_args <= number < num_args:
                raise TypeError(
                    f"{self.name}: argnums={self.argnums} needs at least "
                    f"{number + 1 if number >= 0 else -number} "
                    f"positional arguments{' after the key' if self.keyed else ''}, got "
                    f"{num_args}. argnums count the "
                    f"loss's own arguments: call f({'key, ' if self.keyed else ''}*args)."
                )
        numbers = tuple(number % num_args for number in numbers)
        if len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{self.name}: expected each argument once in argnums, got {self.argnums} for "
                f"{num_args} arguments. "
                "The gradient of an argument that is named twice would be split between both."
            )
        return numbers

    def _in_axes(self, args: tuple[Any, ...], numbers: tuple[int, ...]) -> tuple[Any, ...] | None:
        if self.in_axes is None:
            return None
        in_axes = (
            (self.in_axes,) * len(args) if isinstance(self.in_axes, int) else tuple(self.in_axes)
        )
        if len(in_axes) != len(args):
            raise ValueError(
                f"in_axes must have one entry for each positional argument of the loss: expected "
                f"{len(args)}, got "
                f"{len(in_axes)} in {self.in_axes}. Keyword arguments are not mapped."
            )
        for number in numbers:
            if jax.tree.leaves(in_axes[number]):
                raise ValueError(
                    f"in_axes maps argument {number}, which is differentiated: got "
                    f"in_axes[{number}]="
                    f"{in_axes[number]}. The loss of one example takes all parameters; write None "
                    f"there, as in "
                    "in_axes=(None, 0, 0)."
                )
        if not jax.tree.leaves(in_axes):
            raise ValueError(
                f"in_axes={self.in_axes} maps no argument, so there are no examples. Pass "
                f"in_axes=None for a loss of "
                "the whole batch."
            )
        _check_batch(in_axes, args)
        return in_axes

    def _call(self, full: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Tree]:
        out = self.loss(*full, **kwargs)
        if not self.has_aux:
            return out, None
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"has_aux=True: expected the loss to return a pair (loss, aux), got "
                f"{_type_name(out)}. Return a pair, "
                "or drop has_aux."
            )
        return out


class _Statics:
    """Keeps the leaves of aux that are not arrays aside while the arrays pass through JAX's transformations."""

    def __init__(self) -> None:
        self.leaves: list[Any] = []
        self.structure: Any = None

    def split(self, aux: Tree) -> list[Any]:
        self.leaves, self.structure = jax.tree.flatten(aux)
        arrays = [leaf for leaf in self.leaves if _is_array(leaf)]
        self.leaves = [None if _is_array(leaf) else leaf for leaf in self.leaves]
        return arrays

    def join(self, arrays: list[Any]) -> Tree:
        remaining = iter(arrays)
        return self.structure.unflatten(
            [next(remaining) if leaf is None else leaf for leaf in self.leaves]
        )


def objective_value(out: Any) -> Array:
    """The scalar objective of what a loss returned: itself, or the sum of all entries of its local losses."""
    sums = [jnp.sum(part) if part.ndim else part for part in loss_parts(out)]
    return sum(sums[1:], start=sums[0])


def loss_parts(out: Any) -> list[Array]:
    """The parts of what a loss returned, of any shapes, whose sum is the objective."""
    if isinstance(out, LocalLosses):
        leaves = jax.tree.leaves(out.tree)
        if not leaves:
            raise TypeError("LocalLosses: expected at least one array, got an empty tree.")
        return [_checked_real(leaf) for leaf in leaves]
    if not _is_array(out) or jnp.shape(out) != ():
        shown = f"shape: {jnp.shape(out)}" if _is_array(out) else f"type: {_type_name(out)}"
        raise TypeError(
            f"Gradient only defined for scalar-output functions. Output had {shown}. Return a "
            f"scalar, "
            "forwax.LocalLosses(tree) for the sum of several losses, or (loss, aux) with "
            "has_aux=True."
        )
    return [_checked_real(out)]


def _split_mapped(
    args: tuple[Any, ...], in_axes: Any
) -> tuple[tuple[Array, ...], tuple[int, ...], Callable]:
    """The mapped leaves of the arguments, their axes, and how to put slices of them back."""
    leaves, structure = jax.tree.flatten(args)
    axes: list[int | None] = []
    if in_axes is None:
        axes = [None] * len(leaves)
    else:
        jax.tree.map(
            lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part))),
            in_axes,
            args,
            is_leaf=_is_none,
        )
    mapped = tuple(
        jnp.asarray(leaf) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None
    )

    def rebuild(slices: Sequence[Array]) -> list[Any]:
        remaining = iter(slices)
        full = [
            leaf if axis is None else next(remaining)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return list(structure.unflatten(full))

    return mapped, tuple(axis for axis in axes if axis is not None), rebuild


def _is_none(x: Any) -> bool:
    return x is None


def _checked_real(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            "value_and_grad requires real-valued outputs (output dtype that is a sub-dtype of "
            "np.floating), but got "
            f"{leaf.dtype}. Return a real loss, such as jnp.abs(z)**2 of a complex z."
        )
    return leaf


def _check_leaves(arg: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
        if not (_is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)):
            raise TypeError(
                "value_and_grad requires real- or complex-valued inputs (input dtype that is a "
                "sub-dtype of "
                f"np.inexact), but got {describe(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'the argument itself'}. "
                "Differentiate the floating leaves only: eqx.partition(model, "
                "eqx.is_inexact_array) for Equinox, "
                "nnx.split(model, nnx.Param, ...) for Flax NNX."
            )


def _check_batch(in_axes: tuple[Any, ...], args: tuple[Any, ...]) -> None:
    def check(axis: int | None, arg: Tree) -> None:
        if axis is None:
            return
        for leaf in jax.tree.leaves(arg):
            shape = jnp.shape(leaf)
            if not len(shape) > axis >= -len(shape):
                raise ValueError(
                    f"in_axes: expected arrays that have the axis {axis} along which they are "
                    f"mapped, got an argument "
                    f"of shape {shape}. Write None for what all examples share."
                )
            if shape[axis] == 0:
                raise ValueError(
                    f"in_axes: expected at least one example, got an empty batch: an argument of "
                    f"shape {shape} mapped "
                    f"along axis {axis}. The mean over no example is undefined."
                )

    jax.tree.map(check, in_axes, args, is_leaf=lambda x: x is None)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _type_name(value: Any) -> str:
    return f"a tuple of length {len(value)}" if isinstance(value, tuple) else type(value).__name__


_FIRST = (
    "The returned function takes one leading key before the loss's own "
    "arguments: "
    "f(jax.random.key(0), *args)."
)


def check_key(key: Any, name: str, what: str = "the first argument", advice: str = _FIRST) -> Array:
    """The PRNG key of a call, or an error that names what must be one and says what to do."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return key
        raise TypeError(
            f"{name}: expected one PRNG key as {what}, got an array of keys of shape {shape}. Take "
            f"one of them, or map "
            "over them with jax.vmap."
        )
    if dtype == np.uint32 and shape in ((2,), (4,)):
        return key
    raise TypeError(f"{name}: {what} must be a PRNG key, got {describe(key)}. {advice}")
