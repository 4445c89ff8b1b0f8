"""The finished runs in a column's folder, whichever call made them."""

from contextlib import suppress
from pathlib import Path

from forwax.lab.catalogue.columns import RULES
from forwax.lab.catalogue.names import Entry
from forwax.lab.flags import UsageError
from forwax.lab.keeping.folder import SUMMARY, Run
from forwax.lab.ren2023.runs import KINDS
from forwax.lab.report import RowsByRule


def folder_of(column: Path, entry: Entry, seed: int) -> Path:
    """The folder of one run.

    >>> folder_of(Path("mnist-m"), Entry.parse("LG-FG-A:4"), 0).name
    'LG-FG-A_4-0'
    """
    return column / f"{entry.name.replace(':', '_')}-{seed}"


def finished(column: Path, checksum: str) -> tuple[list[Entry], RowsByRule]:
    """Read all finished runs on the same data.

    Args:
        column: the folder of a column.
        checksum: of the data; runs on other data, such as a part held out, are left out.

    Returns:
        The rows in the order of the paper's methods, and the summaries of each row's seeds by its
        name.
    """
    found = {}
    for path in column.glob(f"*/{SUMMARY}"):
        place = _place(path.parent.name)
        if place is None:
            continue
        run = Run.open(path.parent, {"data_checksum": str, "learning_rate": float})
        if run.config["data_checksum"] == checksum:
            found[place] = run
    results: RowsByRule = {}
    # the place names the row and the seed, so that no two runs share one
    for place, run in sorted(found.items()):
        results.setdefault(place[2], []).append(
            run.summary(KINDS) | {"learning_rate": run.config["learning_rate"]}
        )
    return [Entry.parse(name) for name in results], results


def _place(name: str) -> tuple[int, int, str, int] | None:
    """The place of a folder's run: its rule's, noises, row and seed; None for other folders."""
    row, _, seed = name.rpartition("-")
    with suppress(UsageError, ValueError):
        entry = Entry.parse(row.replace("_", ":"))
        rank = RULES.index(entry.rule)
        return rank, entry.num_tangents or 1, entry.name, int(seed)
    return None
