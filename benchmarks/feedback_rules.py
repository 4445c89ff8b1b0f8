"""The rules of the feedback benchmark, each with the rate that its search is around."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

import forwax as fx
from feedback_tasks import IN_AXES, Loss, Task, of_parts
from forwax.credit import Decay


class Method(NamedTuple):
    """A row of the tables.

    Attributes:
        build: the rule, from a key and parameters, before it has learnt anything.
        sgd: the middle of the three rates that are tried with momentum.
        adam: the same with Adam.
        part: "all", "head" (nothing else is trained) or "frozen" inner layers.
        sequences_only: whether it differs from another row on transformers alone.
    """

    build: Callable[[Array, Any], fx.Rule]
    sgd: float
    adam: float = 0.003
    part: str = "all"
    sequences_only: bool = False


def plain(rule: fx.Rule) -> Callable[[Array, Any], fx.Rule]:
    return lambda key, params: rule


def noise(
    num_tangents: int, sequences_only: bool = False, credit: Decay | None = None
) -> Method:
    rule = fx.ActivityPerturbation(num_tangents=num_tangents, credit=credit)
    return Method(plain(rule), 0.001, sequences_only=sequences_only)


def learned(num_tangents: int = 1, **options: Any) -> Method:
    rule = fx.LearnedFeedback(num_tangents=num_tangents, **options)
    return Method(plain(rule), 0.03, sequences_only="chain" in options)


METHODS = {
    "backprop": Method(plain(fx.Backprop()), 0.1),
    "the head alone": Method(plain(fx.Backprop()), 0.1, part="head"),
    "frozen inner layers": Method(plain(fx.Backprop()), 0.1, part="frozen"),
    "activity noise, 1": noise(1),
    "activity noise, 4": noise(4),
    "activity noise, 16": noise(16, sequences_only=True),
    "activity noise, 4, own position": noise(4, sequences_only=True, credit=Decay(0.0)),
    "direct feedback": Method(
        lambda key, params: fx.DirectFeedbackAlignment(key), 0.03
    ),
    "feedback alignment": Method(
        lambda key, params: fx.FeedbackAlignment(fx.random_feedback(key, params)), 0.03
    ),
    "FDFA, 4": Method(plain(fx.FDFA(num_tangents=4)), 0.03),
    "learned feedback, 1": learned(),
    "learned feedback, 4": learned(4),
    "learned feedback, 4, every 4th step": learned(4, every=4),
    "learned feedback, 1, every 4th step": learned(every=4),
    'learned feedback, 1, chain="none"': learned(chain="none"),
    'learned feedback, 1, chain="all"': learned(chain="all"),
}
SPACING = 3.0
NUM_RATES = 3


def rates(task: str, method: str) -> list[float]:
    """As many for each rule."""
    middle = METHODS[method].sgd if task == "mlp" else METHODS[method].adam
    return [
        float(f"{middle * SPACING**i:.3g}")
        for i in range(-(NUM_RATES // 2), NUM_RATES - NUM_RATES // 2)
    ]


def methods_of(task: str) -> list[str]:
    """The rows of a task."""
    sequences = task not in ("mlp", "cnn")
    return [n for n, m in METHODS.items() if sequences or not m.sequences_only]


def loss_of(task: Task, method: str) -> Loss:
    """The loss whose gradient the row takes."""
    part = METHODS[method].part
    if part == "head":
        return of_parts(task.loss, "head")
    return task.loss if part == "all" else task.frozen_loss


def start(task: Task, method: str, seed: int) -> tuple[fx.Rule, Any]:
    """A rule and parameters."""
    key, feedback = jax.random.split(jax.random.key(seed))
    params = task.init(key)
    rule = METHODS[method].build(feedback, params)
    if isinstance(rule, fx.LearnedFeedback | fx.FDFA):
        rule = rule.init(task.loss, in_axes=IN_AXES)(params, *task.batch(key))
    return rule, params


def gradient(loss: Loss) -> Callable[..., tuple[Array, Any, fx.Rule]]:
    """A function of (rule, key, params, *data), which also gives the next rule."""

    def estimate(rule: fx.Rule, key: Array, params: Any, *data: Array) -> Any:
        if isinstance(rule, fx.LearningRule):
            return rule.step(loss, in_axes=IN_AXES)(key, params, *data)
        found = fx.value_and_grad(loss, rule, in_axes=IN_AXES)(key, params, *data)
        return *found, rule

    return estimate
