"""Optimizers and learning rates of the command line.

A rate tuned for true gradients makes forward gradients explode. Where the user gives no rate, it is
found so:

- SGD-like optimizers: backprop_rate · s, where s is the scale of `forwax.suggest_learning_rate`,
  1/(1 + M) for an unbiased rule of relative MSE M. The law is for a loss that curves alike along
  all n parameters. A network's loss curves along far fewer; where an experiment names that number d
  (its *effective dimension*), s is multiplied by (n + k - 1)/(d + k - 1), which puts d in n's
  place. Momentum 0.9 multiplies a rate by ten in the long run, so that its rate is a tenth.
- Activity noise: n is the number d of noise coordinates of one example, or its *effective noise*
  where an experiment names that. The slopes of a batch of N average, and what the examples' own
  gradients G_i do not share adds to the noise: s = 1/(1 + M) for d' = 1 + (d - 1)·4/N coordinates,
  where 4 stands for mean|G_i|² / |mean G|², found by tuning on MNIST's MLP for 1,800 steps.
- Adaptive optimizers divide by the root of the estimate's second moment, which is 1 + M times that
  of the true gradient: they have scaled by √s already, and get the other √s here: base rate · √s,
  with the base rate of their papers.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax

import forwax as fx
from forwax.lab.catalogue.settings import Settings
from forwax.models.ren2023 import HEADS

MOMENTUM = 0.9
DISAGREEMENT = 4.0


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer of the command line.

    Attributes:
        build: from a schedule to the optax transformation; it takes `weight_decay` too where it
            decays by itself.
        base_rate: the usual rate with true gradients, for optimizers that divide by the gradient's
            size.
        factor: its learning rate over SGD's, for optimizers that are linear in the gradient.
        decays: whether it decays weights by itself; elsewhere decay is a term of the gradient.

    >>> OPTIMIZERS["adam"].base_rate, OPTIMIZERS["sgd"].base_rate
    (0.001, None)
    """

    build: Callable[..., optax.GradientTransformation]
    base_rate: float | None = None
    factor: float = 1.0
    decays: bool = False


