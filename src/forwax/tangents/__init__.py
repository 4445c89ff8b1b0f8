"""Distributions of tangents: random directions v with E[v vᵀ] = I, one distribution a file."""

# pyright: strict, reportUnknownMemberType=false

from forwax.tangents._base import IndependentTangents, Tangents
from forwax.tangents.coordinate import Coordinate
from forwax.tangents.guided import Guided
from forwax.tangents.hadamard import Hadamard
from forwax.tangents.low_rank import LowRank
from forwax.tangents.normal import Normal
from forwax.tangents.orthonormal import Orthonormal
from forwax.tangents.rademacher import Rademacher
from forwax.tangents.sparse import Sparse
from forwax.tangents.sphere import Sphere

__all__ = [
    "Coordinate",
    "Guided",
    "Hadamard",
    "IndependentTangents",
    "LowRank",
    "Normal",
    "Orthonormal",
    "Rademacher",
    "Sparse",
    "Sphere",
    "Tangents",
]
