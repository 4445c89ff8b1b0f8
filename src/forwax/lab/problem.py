"""One experiment made ready to train: its data on the device, its initial parameters, and the loss of one example."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import forwax as fx
from forwax.lab.data import DataSet, load
from forwax.lab.settings import Settings, UsageError

if TYPE_CHECKING:
    from forwax.lab.experiments import Experiment, Gradient

Loss = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a loop needs of an experiment.

    Attributes:
        init: from a key to the parameters, a pytree of floating arrays.
        loss: from (parameters, one uint8 image, its label) to (loss, whether the largest logit is
            the label's).
        train: (images uint8 [N, height, width, channels], labels int32 [N]) in host memory.
        test: the same of the test set.
        num_parameters: how many real parameters there are.
        checksum: the SHA-256 of all images and labels, by which a resumed run knows its data again.
        custom_gradient: takes the place of `forwax.value_and_grad` of the loss, where training has
            another loss.
    """

    init: Callable[[jax.Array], Any]
    loss: Loss
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    num_parameters: int
    checksum: str
    custom_gradient: Gradient | None = None

    def gradient(self, rule: Any) -> Callable[..., Any]:
        """From (key, parameters, images, labels) to ((loss, correct), estimated gradient) of a batch, by a rule."""
        if self.custom_gradient is not None:
            return self.custom_gradient(rule)
        return fx.value_and_grad(self.loss, rule, has_aux=True, in_axes=(None, 0, 0))

    def noise(self, rule: Any) -> int | None:
        """The number of noise coordinates of one example, for a rule that puts noise on activities; else None."""
        if not isinstance(rule, fx.ActivityPerturbation):
            return None
        image, label = (jnp.asarray(x[:1]) for x in self.train)
        table = fx.explain(self.loss, rule, has_aux=True, in_axes=(None, 0, 0))
        rows = table(
            jax.tree.map(jnp.zeros_like, jax.eval_shape(self.init, jax.random.key(0))),
            image,
            label,
        ).rows
        return sum(row.activity_noise for row in rows if row.credit != "exact error")


def build_problem(
    experiment: Experiment, settings: Settings, data_dir: Path | None = None
) -> Problem:
    """Load the data and make the model and its loss.

    Args:
        experiment: one of `EXPERIMENTS`.
        settings: the run's settings; `dtype` is read, and all that the experiment leaves open.
        data_dir: a folder to look for the data in first.

    Raises:
        DataError: when the data set cannot be loaded.
        UsageError: when the model that the settings name does not fit the data.

    >>> from forwax.lab.experiments import EXPERIMENTS
    >>> build_problem(EXPERIMENTS["digits"], Settings()).num_parameters
    2410
    """
    return problem_of(load(settings.data or experiment.data_set, data_dir), experiment, settings)


def problem_of(data: DataSet, experiment: Experiment, settings: Settings) -> Problem:
    """Make the problem of a data set that is in memory already; see `build_problem`."""
    experiment, shape = experiment.of(settings), data.train_images.shape[1:]
    make = lambda key: eqx.partition(
        experiment.model(shape, data.num_classes, key), eqx.is_inexact_array
    )  # noqa: E731
    try:  # the part that is not parameters holds no arrays, so an abstract key serves to build it
        static = eqx.filter_eval_shape(make, jax.random.key(0))[1]
    except ValueError as error:
        advice = " Choose another --size or --data." if experiment.gradient else ""
        raise UsageError(
            f"{experiment.name} does not fit images of {shape}: {error}{advice}"
        ) from error
    init = lambda key: cast(make(key)[0], _parameter_dtype(settings.dtype))  # noqa: E731
    abstract, scale = (
        jax.eval_shape(init, jax.random.key(0)),
        standardiser(data.train_images),
    )
    return Problem(
        init=init,
        loss=_cross_entropy(static, scale, jnp.dtype(settings.dtype)),
        train=(data.train_images, data.train_labels.astype(np.int32)),
        test=(data.test_images, data.test_labels.astype(np.int32)),
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(abstract)),
        checksum=checksum_of(data),
        custom_gradient=experiment.gradient
        and experiment.gradient(static, scale, settings, data.scale),
    )


def standardiser(images: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Give the map of pixels to mean 0 and variance 1, by the mean and deviation over all pixels of the images.

    >>> scale = standardiser(np.array([[0, 4]], np.uint8))
    >>> scale(jnp.array([0, 4], jnp.uint8))
    Array([-1.,  1.], dtype=float32)
    """
    mean, deviation = (
        float(images.mean(dtype=np.float64)),
        float(images.std(dtype=np.float64)) or 1.0,
    )
    return lambda x: (x.astype(jnp.float32) - mean) / deviation


def _parameter_dtype(dtype: str) -> jnp.dtype:
    """Half precision computes in its type and keeps its parameters in float32, or small steps would be rounded off."""
    return jnp.promote_types(dtype, jnp.float32)


def cast(tree: Any, dtype: Any) -> Any:
    """All leaves in another floating type.

    >>> cast({"w": jnp.ones(2)}, jnp.bfloat16)["w"].dtype
    dtype(bfloat16)
    """
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _cross_entropy(static: Any, scale: Callable[[jax.Array], jax.Array], dtype: jnp.dtype) -> Loss:
    """Softmax cross-entropy of one example, with the accuracy as a second output; logits in at least float32."""

    def loss(params: Any, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = eqx.combine(cast(params, dtype), static)
        logits = model(scale(image).astype(dtype)).astype(jnp.promote_types(dtype, jnp.float32))
        return jax.nn.logsumexp(logits) - logits[label], jnp.argmax(logits) == label

    return loss


def checksum_of(data: DataSet) -> str:
    """The SHA-256 of a data set's shapes, types and values."""
    digest = hashlib.sha256()
    for array in (
        data.train_images,
        data.train_labels,
        data.test_images,
        data.test_labels,
    ):
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
