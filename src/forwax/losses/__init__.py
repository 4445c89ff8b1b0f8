"""Losses: cross-entropy, contrastive losses, and fused losses of each patch and group.

The fused ones credit each patch and group with its own features, as in
Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv
2210.03310.
"""

from forwax.losses.contrastive import info_nce, nt_xent, nt_xent_of_view
from forwax.losses.cross_entropy import softmax_cross_entropy
from forwax.losses.linear_cross_entropy import linear_cross_entropy
from forwax.losses.spatial import (
    spatial_average_group_linear,
    spatial_average_group_linear_cross_entropy,
)
from forwax.losses.spatial_contrastive import spatial_average_group_linear_nt_xent

__all__ = [
    "info_nce",
    "linear_cross_entropy",
    "nt_xent",
    "nt_xent_of_view",
    "softmax_cross_entropy",
    "spatial_average_group_linear",
    "spatial_average_group_linear_cross_entropy",
    "spatial_average_group_linear_nt_xent",
]
