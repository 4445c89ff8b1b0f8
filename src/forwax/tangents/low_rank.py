"""Low-rank signs: a matrix's direction is an outer product of sign vectors, which a forward pass need not form."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from forwax._tree import Spec
from forwax.tangents._base import IndependentTangents
from forwax.tangents.rademacher import Rademacher


@jax.tree_util.register_dataclass
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
    full, each leaf split into its last axis and the others.

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
        >>> v = fx.tangents.LowRank().sample(jax.random.key(0), {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)})
        >>> int(jnp.linalg.matrix_rank(v["w"][0])), v["b"].shape
        (1, (1, 3))
    """

    rank: int = dataclasses.field(default=1, metadata={"static": True})
    per_example: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(
                f"tangents.LowRank: expected rank to be a positive integer, got {self.rank!r}."
            )

    def draw_one(self, key: Array, specs: Sequence[Spec]) -> list[Array]:
        """Draw one direction in full: a leaf's last axis, and all others together, are the sides of a matrix."""
        parts = []
        for spec in specs:
            rows, columns = (
                math.prod(spec.shape[:-1]),
                spec.shape[-1] if spec.shape else 1,
            )
            thin = min(rows, columns) > 1
            parts += [Spec((self.rank, n), spec.dtype) for n in (rows, columns)] if thin else [spec]
        drawn = iter(Rademacher().draw_one(key, parts))
        leaves = []
        for spec in specs:
            rows, columns = (
                math.prod(spec.shape[:-1]),
                spec.shape[-1] if spec.shape else 1,
            )
            if min(rows, columns) > 1:
                left, right = next(drawn), next(drawn)
                leaves.append(
                    (jnp.einsum("ri,rj->ij", left, right) * self.rank**-0.5).reshape(spec.shape)
                )
            else:
                leaves.append(next(drawn))
        return leaves

    def relative_mse(self, n: int, num_tangents: int) -> float:
        """(n - 1) / k at rank 1; (n + 1 - 2/r) / k at rank r, reached when the gradient lies in matrices."""
        return (n + 1 - 2 / self.rank) / num_tangents
