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

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

import forwax as fx
from forwax.lab.settings import Settings
from forwax.models.ren2023 import HEADS

MOMENTUM = 0.9
DISAGREEMENT = 4.0


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer of the command line.

    Attributes:
        build: from (schedule, weight decay) to the optax transformation.
        factor: its learning rate over SGD's, for optimizers that are linear in the gradient.
        base_rate: the usual rate with true gradients, for optimizers that divide by the gradient's
            size.

    >>> OPTIMIZERS["adam"].base_rate, OPTIMIZERS["sgd"].base_rate
    (0.001, None)
    """

    build: Callable[[Any, float], optax.GradientTransformation]
    factor: float = 1.0
    base_rate: float | None = None


def _decayed(
    build: Callable[[Any], optax.GradientTransformation],
) -> Callable[[Any, float], Any]:
    """Add weight decay, as a term of the gradient, in front of an optimizer that has none of its own."""

    def with_decay(rate: Any, weight_decay: float) -> optax.GradientTransformation:
        return (
            optax.chain(optax.add_decayed_weights(weight_decay), build(rate))
            if weight_decay
            else build(rate)
        )

    return with_decay


def _decoupled(
    build: Callable[..., optax.GradientTransformation],
) -> Callable[[Any, float], Any]:
    """Pass weight decay on to an optimizer that has its own."""
    return lambda rate, weight_decay: build(rate, weight_decay=weight_decay)


def decayed_by_lars(params: Any) -> Any:
    """Say of each leaf whether LARS takes decay off it: weights alone, neither biases nor heads and readouts.

    So does the code of Ren et al. 2023; its trust ratio, as here, is on every leaf.

    >>> from forwax.models import logistic_regression
    >>> sum(jax.tree.leaves(decayed_by_lars(logistic_regression(4, 3, key=jax.random.key(0)))))
    1
    """

    def decays(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return leaf.ndim > 1 and not name.endswith(".bias") and re.search(HEADS, name) is None

    return jax.tree_util.tree_map_with_path(decays, params)


def _lars(rate: Any, weight_decay: float) -> optax.GradientTransformation:
    return optax.lars(rate, weight_decay, weight_decay_mask=decayed_by_lars)


OPTIMIZERS: Mapping[str, OptimizerChoice] = {
    "sgd": OptimizerChoice(_decayed(optax.sgd)),
    "momentum": OptimizerChoice(
        _decayed(lambda rate: optax.sgd(rate, MOMENTUM)), factor=1 - MOMENTUM
    ),
    "nesterov": OptimizerChoice(
        _decayed(lambda rate: optax.sgd(rate, MOMENTUM, nesterov=True)),
        factor=1 - MOMENTUM,
    ),
    "adam": OptimizerChoice(_decayed(optax.adam), base_rate=1e-3),
    "adamw": OptimizerChoice(_decoupled(optax.adamw), base_rate=1e-3),
    "adamax": OptimizerChoice(_decayed(optax.adamax), base_rate=2e-3),
    "nadam": OptimizerChoice(_decayed(optax.nadam), base_rate=1e-3),
    "radam": OptimizerChoice(_decayed(optax.radam), base_rate=1e-3),
    "adabelief": OptimizerChoice(_decayed(optax.adabelief), base_rate=1e-3),
    "adagrad": OptimizerChoice(_decayed(optax.adagrad), base_rate=1e-2),
    "rmsprop": OptimizerChoice(_decayed(optax.rmsprop), base_rate=1e-3),
    "lion": OptimizerChoice(_decoupled(optax.lion), base_rate=1e-4),
    "lamb": OptimizerChoice(_decoupled(optax.lamb), base_rate=1e-3),
    "lars": OptimizerChoice(_lars, base_rate=1e-1),
    "yogi": OptimizerChoice(_decayed(optax.yogi), base_rate=1e-2),
}
"""Every optimizer of the command line."""

SCHEDULES: Mapping[str, Callable[[float, Settings, int], optax.Schedule]] = {
    "constant": lambda rate, settings, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, settings, steps: optax.cosine_decay_schedule(rate, max(steps, 1)),
    "linear": lambda rate, settings, steps: optax.linear_schedule(rate, 0.0, max(steps, 1)),
    "exponential": lambda rate, settings, steps: optax.exponential_decay(
        rate, 1, math.exp(-(settings.decay_rate or 0))
    ),
}
"""Every schedule, from (rate, settings, the number of steps after the warm-up) to a function of the step."""


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
    after = SCHEDULES[settings.schedule](learning_rate, settings, settings.steps - settings.warm_up)
    if not settings.warm_up:
        return after
    rise = optax.linear_schedule(
        learning_rate / settings.warm_up, learning_rate, max(settings.warm_up - 1, 1)
    )
    return optax.join_schedules([rise, after], [settings.warm_up])


def build_optimizer(settings: Settings, learning_rate: float) -> optax.GradientTransformation:
    """Build the optimizer with its schedule and weight decay.

    Args:
        settings: the run's settings.
        learning_rate: the rate at the schedule's start.

    >>> state = build_optimizer(Settings(optimizer="adam"), 1e-3).init({"w": 0.0})
    """
    build = OPTIMIZERS[settings.optimizer].build
    return build(build_schedule(settings, learning_rate), settings.weight_decay)


def suggest_rate(
    settings: Settings,
    rule: Any,
    n: int,
    effective_dimension: int | None = None,
    noise: int | None = None,
) -> float:
    """Find a learning rate for a rule from the one tuned for backprop; the module's docstring tells how.

    Args:
        settings: the run's settings; `backprop_rate` and `optimizer` are read.
        rule: the forwax rule.
        n: the number of parameters.
        effective_dimension: along how many directions the loss curves; n where it is None.
        noise: the number of noise coordinates of one example, for a rule that puts noise on
            activities.

    Returns:
        A learning rate.

    >>> suggest_rate(Settings(backprop_rate=0.5), fx.Backprop(), n=1000)
    0.5
    >>> round(suggest_rate(Settings(backprop_rate=0.5), fx.WeightPerturbation(), n=1000), 6)
    0.0005
    >>> round(suggest_rate(Settings(backprop_rate=0.5), fx.WeightPerturbation(), n=1000, effective_dimension=100), 6)
    0.005
    >>> round(suggest_rate(Settings(backprop_rate=0.5, batch_size=64), fx.ActivityPerturbation(), n=1000, noise=97), 6)
    0.071429
    """
    choice = OPTIMIZERS[settings.optimizer]
    k = getattr(rule, "num_tangents", None)
    if noise is not None and isinstance(rule, fx.ActivityPerturbation):
        n = round(1 + max(noise - 1, 0) * DISAGREEMENT / settings.batch_size)
    scale = float(fx.suggest_learning_rate(rule, n, 1.0))
    if k is not None and effective_dimension is not None and noise is None:
        scale *= (n + k - 1) / (min(effective_dimension, n) + k - 1)
    if choice.base_rate is not None:
        return choice.base_rate * math.sqrt(scale)
    return settings.backprop_rate * choice.factor * scale
