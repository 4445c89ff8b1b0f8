"""Products of trained weights with data: what an error crosses at most once."""

import dataclasses
from typing import TypeAlias

from forwax._programs.program import Equation, Loop, Program, Variable
from forwax._sites.kinds import Kind

Kinds: TypeAlias = dict[Variable, Kind]


@dataclasses.dataclass(frozen=True, eq=False)
class Products:
    """Which operations of a program, and of the bodies of its loops, multiply trained weights.

    A trained weight is a parameter, or made of parameters and constants alone; or it is mixed.

    Attributes:
        kinds: what each variable is made of.
        copies: mixed weights without data: parameters with a noise of their own, and what is made
            of them.
        merged: mixed weights that parameters and the loss's own data give before any product, as
            `mu + sigma * eps` and the rows `w[i]`. They are weights where they meet an activity,
            and data where they meet a parameter.
    """

    kinds: Kinds
    copies: frozenset[Variable]
    merged: frozenset[Variable]

    @property
    def mixed(self) -> frozenset[Variable]:
        """All mixed weights."""
        return self.copies | self.merged

    def is_weight(self, variable: Variable) -> bool:
        """Whether a variable is a trained weight wherever it is used."""
        return self.kinds[variable] is Kind.PARAMETER or variable in self.copies

    def weights(self, equation: Equation) -> list[Variable]:
        """The inputs of a product that are its trained weights; none if it is no such product.

        A sum is none: it passes errors on as they are. A loop is none: its body's equations are.
        """
        if not _may_multiply(equation):
            return []
        inputs = equation.variables
        weights = [v for v in inputs if self.is_weight(v)]
        return weights or [v for v in inputs if v in self.merged]

    def is_product(self, equation: Equation) -> bool:
        """Whether a trained weight meets data in an equation."""
        weights = self.weights(equation)
        data = [v for v in equation.variables if v not in weights]
        return len(weights) > 0 and any(
            self.kinds[v] in (Kind.DATA, Kind.MIXED) for v in data
        )

    def is_made(self, variable: Variable) -> bool:
        """Whether a variable is a trained weight somewhere."""
        return self.is_weight(variable) or variable in self.merged

    def makes_weights(self, equation: Equation) -> bool:
        """Whether an equation gives trained weights: what is done to weights before their use."""
        return any(map(self.is_made, equation.outputs))

    def data_inputs(self, equation: Equation) -> list[Variable]:
        """The activities that meet a trained weight in an equation: errors stop there.

        They are its mixed inputs that are no weights there. Of an equation that is no product of a
        trained weight, and of one with the loss's own data alone, there are none.
        """
        weights = self.weights(equation)
        if not weights:
            return []
        return [
            v
            for v in dict.fromkeys(equation.variables)
            if self.kinds[v] is Kind.MIXED and v not in weights
        ]


def find_products(program: Program, kinds: Kinds) -> Products:
    """The products of a rewritten program and of the bodies of its loops."""
    copies: set[Variable] = set()
    merged: set[Variable] = set()
    _find_weights(program, kinds, copies, merged)
    return Products(kinds, frozenset(copies), frozenset(merged))


def _find_weights(
    program: Program,
    kinds: Kinds,
    copies: set[Variable],
    merged: set[Variable],
) -> None:
    """Add the mixed weights of a program, of which some inputs may be known."""
    for equation in program.equations:
        if equation.primitive is None:  # a parameter with a noise of its own
            copies.update(equation.outputs)
        elif equation.loop is not None:
            _enter(equation, equation.loop, copies, merged)
            _find_weights(equation.loop.body, kinds, copies, merged)
            _leave(equation, equation.loop, copies, merged)
            if _made_of_weights(equation, kinds, copies, merged) is copies:
                copies.update(v for v in equation.outputs if kinds[v] is Kind.MIXED)
        else:
            found = _made_of_weights(equation, kinds, copies, merged)
            if found is not None:
                mixed = [v for v in equation.outputs if kinds[v] is Kind.MIXED]
                found.update(mixed)


def _made_of_weights(
    equation: Equation,
    kinds: Kinds,
    copies: set[Variable],
    merged: set[Variable],
) -> set[Variable] | None:
    """What an equation's mixed outputs belong to: copies, merged weights, or neither."""
    inputs = equation.variables
    others = [v for v in inputs if v not in copies and v not in merged]
    if any(kinds[v] is Kind.MIXED for v in others):
        return None
    has_data = any(kinds[v] is Kind.DATA for v in others)
    if not has_data and merged.isdisjoint(inputs):
        return copies
    # A product with data gives an activity, not a weight.
    is_product = equation.contains(lambda facts: facts.bilinear)
    return None if is_product else merged


def _enter(equation: Equation, loop: Loop, *sets: set[Variable]) -> None:
    """Weights that enter a loop and are the same in every step, or slices of weights."""
    consts, carry, xs = loop.split(
        list(zip(loop.body.inputs, equation.inputs, strict=True))
    )
    fixed = [pair for pair, same in zip(carry, loop.unchanged, strict=True) if same]
    for inner, outer in [*consts, *fixed, *xs]:
        for weights in sets:
            if outer in weights:
                weights.add(inner)


def _leave(equation: Equation, loop: Loop, *sets: set[Variable]) -> None:
    """Weights that a loop hands on as they are, or stacks."""
    pairs = list(zip(equation.outputs, loop.body.outputs, strict=True))
    carry, stacked = loop.split_outputs(pairs)
    fixed = [pair for pair, same in zip(carry, loop.unchanged, strict=True) if same]
    for outer, inner in [*fixed, *stacked]:
        for weights in sets:
            if inner in weights:
                weights.add(outer)


def _may_multiply(equation: Equation) -> bool:
    if equation.primitive is None or equation.loop is not None:
        return False
    return not equation.facts.additive
