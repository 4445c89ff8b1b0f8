"""Tables keep every number: in a console of any width, and in full where there is none."""

import io
import re

import pytest
from rich.console import Console

from forwax._reports.table import as_rich
from forwax.lab.report import Table, print_tables

NAMES = ("rule", "validation loss", "temporaries", "seconds of a step", "relative MSE")
ROWS = [
    ("backprop", "0.2104", "12.4 MiB", "0.000264", "0"),
    ("forward gradient, 16 [x]", "0.3377", "13.1 MiB", "0.000951", "1.29e+05"),
]
# stacked, what names the rows stands alone
CELLS = (*NAMES[1:], *ROWS[0], *ROWS[1])
WORDS = {word for cell in CELLS for word in cell.split()}
TABLES = {
    "lab": Table(NAMES, ROWS, "Rules", alarming={"backprop"}),
    "reports": as_rich([NAMES, *ROWS], [1, 2], ["A note."], "Take backprop."),
}


def printed(table, width):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [30, 60, 80, 100, 200])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_keeps_its_words_in_every_width(table, width):
    text = printed(TABLES[table], width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert not WORDS - set(re.split(r"[\s│┃]+", text))


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_does_not_fit_is_stacked(table):
    wide, narrow = printed(TABLES[table], 200), printed(TABLES[table], 60)
    assert "┃" in wide
    assert "┃" not in narrow
    assert "backprop\n  validation loss    0.2104\n" in narrow


def test_a_pipe_gets_tables_in_full(capsys):
    rows = [("a" * 120, "1"), ("b" * 120, "2")]
    print_tables(Table(("name", "number"), rows))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "a" * 120 in line and "1" in line]
