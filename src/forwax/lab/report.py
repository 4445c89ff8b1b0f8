"""What commands leave behind: tables, files that are whole or absent, what a result rests on."""

import json
import math
import os
import platform
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, SupportsFloat

from rich.console import Console

from forwax._reports.table import as_rich

Json = dict[str, Any]
"""What JSON can hold, or keyword arguments by their names."""

Rows = list[Json]
RowsByRule = dict[str, Rows]
"""Rows of one kind, and those of each rule by its name."""

PACKAGES = ("forwax", "jax", "jaxlib", "numpy", "optax", "equinox")


@dataclass(frozen=True)
class Table:
    """Cells of text under headings, for the terminal (`print_tables`) and for markdown.

    Attributes:
        headings: one for each column.
        rows: the cells; the first of a row names it.
        title: the line above the table on a terminal.
        numeric: whether all columns but the first hold numbers, which stand at the right.
        alarming: the names of rows that shall catch the eye.

    >>> print(Table(("rule", "loss"), [("backprop", "0.1")]).markdown())
    | rule | loss |
    | --- | ---: |
    | backprop | 0.1 |
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    numeric: bool = True
    alarming: Collection[str] = ()

    def __rich__(self) -> Any:
        """Give what rich prints; see `forwax._reports.table.as_rich`."""
        numbers = range(1, len(self.headings)) if self.numeric else ()
        cells = [self.headings, *self.rows]
        return as_rich(cells, numbers, title=self.title, alarming=self.alarming)

    def markdown(self) -> str:
        """Give the table without its title."""
        rule = "---:" if self.numeric else "---"
        lines = [self.headings, ["---", *[rule] * (len(self.headings) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_tables(*tables: Any) -> None:
    """Print tables, one below the other: on a terminal in its width, elsewhere in their own."""
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    for table in tables:
        console.print(table)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a draft beside a path, and move it there when the block is done.

    A reader sees the old file or the new one, a block that fails leaves the old one, and a machine
    that loses its power leaves no empty one. The folder is made where it is missing.

    Args:
        path: what is made or replaced.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "deep" / "a.txt"
    >>> with replacing(path) as draft:
    ...     _ = draft.write_text("whole")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('whole', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one move; see `replacing`."""
    with replacing(path) as draft:
        draft.write_text(text)


def write_json(path: Path, value: Json) -> None:
    """Write a JSON file in one move; see `replacing`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"a": 1})
    >>> json.loads(path.read_text())
    {'a': 1}
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def finite(value: SupportsFloat) -> float | None:
    """Give a number as JSON can hold it: None where it is infinite or not a number.

    >>> finite(0.5), finite(math.inf), finite(math.nan)
    (0.5, None, None)
    """
    return float(value) if math.isfinite(value) else None


def versions() -> dict[str, str]:
    """Give the versions of what a result depends on.

    >>> sorted(versions())
    ['equinox', 'forwax', 'jax', 'jaxlib', 'numpy', 'optax', 'python']
    """
    return {name: metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version()
    }


def machine() -> Json:
    """Give what a result was made with: the kind of device, and `versions`.

    >>> sorted(machine())
    ['device', 'versions']
    """
    # imported here: tables and files need no jax
    import jax

    return {"device": jax.devices()[0].device_kind, "versions": versions()}
