"""Every public name of forwax; the package imports this module when one is asked for."""

from forwax import combine as combine
from forwax import credit as credit
from forwax import functions as functions
from forwax import privacy as privacy
from forwax import tangents as tangents
from forwax import testing as testing
from forwax._enable_reverse import enable_reverse
from forwax._fused import update
from forwax._gauss_newton import GaussNewton
from forwax._learning_rate import suggest_learning_rate
from forwax._ledger import Ledger
from forwax._momentum import Momentum
from forwax._replay import replay, slopes
from forwax._reports.curvature import Curvature, measure_curvature
from forwax._reports.diagnostics import diagnose
from forwax._reports.explain import explain
from forwax._rules import (
    FDFA,
    ActivityPerturbation,
    Backprop,
    DirectFeedbackAlignment,
    Exact,
    FeedbackAlignment,
    FiniteDifference,
    LearnedFeedback,
    LearningRule,
    Rule,
    WeightPerturbation,
    random_feedback,
)
from forwax._safety import Safe
from forwax._signature import LocalLosses
from forwax._sites.noise_point import noise_point
from forwax._slopes import Slopes
from forwax._transforms import grad, value_and_grad

__all__ = [
    "FDFA",
    "ActivityPerturbation",
    "Backprop",
    "Curvature",
    "DirectFeedbackAlignment",
    "Exact",
    "FeedbackAlignment",
    "FiniteDifference",
    "GaussNewton",
    "LearnedFeedback",
    "LearningRule",
    "Ledger",
    "LocalLosses",
    "Momentum",
    "Rule",
    "Safe",
    "Slopes",
    "WeightPerturbation",
    "combine",
    "credit",
    "diagnose",
    "enable_reverse",
    "explain",
    "functions",
    "grad",
    "measure_curvature",
    "noise_point",
    "privacy",
    "random_feedback",
    "replay",
    "slopes",
    "suggest_learning_rate",
    "tangents",
    "testing",
    "update",
    "value_and_grad",
]
