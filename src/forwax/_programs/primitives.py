"""What forwax knows about JAX's primitives: a row for each, a column for each fact.

What has no row joins all axes, is no sum and no move: results stay right, but get coarser. The sets
that columns make differ on purpose: `pvary` moves factors and is elementwise for credit, `sub` adds
behind output sites but is no running sum of a loop.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives

from forwax._programs import axis_rules, moves, range_rules
from forwax._programs.axis_rules import AxisRule, MaskRule
from forwax._programs.moves import MoveRule
from forwax._programs.range_rules import RangeRule


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about one primitive, each named for who asks.

    Attributes:
        inlined: in traced programs its inner program takes its place.
        is_loop: in traced programs it is a `Loop`.
        credit: which axis of an operand follows an axis of the result.
        passes: which entries of an operand pass, where others are multiplied by 0 or not chosen.
        range: between what its result lies.
        passed_by_regions: noise may move from one operand to behind it, for it keeps errors as
            they are.
        elementwise_for_regions: an error may go back through it inside one region.
        marks_noise_points: its parameter `name` may say that noise enters there.
        sum_behind_outputs: it adds entries up, or moves them, on the way to the losses.
        sum_of_a_loop: it may add up what the steps of a loop give.
        stays_in_a_loop: all steps of a loop at once would compute more: each branch, or as many
            iterations as the longest of them.
        move_of_factors: what it makes of factors of its first operand, whose entries it moves.
        additive: the sum of two operands, up to a sign.
        scaled: the operands that it multiplies, entry by entry, by what the others give.
        is_dot: a layer, linear in each of two operands.
        is_convolution: a layer, linear in each of two operands.
        looks_up: it takes rows of its first operand.
        casts: it changes the dtype alone.
        varies: its operands vary over the mesh axes in its parameter `axes` too.
        repeats: it puts entries on further axes, or several times along one.
        stops_derivatives: nothing before it has derivatives through it.
        irreversible: reverse mode cannot cross it.
        has_own_jvp: the user wrote its derivative, which must stay in force.
        lacks_jvp: the user wrote a derivative that forward mode cannot use.
        refuses: it stands where such a derivative was asked for, and cannot be compiled.
        one_site: where a parameter meets data in it, it is one site whatever programs it carries.
        steep: entry by entry, with a derivative that may be infinite.
        sums_over_mesh: it sums its operands over the mesh axes in its parameter `axes`.
    """

    inlined: bool = False
    is_loop: bool = False
    credit: AxisRule = axis_rules.join_all
    passes: MaskRule | None = None
    range: RangeRule | None = None
    passed_by_regions: bool = False
    elementwise_for_regions: bool = False
    marks_noise_points: bool = False
    sum_behind_outputs: bool = False
    sum_of_a_loop: bool = False
    stays_in_a_loop: bool = False
    move_of_factors: MoveRule | None = None
    additive: bool = False
    scaled: tuple[int, ...] = ()
    is_dot: bool = False
    is_convolution: bool = False
    looks_up: bool = False
    casts: bool = False
    varies: bool = False
    repeats: bool = False
    stops_derivatives: bool = False
    irreversible: bool = False
    has_own_jvp: bool = False
    lacks_jvp: bool = False
    refuses: bool = False
    one_site: bool = False
    steep: bool = False
    sums_over_mesh: bool = False

    @property
    def bilinear(self) -> bool:
        """Whether it is a layer: linear in each of two operands."""
        return self.is_dot or self.is_convolution


UNKNOWN = Facts()
"""What is true of every primitive."""


def facts_of(primitive: Any) -> Facts:
    """The facts about a primitive of a jaxpr."""
    return PRIMITIVES.get(primitive.name, UNKNOWN)


# Their names differ between versions of jax, and some are two names for one.
_CALLS = [
    getattr(primitives, name)
    for name in ("jit_p", "remat_p", "closed_call_p", "call_p")
    if hasattr(primitives, name)
]


_ADD = Facts(
    credit=axis_rules.elementwise,
    passed_by_regions=True,
    elementwise_for_regions=True,
    sum_behind_outputs=True,
    sum_of_a_loop=True,
    additive=True,
    range=range_rules.entrywise(range_rules.add),
)


