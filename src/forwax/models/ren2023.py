"""The learning rules of Ren et al. 2023 by the names of its tables.

Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv
2210.03310.

A name is a place of the losses and a rule: none, `L-` (local) or `LG-` (local and greedy); BP
backpropagation, FA feedback alignment, DFA direct feedback alignment, FG-W and FG-A forward
gradients with noise on weights or activities. LF, learned feedback, is not in the paper. Heads and
readout always get their exact one-layer gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from forwax import (
    ActivityPerturbation,
    Backprop,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LearnedFeedback,
    LocalLosses,
    Rule,
    random_feedback,
    tangents,
    value_and_grad,
)
from forwax.models.local_losses import (
    Where,
    contrastive_loss_of_view,
    contrastive_losses,
    local_losses,
    projections,
)

Kind = Literal["BP", "FA", "DFA", "LF", "FG-W", "FG-A"]
"""The rules of the paper, and learned feedback, without where the losses sit."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a method's name says.

    Attributes:
        losses: where they sit; an argument of `forwax.models.local_losses` and
            `forwax.models.contrastive_losses`.
        kind: the rule.

    >>> READINGS["LG-FG-A"], READINGS["L-FA"].draws_noise
    (Reading(losses='greedy', kind='FG-A'), False)
    """

    losses: Where
    kind: Kind

    @property
    def draws_noise(self) -> bool:
        """Whether it is a forward gradient."""
        return self.kind in ("FG-W", "FG-A")


_PLACES: dict[str, Where] = {"": "global", "L-": "local", "LG-": "greedy"}
_KINDS: tuple[Kind, ...] = ("BP", "FA", "LF", "FG-W", "FG-A")

READINGS: Mapping[str, Reading] = {
    **{
        f"{prefix}{kind}": Reading(place, kind)
        for kind in _KINDS
        for prefix, place in _PLACES.items()
    },
    "DFA": Reading("global", "DFA"),
}
"""What each method's name says."""

NAMES = tuple(READINGS)
"""The names of all methods."""

