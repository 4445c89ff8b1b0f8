"""What Ren et al. 2023 report: test and training error in percent, for each method.

Ren, Kornblith, Liao, Hinton, "Scaling Forward Gradient With Local Losses", ICLR 2023, arXiv
2210.03310: table 3 (supervised), table 4 (contrastive, with a linear readout). It has no L-FG-W and
no L-FG-A.
"""

from typing import NamedTuple


class Figures(NamedTuple):
    """Errors in percent; None where the paper gives none."""

    test: float
    train: float | None = None


def _table(columns: str, rows: str) -> dict[tuple[str, str], Figures]:
    """Read a table by its columns' names; a row is a method and its errors in each of them."""
    read = {}
    for row in rows.strip().splitlines():
        rule, *cells = row.split()
        for column, cell in zip(columns.split(), cells, strict=True):
            read[column, rule] = Figures(*map(float, cell.split("/")))
    return read


TABLE_3 = _table(
    "mnist-s mnist-m cifar-m imagenet-l",
    """
    BP       2.66/0     2.41/0     33.62/0      36.82/14.69
    L-BP     2.38/0     2.16/0     30.75/0      42.38/22.80
    LG-BP    2.43/0     2.81/0     33.84/0.05   54.37/39.66
    FA       2.82/0     2.90/0     39.94/28.44  94.55/94.13
    L-FA     3.21/0     2.90/0     39.74/28.98  87.20/85.69
    LG-FA    3.11/0     2.50/0     39.73/32.32  85.45/82.83
    DFA      3.31/0     3.17/0     38.80/33.69  91.17/90.28
    FG-W     9.25/8.93  8.56/8.64  55.95/54.28  97.71/97.58
    FG-A     3.24/1.53  3.76/1.75  59.72/41.29  98.83/98.80
    LG-FG-W  9.25/8.93  5.66/4.59  52.70/51.71  97.39/97.29
    LG-FG-A  3.24/1.53  2.55/0     30.68/19.39  58.37/44.86
    """,
)
"""Supervised: S/1/1 and M/1/16 on MNIST, M/8/16 on CIFAR-10, L/32/64 on ImageNet."""

TABLE_4 = _table(
    "cifar-m-contrastive cifar-l-contrastive imagenet-l-contrastive",
    """
    BP       24.11  17.53  55.66
    L-BP     24.69  19.13  59.11
    LG-BP    29.63  23.62  68.36
    FA       45.87  67.93  82.86
    L-FA     37.73  31.05  83.18
    LG-FA    36.72  30.49  82.57
    DFA      46.09  39.26  93.51
    FG-W     53.37  50.45  91.94
    FG-A     54.59  56.63  97.83
    LG-FG-W  52.66  52.27  91.36
    LG-FG-A  32.88  26.81  73.24
    """,
)
"""Contrastive: M/8/16 and L/8/64 on CIFAR-10, L/32/64 on ImageNet."""

REPORTED = TABLE_3 | TABLE_4
"""What is known of a column and a method, by their names here."""


def reported(column: str, rule: str) -> Figures | None:
    """What the paper reports for a method in a column, or None.

    >>> reported("mnist-m", "LG-FG-A")
    Figures(test=2.55, train=0.0)
    >>> reported("mnist-m", "L-FG-A") is None
    True
    """
    return REPORTED.get((column, rule))
