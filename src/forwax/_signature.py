"""The user's signature, normalised once: argnums, has_aux, in_axes and LocalLosses.

Behind this door there is only `Problem`: parameters, and an objective that takes them to a scalar.
"""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax import _mesh
from forwax._checks import check_argnums
from forwax._tree import Tree, added, as_array, describe, with_leaves


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
        >>> value_and_grad = fx.value_and_grad(loss, fx.Exact())
        >>> value, grads = value_and_grad(jax.random.key(0), jnp.array([1.0, 2.0]))
        >>> float(value), grads.tolist()
        (8.0, [3.0, 5.0])
    """

    tree: Tree


def as_they_are(params: Tree) -> Tree:
    """Parameters in the types in which the loss gets them."""
    return params


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
        arguments: the arrays of the arguments that are not differentiated, as they were given.
        narrow: takes params to the types in which the loss gets them, where theirs are wider.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, forwax as fx
        >>> @dataclasses.dataclass(frozen=True)
        ... class Doubled(fx.Exact):
        ...     def estimate(self, key, problem):
        ...         value, aux = problem.objective(problem.params)
        ...         return value, aux, jax.tree.map(lambda x: 2 * x, problem.params)
        >>> grad = fx.grad(lambda x: jnp.sum(x**2), Doubled())
        >>> grad(jax.random.key(0), jnp.array([1.0, 2.0])).tolist()
        [2.0, 4.0]
    """

    params: Tree
    objective: Callable[[Tree], tuple[Array, Tree]]
    restore: Callable[[Tree], Tree]
    example: Callable[..., tuple[list[Array], Tree]]
    mapped: tuple[Array, ...] = ()
    mapped_axes: tuple[int, ...] = ()
    arguments: tuple[Any, ...] = ()
    narrow: Callable[[Tree], Tree] = as_they_are

    @property
    def num_examples(self) -> int | None:
        """The number of examples; None without `in_axes`."""
        if not self.mapped:
            return None
        axis = self.mapped_axes[0]
        return self.mapped[0].shape[axis]

    def example_specs(self) -> list[Any]:
        """One example's mapped leaves, to trace with.

        They are shapes and dtypes, or inside `shard_map` the first example.
        """
        pairs = zip(self.mapped, self.mapped_axes, strict=True)
        return [_example_spec(x, axis) for x, axis in pairs]