HEADS = r"^\.(heads|readout)\b"
"""A pattern of the paths of the parameters of a model's heads and readout."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the paper's tables.

    Attributes:
        name: as in the paper.
        losses: where they sit; an argument of `forwax.models.local_losses` and
            `forwax.models.contrastive_losses`.
        parts: whether they come in parts; likewise.
        rule: for `forwax.value_and_grad`; that of LF, which learns, for its own `step`.
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
    tangents: tangents.Tangents = tangents.Hadamard(),  # noqa: B008 (a frozen value)
    num_tangents: int = 1,
) -> Method:
    """The method of a name of the paper's tables, or learned feedback in their places.

    Args:
        name: one of `NAMES`, such as "LG-FG-A".
        params: the model, or its floating arrays as `equinox.partition` gives them; feedback
            matrices are drawn to it.
        key: a JAX random key for the fixed feedback of FA, L-FA, LG-FA and DFA; keep it for all
            steps.
        tangents: the noise of forward gradients, by default signs, orthogonal to each other where
            there are several; the paper's is `forwax.tangents.Normal()`.
        num_tangents: how many noises a step.

    Raises:
        ValueError: when there is no method of this name.

    >>> import forwax as fx, forwax.models
    >>> shape = dict(blocks=2, patches=2, channels=6, groups=3)
    >>> model = fx.models.LocalMixer((4, 4, 1), 10, **shape, key=jax.random.key(0))
    >>> greedy = method("LG-FG-A", model, jax.random.key(1))
    >>> greedy.losses, greedy.parts
    ('greedy', True)
    >>> value_and_grad = jax.jit(fx.models.ren2023.supervised(greedy))
    >>> x, labels = jnp.ones((5, 4, 4, 1)), jnp.zeros(5, int)
    >>> value, grads = value_and_grad(jax.random.key(2), model, x, labels)
    """
    if name not in READINGS:
        raise ValueError(
            f"ren2023.method: expected one of {', '.join(NAMES)}, got {name!r}."
        )
    reading = READINGS[name]
    rules: dict[Kind, Callable[[], Rule]] = {
        "BP": lambda: Backprop(),
        "FA": lambda: FeedbackAlignment(random_feedback(key, params)),
        "DFA": lambda: DirectFeedbackAlignment(key),
        "LF": lambda: LearnedFeedback(),
        # parameters without activity noise get weight noise, all but the heads
        "FG-W": lambda: ActivityPerturbation(tangents, num_tangents, where=HEADS),
        "FG-A": lambda: ActivityPerturbation(tangents, num_tangents),
    }
    return Method(name, reading.losses, reading.draws_noise, rules[reading.kind]())


def supervised(method: Method, static: Any = None) -> Callable[..., tuple[Array, Any]]:
    """The value and estimated gradient of `forwax.models.local_losses` over a batch, by a method.

    Args:
        method: where the losses sit, and the rule.
        static: the model's other half when `params` are its floating arrays, as `equinox.partition`
            gives them.

    Returns:
        A function `f(key, params, x, labels) -> (value, grads)` of examples x [N, ...] and labels
        [N] or [N, K]; for LF it returns `(value, grads, rule)`, whose rule has learnt and is that
        of the next step's method.
    """

    def loss(params: Any, x: Array, label: Array) -> LocalLosses:
        return local_losses(
            _model(params, static), x, label, method.losses, parts=method.parts
        )

    return estimator(loss, method.rule, in_axes=(None, 0, 0))


def estimator(
    loss: Callable[..., Any], rule: Any, **options: Any
) -> Callable[..., Any]:
    """Give `rule.step(loss, ...)` of a rule that learns, `forwax.value_and_grad` of others.

    Args:
        loss: as for `forwax.value_and_grad`.
        rule: likewise.
        **options: likewise.

    >>> from forwax import Backprop
    >>> double = estimator(lambda w: w**2, Backprop())
    >>> [float(x) for x in double(jax.random.key(0), 3.0)]
    [9.0, 6.0]
    """
    if rule.learns:
        return rule.step(loss, **options)
    return value_and_grad(loss, rule, **options)


def contrastive(
    method: Method,
    static: Any = None,
    *,
    temperature: float = 0.5,
    axis_name: Any = None,
) -> Callable[..., tuple[Array, Any]]:
    """The value and estimated gradient of `forwax.models.contrastive_losses`, by a method.

    Direct feedback sends each view its own error, so that DFA takes the losses view by view,
    against keys from a first forward pass; all other methods take the batch's loss as one.

    Args:
        method: where the losses sit, and the rule.
        static: as for `supervised`.
        temperature: of NT-Xent.
        axis_name: the mesh axis of `jax.shard_map` over which examples are spread; not for DFA.

    Returns:
        A function `f(key, params, x, y, labels) -> (value, grads)` of two views x and y [N, ...];
        labels [N] or [N, K] train the readout alone. For LF it returns `(value, grads, rule)`.

    Raises:
        ValueError: when DFA meets an `axis_name`.
    """
    if isinstance(method.rule, DirectFeedbackAlignment):
        if axis_name is not None:
            raise ValueError(
                "ren2023.contrastive: DFA takes no axis_name; its negatives are those of one "
                "device."
            )
        return functools.partial(_view_by_view, method, static, temperature)

    def loss(params: Any, x: Array, y: Array, labels: Array) -> LocalLosses:
        options = {
            "temperature": temperature,
            "parts": method.parts,
            "axis_name": axis_name,
        }
        return contrastive_losses(
            _model(params, static), x, y, labels, method.losses, **options
        )

    return estimator(loss, method.rule)


def _view_by_view(
    method: Method,
    static: Any,
    temperature: float,
    key: Array,
    params: Any,
    x: Array,
    y: Array,
    labels: Array,
) -> tuple[Array, Any]:
    def loss(
        params: Any, view: Array, index: Array, label: Array, views: Array
    ) -> LocalLosses:
        model = _model(params, static)
        return contrastive_loss_of_view(
            model, view, index, label, views, temperature=temperature
        )

    views = projections(_model(params, static), x, y)
    both = (
        jnp.concatenate([x, y]),
        jnp.arange(2 * len(x)),
        jnp.concatenate([labels, labels]),
    )
    return value_and_grad(loss, method.rule, in_axes=(None, 0, 0, 0, None))(
        key, params, *both, views
    )


def _model(params: Any, static: Any) -> Any:
    return params if static is None else eqx.combine(params, static)
