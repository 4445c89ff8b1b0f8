"""The experiments of the command line: a data set, a model, and the settings that suit them.

To add one: add a line to `EXPERIMENTS`, and a model factory where a new model is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax

from forwax.lab import optimizers
from forwax.lab.ren2023 import columns
from forwax.lab.settings import Settings
from forwax.models import MLP, ConvNet, logistic_regression

ModelFactory = Callable[[tuple[int, int, int], int, jax.Array], eqx.Module]
"""From (the shape of one image, the number of classes, a key) to a model of one example."""

Gradient = Callable[[Any], Callable[..., Any]]
"""From a rule to a function of (key, params, images, labels) that gives ((loss, correct), grads) of a batch."""


def _logistic(shape: tuple[int, int, int], classes: int, key: jax.Array) -> eqx.Module:
    return logistic_regression(shape[0] * shape[1] * shape[2], classes, key=key)


def _small_mlp(shape: tuple[int, int, int], classes: int, key: jax.Array) -> eqx.Module:
    return MLP(shape[0] * shape[1] * shape[2], (32,), classes, key=key)


def _paper_mlp(shape: tuple[int, int, int], classes: int, key: jax.Array) -> eqx.Module:
    return MLP(shape[0] * shape[1] * shape[2], (1024, 1024), classes, key=key)


def _conv_net(shape: tuple[int, int, int], classes: int, key: jax.Array) -> eqx.Module:
    return ConvNet(shape, classes, key=key)


@dataclass(frozen=True)
class Experiment:
    """A data set, a model and named settings; the loss is softmax cross-entropy, inputs are standardised pixels.

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
        description: what to run, and what to expect on which device.
        notes: why there is no configuration of a name.
        specialise: gives the experiment for the settings' size, data, objective and rule, where
            these are open.
        suggested_rate: the learning rate for settings that name none; None where it follows from
            the rule's law.
        suggested_epochs: how long settings train that say neither steps nor epochs; None for the
            configuration's steps.
        gradient: from the model's static half, the map of pixels to inputs, the settings and the
            largest pixel to a function of a rule, see `forwax.lab.problem.Problem.gradient`; None
            for softmax cross-entropy by `forwax.value_and_grad`.

    >>> EXPERIMENTS["digits"].data_set
    'digits'
    """

    name: str
    data_set: str
    model: ModelFactory
    configurations: Mapping[str, Settings]
    description: str
    effective_dimension: int | None = None
    effective_noise: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    specialise: Callable[[Experiment, Settings], Experiment] | None = None
    suggested_rate: Callable[[Settings], float] | None = None
    suggested_epochs: Callable[[Settings], float] | None = None
    gradient: Callable[[Any, Callable[[jax.Array], jax.Array], Settings, int], Gradient] | None = (
        None
    )

    def of(self, settings: Settings) -> Experiment:
        """This experiment with all that the settings decide."""
        return self if self.specialise is None else self.specialise(self, settings)

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
            noise: gives the number of noise coordinates of one example, see
                `forwax.lab.problem.Problem.noise`.
        """
        if self.suggested_rate is not None:
            return self.suggested_rate(settings)
        drawn = noise(rule)
        counted = None if drawn is None else min(drawn, self.effective_noise or drawn)
        return optimizers.suggest_rate(
            settings, rule, num_parameters, self.effective_dimension, counted
        )


def _paper(learning_rate: float, steps: int) -> Settings:
    """Give the configuration of Baydin et al. 2022: batch 64, rate η₀ exp(-i·1e-4), one normal tangent, plain SGD."""
    return Settings(
        rule="weight",
        tangents="normal",
        num_tangents=1,
        combine="mean",
        learning_rate=learning_rate,
        schedule="exponential",
        decay_rate=1e-4,
        steps=steps,
        batch_size=64,
    )


PAPER_LOGISTIC = {"paper": _paper(1e-4, 25_000)}
PAPER_MLP = {"paper": _paper(2e-5, 20_000), "paper-fast": _paper(2e-4, 20_000)}
NO_PAPER_CNN = (
    "Baydin et al. 2022 describe this network, but its learning rate and "
    "iterations "
    "were not found in the paper."
)


def _on(
    data_set: str,
    model: str,
    default: Settings,
    effective_dimension: int | None,
    description: str,
) -> Experiment:
    """Make the experiment `<data set>-<model>` of one of Baydin et al.'s three models."""
    factory, paper = {
        "logistic": (_logistic, PAPER_LOGISTIC),
        "mlp": (_paper_mlp, PAPER_MLP),
        "cnn": (_conv_net, {}),
    }[model]
    return Experiment(
        name=f"{data_set}-{model}",
        data_set=data_set,
        model=factory,
        configurations={
            "default": default,
            **{name: _with_rate(each, default) for name, each in paper.items()},
        },
        description=description,
        effective_dimension=effective_dimension,
        effective_noise=CONVOLUTION_NOISE if model == "cnn" else None,
        notes={} if paper else {"paper": NO_PAPER_CNN, "paper-fast": NO_PAPER_CNN},
    )


def _with_rate(configuration: Settings, default: Settings) -> Settings:
    """Carry the tuned backprop rate over, for users who change the rule and clear the learning rate."""
    return dataclasses.replace(configuration, backprop_rate=default.backprop_rate)


