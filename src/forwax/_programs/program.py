"""A traced program as plain data: equations over numbered variables, loops as sub-programs.

Jaxprs differ between JAX versions in how `scan` writes its counts and in whether inner jaxprs are
closed, so both are derived from what all versions share: ranks, and `getattr(j, "jaxpr", j)`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NewType, TypeAlias, TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import source_info_util

from forwax._programs import places
from forwax._programs.primitives import UNKNOWN, Facts, facts_of
from forwax._tree import Tree

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that is written into the program.

    Attributes:
        value: a Python scalar or an array.
    """

    value: Any


Variable = NewType("Variable", int)
"""The number of a value. It is unique in a program and the bodies of its loops together."""


Atom: TypeAlias = Variable | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """What a `scan` repeats.

    Attributes:
        body: inputs are constants, carries and slices of the scanned arrays; outputs are carries
            and stacked outputs.
        num_consts: how many inputs are constants.
        num_carry: how many inputs, and outputs, are carries.
        length: the number of steps.
        reverse: whether it runs from the last step to the first.
        unroll: as in `jax.lax.scan`.
    """

    body: "Program"
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any

    @property
    def carries_of_inputs(self) -> slice:
        """Where the carries stand among the inputs."""
        return slice(self.num_consts, self.num_consts + self.num_carry)

    @property
    def carries_of_outputs(self) -> slice:
        """Where the carries stand among the outputs."""
        return slice(0, self.num_carry)

    def split(self, inputs: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Constants, carries and scanned arrays, from one entry for each input."""
        carries = self.carries_of_inputs
        consts = inputs[: carries.start]
        xs = inputs[carries.stop :]
        return list(consts), list(inputs[carries]), list(xs)

    def split_outputs(self, outputs: Sequence[T]) -> tuple[list[T], list[T]]:
        """Carries and stacked outputs, from one entry for each output."""
        carry = outputs[: self.num_carry]
        ys = outputs[self.num_carry :]
        return list(carry), list(ys)

    @property
    def unchanged(self) -> list[bool]:
        """For each carry whether every step hands it on as it is."""
        # Variables are numbers: such a body has the same one among its inputs and its outputs.
        before = self.body.inputs[self.carries_of_inputs]
        after = self.body.outputs[self.carries_of_outputs]
        return [new == old for new, old in zip(after, before, strict=True)]

    def scan(
        self, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any
    ) -> tuple[Any, Any]:
        """`jax.lax.scan` of a step of one's own, as often and in the order that this loop runs."""
        return lax.scan(step, carry, xs, self.length, self.reverse, self.unroll)

    def with_body(self, body: "Program", num_new_consts: int = 0) -> "Loop":
        """The same loop over another body, whose new constants come first."""
        num_consts = self.num_consts + num_new_consts
        return dataclasses.replace(self, body=body, num_consts=num_consts)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One operation.

    Attributes:
        primitive: what is computed; None for an identity that gives a parameter a noise of its own.
        inputs: variables and constants.
        outputs: variables.
        params: the primitive's parameters; of an identity the mesh axes `over` which it varies.
        loop: the body, when this is a `scan`.
        origin: the jaxpr's equation, for its place in the user's source.
    """

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Variable, ...]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    loop: Loop | None = None
    origin: Any = None

    @property
    def name(self) -> str:
        """The primitive's name, or "parameter" for an identity."""
        if self.primitive is None:
            return "parameter"
        return self.primitive.name

    @property
    def variables(self) -> list[Variable]:
        """The inputs that are variables."""
        return variables(self.inputs)

    @property
    def source(self) -> str:
        """Where in the user's code this operation stands, as `file:line (function)`."""
        if self.origin is None:
            return ""
        # Code that is all of libraries has no line of the user's.
        line = places.own_line(self.origin)
        return line or source_info_util.summarize(self.origin.source_info)

    @property
    def facts(self) -> Facts:
        """What is known about the primitive."""
        if self.primitive is None:
            return UNKNOWN
        return facts_of(self.primitive)

    @property
    def inner_jaxprs(self) -> list[Any]:
        """The jaxprs in the parameters; those of `jit` and `remat` are inlined, and are none."""
        return list(jex.jaxprs_in_params(self.params))

    @property
    def has_inner_programs(self) -> bool:
        """Whether the parameters hold programs, as those of `cond` and of custom rules do."""
        return len(self.inner_jaxprs) > 0

    @property
    def irreversible(self) -> bool:
        """Whether reverse mode cannot cross it, or something inside it."""
        if self.facts.lacks_jvp:  # the user wrote how it is crossed
            return False
        return self.contains(lambda facts: facts.irreversible)

    def contains(self, is_wanted: Callable[[Facts], bool]) -> bool:
        """Whether something is true of this operation's facts, or of one inside it."""
        if is_wanted(self.facts):
            return True
        inside = itertools.chain(*map(equations_of, self.inner_jaxprs))
        return any(is_wanted(facts_of(eqn.primitive)) for eqn in inside)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Equations in order.

    Attributes:
        inputs: the variables that must be given.
        equations: what is computed from them.
        outputs: what is returned.
    """

    inputs: tuple[Variable, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]

    def contains(self, is_wanted: Callable[[Facts], bool]) -> bool:
        """Whether something is true of the facts of an operation, or of one inside it."""
        return any(equation.contains(is_wanted) for equation in self.equations)


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A function's program with what it closes over.

    Attributes:
        program: inputs are the closed-over arrays, the parameters, the function's other inputs.
        closed: the closed-over arrays.
        num_parameters: the number of arrays in the function's first argument.
        types: the abstract value of each variable, by number; promotions append to it.
        out_tree: the structure of the function's output.
    """

    program: Program
    closed: list[Array]
    num_parameters: int
    types: list[Any]
    out_tree: Any

    @property
    def parameters(self) -> tuple[Variable, ...]:
        """The inputs that are leaves of the function's first argument."""
        # [closed-over arrays, parameters, data]
        first = len(self.closed)
        return self.program.inputs[first : first + self.num_parameters]

    @property
    def data(self) -> tuple[Variable, ...]:
        """The inputs that are leaves of the function's further arguments."""
        first = len(self.closed) + self.num_parameters
        return self.program.inputs[first:]

    def arguments(self, params: Tree, data: Iterable[Any] = ()) -> list[Any]:
        """The values of the program's inputs, from the first argument and the leaves of others."""
        leaves = jax.tree.leaves(params)
        return [*self.closed, *leaves, *data]


def variables(atoms: Iterable[Atom]) -> list[Variable]:
    """The atoms that are variables."""
    return [atom for atom in atoms if not isinstance(atom, Constant)]


def renamed(atoms: Iterable[Atom], names: Mapping[Variable, Atom]) -> tuple[Atom, ...]:
    """The atoms with others in place of some variables."""
    return tuple(
        atom if isinstance(atom, Constant) else names.get(atom, atom) for atom in atoms
    )


def is_inexact(aval: Any) -> bool:
    """Whether values of this type carry derivatives."""
    # Tokens have no dtype, and keys an extended one.
    dtype = getattr(aval, "dtype", jnp.int32)
    return jnp.issubdtype(dtype, jnp.inexact)


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A jaxpr that may be closed, and what it closes over."""
    inside = getattr(jaxpr, "jaxpr", jaxpr)
    consts = getattr(jaxpr, "consts", ())
    return inside, list(consts)


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """A jaxpr's equations, those of jaxprs inside them included."""
    inside, _ = opened(jaxpr)
    for eqn in inside.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations_of(inner)
