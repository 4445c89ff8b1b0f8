"""What the slopes of a guarded run tell of its gradient, as numbers for metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

import jax

import forwax as fx
from forwax.lab.catalogue import rules as choices
from forwax.lab.catalogue.settings import Settings
from forwax.lab.training.program import TrainState

NAMES = ("gradient_norm", "relative_mse", "cosine", "num_clipped", "num_skipped")


def monitored(settings: Settings, state: TrainState, num_parameters: int) -> dict[str, Any]:
    """Give what `forwax.Safe.monitor` finds in the slopes of the last thousand steps.

    Args:
        settings: the run's settings.
        state: the state after a step.
        num_parameters: the number of parameters.

    Returns:
        `gradient_norm`, the root mean square of |g| of the batches; `relative_mse`, the law of one
        step's estimate; `cosine`, that of an estimate with its batch's gradient; and how many
        slopes were clipped and skipped since the start. None stands for what cannot be told. Empty
        where slopes are neither clipped nor skipped.

    >>> monitored(Settings(), TrainState({}, None, None, 0), 2410)
    {}
    """
    if state.slopes is None:
        return {}
    rule = choices.guard_rule(settings, choices.build_rule(settings, state.guess), state.slopes)
    found = _monitor(rule, num_parameters)
    numbers = {name: getattr(found, name).item() for name in NAMES}
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _monitor(rule: fx.Safe, num_parameters: int) -> Any:
    # one program instead of one for each operation
    return jax.jit(lambda rule: rule.monitor(num_parameters))(rule)
