"""Models as Equinox modules that take one example; batch them with `jax.vmap` or `in_axes`. Needs the extra `lab`."""

from forwax.models.conv_net import ConvNet
from forwax.models.layers import Conv, Dense
from forwax.models.mlp import MLP, logistic_regression

__all__ = ["MLP", "Conv", "ConvNet", "Dense", "logistic_regression"]
