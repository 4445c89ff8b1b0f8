"""What to try when a run stopped because something was not finite."""

from __future__ import annotations

import dataclasses
import math

import jax

from forwax.lab import choices
from forwax.lab.options import find_experiment
from forwax.lab.settings import Settings, UsageError
from forwax.lab.train.sitting import Sitting


def advice(sitting: Sitting, loss: float) -> str:
    """Give one sentence on why the run stopped and what to try."""
    settings, n = sitting.settings, sitting.trainer.problem.num_parameters
    experiment = find_experiment(sitting.run.config["experiment"])
    rule = choices.build_rule(settings, jax.numpy.zeros(n))
    rate = settings.learning_rate or 0.0
    smaller = min(
        experiment.suggest_rate(settings, rule, n, sitting.trainer.problem.noise),
        rate / 3,
    )
    tries = [f"a smaller --learning-rate (say {smaller:.1g}; it was {rate:.2g})"]
    if settings.num_tangents is not None:
        tries.append(f"more --num-tangents (it was {settings.num_tangents})")
        guarded = "clip_slopes" in choices.RULES[settings.rule].takes
        tries += ["--clip-slopes 1"] if guarded and settings.clip_slopes != 1 else []
        tries += (
            ["--skip-bad-slopes"]
            if guarded and math.isfinite(loss) and not settings.skip_bad_slopes
            else []
        )
        tries += ["--combine projection"] if _takes_projection(settings) else []
    what = "gradient" if math.isfinite(loss) else "loss"
    return (
        f"Step {sitting.trainer.step + 1} was not made because its {what} is not finite (loss "
        f"{loss:g}); the last "
        f"finite state is kept in {sitting.run.path}: try {' or '.join(tries)}."
    )


def _takes_projection(settings: Settings) -> bool:
    if "combine" not in choices.RULES[settings.rule].takes or settings.combine == "projection":
        return False
    try:
        choices.build_rule(dataclasses.replace(settings, combine="projection"))
    except UsageError:
        return False
    return True