_STEEP = [
    *("sqrt", "rsqrt", "cbrt", "integer_pow", "log", "log1p"),
    *("asin", "acos", "acosh", "atanh", "atan2", "erf_inv", "digamma", "lgamma"),
]


PRIMITIVES: dict[str, Facts] = {
    # programs inside programs
    **{primitive.name: Facts(inlined=True) for primitive in _CALLS},
    "scan": Facts(is_loop=True),
    "while": Facts(stays_in_a_loop=True, irreversible=True),
    "cond": Facts(stays_in_a_loop=True),
    "custom_jvp_call": Facts(has_own_jvp=True, one_site=True),
    "custom_vjp_call": Facts(lacks_jvp=True, one_site=True),
    "custom_lin": Facts(refuses=True),
    "stop_gradient": Facts(stops_derivatives=True, range=range_rules.unchanged),
    # entry by entry: sums
    "add": _ADD,
    "add_any": _ADD,  # what transposition adds up by
    # Its second operand's sign turns, so that it is no running sum of a loop.
    "sub": dataclasses.replace(
        _ADD, sum_of_a_loop=False, range=range_rules.entrywise(range_rules.sub)
    ),
    "neg": Facts(
        credit=axis_rules.elementwise,
        range=range_rules.entrywise(range_rules.neg),
        passed_by_regions=True,
        sum_behind_outputs=True,
    ),
    # entry by entry: products and choices
    "mul": Facts(
        credit=axis_rules.elementwise,
        passes=axis_rules.by_factor,
        range=range_rules.entrywise(range_rules.mul),
        elementwise_for_regions=True,
        scaled=(0, 1),
    ),
    "div": Facts(
        credit=axis_rules.elementwise,
        range=range_rules.entrywise(range_rules.div),
        elementwise_for_regions=True,
        scaled=(0,),
        steep=True,
    ),
    "select_n": Facts(
        credit=axis_rules.elementwise,
        passes=axis_rules.by_choice,
        range=range_rules.entrywise(range_rules.select_n),
        elementwise_for_regions=True,
    ),
    "pow": Facts(elementwise_for_regions=True, steep=True),
    "max": Facts(
        range=range_rules.entrywise(range_rules.maximum), elementwise_for_regions=True
    ),
    "min": Facts(
        range=range_rules.entrywise(range_rules.minimum), elementwise_for_regions=True
    ),
    # entry by entry: of values alone, whose tangents are products
    "exp": Facts(range=range_rules.exp(math.e)),
    "exp2": Facts(range=range_rules.exp(2.0)),
    "logistic": Facts(range=range_rules.bounded(0, 1)),
    "tanh": Facts(range=range_rules.bounded(-1, 1)),
    "and": Facts(range=range_rules.entrywise(range_rules.logical_and, jnp.bool_)),
    "or": Facts(range=range_rules.entrywise(range_rules.logical_or, jnp.bool_)),
    "not": Facts(range=range_rules.entrywise(range_rules.logical_not, jnp.bool_)),
    **{name: Facts(steep=True) for name in _STEEP},
    # entry by entry: the same value, or a part of it
    "convert_element_type": Facts(
        credit=axis_rules.elementwise,
        range=range_rules.cast,
        passed_by_regions=True,
        sum_behind_outputs=True,
        move_of_factors=moves.convert_element_type,
        casts=True,
    ),
    "copy": Facts(
        credit=axis_rules.elementwise,
        range=range_rules.unchanged,
        passed_by_regions=True,
        move_of_factors=moves.unchanged,
    ),
    "name": Facts(
        credit=axis_rules.elementwise,
        range=range_rules.unchanged,
        marks_noise_points=True,
        move_of_factors=moves.unchanged,
    ),
    "reduce_precision": Facts(
        credit=axis_rules.elementwise, move_of_factors=moves.unchanged
    ),
    "sharding_constraint": Facts(
        credit=axis_rules.elementwise,
        range=range_rules.unchanged,
        move_of_factors=moves.unchanged,
    ),
    "psum_invariant": Facts(sums_over_mesh=True),
    "psum": Facts(sums_over_mesh=True),  # where no type says what varies
    "pvary": Facts(
        credit=axis_rules.elementwise,
        range=range_rules.unchanged,
        move_of_factors=moves.vary,
        varies=True,
    ),
    "real": Facts(credit=axis_rules.elementwise),
    "imag": Facts(credit=axis_rules.elementwise),
    "conj": Facts(credit=axis_rules.elementwise),
    "complex": Facts(credit=axis_rules.elementwise),
    "optimization_barrier": Facts(credit=axis_rules.one_to_one),
    "device_put": Facts(credit=axis_rules.one_to_one),
    # moves of entries
    "reshape": Facts(
        credit=axis_rules.reshape,
        range=range_rules.moved(range_rules.reshape),
        passed_by_regions=True,
        sum_behind_outputs=True,
        move_of_factors=moves.reshape,
    ),
    "transpose": Facts(
        credit=axis_rules.transpose,
        range=range_rules.moved(range_rules.transpose),
        passed_by_regions=True,
        sum_behind_outputs=True,
        move_of_factors=moves.transpose,
    ),
    "squeeze": Facts(
        credit=axis_rules.squeeze,
        range=range_rules.moved(range_rules.squeeze),
        passed_by_regions=True,
        sum_behind_outputs=True,
        move_of_factors=moves.squeeze,
    ),
    "broadcast_in_dim": Facts(
        credit=axis_rules.broadcast_in_dim,
        range=range_rules.moved(range_rules.broadcast_in_dim),
        passed_by_regions=True,
        sum_behind_outputs=True,
        move_of_factors=moves.broadcast_in_dim,
        repeats=True,
    ),
    "slice": Facts(
        credit=axis_rules.slice_,
        range=range_rules.moved(range_rules.slice_),
        move_of_factors=moves.slice_,
    ),
    "dynamic_slice": Facts(
        credit=axis_rules.dynamic_slice,
        range=range_rules.hull,
        move_of_factors=moves.dynamic_slice,
    ),
    "dynamic_update_slice": Facts(credit=axis_rules.dynamic_update_slice),
    "concatenate": Facts(
        credit=axis_rules.concatenate,
        range=range_rules.concatenate,
        sum_behind_outputs=True,
    ),
    "stack": Facts(credit=axis_rules.stack, sum_behind_outputs=True),
    "split": Facts(credit=axis_rules.split),
    "unstack": Facts(credit=axis_rules.unstack),
    "tile": Facts(credit=axis_rules.tile),
    "pad": Facts(credit=axis_rules.pad),
    "rev": Facts(credit=axis_rules.rev, range=range_rules.moved(range_rules.rev)),
    "sort": Facts(credit=axis_rules.along("dimension")),
    # look-ups and updates
    "gather": Facts(credit=axis_rules.gather, looks_up=True),
    "scatter": Facts(one_site=True),
    "scatter-add": Facts(credit=axis_rules.scatter_add, one_site=True),
    "scatter-sub": Facts(one_site=True),
    "scatter-mul": Facts(one_site=True),
    "scatter-min": Facts(one_site=True),
    "scatter-max": Facts(one_site=True),
    # sums along axes, and layers
    "reduce_sum": Facts(
        credit=axis_rules.reduce,
        range=range_rules.reduce_sum,
        sum_behind_outputs=True,
    ),
    "reduce_max": Facts(range=range_rules.reduce_max),
    "cumsum": Facts(credit=axis_rules.cumulative),
    "reduce_window_sum": Facts(credit=axis_rules.window),
    "select_and_gather_add": Facts(credit=axis_rules.window),
    "fft": Facts(credit=axis_rules.fft),
    "dot_general": Facts(
        credit=axis_rules.dot_general,
        range=range_rules.product_of_arrays,
        is_dot=True,
    ),
    "conv_general_dilated": Facts(
        credit=axis_rules.conv_general_dilated,
        range=range_rules.product_of_arrays,
        is_convolution=True,
    ),
}
