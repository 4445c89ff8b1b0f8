"""A traced program as plain data: equations over numbered variables, `jit` and `remat` inlined, loops as sub-programs.

This is the only module that reads jaxprs. It differs between JAX versions in how `scan` writes its
counts and in whether inner jaxprs are closed, so both are derived from what all versions share:
ranks, and `getattr(j, "jaxpr", j)`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.extend import source_info_util
from jax.extend.core import primitives

from forwax import _mesh

NOISE_POINT = "forwax.noise_point"
"""The name that marks where a site's noise enters."""

_INLINED = [
    getattr(primitives, name)
    for name in ("jit_p", "remat_p", "closed_call_p", "call_p")
    if hasattr(primitives, name)  # newer jax has no call_p
]


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that is written into the program.

    Attributes:
        value: a Python scalar or an array.
    """

    value: Any


Variable: TypeAlias = int
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


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One operation.

    Attributes:
        primitive: what is computed; None for an identity that gives a parameter a noise of its own.
        inputs: variables and constants.
        outputs: variables.
        params: the primitive's parameters.
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
        return "parameter" if self.primitive is None else self.primitive.name

    @property
    def variables(self) -> list[Variable]:
        """The inputs that are variables."""
        return variables(self.inputs)

    @property
    def source(self) -> str:
        """Where in the user's code this operation stands, as `file:line (function)`."""
        return (
            source_info_util.summarize(self.origin.source_info) if self.origin is not None else ""
        )

    def contains(self, *names: str) -> bool:
        """Whether this is, or carries inside it, a primitive of one of the names."""
        return self.name in names or any(
            _contains(inner, names) for inner in jex.jaxprs_in_params(self.params)
        )


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


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A function's program with what it closes over.

    Attributes:
        program: inputs are the closed-over arrays, then the function's own inputs.
        closed: the closed-over arrays.
        types: the abstract value of each variable, by number; promotions append to it.
        out_tree: the structure of the function's output.
    """

    program: Program
    closed: list[Array]
    types: list[Any]
    out_tree: Any


def trace(fun: Callable[..., Any], *specs: Any) -> Traced:
    """The program of a function of the given abstract arguments."""
    structure: list[Any] = []

    def flat(*args: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(fun(*args))
        structure.append(tree)
        return leaves

    closed_jaxpr = jax.make_jaxpr(flat)(*specs)
    types: list[Any] = []
    program = _convert(closed_jaxpr.jaxpr, types)
    return Traced(program, list(closed_jaxpr.consts), types, structure[0])


def retrace(fun: Callable[..., Any], atoms: Sequence[Atom], types: list[Any]) -> Program:
    """The program of a function of some atoms; its variables are numbered behind those in `types`."""
    given = variables(atoms)

    def flat(*values: Any) -> Any:
        remaining = iter(values)
        return fun(
            *(atom.value if isinstance(atom, Constant) else next(remaining) for atom in atoms)
        )

    specs = [
        _mesh.like(tuple(types[v].shape), types[v].dtype, _mesh.type_axes(types[v])) for v in given
    ]
    closed_jaxpr = jax.make_jaxpr(flat)(*specs)
    program = _convert(closed_jaxpr.jaxpr, types, closed_jaxpr.consts)
    names: dict[Variable, Atom] = dict(zip(program.inputs, given, strict=True))
    equations = tuple(renamed_inputs(equation, names) for equation in program.equations)
    outputs = tuple(
        atom if isinstance(atom, Constant) else names.get(atom, atom) for atom in program.outputs
    )
    return Program(tuple(given), equations, outputs)


def renamed_inputs(equation: Equation, names: Mapping[Variable, Atom]) -> Equation:
    """The same operation on other inputs."""
    inputs = tuple(
        atom if isinstance(atom, Constant) else names.get(atom, atom) for atom in equation.inputs
    )
    return dataclasses.replace(equation, inputs=inputs)


def variables(atoms: Iterable[Atom]) -> list[Variable]:
    """The atoms that are variables."""
    return [atom for atom in atoms if not isinstance(atom, Constant)]


def new_variable(types: list[Any], aval: Any) -> Variable:
    """A fresh variable of the given type."""
    types.append(aval)
    return len(types) - 1


def is_inexact(aval: Any) -> bool:
    """Whether values of this type carry derivatives."""
    return jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact)


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Compute one equation's outputs as ordinary traceable JAX operations."""
    if equation.primitive is None:
        return list(values)
    with contextlib.ExitStack() as stack:
        if equation.origin is not None:
            info = equation.origin.source_info
            names = source_info_util.current_name_stack() + info.name_stack
            stack.enter_context(source_info_util.user_context(info.traceback, name_stack=names))
            stack.enter_context(equation.origin.ctx.manager)
        params = equation.primitive.get_bind_params(equation.params)
        out = equation.primitive.bind(*values, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def read(atom: Atom, env: Mapping[Variable, Any]) -> Any:
    """The value of an atom."""
    return atom.value if isinstance(atom, Constant) else env[atom]


def evaluate(
    equations: Iterable[Equation],
    env: dict[Variable, Any],
    apply: Callable[[Equation, list[Any]], list[Any]] = bind,
) -> None:
    """Compute equations in order; their outputs are added to `env`."""
    for equation in equations:
        outputs = apply(equation, [read(atom, env) for atom in equation.inputs])
        env.update(zip(equation.outputs, outputs, strict=True))


def _convert(jaxpr: Any, types: list[Any], consts: Sequence[Any] | None = None) -> Program:
    """A jaxpr as a program with variables of its own; without values for its constvars, they become inputs too."""
    env: dict[Any, Atom] = {}

    def define(var: Any) -> Variable:
        env[var] = number = new_variable(types, var.aval)
        return number

    if consts is not None:
        env.update(zip(jaxpr.constvars, map(Constant, consts), strict=True))
    inputs = tuple(map(define, [*(jaxpr.constvars if consts is None else ()), *jaxpr.invars]))
    equations: list[Equation] = []
    _convert_equations(jaxpr, types, env, equations)
    return Program(inputs, tuple(equations), tuple(_atom(env, var) for var in jaxpr.outvars))


def _convert_equations(
    jaxpr: Any, types: list[Any], env: dict[Any, Atom], equations: list[Equation]
) -> None:
    for eqn in jaxpr.eqns:
        inputs = tuple(_atom(env, var) for var in eqn.invars)
        if eqn.primitive in _INLINED:
            outputs = _inline(eqn, inputs, types, equations)
            env.update(zip(eqn.outvars, outputs, strict=True))
            continue
        outputs = tuple(new_variable(types, var.aval) for var in eqn.outvars)
        env.update(zip(eqn.outvars, outputs, strict=True))
        loop = _loop(eqn, types) if eqn.primitive is primitives.scan_p else None
        equations.append(Equation(eqn.primitive, inputs, outputs, eqn.params, loop, eqn))


def _inline(
    eqn: Any, inputs: tuple[Atom, ...], types: list[Any], equations: list[Equation]
) -> list[Atom]:
    inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    jaxpr, consts = _open(inner)
    env: dict[Any, Atom] = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    _convert_equations(jaxpr, types, env, equations)
    return [_atom(env, var) for var in jaxpr.outvars]


def _loop(eqn: Any, types: list[Any]) -> Loop:
    jaxpr, consts = _open(eqn.params["jaxpr"])
    ranks = [len(atom.aval.shape) for atom in eqn.invars]
    num_xs = sum(rank != len(var.aval.shape) for rank, var in zip(ranks, jaxpr.invars, strict=True))
    num_carry = sum(
        len(out.aval.shape) == len(v.aval.shape)
        for out, v in zip(eqn.outvars, jaxpr.outvars, strict=True)
    )
    body, params = _convert(jaxpr, types, consts), eqn.params
    num_consts = len(ranks) - num_carry - num_xs
    return Loop(body, num_consts, num_carry, params["length"], params["reverse"], params["unroll"])


def _open(jaxpr: Any) -> tuple[Any, list[Any]]:
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def _atom(env: dict[Any, Atom], var: Any) -> Atom:
    return Constant(var.val) if isinstance(var, jex.Literal) else env[var]


def _contains(jaxpr: Any, names: tuple[str, ...]) -> bool:
    opened, _ = _open(jaxpr)
    return any(
        eqn.primitive.name in names
        or any(_contains(inner, names) for inner in jex.jaxprs_in_params(eqn.params))
        for eqn in opened.eqns
    )
