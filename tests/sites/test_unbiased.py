"""Law 2 for activity noise: the mean over every coordinate of the noise is the gradient, exactly."""

import jax
import jax.numpy as jnp
import pytest

import forwax as fx
from forwax._signature import Signature
from sites.programs import PROGRAMS

KEY = jax.random.key(0)
RULES = {
    "keep": fx.ActivityPerturbation(),
    "no-exact-outputs": fx.ActivityPerturbation(exact_outputs=False),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "shared": fx.ActivityPerturbation(memory="shared"),
    "where": fx.ActivityPerturbation(where="'[wh]'"),
}

SOME = ["tied", "weight_decay", "recurrent", "local_losses", "conditional"]
FORWARD_ONLY = ["while_loop", "spectral_norm"]  # reverse mode rejects them


def basis_mean(program, rule):
    """Value and the mean of the estimates over all coordinates of the noise."""
    listed = rule.basis(Signature(program.loss, 0, False, program.in_axes).bind(program.args, {}))
    return jax.jit(fx.value_and_grad(program.loss, listed, **program.options))(KEY, *program.args)


CASES = [("keep", name) for name in PROGRAMS]
CASES += [(rule, name) for rule in RULES if rule != "keep" for name in SOME]
CASES += [("replay", name) for name in ("nested_scans", "parameters_in_carries", "embedding")]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_the_mean_over_all_noise_is_the_gradient(rule, name):
    program = PROGRAMS[name]
    value, grads = basis_mean(program, RULES[rule])
    reference = fx.Exact() if name in FORWARD_ONLY else fx.Backprop()
    true_value, truth = jax.jit(fx.value_and_grad(program.loss, reference, **program.options))(
        KEY, *program.args
    )
    scale = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(truth)))
    assert abs(value - true_value) <= 1e-5 * abs(true_value)
    for (path, got), true in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(truth), strict=True
    ):
        error = float(jnp.linalg.norm((got - true).ravel()))
        assert error <= 2e-6 * scale * got.size**0.5, (
            jax.tree_util.keystr(path),
            error,
            float(scale),
        )
