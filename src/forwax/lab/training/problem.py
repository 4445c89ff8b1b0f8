"""One experiment made ready to train: its data, its initial parameters, its loss."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwax as fx
from forwax.lab.catalogue.experiments import Experiment
from forwax.lab.catalogue.objectives import (
    BATCHED,
    Estimate,
    Gradient,
    Logits,
    Scale,
    cast,
    gauss_newton,
    logits_of,
    parameter_dtype,
)
from forwax.lab.catalogue.settings import Settings
from forwax.lab.data import DataSet, load
from forwax.lab.data.sets import ARRAYS
from forwax.lab.flags import UsageError
from forwax.models.ren2023 import estimator

Examples = tuple[np.ndarray, np.ndarray]
"""(images uint8 [N, height, width, channels], labels int32 [N]) in host memory."""


@dataclass(frozen=True, eq=False)
class Task:
    """What a loop needs of an experiment.

    Attributes:
        init: from a key to the parameters, a pytree of floating arrays.
        logits: from (parameters, one uint8 image) to the logits of its classes.
        train: the training set.
        test: the test set.
        num_parameters: how many real parameters there are.
        checksum: the SHA-256 of all images and labels, by which a resumed run knows its data again.
        custom_gradient: takes the place of `forwax.value_and_grad` of the loss, where training has
            another loss.
    """

    init: Callable[[Array], Any]
    logits: Logits
    train: Examples
    test: Examples
    num_parameters: int
    checksum: str
    custom_gradient: Gradient | None = None

    def loss(self, params: Any, image: Array, label: Array) -> tuple[Array, Array]:
        """The loss of one uint8 image, and whether the largest logit is its label's."""
        logits = self.logits(params, image)
        return jax.nn.logsumexp(logits) - logits[label], jnp.argmax(logits) == label

    @property
    def num_examples(self) -> int:
        """The size of the training set."""
        return len(self.train[0])

    def gradient(self, rule: Any) -> Estimate:
        """The function that estimates the gradient of a batch by a rule; see `Gradient`."""
        if self.custom_gradient is not None:
            return self.custom_gradient(rule)
        if isinstance(rule, fx.GaussNewton):
            return functools.partial(gauss_newton, self.logits, rule)
        return estimator(self.loss, rule, **BATCHED)

    def own_step(self, settings: Settings) -> Any:
        """What takes the place of the usual step, see `make_step`; None here."""

    def ready(self, rule: Any, params: Any) -> Any:
        """The rule, one that learns with the maps that it starts from."""
        if (
            isinstance(rule, fx.GaussNewton)
            or not rule.learns
            or rule.inner is not rule
        ):
            return rule
        inputs = jax.random.key(0), params, *self._one_example()
        learnt = jax.eval_shape(self.gradient(rule), *inputs)[2].maps
        maps = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), learnt)
        return dataclasses.replace(rule, maps=maps)

    def _one_example(self) -> tuple[Array, Array]:
        image, label = (jax.tree.map(jnp.asarray, x[:1]) for x in self.train)
        return image, label

    def noise(self, rule: Any) -> int:
        """The number of noise coordinates of one example, for a rule with noise on activities."""
        params = jax.tree.map(
            jnp.zeros_like, jax.eval_shape(self.init, jax.random.key(0))
        )
        rows = fx.explain(self.loss, rule, **BATCHED)(params, *self._one_example()).rows
        return sum(row.activity_noise for row in rows if row.credit != "exact error")


def build_problem(
    experiment: Experiment, settings: Settings, data_dir: Path | None = None
) -> Task:
    """Load the data and make the model and its loss.

    Args:
        experiment: one of `EXPERIMENTS`.
        settings: the run's settings; `dtype` is read, and all that the experiment leaves open.
        data_dir: a folder to look for the data in first.

    Raises:
        DataError: when the data set cannot be loaded.
        UsageError: when the model that the settings name does not fit the data.

    >>> from forwax.lab.catalogue.experiments import EXPERIMENTS
    >>> build_problem(EXPERIMENTS["digits"], Settings()).num_parameters
    2410
    """
    return problem_of(
        load(settings.data or experiment.data_set, data_dir), experiment, settings
    )


def problem_of(data: DataSet, experiment: Experiment, settings: Settings) -> Task:
    """Make the problem of a data set that is in memory already; see `build_problem`."""
    experiment = experiment.of(settings)
    shape = data.train_images.shape[1:]

    def make(key: Array) -> Any:
        return eqx.partition(
            experiment.model(shape, data.num_classes, key), eqx.is_inexact_array
        )

    def init(key: Array) -> Any:
        return cast(make(key)[0], parameter_dtype(settings.dtype))

    try:  # the part that is not parameters holds no arrays, so an abstract key serves to build it
        static = eqx.filter_eval_shape(make, jax.random.key(0))[1]
    except ValueError as error:
        advice = " Choose another --size or --data." if experiment.gradient else ""
        raise UsageError(
            f"{experiment.name} does not fit images of {shape}: {error}{advice}"
        ) from error
    params = jax.eval_shape(init, jax.random.key(0))
    scale = standardiser(data.train_images)
    gradient = experiment.gradient
    return Task(
        init=init,
        logits=logits_of(static, scale, settings.dtype),
        train=(data.train_images, data.train_labels.astype(np.int32)),
        test=(data.test_images, data.test_labels.astype(np.int32)),
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        checksum=checksum_of(data),
        custom_gradient=gradient
        and functools.partial(gradient, static, scale, settings, data.scale),
    )


def standardiser(images: np.ndarray) -> Scale:
    """Give the map of pixels to mean 0 and variance 1, over all pixels of the images.

    >>> scale = standardiser(np.array([[0, 4]], np.uint8))
    >>> scale(jnp.array([0, 4], jnp.uint8))
    Array([-1.,  1.], dtype=float32)
    """
    mean = float(images.mean(dtype=np.float64))
    deviation = float(images.std(dtype=np.float64)) or 1.0
    return lambda x: (x.astype(jnp.float32) - mean) / deviation


def checksum_of(data: DataSet) -> str:
    """The SHA-256 of a data set's shapes, types and values."""
    digest = hashlib.sha256()
    for array in (getattr(data, name) for name in ARRAYS):
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
