"""What one training run is: every choice that its result depends on, as one flat value."""

# ruff: noqa: RUF009 (`_choice` makes fields, as `dataclasses.field` does)

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from forwax.lab.flags import AtLeastOne, Count, Natural, NotNegative, Positive, Range
from forwax.lab.report import Json

Share = Annotated[Positive, Range("at most 1", lambda x: x <= 1)]
Seed = Annotated[Natural, Range("below 2**32", lambda x: x < 2**32)]
Decay = Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]


def _choice(default: Any, text: str) -> Any:
    """A field: what holds where neither the user nor a configuration says more, and its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Every choice that a run's result depends on, stored as JSON in config.json.

    `None` stands where a choice does not apply or is still open. Names are those of the tables of
    this package; ranges stand in the types.

    >>> Settings(rule="weight", num_tangents=8).num_tangents
    8
    """

    rule: str = _choice(
        "weight",
        "How the gradient is found; for local-mixer a method of Ren et al. 2023 by its name there.",
    )
    tangents: str | None = _choice(
        None,
        "The distribution of the tangents, by default the rule's own: low-rank, hadamard or "
        "rademacher.",
    )
    num_tangents: Count | None = _choice(
        1, "How many tangents each step draws; more cost more and are less noisy."
    )
    combine: str | None = _choice(
        "mean", "How slopes and tangents become one estimate."
    )
    density: Share | None = _choice(
        0.1, "The share of non-zero entries of sparse tangents (0.1)."
    )
    chunk_size: Count | None = _choice(
        None, "How many tangents are pushed forward at once; all of them by default."
    )
    epsilon: Positive | None = _choice(1e-3, "The step of finite differences (0.001).")
    noise: Literal["activity", "auto"] | None = _choice(
        "activity",
        "Where the noise of activity enters: on what parameters put out, or, where that is more, "
        "on the parameters of each example (auto).",
    )
    calibrate: bool | None = _choice(
        False,
        "Whether activity's noise gets a scale for each site before the first step, found on a "
        "batch.",
    )
    chain: Literal["none", "positions", "all"] | None = _choice(
        "positions",
        "Which errors of learned-feedback come through mirrors of weights, from product to product "
        "(positions).",
    )
    every: Count | None = _choice(
        1,
        "In each n-th step the maps of learned-feedback learn; the others are cheaper.",
    )
    guess_decay: Decay | None = _choice(
        0.9,
        "Guided tangents and control variates use an exponential mean of past estimates; this "
        "share is kept (0.9).",
    )
    clip_slopes: AtLeastOne | None = _choice(
        None,
        "The largest slope, in medians of the last 1,001 steps': 1 stops explosions; by default "
        "nothing is clipped.",
    )
    skip_bad_slopes: bool | None = _choice(
        False,
        "Whether a slope that is not finite counts as zero and does not stop the run, as such a "
        "loss always does.",
    )
    optimizer: str = _choice("sgd", "The optimizer.")
    # at the start of the schedule; its peak, with a warm-up
    learning_rate: Positive | None = _choice(
        None, "The learning rate; by default the one that the rule's law implies."
    )
    backprop_rate: Positive = _choice(
        0.1,
        "The rate tuned for SGD by backprop, from which the default learning rate is found.",
    )
    schedule: str = _choice("constant", "How the learning rate changes over the steps.")
    decay_rate: NotNegative | None = _choice(
        1e-4, "k of the exponential schedule: rate · exp(-k · step)."
    )
    warm_up: Natural = _choice(0, "Over how many steps the rate rises from zero.")
    weight_decay: NotNegative = _choice(
        0.0, "The share of each parameter taken off per unit of learning rate."
    )
    steps: Count = _choice(1000, "The number of training steps.")
    batch_size: Count = _choice(64, "The number of examples of a step.")
    eval_every: Count | None = _choice(
        None,
        "The number of steps between two evaluations on the test set; a twentieth of all steps by "
        "default.",
    )
    seed: Seed = _choice(
        0, "The seed of the initial parameters, the data order and the tangents."
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = _choice(
        "float32",
        "The floating type that the model computes in; half precision keeps its parameters in "
        "float32.",
    )
    size: str | None = _choice(
        None, "The size of local-mixer: size, patches along a side, groups (M/1/16)."
    )
    data: str | None = _choice(None, "The data set of local-mixer (mnist).")
    objective: Literal["supervised", "contrastive"] | None = _choice(
        None,
        "What local-mixer learns from: labels, or two views of each image, with a linear readout "
        "(supervised).",
    )
    parts: bool = _choice(
        True,
        "Whether forward gradients of local-mixer get a slope for each patch and group, not one "
        "for each block (True).",
    )
    augment: bool = _choice(
        False,
        "Whether supervised training images of local-mixer are shifted by up to 2 pixels, and "
        "flipped where coloured.",
    )
    data_parallel: bool = _choice(
        False, "Whether each batch is spread over all local devices."
    )

    def as_dict(self) -> Json:
        """Give the settings as a dictionary that JSON can hold.

        >>> Settings.from_dict(Settings(steps=3).as_dict()) == Settings(steps=3)
        True
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Json) -> Settings:
        """Read settings back from a dictionary that may hold other things as well.

        >>> Settings.from_dict({"steps": 3, "experiment": "digits"}).steps
        3
        """
        return cls(**fields_in(cls, values))


def fields_in(options: Any, values: Json) -> Json:
    """Give those of the values that are fields of a dataclass, by name.

    >>> fields_in(Settings, {"steps": 3, "experiment": "digits"})
    {'steps': 3}
    """
    names = {field.name for field in fields(options)}
    return {name: value for name, value in values.items() if name in names}