DIGITS = Settings(
    num_tangents=64,
    backprop_rate=0.5,
    schedule="cosine",
    steps=10_000,
    batch_size=64,
)
LOGISTIC = Settings(
    num_tangents=16, backprop_rate=0.1, schedule="cosine", steps=10_000, batch_size=64
)
# on the large MLP activity noise ends far lower than weight noise
DENSE = Settings(
    rule="activity",
    num_tangents=1,
    backprop_rate=0.3,
    schedule="cosine",
    steps=10_000,
    batch_size=64,
)
# 500 steps on MNIST: 71.7 %, by four rank-1 weight tangents 39.2 %
CONVOLUTION = Settings(
    rule="activity",
    num_tangents=4,
    backprop_rate=0.01,
    schedule="cosine",
    steps=500,
    batch_size=64,
    eval_every=250,
)

# the backprop rate over the best rate of one weight tangent, both tuned on MNIST, rounded
LOGISTIC_DIMENSION, DENSE_DIMENSION, CONVOLUTION_DIMENSION = 330, 3000, 640
# the same for noise on activities, of 91,648 coordinates an example: 150 steps on MNIST with four
# noises gave 12.5, 21.3, 27.3, 27.0 % at 5e-5, 1e-4, 2e-4, 4e-4, and 9e-4 exploded
CONVOLUTION_NOISE = 2000

_LOCAL_MIXER = columns.configurations()
_LOCAL_MIXER = {"default": _LOCAL_MIXER[columns.DEFAULT], **_LOCAL_MIXER}


def _of_local_mixer(experiment: Experiment, settings: Settings) -> Experiment:
    """Give the experiment for a size and an objective."""
    return dataclasses.replace(
        experiment, model=columns.build_model(settings), gradient=columns.build_gradient
    )


_ALL = (
    Experiment(
        name="digits",
        data_set="digits",
        model=_small_mlp,
        configurations={"default": DIGITS},
        effective_dimension=600,
        description=(
            "An MLP 64-32-10 on scikit-learn's 8×8 digits. `forwax train`: 96.1 to 97.8 % on the "
            "test set over seeds "
            "0 to 9, 96.9 % in the mean, 5 to 26 s of training on one busy CPU core."
        ),
    ),
    _on(
        "mnist",
        "logistic",
        LOGISTIC,
        LOGISTIC_DIMENSION,
        "Logistic regression on MNIST. `forwax train mnist-logistic`: 88.8 % (seed 0), 12 s of "
        "training on 2 "
        "busy CPU cores.",
    ),
    _on(
        "mnist",
        "mlp",
        DENSE,
        DENSE_DIMENSION,
        "The MLP 784-1024-1024-10 on MNIST, by activity noise. `forwax train mnist-mlp`: 93.2 % "
        "(seed 0), 510 s of "
        "training on one CPU core shared with three other processes; 89.5 % after --steps 2000.",
    ),
    _on(
        "mnist",
        "cnn",
        CONVOLUTION,
        CONVOLUTION_DIMENSION,
        "The convolutional network on MNIST, by activity noise. `forwax train mnist-cnn`: 71.7 % "
        "(seed 0), 387 s of "
        "training on one CPU core; 500 steps are few.",
    ),
    _on(
        "fashion-mnist",
        "logistic",
        LOGISTIC,
        LOGISTIC_DIMENSION,
        "Logistic regression on Fashion-MNIST. `forwax train fashion-mnist-logistic`: 78.4 % (seed "
        "0), "
        "14 s of training on 2 busy CPU cores.",
    ),
    _on(
        "fashion-mnist",
        "mlp",
        DENSE,
        DENSE_DIMENSION,
        "The MLP 784-1024-1024-10 on Fashion-MNIST, by activity noise. `forwax train "
        "fashion-mnist-mlp`: 81.3 % (seed "
        "0), 93 s of training on one CPU core.",
    ),
    _on(
        "fashion-mnist",
        "cnn",
        CONVOLUTION,
        CONVOLUTION_DIMENSION,
        "The convolutional network on Fashion-MNIST. `forwax train fashion-mnist-cnn`: 54.8 % "
        "(seed 0), 399 s of "
        "training on one CPU core.",
    ),
    _on(
        "cifar10",
        "cnn",
        CONVOLUTION,
        CONVOLUTION_DIMENSION,
        "The convolutional network on CIFAR-10, by activity noise. `forwax train cifar10-cnn`: "
        "17.0 % (seed 0), 526 s "
        "of training on one CPU core; 500 steps are far too few.",
    ),
    Experiment(
        name="local-mixer",
        data_set="mnist",
        model=columns.build_model(columns.COLUMNS[columns.DEFAULT].settings),
        configurations=_LOCAL_MIXER,
        description=(
            "LocalMixer of Ren et al. 2023 by any of thirteen methods, eleven of its tables and "
            "two more, see `forwax "
            "reproduce --help`; --size, --data and --objective choose what is trained."
        ),
        specialise=_of_local_mixer,
        suggested_rate=columns.learning_rate,
        suggested_epochs=columns.epochs,
    ),
)

EXPERIMENTS: Mapping[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
"""Every experiment by its name."""


def describe(experiment: Experiment) -> str:
    """Give the experiment's description with its configurations, for the command line's help.

    >>> print(describe(EXPERIMENTS["digits"]).splitlines()[0])
    digits: An MLP 64-32-10 on scikit-learn's 8×8 digits. ...
    """
    return f"{experiment.name}: {experiment.description}"
