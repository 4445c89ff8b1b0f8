"""The finished runs in a column's folder, whichever call made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forwax.lab.ren2023.columns import RULES
from forwax.lab.ren2023.entries import Entry
from forwax.lab.settings import UsageError
from forwax.lab.train.runs import CONFIG, SUMMARY


def folder_of(column: Path, entry: Entry, seed: int) -> Path:
    """The folder of one run.

    >>> folder_of(Path("mnist-m"), Entry.parse("LG-FG-A:4"), 0).name
    'LG-FG-A_4-0'
    """
    return column / f"{entry.name.replace(':', '_')}-{seed}"


def finished(column: Path, checksum: str) -> tuple[list[Entry], dict[str, list[dict[str, Any]]]]:
    """Read all finished runs on the same data.

    Args:
        column: the folder of a column.
        checksum: of the data; runs on other data, such as a part held out, are left out.

    Returns:
        The rows in the order of the paper's methods, and the summaries of each row's seeds by its
        name.
    """
    found: dict[Entry, dict[int, dict[str, Any]]] = {}
    for path in column.glob(f"*/{SUMMARY}"):
        entry, seed = _read_name(path.parent.name)
        config = json.loads((path.parent / CONFIG).read_text())
        if entry is not None and config["data_checksum"] == checksum:
            summary = json.loads(path.read_text()) | {"learning_rate": config["learning_rate"]}
            found.setdefault(entry, {})[seed] = summary
    entries = sorted(
        found,
        key=lambda entry: (
            RULES.index(entry.rule),
            entry.num_tangents or 1,
            entry.name,
        ),
    )
    return entries, {
        entry.name: [found[entry][seed] for seed in sorted(found[entry])] for entry in entries
    }


def _read_name(name: str) -> tuple[Entry | None, int]:
    """The row and the seed that a folder's name tells; no row for other folders."""
    row, _, seed = name.rpartition("-")
    try:
        return (Entry.parse(row.replace("_", ":")), int(seed)) if seed.isdecimal() else (None, 0)
    except UsageError:
        return None, 0
