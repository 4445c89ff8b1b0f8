"""The learning rules of Ren et al. 2023 by the names of its tables: where the losses sit, and a rule of forwax.

Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv 2210.03310.

A name is a place of the losses and a rule: none, `L-` (local) or `LG-` (local and greedy); BP backpropagation, FA
feedback alignment, DFA direct feedback alignment, FG-W and FG-A forward gradients with noise on weights or activities.
Heads and readout always get their exact one-layer gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from forwax import (
    ActivityPerturbation,
    Backprop,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    Rule,
    random_feedback,
    tangents,
)
from forwax.models.local_losses import Where

_PLACES: dict[str, Where] = {"": "global", "L-": "local", "LG-": "greedy"}

NAMES = (*(f"{place}{rule}" for rule in ("BP", "FA", "FG-W", "FG-A") for place in _PLACES), "DFA")
"""The names of all methods."""

HEADS = r"\.(heads|readout)\b"
"""A pattern of the paths of heads' and readouts' parameters."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the paper's tables.

    Attributes:
        name: as in the paper.
        losses: where they sit; an argument of `forwax.models.local_losses` and `forwax.models.contrastive_losses`.
        parts: whether they come in parts; likewise.
        rule: for `forwax.value_and_grad`.
    """

    name: str
    losses: Where
    parts: bool
    rule: Rule


def method(
    name: str,
    params: Any,
    key: jax.Array,
    *,
    tangents: tangents.Tangents = tangents.Rademacher(),  # noqa: B008 (a frozen value)
    num_tangents: int = 1,
) -> Method:
    """The method of a name of the paper's tables.

    Args:
        name: one of `NAMES`, such as "LG-FG-A".
        params: the model, or its floating arrays as `equinox.partition` gives them; feedback matrices are drawn to it.
        key: a JAX random key for the fixed feedback of FA, L-FA, LG-FA and DFA; keep it for all steps.
        tangents: the noise of forward gradients; the paper's is `forwax.tangents.Normal()`.
        num_tangents: how many noises a step.

    Raises:
        ValueError: when there is no method of this name.

    >>> import forwax as fx, forwax.models
    >>> import jax.numpy as jnp
    >>> model = fx.models.LocalMixer((4, 4, 1), 10, blocks=2, patches=2, channels=6, groups=3, key=jax.random.key(0))
    >>> greedy = method("LG-FG-A", model, jax.random.key(1))
    >>> greedy.losses, greedy.parts
    ('greedy', True)
    >>> loss = lambda model, x, y: fx.models.local_losses(model, x, y, greedy.losses, parts=greedy.parts)
    >>> value_and_grad = jax.jit(fx.value_and_grad(loss, greedy.rule, in_axes=(None, 0, 0)))
    >>> value, grads = value_and_grad(jax.random.key(2), model, jnp.ones((5, 4, 4, 1)), jnp.zeros(5, int))
    """
    if name not in NAMES:
        raise ValueError(f"ren2023.method: expected one of {', '.join(NAMES)}, got {name!r}.")
    place = next((place for place in ("LG-", "L-") if name.startswith(place)), "")
    kind = name.removeprefix(place)
    rules = {
        "BP": lambda: Backprop(),
        "FA": lambda: FeedbackAlignment(random_feedback(key, params)),
        "DFA": lambda: DirectFeedbackAlignment(key),
        # parameters without activity noise get weight noise, all but the heads
        "FG-W": lambda: ActivityPerturbation(tangents, num_tangents, where=HEADS),
        "FG-A": lambda: ActivityPerturbation(tangents, num_tangents),
    }
    return Method(name, _PLACES[place], kind.startswith("FG"), rules[kind]())
