"""Rules: how a gradient is estimated, one rule a file. Rules never import one another."""

from forwax._rule import LearningRule, Rule
from forwax._rules.activity import ActivityPerturbation
from forwax._rules.backprop import Backprop
from forwax._rules.direct_feedback import DirectFeedbackAlignment
from forwax._rules.exact import Exact
from forwax._rules.fdfa import FDFA
from forwax._rules.feedback import FeedbackAlignment, random_feedback
from forwax._rules.finite_difference import FiniteDifference
from forwax._rules.learned_feedback import LearnedFeedback
from forwax._rules.weight import WeightPerturbation

__all__ = [
    "FDFA",
    "ActivityPerturbation",
    "Backprop",
    "DirectFeedbackAlignment",
    "Exact",
    "FeedbackAlignment",
    "FiniteDifference",
    "LearnedFeedback",
    "LearningRule",
    "Rule",
    "WeightPerturbation",
    "random_feedback",
]
