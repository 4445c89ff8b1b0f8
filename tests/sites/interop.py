"""What every model must show, of whichever library.

`check` compiles one program and asserts all of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import forwax as fx
from forwax._directions.plan import plan_low_rank
from forwax._signature import Signature
from helpers import dense, norm
from sites.programs import normal

KEY = jax.random.key(0)
EACH = (None, 0)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss with its parameters and data, and what is known of its sites.

    Attributes:
        loss: takes the parameters and the data.
        params: the parameters.
        data: the other arguments.
        in_axes: None makes it a loss of the whole batch.
        has_aux: as in `forwax.value_and_grad`.
        weight_noise: how many parameters may get weight noise.
        direct: whether direct feedback alignment finds an output site after every other site.
    """

    loss: Callable[..., Any]
    params: Any
    data: tuple[Any, ...]
    in_axes: Any = EACH
    has_aux: bool = False
    weight_noise: int = 0
    direct: bool = True

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.params, *self.data)

    @property
    def options(self) -> dict[str, Any]:
        return {"in_axes": self.in_axes, "has_aux": self.has_aux}


def filled(shapes: Any) -> Any:
    """Fixed numbers in the shapes that a library's initialiser would fill.

    It would compile dozens of programs.
    """

    def fill(spec: jax.ShapeDtypeStruct, seed: int) -> Array:
        if jnp.issubdtype(spec.dtype, jnp.inexact):
            return jnp.asarray(0.5 * normal(seed, *spec.shape), spec.dtype)
        return (
            KEY
            if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key)
            else jnp.asarray(np.zeros(spec.shape, spec.dtype))
        )

    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([fill(spec, seed) for seed, spec in enumerate(leaves)])


def ones(shapes: Any) -> Any:
    """The same with ones, for variances among them."""
    return jax.tree.map(
        lambda spec: jnp.asarray(np.ones(spec.shape, spec.dtype)), shapes
    )


def wave(y: Array) -> Array:
    """A loss with slopes everywhere."""
    return jnp.sum(jnp.sin(y))


def check(model: Model) -> None:
    """Unbiased by the sum over all noise, value and aux kept, traced once.

    Feedback alignment is backprop with W.
    """
    with jax.numpy_rank_promotion("allow"):  # the libraries rely on it
        _check_sites(model)
        results = jax.device_get(jax.jit(_every_rule(model))(*model.args))
    value, truth = results["backprop"]
    scale = norm(truth)
    assert scale > 0
    for name in ("activity", "feedback"):
        got, grads = results[name]
        _assert_close(got, value, 1e-5, name)
        for (path, g), t in zip(
            jax.tree_util.tree_leaves_with_path(grads),
            jax.tree.leaves(truth),
            strict=True,
        ):
            assert norm(g - t) <= 1e-5 * scale, (name, jax.tree_util.keystr(path), g, t)
    if model.direct:
        got, grads = results["direct"]
        _assert_close(got, value, 1e-5, "direct")
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def check_factors(model: Model) -> None:
    """Low-rank weight tangents give the slope and the estimate of the direction in full."""
    with jax.numpy_rank_promotion("allow"):  # the libraries rely on it
        problem = Signature(model.loss, 0, model.has_aux, model.in_axes).bind(
            model.args, {}
        )
        plan = plan_low_rank(problem)
        assert any(split is not None for split in plan.splits)

        @jax.jit
        def both(leaves: list[Array]) -> tuple[Any, Any]:
            here = plan.at(leaves)
            params = here.problem.params
            drawn = fx.tangents.Normal().sample(KEY, here.specs(), 1)
            full = jax.tree.map(lambda v: v[0], dense(here, drawn))
            expected, exact = jax.jvp(
                lambda p: problem.objective(p)[0], (params,), (full,)
            )
            value, _, slopes = here.push(drawn, 1)
            estimate = jax.tree.map(lambda v: exact * v, full)
            return (value, slopes[0], here.assemble(slopes, drawn)), (
                expected,
                exact,
                estimate,
            )

        got, true = jax.device_get(both(plan.leaves))
    (value, slope, grads), (expected, exact, estimate) = got, true
    # the losses sum terms of about 1, which may cancel
    assert float(value) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    assert float(slope) == pytest.approx(float(exact), rel=1e-4)
    size = norm(
        estimate
    )  # sums round as the whole tree's size does where entries cancel
    assert size > 0
    for (path, mine), whole in zip(
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree.leaves(estimate),
        strict=True,
    ):
        np.testing.assert_allclose(
            mine, whole, rtol=1e-4, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path)
        )


def _check_sites(model: Model) -> None:
    table = fx.explain(model.loss, **model.options)(*model.args)
    fallen = [row for row in table.rows if row.operation.startswith("weight noise")]
    assert len(fallen) == model.weight_noise, str(table)


def _every_rule(model: Model) -> Callable[..., dict[str, Any]]:
    """All rules in one function, so that one compilation serves them; counts the traces of each."""
    calls: list[None] = []
    problem = Signature(model.loss, 0, model.has_aux, model.in_axes).bind(
        model.args, {}
    )
    listed = fx.ActivityPerturbation().basis(problem)

    def counted(*args: Any) -> Any:
        calls.append(None)
        return model.loss(*args)

    def run(rule: fx.Rule, args: Any) -> Any:
        calls.clear()
        out = fx.value_and_grad(counted, rule, **model.options)(KEY, *args)
        assert len(calls) == 1, (
            f"{type(rule).__name__} traces the loss {len(calls)} times"
        )
        return out

    def every_rule(*args: Any) -> dict[str, Any]:
        results = {
            "backprop": run(fx.Backprop(), args),
            "activity": run(listed, args),
            "feedback": run(fx.FeedbackAlignment(args[0]), args),
        }
        if model.direct:
            results["direct"] = run(fx.DirectFeedbackAlignment(KEY), args)
        else:
            with pytest.raises(ValueError, match="found no output site after"):
                run(fx.DirectFeedbackAlignment(KEY), args)
        return results

    return every_rule


def _assert_close(got: Any, expected: Any, tolerance: float, name: str) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        limit = tolerance * (1 + np.max(np.abs(b), initial=0))
        assert np.max(np.abs(a - b), initial=0) <= limit, (name, a, b)
