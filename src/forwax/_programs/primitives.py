"""Facts about primitives."""

ADDITIVE = frozenset({"add", "sub", "add_any"})
"""Sums of two operands, up to a sign."""


MOVES = frozenset({"reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type"})
"""Their result holds the entries of one operand in other places, repeated or in another dtype."""


BILINEAR = frozenset({"dot_general", "conv_general_dilated"})
"""Layers: linear in each of two operands."""
