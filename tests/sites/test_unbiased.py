"""Law 2 for activity noise.

The mean over every coordinate of the noise is the gradient, exactly.
"""

import jax
import numpy as np
import pytest

import forwax as fx
from helpers import basis_of, estimates
from sites.programs import PROGRAMS

RULES = {
    "keep": fx.ActivityPerturbation(),
    "no-exact-outputs": fx.ActivityPerturbation(exact_outputs=False),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "shared": fx.ActivityPerturbation(memory="shared"),
    "where": fx.ActivityPerturbation(where="'[wh]'"),
}

SOME = ["tied", "weight_decay", "recurrent", "local_losses", "conditional"]
FORWARD_ONLY = ["while_loop", "spectral_norm"]  # reverse mode rejects them


CASES = [("keep", name) for name in PROGRAMS]
CASES += [(rule, name) for rule in RULES if rule != "keep" for name in SOME]
CASES += [
    ("replay", name) for name in ("nested_scans", "parameters_in_carries", "embedding")
]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_the_mean_over_all_noise_is_the_gradient(rule, name):
    program = PROGRAMS[name]
    reference = fx.Exact() if name in FORWARD_ONLY else fx.Backprop()
    listed = basis_of(program, RULES[rule])
    (value, grads), (true_value, truth) = estimates(program, listed, reference)
    scale = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(truth)))
    assert abs(value - true_value) <= 1e-5 * abs(true_value)
    for (path, got), true in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(truth), strict=True
    ):
        error = np.linalg.norm((got - true).ravel())
        assert error <= 2e-6 * abs(scale) * got.size**0.5, (
            jax.tree_util.keystr(path),
            error,
            scale,
        )
