"""Which chunk size of a rule is the fastest on a loss."""

from collections.abc import Mapping

from forwax._reports.diagnosis_row import DiagnosisRow
from forwax._reports.table import with_prefix


def about_chunks(
    name: str,
    row: DiagnosisRow,
    others: Mapping[int, DiagnosisRow],
) -> str | None:
    """One sentence on the times of a rule's chunk sizes; None where there are no others.

    Args:
        name: the rule's name in the table.
        row: what it costs as it is.
        others: what it costs with other chunk sizes.
    """
    if row.seconds is None:
        return None
    least = row.seconds
    choice = "leave it"
    texts: list[str] = []
    for size, other in others.items():
        if other.seconds is None:
            continue
        time = with_prefix(other.seconds, "s")
        texts.append(f"{time} with chunk_size={size}")
        if other.seconds < least:
            least = other.seconds
            choice = f"take chunk_size={size}"
    if not texts:
        return None
    own = with_prefix(row.seconds, "s")
    listed = " and ".join(texts)
    return f"{name} takes {own}, {listed}: {choice}."