def _example_spec(x: Array, axis: int) -> Any:
    if _mesh.axes(x):
        # A spec cannot say over which mesh axes a value varies.
        return jax.lax.index_in_dim(x, 0, axis, keepdims=False)
    shape = list(x.shape)
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


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
            got = type(self.loss).__name__
            raise TypeError(f"{self.name}: expected a function as the loss, got {got}.")
        object.__setattr__(self, "argnums", check_argnums(self.name, self.argnums))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
        """Fix all but the differentiated arguments; a bad call raises before the loss is run."""
        numbers = self._numbers(len(args))
        in_axes = self._in_axes(args, numbers)
        for number in numbers:
            check_leaves(self.name, args[number])
        params = tuple(jax.tree.map(as_array, args[number]) for number in numbers)
        mapped = _Mapped(args, in_axes)
        statics = _Statics()

        def with_params(values: Sequence[Any], params: Tree) -> list[Any]:
            chosen = params if isinstance(self.argnums, Sequence) else (params,)
            arguments = list(values)
            for number, value in zip(numbers, chosen, strict=True):
                arguments[number] = value
            return arguments

        def loss(*arguments: Any) -> tuple[Array, Tree]:
            value, aux = self._call(arguments, kwargs)
            return objective_value(value), statics.split(aux)

        def objective(params: Tree) -> tuple[Array, Tree]:
            arguments = with_params(args, params)
            if in_axes is None:
                return loss(*arguments)
            # [examples], and in aux the leaves of each example stacked
            values, aux = jax.vmap(loss, in_axes)(*arguments)
            return jnp.mean(values), aux

        # Not mapped: a rule traces the loss of one example, and batches what it makes of it.
        def example(params: Tree, *slices: Array) -> tuple[list[Array], Tree]:
            arguments = with_params(mapped.replaced(slices), params)
            value, aux = self._call(arguments, kwargs)
            return loss_parts(value), statics.split(aux)

        return Problem(
            params=params if isinstance(self.argnums, Sequence) else params[0],
            objective=objective,
            restore=statics.join,
            example=example,
            mapped=mapped.arrays,
            mapped_axes=mapped.axes,
            arguments=_arrays(
                ([arg for i, arg in enumerate(args) if i not in numbers], kwargs)
            ),
        )

    def _numbers(self, num_args: int) -> tuple[int, ...]:
        """Which arguments are differentiated, counted from the front."""
        argnums = self.argnums
        numbers = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
        for number in numbers:
            if -num_args <= number < num_args:
                continue
            least = number + 1 if number >= 0 else -number
            after = " after the key" if self.keyed else ""
            key = "key, " if self.keyed else ""
            raise TypeError(
                f"{self.name}: argnums={argnums} needs at least {least} positional arguments"
                f"{after}, got {num_args}. argnums count the loss's own arguments: call "
                f"f({key}*args)."
            )
        # -1 and the last argument's own number mean the same argument.
        numbers = tuple(number % num_args for number in numbers)
        if len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{self.name}: expected each argument once in argnums, got {argnums} for "
                f"{num_args} arguments. The gradient of an argument that is named twice would be "
                "split between both."
            )
        return numbers

    def _in_axes(
        self, args: tuple[Any, ...], numbers: tuple[int, ...]
    ) -> tuple[Any, ...] | None:
        """One entry of `in_axes` for each argument."""
        if self.in_axes is None:
            return None
        if isinstance(self.in_axes, int):
            in_axes: tuple[Any, ...] = (self.in_axes,) * len(args)
        else:
            in_axes = tuple(self.in_axes)
        if len(in_axes) != len(args):
            raise ValueError(
                "in_axes must have one entry for each positional argument of the loss: expected "
                f"{len(args)}, got {len(in_axes)} in {self.in_axes}. Keyword arguments are not "
                "mapped."
            )
        for number in numbers:
            if jax.tree.leaves(in_axes[number]):
                raise ValueError(
                    f"in_axes maps argument {number}, which is differentiated: got "
                    f"in_axes[{number}]={in_axes[number]}. The loss of one example takes all "
                    "parameters; write None there, as in in_axes=(None, 0, 0)."
                )
        if not jax.tree.leaves(in_axes):
            raise ValueError(
                f"in_axes={self.in_axes} maps no argument, so there are no examples. Pass "
                "in_axes=None for a loss of the whole batch."
            )
        jax.tree.map(_check_batch, in_axes, args, is_leaf=_is_none)
        return in_axes

    def _call(
        self, arguments: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Any, Tree]:
        """What the loss returns, as a pair with or without `has_aux`."""
        out = self.loss(*arguments, **kwargs)
        if not self.has_aux:
            return out, None
        if isinstance(out, tuple):
            pair = cast(tuple[Any, ...], out)
            if len(pair) == 2:
                return pair
        raise TypeError(
            f"has_aux=True: expected the loss to return a pair (loss, aux), got {_type_name(out)}. "
            "Return a pair, or drop has_aux."
        )


class _Statics:
    """Keeps the leaves of aux that are no arrays aside while JAX transforms the arrays."""

    def __init__(self) -> None:
        self.leaves: list[Any] = []
        self.structure: Any = None

    def split(self, aux: Tree) -> list[Any]:
        """The arrays of aux; the rest is kept."""
        leaves = jax.tree.leaves(aux)
        # Arrays are not kept: inside a transformation they are tracers, which must not leave it.
        self.leaves = [None if is_array(leaf) else leaf for leaf in leaves]
        self.structure = cast(Any, jax.tree.structure(aux))
        return [leaf for leaf in leaves if is_array(leaf)]

    def join(self, arrays: list[Any]) -> Tree:
        """Aux again, with arrays in their places."""
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is None else leaf for leaf in self.leaves]
        return self.structure.unflatten(leaves)


class _Mapped:
    """The leaves of the arguments that `in_axes` maps, and their axes of examples."""

    def __init__(self, args: tuple[Any, ...], in_axes: tuple[Any, ...] | None) -> None:
        self.args = args
        self.leaves: list[Any] = jax.tree.leaves(args)
        self.leaf_axes = _leaf_axes(args, in_axes)
        pairs = zip(self.leaves, self.leaf_axes, strict=True)
        self.arrays = tuple(as_array(leaf) for leaf, axis in pairs if axis is not None)
        self.axes = tuple(axis for axis in self.leaf_axes if axis is not None)

    def replaced(self, slices: Sequence[Array]) -> list[Any]:
        """The arguments with slices in place of these leaves."""
        remaining = iter(slices)
        pairs = zip(self.leaves, self.leaf_axes, strict=True)
        leaves = [leaf if axis is None else next(remaining) for leaf, axis in pairs]
        return list(with_leaves(self.args, leaves))


def _arrays(arguments: Any) -> tuple[Any, ...]:
    leaves: list[Any] = jax.tree.leaves(arguments)
    has_shape = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    return tuple(itertools.compress(leaves, has_shape))


