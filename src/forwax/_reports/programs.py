"""Compiled programs of one call of a user's loss: the loss alone, a rule's estimate, backprop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from forwax._signature import Problem, Signature
from forwax._tree import Tree

Step: TypeAlias = Callable[[Array, Problem], tuple[Array, Tree, Tree]]
"""Takes a key and a problem to `(value, aux, grads)`, as `Rule.estimate` does."""

# What JAX raises for a loss that a way to a derivative cannot take, and XLA for want of memory.
REJECTIONS = (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledStep:
    """A compiled step with the arrays of its call; a function of the key alone.

    Attributes:
        executable: what XLA made of the step.
        arrays: the arrays of the call, arguments of the program so that none is a constant in it.
    """

    executable: Any
    arrays: list[Array]

    def __call__(self, key: Array) -> tuple[Array, Tree, Tree]:
        """Run the step."""
        return self.executable(key, self.arrays)

    @property
    def flops(self) -> float | None:
        """The arithmetic operations; None where a backend does not tell."""
        costs = self.executable.cost_analysis()
        return costs.get("flops") if isinstance(costs, dict) else None

    @property
    def temporary_bytes(self) -> int | None:
        """See `held_bytes`."""
        return held_bytes(self.executable)


def held_bytes(executable: Any) -> int | None:
    """What a compiled program takes beside its arguments: temporaries + outputs - aliases.

    Outputs count because programs that return gradients hide their scratch in them.

    Returns:
        None where a backend does not tell.
    """
    memory = executable.memory_analysis()
    if memory is None:
        return None
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return int(held - memory.alias_size_in_bytes)


def compiled(
    step: Step,
    signature: Signature,
    key: Array,
    args: Any,
    kwargs: Any,
) -> CompiledStep:
    """Compile a step for one call of the loss."""
    arrays, rebuild = _split_arrays(args, kwargs)

    # The signature is bound inside, so that the arrays it holds are the program's arguments.
    def program(key: Array, arrays: list[Array]) -> tuple[Array, Tree, Tree]:
        args, kwargs = rebuild(arrays)
        return step(key, signature.bind(args, kwargs))

    lowered = jax.jit(program).lower(key, arrays)
    return CompiledStep(lowered.compile(), arrays)


def _split_arrays(
    args: Any,
    kwargs: Any,
) -> tuple[list[Array], Callable[[Sequence[Array]], tuple[Any, Any]]]:
    """The arrays of a call, and how to put others in their places.

    Everything else stays as it is: a number must not become an array that a loss cannot branch on.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    kinds = jax.Array | np.ndarray | np.generic
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def rebuild(arrays: Sequence[Array]) -> tuple[Any, Any]:
        full = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            full[place] = array
        return structure.unflatten(full)

    arrays = [jnp.asarray(leaves[i]) for i in places]
    return arrays, rebuild
