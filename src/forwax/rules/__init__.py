"""Rules: how a gradient is estimated, one rule a file. Rules never import one another."""

from forwax.rules._base import Rule
from forwax.rules.activity import ActivityPerturbation
from forwax.rules.backprop import Backprop
from forwax.rules.exact import Exact
from forwax.rules.finite_difference import FiniteDifference
from forwax.rules.weight import WeightPerturbation

__all__ = ["ActivityPerturbation", "Backprop", "Exact", "FiniteDifference", "Rule", "WeightPerturbation"]
