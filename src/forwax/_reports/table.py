"""Tables for people: plain text, or rich's where rich prints; and numbers with units."""

import math
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

Cells = Sequence[Sequence[str]]
"""The rows of a table as text, the columns' names first."""

_PREFIXES = ("n", "µ", "m", "", "k", "M", "G", "T", "P")
_BINARY_PREFIXES = ("B", "KiB", "MiB", "GiB", "TiB")


def as_text(cells: Cells, numbers: Collection[int] = ()) -> str:
    """The table in plain text; the columns of numbers stand at the right.

    >>> print(as_text([("site", "size"), ("tanh", "8")], numbers=[1]))
    site  size
    ----  ----
    tanh     8
    """
    columns = []
    for i, column in enumerate(zip(*cells, strict=True)):
        width = max(map(len, column))
        pad = str.rjust if i in numbers else str.ljust
        name, *rest = [pad(text, width) for text in column]
        rule = "-" * width
        columns.append([name, rule, *rest])
    lines = zip(*columns, strict=True)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_rich(
    cells: Cells,
    numbers: Collection[int] = (),
    notes: Sequence[str] = (),
    conclusion: str | None = None,
    *,
    title: str | None = None,
    alarming: Collection[str] = (),
) -> Any:
    """What rich prints: the table, and below it the notes and a conclusion that stands out.

    Args:
        cells: the rows as text, the columns' names first.
        numbers: the columns whose cells stand at the right.
        notes: lines below the table.
        conclusion: the last line.
        title: the line above the table.
        alarming: the first cells of rows that shall catch the eye.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names, *rows = cells
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        side = "right" if i in numbers else "left"
        table.add_column(name, justify=side, overflow="fold")
    for row in rows:
        style = "bold red" if row[0] in alarming else None
        # As `Text`, since a "[" in a plain string opens rich's markup.
        table.add_row(*map(Text, row), style=style)
    below = [Text(note) for note in notes]
    if conclusion is not None:
        below.append(Text(conclusion, style="bold"))
    return Group(_Fitting(table, _stacked(cells, title)), *below)


class _Fitting:
    """A table of rich's where the console is wide enough for it, else a text in its place."""

    def __init__(self, table: Any, narrow: str):
        self.table = table
        self.narrow = narrow

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        unbounded = options.update(max_width=sys.maxsize)
        width = console.measure(self.table, options=unbounded).maximum
        yield self.table if width <= options.max_width else Text(self.narrow)


def _stacked(cells: Cells, title: str | None) -> str:
    """The rows one below another, each cell behind its column's name.

    >>> print(_stacked([("rule", "loss", "time"), ("backprop", "0.1", "2 s")], "Rules"))
    Rules
    backprop
      loss  0.1
      time  2 s
    """
    names, *rows = cells
    width = max(map(len, names))
    lines = [title] if title else []
    for first, *others in rows:
        lines.append(first)
        for name, cell in zip(names[1:], others, strict=True):
            lines.append(f"  {name.ljust(width)}  {cell}")
    return "\n".join(lines)


def plus_minus(mean: float, error: float) -> str:
    """A mean and its standard error; the mean alone where nothing varied.

    >>> plus_minus(31.26, 0.54), plus_minus(1.0, 0.0)
    ('31.3 ± 0.5', '1')
    """
    if error == 0:
        return f"{mean:,.3g}"
    return f"{mean:,.3g} ± {error:,.1g}"


def with_prefix(number: float, unit: str) -> str:
    """A number with three digits and an SI prefix.

    >>> with_prefix(1.5e9, "FLOP"), with_prefix(2.5e-3, "s"), with_prefix(0, "s")
    ('1.5 GFLOP', '2.5 ms', '0 s')
    """
    power = 0
    if number != 0:
        power = math.floor(math.log10(abs(number)) / 3)
        power = min(max(power, -3), 5)
    prefix = _PREFIXES[power + 3]
    scaled = number / 1000**power
    return f"{scaled:.3g} {prefix}{unit}"


def with_binary_prefix(count: int) -> str:
    """A number of bytes.

    >>> with_binary_prefix(3 * 2**20), with_binary_prefix(20)
    ('3 MiB', '20 B')
    """
    power = 0
    if count != 0:
        power = min(int(math.log2(count) / 10), 4)
    prefix = _BINARY_PREFIXES[power]
    scaled = count / 1024**power
    return f"{scaled:.4g} {prefix}"
