"""What one training run is: every choice that its result depends on, as one flat value that is stored as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class UsageError(Exception):
    """Options that do not go together: one sentence for the user; the command line then exits with code 2.

    >>> raise UsageError("--steps must be at least 1, got 0.")
    Traceback (most recent call last):
        ...
    forwax.lab.catalogue.settings.UsageError: --steps must be at least 1, got 0.
    """


@dataclass(frozen=True)
class Settings:
    """Every choice that a run's result depends on; `None` where a choice does not apply or is still open.

    Attributes:
        rule: how the gradient is found, a name of `forwax.lab.catalogue.rules.RULES`.
        tangents: the distribution of the tangents, a name of `forwax.lab.catalogue.rules.TANGENTS`; None
            for the rule's own.
        num_tangents: how many tangents a step draws.
        combine: how slopes and tangents become one estimate, a name of
            `forwax.lab.catalogue.rules.COMBINES`.
        density: the share of non-zero entries of sparse tangents.
        chunk_size: how many tangents are pushed forward at once; None means all.
        epsilon: the step of finite differences.
        clip_slopes: the largest slope, in medians of what the last 1,001 steps used; None clips
            nothing.
        skip_bad_slopes: whether slopes that are not finite count as zero, instead of stopping the
            run.
        guess_decay: how slowly the guess, an exponential mean of past estimates, forgets.
        optimizer: a name of `forwax.lab.catalogue.optimizers.OPTIMIZERS`.
        learning_rate: the rate at the start of the schedule (its peak, with a warm-up).
        backprop_rate: the rate tuned for SGD with true gradients, from which an open
            `learning_rate` is found.
        schedule: a name of `forwax.lab.catalogue.optimizers.SCHEDULES`.
        decay_rate: k of the exponential schedule rate · exp(-k · step).
        warm_up: the number of steps over which the rate rises from zero.
        weight_decay: the share of each parameter taken off per unit of learning rate.
        steps: the number of training steps.
        batch_size: the number of examples of a step.
        eval_every: the number of steps between two evaluations on the test set.
        seed: the seed of the initial parameters, the data order and the tangents.
        dtype: the floating type that the model computes in.
        size: LocalMixer's, a name of `forwax.models.local_mixer.SIZES`; None for other models.
        data: the data set, where the experiment leaves it open.
        objective: "supervised" or "contrastive", where the experiment leaves it open.
        parts: whether local losses come in one part for each patch and group, where noise is on
            activities or weights.
        augment: whether supervised training images are shifted and flipped, see
            `forwax.lab.catalogue.objectives.shifted`.
        data_parallel: whether each batch is spread over all local devices.

    >>> Settings(rule="weight", num_tangents=8).num_tangents
    8
    """

    rule: str = "weight"
    tangents: str | None = None
    num_tangents: int | None = 1
    combine: str | None = "mean"
    density: float | None = 0.1
    chunk_size: int | None = None
    epsilon: float | None = 1e-3
    guess_decay: float | None = 0.9
    clip_slopes: float | None = None
    skip_bad_slopes: bool | None = False
    optimizer: str = "sgd"
    learning_rate: float | None = None
    backprop_rate: float = 0.1
    schedule: str = "constant"
    decay_rate: float | None = 1e-4
    warm_up: int = 0
    weight_decay: float = 0.0
    steps: int = 1000
    batch_size: int = 64
    eval_every: int | None = None
    seed: int = 0
    dtype: str = "float32"
    size: str | None = None
    data: str | None = None
    objective: str | None = None
    parts: bool = True
    augment: bool = False
    data_parallel: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Give the settings as a dictionary that JSON can hold.

        >>> Settings.from_dict(Settings(steps=3).as_dict()) == Settings(steps=3)
        True
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Read settings back from a dictionary that may hold other things as well.

        >>> Settings.from_dict({"steps": 3, "experiment": "digits"}).steps
        3
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})
