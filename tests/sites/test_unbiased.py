"""Law 2 for activity noise: the mean over every coordinate of the noise is the gradient, exactly."""

import jax
import jax.numpy as jnp
import pytest
from sites.programs import PROGRAMS

import forwax as fx
from forwax._signature import Signature

RULES = {
    "keep": fx.ActivityPerturbation(),
    "no-exact-outputs": fx.ActivityPerturbation(exact_outputs=False),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "shared": fx.ActivityPerturbation(memory="shared"),
    "where": fx.ActivityPerturbation(where="w"),
}


def basis_mean(program, rule):
    """Value and the mean of the estimates over all coordinates of the noise."""
    listed = rule.basis(Signature(program.loss, 0, False, program.in_axes).bind(program.args, {}))
    return jax.jit(fx.value_and_grad(program.loss, listed, **program.options))(jax.random.key(0), *program.args)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("rule", RULES)
def test_the_mean_over_all_noise_is_the_gradient(name, rule):
    program = PROGRAMS[name]
    value, grads = basis_mean(program, RULES[rule])
    true_value, truth = jax.jit(fx.value_and_grad(program.loss, fx.Exact(), **program.options))(
        jax.random.key(0), *program.args
    )
    scale = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(truth)))
    assert abs(value - true_value) <= 1e-5 * abs(true_value)
    for (path, got), true in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(truth), strict=True):
        error = float(jnp.linalg.norm((got - true).ravel()))
        assert error <= 2e-6 * scale * got.size**0.5, (jax.tree_util.keystr(path), error, float(scale))
