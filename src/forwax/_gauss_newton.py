"""Gauss-Newton in a random subspace, by Jacobian-vector products alone.

Yu, Xia, Ma, Lengyel, Hennequin, "Second-order forward-mode optimization of recurrent neural
networks for neuroscience" (SOFO), NeurIPS 2024; the damping's adaptation is that of Levenberg 1944
and Marquardt 1963.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from forwax import _mesh, _subspace, _tree
from forwax._checks import check_no_text, register_checked, set_counts
from forwax._directions.formed import Formed, basis_vectors
from forwax._programs import ways_out
from forwax._pushforward import is_concrete, num_chunks, slopes
from forwax._rule import check_directions, check_shared
from forwax._signature import Problem, Signature, check_key, check_leaves
from forwax._subspace import Draw
from forwax._tree import Tree
from forwax.tangents import Rademacher, Tangents
from forwax.tangents._base import sampler, typed_key

Loss = Callable[[Any], Any]

GOOD, POOR = 0.75, 0.25
"""Above and below which ratios of actual to predicted decrease the damping changes."""

LEAST_RAISED = 1e-3
"""To at least this the damping is raised after a step that failed, from 0 too."""


@register_checked
@dataclasses.dataclass(frozen=True, eq=False)
class GaussNewton:
    """Least squares, and other losses of many outputs, by slopes along k directions.

    A residual r(θ) in R^m is pushed along k random directions, the rows of V [k, n], which gives J
    Vᵀ = (JV)ᵀ with JV [k, m]. With the loss's gradient g and Hessian H in the *residuals*, both
    known at the price of the loss alone, the step is the damped Gauss-Newton step in the span of
    the directions:

        θ ← θ - step_size · Vᵀ a,    (A + damping · tr(A)/tr(G) · G) a = JV g,
        A = JV H JVᵀ,    G = V Vᵀ.

    So the damping has no unit: 1 is the mean curvature along the directions. Where k reaches the
    number of parameters the directions are the basis vectors, and the step is that of all
    parameters. It pays where k exceeds the effective rank of the Jacobian, whatever n is: a few
    hundred observations of a simulation, or a minibatch. For a linear residual of rank up to k one
    step without damping is enough.

    With `adapt` the damping follows the ratio of the actual to the predicted decrease (Levenberg,
    Marquardt), and a step that would raise the loss, or is not finite, is refused: the parameters
    stay, and the next step has more damping. This is for residuals that are the same in every step.
    On minibatches it would fit each batch in turn: there take `adapt=False`, a damping around 1 and
    a step size that falls, such as a cosine from 0.5. Then a step that is not finite is still left
    out.

    Cost of a step: 1 + 2k evaluations, with `adapt` one more, and k²(n + m) multiplications for
    both matrices. Memory: JV [k, m], a second one with a loss of one's own, and the directions of a
    chunk [chunk, n]. Directions that can be drawn one by one, such as signs, are drawn anew where
    they are needed; others, such as `tangents.Orthonormal`, are held [k, n].

    The program is only run forwards: it may have a `while_loop`. The loss, a function of the
    residuals alone, is differentiated by reverse mode, and its Hessian by a Jacobian-vector product
    of that gradient for each direction; it is never formed. The step is not of minimal norm in θ:
    where the data do not fix all parameters, put a prior among the residuals, or scale the
    parameters by it.

    `step` returns the next solver, to be carried through the loop; it is a frozen value and a
    pytree, and works under `jit`, `scan`, `vmap` over problems and with donated arguments. What
    varies over steps, as a schedule, is a new value: `dataclasses.replace(solver, step_size=rate)`,
    also of a traced rate.

    Attributes:
        num_tangents: the number k of directions; where it is above n, it is n.
        tangents: their distribution; of it only the span matters, up to the damping.
        damping: in units of the mean curvature along the directions; 0 for none.
        adapt: whether damping follows the loss, and steps that raise it are refused.
        step_size: what the step is multiplied with, a number or an array.
        chunk_size: the most directions at a time; None for all at once.
        num_refused: how many steps were refused since `init`; None before it.
        ratio: of the last step's actual to its predicted decrease; infinite without `adapt`,
            and where nothing was to be gained beyond rounding. None before `init`.

    Raises:
        TypeError: when a parameter is not floating or complex, tangents are of another kind, or the
            loss is no real scalar of the residuals.
        ValueError: when a count is not a positive integer, the damping is negative or the step size
            not positive, residuals are missing or a mere scalar, or inside `jax.shard_map` they
            vary over axes over which parameters do not. Outside of a trace also where residuals,
            loss or slopes are not finite, or the loss has a slope but no curvature along any
            direction; inside, such a step is refused, and the value shows it.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> def residuals(w, x, y):  # fit y = tanh(x w)
        ...     return jnp.tanh(x @ w) - y
        >>> x = jax.random.normal(jax.random.key(1), (50, 20))
        >>> y = jnp.tanh(x @ jnp.linspace(-1, 1, 20))
        >>> solver, w = fx.GaussNewton(num_tangents=16), jnp.zeros(20)
        >>> solver = solver.init(w)
        >>> step = jax.jit(lambda key, w, solver: solver.step(residuals)(key, w, x, y))
        >>> for key in jax.random.split(jax.random.key(0), 30):
        ...     value, w, solver = step(key, w, solver)
        >>> bool(value < 1e-6)
        True
    """

    num_tangents: int = dataclasses.field(default=64, metadata={"static": True})
    tangents: Tangents = Rademacher()  # noqa: RUF009 (a frozen value)
    damping: float | Array = 1.0
    adapt: bool = dataclasses.field(default=True, metadata={"static": True})
    step_size: float | Array = 1.0
    chunk_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    num_refused: Array | None = None
    ratio: Array | None = None

    def __post_init__(self) -> None:
        set_counts(self, "num_tangents", or_none="chunk_size")
        check_no_text(self, "damping", "step_size")
        check_directions("GaussNewton", self.tangents)
        damping = self.damping
        if isinstance(damping, int | float) and not 0 <= damping < math.inf:
            raise ValueError(
                f"GaussNewton: expected damping of at least 0, got {damping}. It is relative to "
                "the mean curvature along the directions: 1 is a good start, 0 is none."
            )
        step_size = self.step_size
        if isinstance(step_size, int | float) and not 0 < step_size < math.inf:
            raise ValueError(
                f"GaussNewton: expected a positive step_size, got {step_size}. 1 is the whole "
                "step; on minibatches it falls, as a cosine from 0.5 does."
            )

    def init(self, params: Tree) -> "GaussNewton":
        """The solver before its first step, so that its structure stays the same in all steps.

        Args:
            params: the parameters, a pytree of floating or complex arrays.

        Raises:
            TypeError: when a leaf is not floating or complex.
            ValueError: when there is no parameter.
        """
        check_leaves("GaussNewton.init", params)
        params = jax.tree.map(_tree.as_array, params)
        _check_some("GaussNewton.init", "parameters", params)
        dtype = _tree.common_dtype(_tree.real_specs(params))
        # Copies, so that donating the solver gives away nothing of the user's.
        return dataclasses.replace(
            self,
            damping=jnp.array(self.damping, dtype),
            step_size=jnp.array(self.step_size, dtype),
            num_refused=jnp.int32(0),
            ratio=jnp.array(jnp.inf, dtype),
        )

    def step(
        self,
        residuals: Callable[..., Any],
        loss: Loss | None = None,
        *,
        has_aux: bool = False,
    ) -> Callable[..., tuple[Any, Tree, "GaussNewton"]]:
        """One step.

        Args:
            residuals: takes parameters and further arguments to an array or a pytree of arrays,
                real or complex; with `has_aux`, to a pair of it and a pytree.
            loss: takes what `residuals` returns to a real scalar, convex in it; by default half the
                sum of the squares. What else it needs, such as labels, it closes over.
            has_aux: whether `residuals` returns `(residuals, aux)`.

        Returns:
            A function `f(key, params, *args, **kwargs)` that returns `(value, params, solver)`: the
            loss before the step, with `has_aux` `(value, aux)`, then the parameters after it, and
            the solver to go on with. Nothing is jitted inside.
        """
        name = "GaussNewton.step"
        for field, function in (("residuals", residuals), ("loss", loss)):
            if function is not None and not callable(function):
                raise TypeError(
                    f"{name}: expected a function as {field}, got {type(function).__name__}."
                )
        signature = Signature(_as_aux(residuals, has_aux), 0, True, None, name)

        def step_of_residuals(key: Any, /, *args: Any, **kwargs: Any) -> Any:
            key = typed_key(check_key(key, name))
            problem = signature.bind(args, kwargs)
            solver = self.init(problem.params) if self.ratio is None else self
            with ways_out.named(problem):
                value, aux, params, solver = solver._advance(key, problem, loss)
            return ((value, aux) if has_aux else value), params, solver

        return step_of_residuals

    def _advance(
        self, key: Array, problem: Problem, loss: Loss | None
    ) -> tuple[Array, Tree, Tree, "GaussNewton"]:
        """Value, aux, the parameters after a step and the solver after it."""
        check_shared("GaussNewton", self.tangents)
        params = problem.params

        def vector(params: Tree) -> tuple[Array, Tree]:
            _, out = problem.objective(params)
            return _flat(problem.restore(out)[0]), out

        n = _tree.num_coordinates(params)
        k = min(self.num_tangents, n)
        draw = self._draw(key, params, k)
        directions = Formed(params, lambda key: draw, objective=vector)
        pushed = slopes(directions, draw, k, chunk_size=self.chunk_size)
        at, aux = problem.restore(pushed.aux)
        _check_mesh(pushed.found, params)

        objective = _Objective(loss, at, self.chunk_size)
        value, gradient = objective.value_and_gradient(pushed.value)
        curvature = objective.curvature(pushed.value, pushed.found)  # A [k, k]
        slope = _subspace.product(pushed.found, gradient)  # [k]
        _check_start(value, slope, curvature)
        # Basis vectors have the unit matrix.
        metric = None if k == n else _subspace.gram(draw, k, self.chunk_size)
        weights = _subspace.solved(curvature, metric, slope, self.damping)
        weights = weights * jnp.asarray(self.step_size, weights.dtype)
        change = _subspace.combined(directions, draw, weights, self.chunk_size)
        moved = jax.tree.map(_minus, params, change)
        is_finite = _tree.all_finite(moved)
        if not self.adapt:
            return value, aux, *self._kept(params, moved, is_finite)
        after = objective.value(vector(moved)[0])
        square = jnp.vdot(weights, _subspace.product(curvature, weights))
        predicted = jnp.vdot(weights, slope) - square / 2
        params, solver = self._kept(params, moved, is_finite & (after <= value))
        return value, aux, params, solver._adapted(value, after, predicted)

    def _draw(self, key: Array, params: Tree, num_tangents: int) -> Draw:
        """How directions are drawn: held where they are pushed in one go, else drawn anew."""
        draw: Draw = basis_vectors(params)
        if num_tangents < _tree.num_coordinates(params):
            draw = sampler(self.tangents, key, params, num_tangents)
        if num_chunks(num_tangents, self.chunk_size) > 1:
            return draw
        held = draw(jnp.arange(num_tangents))
        return lambda indices: held

    def _kept(
        self, params: Tree, moved: Tree, is_good: Array
    ) -> tuple[Tree, "GaussNewton"]:
        """The new parameters, or the old ones and a solver that has counted it."""
        kept = jax.tree.map(
            lambda new, old: jnp.where(is_good, new, old), moved, params
        )
        refused = cast(Array, self.num_refused) + (~is_good).astype(jnp.int32)
        return kept, dataclasses.replace(self, num_refused=refused)

    def _adapted(self, value: Array, after: Array, predicted: Array) -> "GaussNewton":
        """The solver with its next damping, from the loss before and after a step."""
        damping = jnp.asarray(self.damping)
        rounding = float(jnp.finfo(value.dtype).eps)
        # A loss in half precision is not mixed with what was predicted from its slopes.
        dtype = _tree.promoted(value.dtype, predicted.dtype)
        predicted, value, after = (x.astype(dtype) for x in (predicted, value, after))
        # Below the rounding of the loss a ratio says nothing.
        is_known = ~(predicted <= 4 * rounding * jnp.abs(value))
        ratio = (value - after) / jnp.where(is_known, predicted, 1)
        ratio = ratio.astype(damping.dtype)
        lowered = jnp.where(ratio > GOOD, damping / 3, damping)
        raised = jnp.maximum(damping * jnp.where(ratio >= 0, 2, 4), LEAST_RAISED)
        new = jnp.where(ratio >= POOR, lowered, raised)  # a ratio that is NaN raises
        highest = 1 / jnp.finfo(damping.dtype).eps
        new = jnp.where(is_known, jnp.minimum(new, highest), damping)
        ratio = jnp.where(is_known, ratio, jnp.inf)
        return dataclasses.replace(self, damping=new, ratio=ratio)


def _as_aux(residuals: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """A loss of 0 with `(residuals, aux)` as its aux, for `Signature` to bind."""

    def loss(*args: Any, **kwargs: Any) -> Any:
        out = residuals(*args, **kwargs)
        if not has_aux:
            out = (out, None)
        elif not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                "GaussNewton.step: has_aux=True: expected residuals to return a pair (residuals, "
                f"aux), got {type(out).__name__}. Return a pair, or drop has_aux."
            )
        _check_residuals(out[0])
        return jnp.zeros(()), out

    return loss


def _check_residuals(found: Any) -> None:
    """Raise for residuals that are no floating arrays, empty, or one scalar."""
    leaves = jax.tree.leaves(found)
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                "GaussNewton.step: expected residuals of floating or complex numbers, got "
                f"{_tree.describe(leaf)}. Return what the parameters change; what the loss needs "
                "beside it, such as labels, it closes over."
            )
    _check_some("GaussNewton.step", "residuals", found)
    if len(leaves) == 1 and jnp.ndim(leaves[0]) == 0:
        raise ValueError(
            "GaussNewton.step: expected an array of residuals, got a scalar: the slopes of one "
            "number do not tell how it curves. Return the residuals themselves, not the sum of "
            "their squares; another loss of them is the second argument, as in "
            "solver.step(residuals, loss)."
        )


def _check_some(name: str, what: str, tree: Tree) -> None:
    if sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree)) == 0:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
        raise ValueError(
            f"{name}: expected at least one number among the {what}, got leaves of shapes "
            f"{shapes}."
        )


def _check_mesh(pushed: Array, params: Tree) -> None:
    """Raise where devices have different residuals of the same parameters."""
    shared = frozenset.intersection(*_mesh.tree_axes(params))
    others = _mesh.axes(pushed) - shared
    if others:
        raise ValueError(
            "GaussNewton.step: inside shard_map the residuals vary over the mesh axes "
            f"{sorted(others)}, over which parameters do not, so that no device knows the whole "
            "loss. Gather them with jax.lax.all_gather, or leave shard_map out and jit the step "
            "with arrays that are spread over devices."
        )


def _check_start(value: Array, slope: Array, curvature: Array) -> None:
    """Raise, outside of a trace, where no step can be told."""
    if not is_concrete((value, slope, curvature)):
        return
    if not jnp.isfinite(value):
        raise ValueError(
            f"GaussNewton.step: expected residuals with a finite loss, got a loss of {value} at "
            "these parameters. Start from others; with adapt=False, try adapt=True, more damping "
            "or a smaller step_size."
        )
    if not jnp.all(jnp.isfinite(slope)) or not jnp.all(jnp.isfinite(curvature)):
        raise ValueError(
            "GaussNewton.step: the loss is finite at these parameters, but its derivatives along "
            "the directions are not. A square root, norm or logarithm at zero does this, also "
            "where its value is masked afterwards: mask its argument."
        )
    if jnp.any(slope != 0) and not jnp.any(jnp.diagonal(curvature) > 0):
        raise ValueError(
            "GaussNewton.step: the loss has a slope along the directions, but no curvature in the "
            "residuals, so that no step follows from it. Expected a loss that is strictly convex "
            "in them, such as half the sum of squares, got one that is linear or concave."
        )


class _Objective:
    """The loss as a function of the residuals' real coordinates [m].

    Args:
        loss: the user's, or None for half the sum of squares.
        at: the residuals, for structure and dtypes.
        chunk_size: along how many directions at a time the Hessian is taken.
    """

    def __init__(self, loss: Loss | None, at: Tree, chunk_size: int | None) -> None:
        self.loss = loss
        self.at = at
        self.chunk_size = chunk_size

    def value(self, flat: Array) -> Array:
        """The loss, a scalar."""
        if self.loss is None:
            return jnp.vdot(flat, flat) / 2
        leaves = _tree.split_flat(flat, _tree.real_specs(self.at))
        value = self.loss(_tree.from_real(leaves, self.at))
        if jnp.shape(value) != () or not jnp.issubdtype(
            jnp.result_type(value), jnp.floating
        ):
            raise TypeError(
                "GaussNewton.step: expected the loss to take the residuals to a real scalar, got "
                f"{_tree.describe(value)}."
            )
        return jnp.asarray(value)

    def value_and_gradient(self, flat: Array) -> tuple[Array, Array]:
        """The loss, and its gradient [m]."""
        if self.loss is None:
            return self.value(flat), flat
        return jax.value_and_grad(self.value)(flat)

    def curvature(self, flat: Array, pushed: Array) -> Array:
        """JV H JVᵀ [k, k] of directions JV [k, m], H the Hessian at the residuals."""
        if self.loss is None:
            return _subspace.product(pushed, pushed.T)

        def row(direction: Array) -> Array:
            _, turned = jax.jvp(jax.grad(self.value), (flat,), (direction,))
            return _subspace.product(pushed, turned)

        # As many at a time as are pushed: each holds a few arrays like the residuals.
        rows = lax.map(row, pushed, batch_size=self.chunk_size or len(pushed))
        return (rows + rows.T) / 2


def _flat(residuals: Tree) -> Array:
    """Residuals as one array [m] of real coordinates."""
    arrays = jax.tree.map(_tree.as_array, residuals)
    return _tree.join_flat(_tree.to_real(arrays))


def _minus(leaf: Array, change: Array) -> Array:
    return (leaf.astype(change.dtype) - change).astype(leaf.dtype)
