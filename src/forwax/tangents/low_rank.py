"""Low-rank signs: a matrix's direction is an outer product of signs, which need not be formed."""

# pyright: strict, reportUnknownMemberType=false

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from forwax._checks import check_count, register_checked
from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents
from forwax.tangents.rademacher import Rademacher


@register_checked
@dataclasses.dataclass(frozen=True)
class LowRank(IndependentTangents):
    """Directions E = A Bᵀ/√r with sign entries for matrices, plain signs for vectors.

    With `combine.Mean` or `Shrinkage`, and parameters that are whole on every device,
    `forwax.WeightPerturbation` never forms them: where a matrix W meets a layer's input h, the
    tangent of h W is ḣ W + (h A) Bᵀ/√r, two thin products in place of one as large as the layer, so
    that a gradient costs about two forward passes instead of three. It traces the loss to see how
    each parameter is used: a kernel is split into what is contracted with the input and what is
    not, with one pair of factors for each batch index and each layer of a scan; a parameter that is
    used in several ways, or looked up, into its last axis and the others. Every use shares the one
    tangent. What is neither a matrix nor a kernel gets plain signs. Other rules draw directions in
    full, each leaf split into its last axis and the others. So does `sample`: it is what the rule
    draws for matrices that are used as h W or looked up, and for vectors; for kernels, for
    matrices used transposed and for stacks of layers it is not, as their split depends on the loss:
    there `forwax.replay` on zeros shows the rule's own direction.

    Relative MSE of the mean over k tangents: (n - 1) / k at rank 1, as good as independent signs,
    since |v|² = n holds here too; (n + 1 - 2/r) / k at rank r, when all of the gradient lies in
    matrices, and less otherwise.

    Attributes:
        rank: the number r of columns of A and B.
        per_example: whether each example of `in_axes` draws factors of its own and gets its own
            slope: for a layer of fan-in p and fan-out q the error is (pq - 1)·mean|G_i|²/N, instead
            of (pq - 1)|mean G|². Better where examples disagree.

    Raises:
        ValueError: when the rank is not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp, forwax as fx
        >>> params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
        >>> v = fx.tangents.LowRank().sample(jax.random.key(0), params)
        >>> int(jnp.linalg.matrix_rank(v["w"][0])), v["b"].shape
        (1, (1, 3))
    """

    rank: int = dataclasses.field(default=1, metadata={"static": True})
    per_example: bool = dataclasses.field(default=False, metadata={"static": True})

    drawn_twice: ClassVar[bool] = True
    planned = "factors"

    def __post_init__(self) -> None:
        rank = check_count("tangents.LowRank", "rank", self.rank)
        object.__setattr__(self, "rank", rank)

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction in full.

        A leaf's last axis, and all others together, are the sides of a matrix.
        """
        parts: list[Spec] = []
        for spec in specs:
            if _is_matrix(spec):
                sides = [Spec((side,), spec.dtype) for side in _sides(spec)]
                parts += sides * self.rank  # left, right, left, right, ...
            else:
                parts.append(spec)
        drawn = iter(Rademacher().draw_one(key, parts))
        leaves: list[Array] = []
        for spec in specs:
            if not _is_matrix(spec):
                leaves.append(next(drawn))
                continue
            pairs = [(next(drawn), next(drawn)) for _ in range(self.rank)]
            lefts, rights = map(jnp.stack, zip(*pairs, strict=True))
            # Each entry sums r products of signs: variance r, which the scale makes 1.
            product = jnp.einsum("ri,rj->ij", lefts, rights)
            leaves.append((product * self.rank**-0.5).reshape(spec.shape))
        return leaves

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n + 1 - 2/r) / k, reached when the gradient lies in matrices; (n - 1) / k at rank 1."""
        return (n + 1 - 2 / self.rank) / num_tangents


def _sides(spec: Spec) -> tuple[int, int]:
    """The rows and columns of a leaf as a matrix."""
    columns = spec.shape[-1] if spec.shape else 1
    return math.prod(spec.shape[:-1]), columns


def _is_matrix(spec: Spec) -> bool:
    # With a side of 1 an outer product is a vector of signs itself.
    return min(_sides(spec)) > 1