def _leaf_axes(
    args: tuple[Any, ...], in_axes: tuple[Any, ...] | None
) -> list[int | None]:
    """The mapped axis of each leaf; `in_axes` may say it for a whole subtree."""
    if in_axes is None:
        return [None] * len(jax.tree.leaves(args))
    axes: list[int | None] = []

    def add(axis: int | None, part: Tree) -> None:
        axes.extend([axis] * len(jax.tree.leaves(part)))

    jax.tree.map(add, in_axes, args, is_leaf=_is_none)
    return axes


def objective_value(out: Any) -> Array:
    """The scalar objective of what a loss returned: itself, or the sum of its local losses."""
    # A scalar stays as it is: a sum of it would only be one more operation to trace.
    return added([jnp.sum(part) if part.ndim else part for part in loss_parts(out)])


def loss_parts(out: Any) -> list[Array]:
    """The parts of what a loss returned, of any shapes, whose sum is the objective."""
    if isinstance(out, LocalLosses):
        leaves = jax.tree.leaves(out.tree)
        if not leaves:
            raise TypeError(
                "LocalLosses: expected at least one array, got an empty tree."
            )
        return [_checked_real(leaf) for leaf in leaves]
    if is_array(out) and jnp.shape(out) == ():
        return [_checked_real(out)]
    shown = f"shape: {jnp.shape(out)}" if is_array(out) else f"type: {_type_name(out)}"
    raise TypeError(
        f"Gradient only defined for scalar-output functions. Output had {shown}. Return a scalar, "
        "forwax.LocalLosses(tree) for the sum of several losses, or (loss, aux) with has_aux=True."
    )


def _checked_real(leaf: Any) -> Array:
    array = as_array(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            "value_and_grad requires real-valued outputs (output dtype that is a sub-dtype of "
            f"np.floating), but got {array.dtype}. Return a real loss, such as jnp.abs(z)**2 of a "
            "complex z."
        )
    return array


def check_leaves(name: str, arg: Tree) -> None:
    """Raise a TypeError for a leaf that cannot be differentiated."""
    leaves = cast(list[tuple[Any, Any]], jax.tree_util.tree_leaves_with_path(arg))
    for path, leaf in leaves:
        if is_array(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        where = jax.tree_util.keystr(path) or "the argument itself"
        if hasattr(leaf, "__dlpack__") and not is_array(leaf):
            raise TypeError(
                f"{name}: expected arrays of JAX or NumPy, got {type(leaf).__module__}."
                f"{type(leaf).__name__} at {where}. Pass jnp.asarray(x) of it, for a whole tree "
                "jax.tree.map(jnp.asarray, params)."
            )
        raise TypeError(
            f"{name} requires real- or complex-valued inputs (input dtype that is a sub-dtype of "
            f"np.inexact), but got {describe(leaf)} at {where}. Differentiate the floating leaves "
            "only: eqx.partition(model, eqx.is_inexact_array) for Equinox, "
            "nnx.split(model, nnx.Param, ...) for Flax NNX."
        )


def _check_batch(axis: int | None, arg: Tree) -> None:
    """Raise a ValueError when a part of the arguments has no examples along its mapped axis."""
    if axis is None:
        return
    for leaf in jax.tree.leaves(arg):
        shape = jnp.shape(leaf)
        if not len(shape) > axis >= -len(shape):
            raise ValueError(
                f"in_axes: expected arrays that have the axis {axis} along which they are mapped, "
                f"got an argument of shape {shape}. Write None for what all examples share."
            )
        if shape[axis] == 0:
            raise ValueError(
                "in_axes: expected at least one example, got an empty batch: an argument of shape "
                f"{shape} mapped along axis {axis}. The mean over no example is undefined."
            )


def _is_none(x: Any) -> bool:
    return x is None


def is_array(leaf: Any) -> bool:
    """Whether JAX takes it as an array: Python's numbers too."""
    return isinstance(
        leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex
    )


def _type_name(value: Any) -> str:
    if not isinstance(value, tuple):
        return type(value).__name__
    length = len(cast(tuple[Any, ...], value))
    return f"a tuple of length {length}"


_FIRST = (
    "The returned function takes one leading key before the loss's own arguments: "
    "f(jax.random.key(0), *args)."
)


def check_key(
    key: Any,
    name: str,
    what: str = "the first argument",
    advice: str = _FIRST,
) -> Array:
    """The PRNG key of a call, or an error that names what must be one and says what to do."""
    dtype = getattr(key, "dtype", None)
    shape = getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return key
        raise TypeError(
            f"{name}: expected one PRNG key as {what}, got an array of keys of shape {shape}. Take "
            "one of them, or map over them with jax.vmap."
        )
    # A legacy key holds two words, or four with the generator rbg.
    if dtype == np.uint32 and shape in ((2,), (4,)):
        return key
    raise TypeError(f"{name}: {what} must be a PRNG key, got {describe(key)}. {advice}")
