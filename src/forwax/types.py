"""What calls return and what rules and tangents receive: to annotate with, and to read."""

from forwax._reports.diagnosis import Diagnosis
from forwax._reports.diagnosis_row import DiagnosisRow
from forwax._reports.explain import Explanation, SiteRow
from forwax._safety import History, Monitor
from forwax._signature import Problem
from forwax._tree import Spec

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
