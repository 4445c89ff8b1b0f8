"""Models as Equinox modules that take one example; batch them with `jax.vmap` or `in_axes`.

Needs the extra `lab`.
"""

from forwax.models import ren2023 as ren2023
from forwax.models.conv_net import ConvNet
from forwax.models.layers import (
    ChannelDense,
    Conv,
    Dense,
    DepthwiseConv,
    GroupedDense,
    TokenDense,
)
from forwax.models.local_losses import (
    contrastive_loss_of_view,
    contrastive_losses,
    local_losses,
    projections,
)
from forwax.models.local_mixer import LocalMixer, MixerBlock
from forwax.models.local_model import Local, local
from forwax.models.mlp import MLP, logistic_regression
from forwax.models.vision_transformer import (
    PatchEmbedding,
    TransformerBlock,
    VisionTransformer,
)

__all__ = [
    "MLP",
    "ChannelDense",
    "Conv",
    "ConvNet",
    "Dense",
    "DepthwiseConv",
    "GroupedDense",
    "Local",
    "LocalMixer",
    "MixerBlock",
    "PatchEmbedding",
    "TokenDense",
    "TransformerBlock",
    "VisionTransformer",
    "contrastive_loss_of_view",
    "contrastive_losses",
    "local",
    "local_losses",
    "logistic_regression",
    "projections",
    "ren2023",
]
