"""Which chunk size of a rule is the fastest on a loss."""

from collections.abc import Mapping

from forwax._reports.diagnosis_row import DiagnosisRow
from forwax._reports.table import with_prefix


def about_chunks(
    name: str, row: DiagnosisRow, others: Mapping[int, DiagnosisRow]
) -> str | None:
    """One sentence on the times of a rule's chunk sizes; None where there are no others.

    Args:
        name: the rule's name in the table.
        row: what it costs as it is.
        others: what it costs with other chunk sizes.
    """
    seconds = {size: other.seconds for size, other in others.items()}
    timed = {size: time for size, time in seconds.items() if time is not None}
    if row.seconds is None or not timed:
        return None
    texts = [
        f"{with_prefix(time, 's')} with chunk_size={size}"
        for size, time in timed.items()
    ]
    best = min(timed, key=lambda size: timed[size])
    choice = f"take chunk_size={best}"
    if row.seconds <= timed[best]:
        choice = "leave it"
    return f"{name} takes {with_prefix(row.seconds, 's')}, {' and '.join(texts)}: {choice}."
