"""What calls return and what rules and tangents receive: to annotate with, and to read."""

from forwax._signature import Problem
from forwax._tree import Spec
from forwax.diagnosis import Diagnosis, DiagnosisRow
from forwax.explain import Explanation, SiteRow
from forwax.safety import History, Monitor

__all__ = [
    "Diagnosis",
    "DiagnosisRow",
    "Explanation",
    "History",
    "Monitor",
    "Problem",
    "SiteRow",
    "Spec",
]
