"""Law 2 for activity noise.

The mean over every coordinate of the noise is the gradient, exactly.
"""

import dataclasses

import jax
import numpy as np
import pytest

import forwax as fx
from helpers import basis_of, estimates, problem_of
from sites.programs import PROGRAMS

RULES = {
    "keep": fx.ActivityPerturbation(),
    "no-exact-outputs": fx.ActivityPerturbation(exact_outputs=False),
    "replay": fx.ActivityPerturbation(memory="replay"),
    "shared": fx.ActivityPerturbation(memory="shared"),
    "auto": fx.ActivityPerturbation(noise="auto"),
    "where": fx.ActivityPerturbation(where="'[wh]'"),
}

SOME = ["tied", "weight_decay", "recurrent", "local_losses", "conditional"]
FORWARD_ONLY = ["while_loop", "spectral_norm"]  # reverse mode rejects them


SCALED = ("keep", "replay", "shared")
CASES = [("keep", name) for name in PROGRAMS]
CASES += [("keep-scaled", name) for name in PROGRAMS]
CASES += [(f"{rule}-scaled", name) for rule in SCALED[1:] for name in SOME]
CASES += [(rule, name) for rule in RULES if rule != "keep" for name in SOME]
CASES += [("auto", name) for name in ("batch_loss", "custom_rule_with_a_parameter")]
CASES += [
    ("replay", name) for name in ("nested_scans", "parameters_in_carries", "embedding")
]


def rule_for(name, program):
    """A rule of the list; "-scaled" gives each site with noise a scale of its own."""
    rule = RULES[name.removesuffix("-scaled")]
    if rule is RULES.get(name):
        return rule
    count = len(rule.sites(problem_of(program)).noisy)
    return dataclasses.replace(rule, scales=np.geomspace(0.3, 4, count))


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_the_mean_over_all_noise_is_the_gradient(rule, name):
    program = PROGRAMS[name]
    reference = fx.Exact() if name in FORWARD_ONLY else fx.Backprop()
    listed = basis_of(program, rule_for(rule, program))
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
