"""Rules: how a gradient is estimated, one rule a file. Rules never import one another."""

from forwax._rule import LearningRule, Rule
from forwax.rules.activity import ActivityPerturbation
from forwax.rules.backprop import Backprop
from forwax.rules.direct_feedback import DirectFeedbackAlignment
from forwax.rules.exact import Exact
from forwax.rules.fdfa import FDFA
from forwax.rules.feedback import FeedbackAlignment, random_feedback
from forwax.rules.finite_difference import FiniteDifference
from forwax.rules.weight import WeightPerturbation

__all__ = [
    "FDFA",
    "ActivityPerturbation",
    "Backprop",
    "DirectFeedbackAlignment",
    "Exact",
    "FeedbackAlignment",
    "FiniteDifference",
    "LearningRule",
    "Rule",
    "WeightPerturbation",
    "random_feedback",
]
