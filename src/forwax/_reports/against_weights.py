"""Whether activity noise is worse than weight noise on a loss, and at which parameters."""

import jax
import numpy as np

from forwax import _tree
from forwax._rules import Rule
from forwax._signature import Problem
from forwax._tree import Tree

_MOST_NAMES = 3
_WORSE = 1.5
_SHARE = 0.05


def against_weight_noise(
    name: str, rule: Rule, params: Tree, found: np.ndarray
) -> str | None:
    """One sentence where activity noise has more error than weight noise; else None.

    Weight noise of k signs has the error (n_l |g|² - |g_l|²)/k at a parameter of n_l entries, of
    which
    the second term is left out.

    Args:
        name: the rule's name in the table.
        rule: the rule.
        params: the parameters.
        found: squared errors over |g|², [draws, leaves].
    """
    noise = rule.inner
    # Of all rules one alone has a memory.
    if getattr(noise, "memory", None) is None or len(found) < 2:
        return None
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path) or "the parameter" for path, _ in leaves]
    sizes = np.array([_tree.num_coordinates(leaf) for _, leaf in leaves])
    laws = sizes / getattr(noise, "num_tangents", 1)
    ratio = _surely(found.sum(1)) / laws.sum()
    ratios = _surely(found) / laws
    shares = found.mean(0) / max(found.mean(0).sum(), np.finfo(float).tiny)
    worst = [
        i for i in np.argsort(-ratios) if ratios[i] > _WORSE and shares[i] > _SHARE
    ]
    at = ", ".join(f"{paths[i]} ({ratios[i]:,.3g} times)" for i in worst[:_MOST_NAMES])
    if ratio > 1:
        where = f", most at {at}" if at else ""
        return (
            f"{name} has {ratio:,.3g} times the error of weight noise here{where}: so it is where "
            "the gradients of examples, or of positions, cancel in their sum, which each example's "
            "own noise does not see. Use forwax.WeightPerturbation(forwax.tangents.LowRank()), or "
            'try noise="auto".'
        )
    if not at:
        return None
    return (
        f"{name} has more error than weight noise at {at}, less in all. Calibrated scales, "
        'noise="auto", or weight noise there by where=... may lower it.'
    )


def about_examples(name: str, rule: Rule, problem: Problem) -> str | None:
    """One sentence where activity noise can only enter at parameters that examples share."""
    # Of all rules one alone has a memory.
    if getattr(rule.inner, "memory", None) is None or problem.num_examples is None:
        return None
    sites = rule.sites(problem)
    shared = [s for s in sites.places if s.region.promoted and not s.mapped]
    if not shared:
        return None
    return (
        f"{name}: at {len(shared)} of {len(sites.places)} sites the loss can only be perturbed at "
        "a parameter, so all examples share a slope there, as behind a while_loop. "
        "forwax.WeightPerturbation(per_example=True) gives each example its own."
    )


def _surely(found: np.ndarray) -> np.ndarray:
    """The mean over draws less two standard errors."""
    return found.mean(0) - 2 * found.std(0, ddof=1) / len(found) ** 0.5
