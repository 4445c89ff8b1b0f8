"""What is trained: softmax cross-entropy of one example, or the losses of a LocalMixer.

LocalMixers learn supervised or contrastive, by a method of Ren et al. 2023. The contrastive columns
on GPUs follow the paper's code (local_forward_gradient in google-research): LARS at a rate of 0.1
for 256 examples, ten epochs of warm-up, decay on the backbone's weights alone, crops of 8 % of the
area and more. Still different are

- the readout: here it learns along with the rest, by LARS without decay, from the augmented views
  and the pooled features as they are; there by SGD at 0.01 without momentum, an epoch after each
  epoch, from images as they are and normalised features;
- colour jitter: here brightness, contrast, saturation and hue in this order; there in random order;
- crops: here of any real sides, stretched linearly; there of whole pixels, by cubic splines;
- the batch of 512 images, 800 epochs on CIFAR-10 and bfloat16: the code gives settings for ImageNet
  only;
- cifar-small-contrastive, which is not the paper's: SGD with momentum, decay on all parameters, no
  warm-up.
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from optax import tree_utils

import forwax as fx
from forwax.lab.catalogue import augment
from forwax.lab.catalogue.settings import Settings
from forwax.lab.report import Json
from forwax.losses import softmax_cross_entropy
from forwax.models import local_losses, ren2023

Scale = Callable[[Array], Array]
"""From pixels to inputs."""

Estimate = Callable[[Array, Any, Array, Array], Any]
"""From (key, params, images, labels) of a batch to ((loss, correct), grads) and, of a rule that
learns, the rule that has learnt."""

Gradient = Callable[[Any], Estimate]
"""From a rule to what estimates the gradient by it."""

Objective = Callable[[Any, Scale, Settings, int, Any], Estimate]
"""From a model's static half, pixels to inputs, settings, the largest pixel and a rule to what
estimates the gradient by it."""

Logits = Callable[[Any, Array], Array]
"""From (parameters, one uint8 image) to logits."""

BATCHED: Json = {"has_aux": True, "in_axes": (None, 0, 0)}


cast: Any = tree_utils.tree_cast
"""From (tree, dtype) to the tree with all leaves in that floating type."""


def parameter_dtype(dtype: str) -> jnp.dtype:
    """The type that parameters are kept in.

    Half precision computes in its type and keeps its parameters in float32, or small steps would be
    rounded off.
    """
    return jnp.dtype("float64" if dtype == "float64" else "float32")


def logits_of(static: Any, scale: Scale, dtype: str) -> Logits:
    """Logits of one example, in at least float32.

    Args:
        static: the model's half that holds no parameters.
        scale: from pixels to inputs.
        dtype: what the model computes in.
    """

    def logits(params: Any, image: Array) -> Array:
        model = eqx.combine(cast(params, dtype), static)
        return model(scale(image).astype(dtype)).astype(parameter_dtype(dtype))

    return logits


def gauss_newton(
    logits: Logits,
    solver: fx.GaussNewton,
    key: Array,
    params: Any,
    images: Array,
    labels: Array,
) -> Any:
    """A whole Gauss-Newton step on a batch, in place of its gradient."""

    def residuals(params: Any) -> tuple[Array, Array]:
        found = jax.vmap(logits, (None, 0))(params, images)
        return found, jnp.argmax(found, axis=1) == labels

    def loss(found: Array) -> Array:
        return jnp.mean(softmax_cross_entropy(found, labels))

    told, after, _ = solver.step(residuals, loss, has_aux=True)(key, params)
    return told, jax.tree.map(jnp.subtract, params, after)


def _method(settings: Settings, rule: Any) -> ren2023.Method:
    """The method that the settings name, by this rule."""
    reading = ren2023.READINGS[settings.rule]
    parts = settings.parts and reading.draws_noise
    return ren2023.Method(settings.rule, reading.losses, parts, rule)


def supervised(
    static: Any, scale: Scale, settings: Settings, largest_pixel: int, rule: Any
) -> Estimate:
    """Local cross-entropies, see `forwax.models.local_losses`.

    Args:
        static: the model's half that holds no parameters.
        scale: from pixels to inputs.
        settings: the run's settings.
        largest_pixel: of the data set, see `DataSet.scale`.
        rule: how the gradient is found.
    """
    method = _method(settings, rule)
    dtype = settings.dtype

    def loss(params: Any, x: Array, label: Array) -> Any:
        model = eqx.combine(cast(params, dtype), static)
        losses = local_losses(model, x, label, method.losses, parts=method.parts)
        # the same forward pass again, which XLA merges with the first; no rule sees parameters in
        # it
        seen = eqx.combine(cast(lax.stop_gradient(params), dtype), static)
        return losses, jnp.argmax(lax.stop_gradient(seen(x))) == label

    of_batch = ren2023.estimator(loss, rule, **BATCHED)

    def estimate(key: Array, params: Any, images: Array, labels: Array) -> Any:
        if settings.augment:
            key, shown = jax.random.split(key)
            images = shifted(shown, images)
        return of_batch(key, params, scale(images).astype(dtype), labels)

    return estimate


def shifted(key: Array, images: Array) -> Array:
    """A batch for supervised training: shifts by up to 2 pixels, and flips of coloured images.

    >>> shifted(jax.random.key(0), jnp.ones((3, 8, 8, 1), jnp.uint8)).shape
    (3, 8, 8, 1)
    """
    first, second = (
        jax.random.split(each, len(images)) for each in jax.random.split(key)
    )
    moved = jax.vmap(augment.shift)(first, images)
    return jax.vmap(augment.flip)(second, moved) if images.shape[-1] == 3 else moved


def contrastive(
    static: Any, scale: Scale, settings: Settings, largest_pixel: int, rule: Any
) -> Estimate:
    """NT-Xent between two views of each image, the readout trained along.

    The accuracy is the readout's on the first view; the arguments are those of `supervised`.
    """
    dtype = settings.dtype
    of_batch = ren2023.contrastive(_method(settings, rule), static)

    def estimate(key: Array, params: Any, images: Array, labels: Array) -> Any:
        key, shown = jax.random.split(key)
        pixels = images.astype(jnp.float32) / largest_pixel
        x, y = (
            scale(largest_pixel * view).astype(dtype)
            for view in augment.two_views(shown, pixels)
        )
        low = cast(params, dtype)
        loss, grads, *learnt = of_batch(key, low, x, y, labels)
        logits = jax.vmap(eqx.combine(low, static))(x)
        correct = jnp.argmax(logits, axis=-1) == labels
        return (loss, correct), tree_utils.tree_cast_like(grads, params), *learnt

    return estimate


GRADIENTS: Mapping[str, Objective] = {
    "supervised": supervised,
    "contrastive": contrastive,
}
"""Every objective of a LocalMixer."""
