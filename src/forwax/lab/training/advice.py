"""What the slopes of a guarded run tell of its gradient, and what to try when a run stopped."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp

import forwax as fx
from forwax.lab.catalogue.options import find_experiment
from forwax.lab.catalogue.rules import RULES, build_rule, guarded_rule
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import UsageError
from forwax.lab.report import Json
from forwax.lab.training.program import Trainer
from forwax.lab.training.step import TrainState

NAMES = ("gradient_norm", "relative_mse", "cosine", "num_clipped", "num_skipped")


def monitored(settings: Settings, state: TrainState, num_parameters: int) -> Json:
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
    rule: fx.Safe = guarded_rule(settings, state.guess, state.slopes)
    # one program instead of one for each operation
    found = jax.jit(lambda rule: rule.monitor(num_parameters))(rule)
    numbers = {name: getattr(found, name).item() for name in NAMES}
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def advice(experiment: str, trainer: Trainer, folder: Path, loss: float) -> str:
    """Give one sentence on why the run stopped and what to try.

    Args:
        experiment: its name.
        trainer: the run at its last finite step.
        folder: that it is kept in.
        loss: of the step that was not made.
    """
    settings = trainer.program.settings
    tries = [smaller_rate(experiment, trainer)]
    if settings.num_tangents is not None:
        tries.append(f"more --num-tangents (it was {settings.num_tangents})")
        guarded = "clip_slopes" in RULES[settings.rule].takes
        if guarded and settings.clip_slopes != 1:
            tries.append("--clip-slopes 1")
        if guarded and math.isfinite(loss) and not settings.skip_bad_slopes:
            tries.append("--skip-bad-slopes")
        if _takes_projection(settings):
            tries.append("--combine projection")
    what = "gradient" if math.isfinite(loss) else "loss"
    return (
        f"Step {trainer.step + 1} was not made because its {what} is not finite (loss {loss:g}); "
        f"the last finite state is kept in {folder}: try {' or '.join(tries)}."
    )


def smaller_rate(experiment: str, trainer: Trainer) -> str:
    """Advise a smaller rate: what the rule's law implies, at most a third of the run's."""
    settings, problem = trainer.program.settings, trainer.program.problem
    n = problem.num_parameters
    rate = settings.learning_rate or 0.0
    suggested = find_experiment(experiment).suggest_rate(
        settings, build_rule(settings, jnp.zeros(n)), n, problem.noise
    )
    return f"a smaller --learning-rate (say {min(suggested, rate / 3):.1g}; it was {rate:.2g})"


def _takes_projection(settings: Settings) -> bool:
    if "combine" not in RULES[settings.rule].takes or settings.combine == "projection":
        return False
    try:
        build_rule(dataclasses.replace(settings, combine="projection"))
    except UsageError:
        return False
    return True
