"""Reverse mode through a function that runs forwards only, as a simulation with a `while_loop`.

Its derivative is made of slopes, which forward mode gives, and written as a linear function of the
tangents, which JAX can transpose.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.lax import Precision

from forwax import _mesh, _tree
from forwax._checks import check_count
from forwax._directions.formed import Formed, basis_vectors
from forwax._programs.program import is_inexact
from forwax._programs.tracing import staged_apart
from forwax._pushforward import slopes
from forwax._signature import check_key, is_array
from forwax.tangents import Rademacher
from forwax.tangents._base import sampler, typed_key

NAME = "enable_reverse"


def enable_reverse(
    fn: Callable[..., Any],
    num_tangents: int | None = None,
    *,
    key: Array | None = None,
    chunk_size: int | None = 32,
) -> Callable[..., Any]:
    """The same function, through which `jax.grad` and all that calls it can go.

    For a piece that reverse mode rejects, such as a contact solver that iterates until it has
    converged, inside a program that is otherwise differentiated backwards: a policy in front of it,
    a loss behind it, a scan around it; or for a library that calls `jax.grad` itself. The function
    is pushed along the n basis vectors of its arguments as it is evaluated. That gives its Jacobian
    J, with which backwards a cotangent u becomes Jᵀ u, and forwards a tangent v becomes J v:

        value = fn(x),    ∂value = J ∂x,    row i of Jᵀ is jvp(fn)(x; e_i).

    n counts the real coordinates of those arguments that are differentiated, no others. It costs
    1 + 2n evaluations (and one more for each further chunk) and holds J, whatever the function does
    inside. So wrap the piece of few numbers, one step of a simulation and not the whole; and where
    `jax.grad` runs as it is, it is cheaper. Forward mode pays this price too: do not wrap what is
    only pushed forwards.

    With `num_tangents=k` and a key, J is known along k random directions v_j of signs alone, and
    J (1/k) Σ v_j v_jᵀ stands in for it: unbiased, at 1 + 2k evaluations, with a relative MSE of
    (n - 1) / k (see `forwax.WeightPerturbation`). Backwards and forwards are then estimates, one
    the transpose of the other. Each call needs a key of its own, or a product of the Jacobians of
    several calls is biased: inside a scan, wrap in its body with the step's key. From k = n on the
    basis vectors are taken and nothing is random.

    It is a `jax.custom_jvp` inside: it works under `jit`, `vmap`, `scan`, `jax.checkpoint`, inside
    itself, and for derivatives of any order.

    Args:
        fn: takes any arguments to a pytree of arrays. It is traced, as by `jax.jit`. Floating and
            complex arguments are differentiated; integers, booleans and keys have no derivatives;
            leaves that are no arrays stay what they are. What it closes over has none either.
        num_tangents: the number k of random directions; None for all n basis vectors.
        key: PRNG key of the random directions; it may be a traced one.
        chunk_size: the most directions at a time, None for all at once.

    Returns:
        A function of the same arguments, with the same values.

    Raises:
        TypeError: when `fn` is no function, the key is none; from the wrapped function when an
            array is differentiated that `fn` closes over: it would get no gradient.
        ValueError: when a count is not a positive integer, or only one of `num_tangents` and `key`
            is given.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> def root(a):  # Newton's iteration, until it has converged
        ...     unfinished = lambda x: jnp.abs(x * x - a) > 1e-5
        ...     return jax.lax.while_loop(unfinished, lambda x: (x + a / x) / 2, a)
        >>> def loss(w):  # jax.grad(lambda w: root(w @ w)) raises a ValueError
        ...     return fx.enable_reverse(root)(w @ w)
        >>> [round(float(x), 3) for x in jax.grad(loss)(jnp.array([3.0, 4.0]))]  # w / |w|
        [0.6, 0.8]
    """
    keys = _checked(fn, num_tangents, key, chunk_size)

    @functools.wraps(fn)
    def reversible(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        numbers = [i for i, leaf in enumerate(leaves) if _is_operand(leaf)]
        arrays = [_as_operand(leaves[i]) for i in numbers]

        def of_arrays(arrays: list[Any]) -> Any:
            whole = _with(leaves, numbers, arrays)
            args, kwargs = structure.unflatten(whole)
            return fn(*args, **kwargs)

        # A custom rule drops the tangents of what its function closes over, without a word.
        run, closed, shapes = staged_apart(of_arrays, arrays)

        def flat(closed: list[Any], arrays: list[Any]) -> list[Any]:
            outputs = run(closed, arrays)
            return jax.tree.leaves(outputs)

        call = _Call(flat, num_tangents, chunk_size)
        outputs = call.transposable(closed, arrays, keys)
        structure_out = jax.tree.structure(shapes)
        return structure_out.unflatten(outputs)

    return reversible


def _checked(
    fn: Any,
    num_tangents: int | None,
    key: Any,
    chunk_size: int | None,
) -> list[Array]:
    """The key as a typed one, where there is one, after the checks of the arguments."""
    if not callable(fn):
        got = type(fn).__name__
        raise TypeError(f"{NAME}: expected a function, got {got}.")
    if chunk_size is not None:
        check_count(NAME, "chunk_size", chunk_size)
    if num_tangents is not None:
        check_count(NAME, "num_tangents", num_tangents)
    if num_tangents is None and key is None:
        return []
    if num_tangents is None:
        raise ValueError(
            f"{NAME}: expected num_tangents with a key, got None: all basis vectors need no key. "
            "Pass num_tangents for random directions, or leave the key out."
        )
    if key is None:
        raise ValueError(
            f"{NAME}: expected a key with num_tangents={num_tangents}, got None. Pass "
            "key=jax.random.key(0), another one for each call, or leave num_tangents out for the "
            "exact derivative."
        )
    advice = f"Call {NAME}(fn, {num_tangents}, key=jax.random.key(0))."
    return [typed_key(check_key(key, NAME, "key", advice))]


def _is_operand(leaf: Any) -> bool:
    """Whether a leaf is an array, also one of keys, or a number."""
    return is_array(leaf) or hasattr(leaf, "dtype")


def _as_operand(leaf: Any) -> Any:
    """A number as an array; arrays, of keys too, as they are."""
    return leaf if hasattr(leaf, "dtype") else _tree.as_array(leaf)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function of arrays, and along which directions its Jacobian is taken.

    Attributes:
        run: takes the arrays that it closes over, and those it is given, to its outputs.
        num_tangents: the number of random directions; None for all basis vectors.
        chunk_size: the most directions at a time.
    """

    run: Callable[[list[Any], list[Any]], list[Any]]
    num_tangents: int | None
    chunk_size: int | None

    def transposable(
        self,
        closed: list[Any],
        arrays: list[Any],
        keys: list[Array],
    ) -> list[Any]:
        """The function's outputs, with a derivative that is written as a product with arrays.

        Args:
            closed: the arrays that it closes over, which have no derivatives.
            arrays: those it is given.
            keys: the key of random directions, where there are any.
        """

        @jax.custom_jvp
        def function(
            closed: list[Any],
            arrays: list[Any],
            keys: list[Array],
        ) -> list[Any]:
            return self.run(closed, arrays)

        function.defjvp(self._derivative, symbolic_zeros=True)
        return function(closed, arrays, keys)

    def _derivative(self, primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        """The outputs and their tangents, linear in those of the arguments."""
        closed, arrays, keys = primals
        of_closed, of_arrays, _ = tangents
        _check_closed(closed, of_closed)
        # Arguments that are not differentiated cost no slope.
        moving = [i for i, tangent in enumerate(of_arrays) if _moves(tangent)]
        n = _tree.num_coordinates([arrays[i] for i in moving])
        if n == 0:
            outputs = self.transposable(closed, arrays, keys)
            return outputs, [_zero(x) for x in outputs]
        own, others = _split(keys)
        jacobian = _Jacobian(self, moving, n)
        # That it is such a function too gives derivatives of any order.
        again = dataclasses.replace(self, run=jacobian.pushed)
        *outputs, rows = again.transposable([*closed, *own], arrays, others)
        weights = jacobian.weights([of_arrays[i] for i in moving], own)
        dtype = _tree.promoted(weights.dtype, rows.dtype)
        # [k] · [k, m] -> [m], linear in the tangents and with a transpose
        out = jnp.matmul(
            weights.astype(dtype),
            rows.astype(dtype),
            precision=Precision.HIGHEST,
        )
        return outputs, _unflat(out, outputs)


@dataclasses.dataclass(frozen=True)
class _Jacobian:
    """The derivatives of a call along k directions of those arguments that move.

    Attributes:
        call: the function.
        moving: which of its arguments move.
        n: how many real coordinates they have.
    """

    call: _Call
    moving: list[int]
    n: int

    @property
    def k(self) -> int:
        """The number of directions."""
        return min(self.call.num_tangents or self.n, self.n)

    def _draw(
        self, keys: list[Array], point: list[Any]
    ) -> Callable[[Array], list[Any]]:
        if self.k == self.n:
            return basis_vectors(point)
        return sampler(Rademacher(), keys[0], point, self.k)

    def pushed(self, closed: list[Any], arrays: list[Any]) -> list[Any]:
        """The function's outputs, and their slopes [k, m].

        Args:
            closed: the arrays that the function closes over, and behind them the key of the
                directions, where they are random.
            arrays: its arguments.
        """
        is_random = self.call.num_tangents is not None
        end = len(closed) - is_random
        keys = closed[end:]

        def objective(point: list[Any]) -> tuple[Array, list[Any]]:
            whole = _with(arrays, self.moving, point)
            outputs = self.call.run(closed[:end], whole)
            return _flat(_inexact(outputs)), outputs

        point = [arrays[i] for i in self.moving]
        draw = self._draw(keys, point)
        directions = Formed(point, lambda key: draw, objective=objective)
        size = self.call.chunk_size
        result = slopes(directions, draw, self.k, chunk_size=size)
        return [*result.aux, result.found]

    def weights(self, tangents: list[Any], keys: list[Array]) -> Array:
        """How much of each direction [k] there is in the arguments' tangents."""
        if self.k == self.n:
            return _flat(tangents)
        drawn = self._draw(keys, tangents)(jnp.arange(self.k))
        # J (1/k) Σ v vᵀ stands in for J.
        rows = [x[None] for x in tangents]
        # [k, n] · [n, 1] -> [k]
        return _tree.gram(drawn, rows)[:, 0] / self.k


def _split(keys: list[Array]) -> tuple[list[Array], list[Array]]:
    """For a derivative's own directions, and for those of its derivatives."""
    own: list[Array] = []
    others: list[Array] = []
    for key in keys:
        first, second = jax.random.split(key)
        own.append(first)
        others.append(second)
    return own, others


def _with(
    values: Sequence[Any],
    numbers: Sequence[int],
    others: Sequence[Any],
) -> list[Any]:
    """Values, of which those of some numbers are others."""
    whole = list(values)
    for i, other in zip(numbers, others, strict=True):
        whole[i] = other
    return whole


def _moves(tangent: Any) -> bool:
    """Whether it is a tangent that may differ from zero."""
    return not isinstance(tangent, SymbolicZero) and is_inexact(jax.typeof(tangent))


def _check_closed(closed: Sequence[Any], tangents: Sequence[Any]) -> None:
    """Raise a TypeError where what the function closes over is differentiated."""
    traced: list[str] = []
    for value, tangent in zip(closed, tangents, strict=True):
        if _moves(tangent):
            traced.append(_tree.describe(value))
    if not traced:
        return
    raise TypeError(
        f"{NAME}: expected what is differentiated among the arguments of the function, but it "
        f"closes over {', '.join(traced)}, which would get no gradient. Pass this as an argument, "
        "at the price of one slope for each of its numbers; or wrap a smaller piece that does "
        "without it; or close over jax.lax.stop_gradient of it."
    )


def _inexact(arrays: Sequence[Any]) -> list[Any]:
    return [x for x in arrays if is_inexact(jax.typeof(x))]


def _flat(arrays: Sequence[Any]) -> Array:
    """Floating and complex arrays as one of real coordinates, in at least float32."""
    if not arrays:
        return jnp.zeros(0)
    return _tree.join_flat(_tree.to_real(arrays))


def _zero(like: Any) -> Any:
    """The tangent of what does not move."""
    if is_inexact(jax.typeof(like)):
        return jnp.zeros_like(like)
    return np.zeros(like.shape, jax.dtypes.float0)


def _unflat(tangent: Array, outputs: Sequence[Any]) -> list[Any]:
    """A flat tangent [m] of the floating outputs as tangents of all."""
    inexact = _inexact(outputs)
    parts = _tree.split_flat(tangent, _tree.real_specs(inexact))
    joined = _tree.from_real(parts, inexact)
    remaining = iter(joined)
    tangents: list[Any] = []
    for x in outputs:
        if not is_inexact(jax.typeof(x)):
            tangents.append(_zero(x))
            continue
        moved = next(remaining).astype(x.dtype)
        # A tangent varies over all mesh axes over which its value does.
        tangents.append(_mesh.vary(moved, _mesh.axes(x)))
    return tangents
