"""The experiments of the command line: a data set, a model, and the settings that suit them.

To add one: add a line to `EXPERIMENTS` and one to those of `forwax.lab.catalogue.menu`, which say
what is trained on what, and a model factory where a new model is needed. What the
defaults reach is told in docs/results/experiments.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forwax.lab.catalogue import columns, menu, objectives, optimizers
from forwax.lab.catalogue.columns import ModelFactory
from forwax.lab.catalogue.objectives import Objective
from forwax.lab.catalogue.settings import Settings
from forwax.models import MLP, ConvNet


@dataclass(frozen=True)
class Experiment:
    """A data set, a model and named settings.

    The loss is softmax cross-entropy, inputs are standardised pixels.

    Attributes:
        name: the name on the command line.
        data_set: a name of `forwax.lab.data`.
        model: the model factory.
        configurations: settings by name; "default" is always there.
        effective_dimension: along how many directions the loss curves, for the suggested rate of
            rules with tangents; found by tuning the rate of a single tangent, None where the number
            of parameters serves.
        effective_noise: the same for noise on activities, along how many of an example's noise
            coordinates.
        notes: why there is no configuration of a name.
        is_mixer: whether it is a LocalMixer, whose size, data, objective and method are the user's
            to choose; what its settings leave open, rate and epochs, is that of the nearest column.
        gradient: makes what estimates the gradient, see `Objective`; None for softmax cross-entropy
            by `forwax.value_and_grad`.

    >>> EXPERIMENTS["digits"].data_set
    'digits'
    """

    name: str
    data_set: str
    model: ModelFactory
    configurations: Mapping[str, Settings]
    effective_dimension: int | None = None
    effective_noise: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    is_mixer: bool = False
    gradient: Objective | None = None

    def of(self, settings: Settings) -> Experiment:
        """This experiment with all that the settings decide."""
        if not self.is_mixer:
            return self
        return replace(
            self,
            model=columns.build_model(settings),
            gradient=objectives.GRADIENTS[settings.objective or "supervised"],
        )

    def suggest_rate(
        self,
        settings: Settings,
        rule: Any,
        num_parameters: int,
        noise: Callable[[Any], int | None],
    ) -> float:
        """The learning rate for settings that name none.

        Args:
            settings: the run's settings.
            rule: the forwax rule.
            num_parameters: the size of the model.
            noise: gives the number of noise coordinates of one example, see `Task.noise`.
        """
        if self.is_mixer:
            return columns.suggested(settings)[0]
        drawn = noise(rule) if settings.rule == "activity" else None
        counted = drawn and min(drawn, self.effective_noise or drawn)
        return optimizers.suggest_rate(
            settings, rule, num_parameters, self.effective_dimension, counted
        )


def _mlp(*hidden: int) -> ModelFactory:
    return lambda shape, classes, key: MLP(math.prod(shape), hidden, classes, key=key)


def _paper(learning_rate: float, steps: int, backprop_rate: float) -> Settings:
    """Give the configuration of Baydin et al. 2022.

    Batches of 64, rate η₀ exp(-i·1e-4), one normal tangent, plain SGD. The tuned backprop rate is
    for users who change the rule and clear the learning rate.
    """
    return Settings(
        tangents="normal",
        learning_rate=learning_rate,
        backprop_rate=backprop_rate,
        schedule="exponential",
        steps=steps,
    )


_NO_PAPER_CNN = (
    "Baydin et al. 2022 describe this network, but its learning rate and iterations were not found "
    "in the paper."
)
_LONG = Settings(schedule="cosine", steps=10_000)

# The backprop rate over the best rate of one weight tangent, both tuned on MNIST, rounded, gives
# the effective dimensions; the effective noise, of 91,648 coordinates an example, was found by
# short runs at several rates. See docs/results/experiments.md.
_MODELS: dict[str, Experiment] = {
    "logistic": Experiment(
        "logistic",
        "",
        _mlp(),
        {
            "default": replace(_LONG, num_tangents=16, backprop_rate=0.1),
            "paper": _paper(1e-4, 25_000, 0.1),
        },
        effective_dimension=330,
    ),
    # on the large MLP activity noise ends far lower than weight noise
    "mlp": Experiment(
        "mlp",
        "",
        _mlp(1024, 1024),
        {
            "default": replace(_LONG, rule="activity", backprop_rate=0.3),
            "paper": _paper(2e-5, 20_000, 0.3),
            "paper-fast": _paper(2e-4, 20_000, 0.3),
        },
        effective_dimension=3000,
    ),
    "cnn": Experiment(
        "cnn",
        "",
        lambda shape, classes, key: ConvNet(shape, classes, key=key),
        {
            "default": replace(
                _LONG,
                rule="activity",
                num_tangents=4,
                backprop_rate=0.01,
                steps=500,
                eval_every=250,
            )
        },
        effective_dimension=640,
        effective_noise=2000,
        notes={"paper": _NO_PAPER_CNN, "paper-fast": _NO_PAPER_CNN},
    ),
}
"""Baydin et al.'s three models, still without a data set."""


def _on(data_set: str, *models: str) -> list[Experiment]:
    """Make the experiments `<data set>-<model>`."""
    return [
        replace(
            _MODELS[model],
            name=f"{data_set}-{model}",
            data_set=data_set,
        )
        for model in models
    ]


_COLUMNS = columns.configurations()
_ALL = (
    Experiment(
        "digits",
        "digits",
        _mlp(32),
        {"default": replace(_LONG, num_tangents=64, backprop_rate=0.5)},
        effective_dimension=600,
    ),
    *_on("mnist", "logistic", "mlp", "cnn"),
    *_on("fashion-mnist", "logistic", "mlp", "cnn"),
    *_on("cifar10", "cnn"),
    Experiment(
        menu.MIXER,
        "mnist",
        columns.build_model(_COLUMNS[columns.DEFAULT]),
        {"default": _COLUMNS[columns.DEFAULT], **_COLUMNS},
        is_mixer=True,
    ),
)

EXPERIMENTS: Mapping[str, Experiment] = {
    experiment.name: experiment for experiment in _ALL
}
"""Every experiment by its name."""