def decayed_by_lars(params: Any) -> Any:
    """Say of each leaf whether LARS takes decay off it.

    It does off weights alone, neither off biases nor off heads and readouts. So does the code of
    Ren et al. 2023; its trust ratio, as here, is on every leaf.

    >>> from forwax.models import logistic_regression
    >>> sum(jax.tree.leaves(decayed_by_lars(logistic_regression(4, 3, key=jax.random.key(0)))))
    1
    """

    def decays(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return (
            leaf.ndim > 1
            and not name.endswith(".bias")
            and re.search(HEADS, name) is None
        )

    return jax.tree_util.tree_map_with_path(decays, params)


_ADAPTIVE = {
    "adam": 1e-3,
    "adamw": 1e-3,
    "adamax": 2e-3,
    "nadam": 1e-3,
    "radam": 1e-3,
    "adabelief": 1e-3,
    "adagrad": 1e-2,
    "rmsprop": 1e-3,
    "lion": 1e-4,
    "lamb": 1e-3,
    "yogi": 1e-2,
}
"""The base rates of optax's optimizers of these names."""

_momentum = partial(optax.sgd, momentum=MOMENTUM)
OPTIMIZERS: Mapping[str, OptimizerChoice] = {
    "sgd": OptimizerChoice(optax.sgd),
    "momentum": OptimizerChoice(_momentum, factor=1 - MOMENTUM),
    "nesterov": OptimizerChoice(partial(_momentum, nesterov=True), factor=1 - MOMENTUM),
    **{
        name: OptimizerChoice(
            getattr(optax, name), rate, decays=name in ("adamw", "lion", "lamb")
        )
        for name, rate in _ADAPTIVE.items()
    },
    "lars": OptimizerChoice(
        partial(optax.lars, weight_decay_mask=decayed_by_lars),
        1e-1,
        decays=True,
    ),
}
"""Every optimizer of the command line."""

SCHEDULES: Mapping[str, Callable[[float, Settings, int], optax.Schedule]] = {
    "constant": lambda rate, settings, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, settings, steps: optax.cosine_decay_schedule(rate, steps),
    "linear": lambda rate, settings, steps: optax.linear_schedule(rate, 0.0, steps),
    "exponential": lambda rate, settings, steps: optax.exponential_decay(
        rate, 1, math.exp(-(settings.decay_rate or 0))
    ),
}
"""Every schedule, from (rate, settings, the steps after the warm-up) to a function of the step."""


def build_schedule(settings: Settings, learning_rate: float) -> optax.Schedule:
    """Build the learning rate as a function of the step: a linear warm-up, then the schedule.

    Args:
        settings: the run's settings.
        learning_rate: the rate at the schedule's start.

    Returns:
        A function from the step, counted from 0, to the rate.

    >>> schedule = build_schedule(Settings(schedule="exponential", decay_rate=1e-4), 2e-4)
    >>> round(float(schedule(10_000)) / 2e-4, 3)
    0.368
    """
    warm_up = settings.warm_up
    after = SCHEDULES[settings.schedule](
        learning_rate, settings, max(settings.steps - warm_up, 1)
    )
    if not warm_up:
        return after
    rise = optax.linear_schedule(
        learning_rate / warm_up, learning_rate, max(warm_up - 1, 1)
    )
    return optax.join_schedules([rise, after], [warm_up])


def build_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Build the optimizer with its schedule and weight decay.

    Args:
        settings: the run's settings, with a learning rate.

    >>> settings = Settings(optimizer="adam", learning_rate=1e-3)
    >>> state = build_optimizer(settings).init({"w": 0.0})
    """
    if settings.learning_rate is None:
        raise ValueError(
            "expected settings with a learning rate, got None; see options.resolve"
        )
    choice = OPTIMIZERS[settings.optimizer]
    schedule = build_schedule(settings, settings.learning_rate)
    if choice.decays:
        return choice.build(schedule, weight_decay=settings.weight_decay)
    optimizer = choice.build(schedule)
    if not settings.weight_decay:
        return optimizer
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), optimizer)


def suggest_rate(
    settings: Settings,
    rule: Any,
    n: int,
    effective_dimension: int | None = None,
    noise: int | None = None,
) -> float:
    """Find a learning rate for a rule from the one tuned for backprop, as told above.

    Args:
        settings: the run's settings; `backprop_rate` and `optimizer` are read.
        rule: the forwax rule.
        n: the number of parameters.
        effective_dimension: along how many directions the loss curves; n where it is None.
        noise: the number of noise coordinates of one example, for a rule that puts noise on
            activities.

    Returns:
        A learning rate.

    >>> settings = Settings(backprop_rate=0.5, batch_size=64)
    >>> suggest_rate(settings, fx.Backprop(), n=1000)
    0.5
    >>> round(suggest_rate(settings, fx.LearnedFeedback(), n=1000), 6)
    0.166667
    >>> round(suggest_rate(settings, fx.WeightPerturbation(), n=1000), 6)
    0.0005
    >>> round(suggest_rate(settings, fx.WeightPerturbation(), 1000, effective_dimension=100), 6)
    0.005
    >>> round(suggest_rate(settings, fx.ActivityPerturbation(), n=1000, noise=97), 6)
    0.071429
    """
    choice = OPTIMIZERS[settings.optimizer]
    if isinstance(rule, fx.GaussNewton):
        return 0.5  # of the whole step
    if rule.learns:
        # Maps lag behind weights that move fast.
        return choice.base_rate or settings.backprop_rate * choice.factor / 3
    k = getattr(rule, "num_tangents", None)
    if noise is not None:
        n = round(1 + max(noise - 1, 0) * DISAGREEMENT / settings.batch_size)
    scale = fx.suggest_learning_rate(rule, n, 1.0)
    if k is not None and effective_dimension is not None and noise is None:
        scale *= (n + k - 1) / (min(effective_dimension, n) + k - 1)
    if choice.base_rate is not None:
        return choice.base_rate * math.sqrt(scale)
    return settings.backprop_rate * choice.factor * scale
