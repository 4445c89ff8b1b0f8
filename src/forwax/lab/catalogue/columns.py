"""The columns of the tables of Ren et al. 2023, and two small ones: a model, data, settings.

The settings on MNIST are ours, since the paper's were not found: docs/results/ren2023.md says which
rates were searched, on held-out training images, and which were set without a search. Those on
CIFAR-10 are not tuned; what the contrastive ones do otherwise than the paper's code is said in
`forwax.lab.catalogue.objectives`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import equinox as eqx
import jax

from forwax.lab.catalogue import menu
from forwax.lab.catalogue.settings import Settings
from forwax.lab.report import Json
from forwax.models import LocalMixer, ren2023
from forwax.models.local_mixer import SIZES

ModelFactory = Callable[[tuple[int, int, int], int, jax.Array], eqx.Module]
"""From (the shape of one image, the number of classes, a key) to a model of one example."""

PROJECTION = 128
"""The size of contrastive projectors."""

RULES = ren2023.NAMES
"""The methods, in the paper's names."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: on the command line.
        title: for people.
        epochs: the passes over the training set.
        settings: those that all methods share; `steps` are filled in from the epochs.
        rows: the learning rate and the epochs of each method, and of rows such as "LG-FG-A:4".
        warm_up: the epochs of `epochs` over which the rate rises; a shorter run has the same share
            of them.

    >>> COLUMNS["mnist-m"].settings.size
    'M/1/16'
    """

    name: str
    title: str
    epochs: int
    settings: Settings
    rows: Mapping[str, tuple[float, int]]
    warm_up: int = 0

    def of_row(self, row: str) -> tuple[float, int]:
        """The learning rate and the epochs of a row, such as "LG-FG-A:4", else of its method.

        >>> COLUMNS["cifar-m"].of_row("LG-FG-A:4")
        (0.02, 200)
        """
        return self.rows.get(row, self.rows[row.split(":")[0]])

    def warmed_up(self, settings: Settings) -> Settings:
        """The settings with the warm-up that their steps imply.

        >>> COLUMNS["cifar-m-contrastive"].warmed_up(Settings(steps=8000)).warm_up
        100
        """
        return replace(settings, warm_up=settings.steps * self.warm_up // self.epochs)


def _column(name: str, settings: Settings, rows: str, warm_up: int = 0) -> Column:
    """Read a column's rows: each a rate and, where it trains for more or fewer, its epochs.

    A row is a method, or a method and the number of its noises; `*FA` stands for all methods whose
    errors go through fixed feedback, and so on. Later rows win.
    """
    title, epochs = menu.COLUMNS[name]
    read: dict[str, tuple[float, int]] = {}
    for line in rows.strip().splitlines():
        row, rate, *own = line.split()
        of_kind = [
            rule
            for rule, reading in ren2023.READINGS.items()
            if f"*{reading.kind}" == row
        ]
        for each in of_kind or [row]:
            read[each] = float(rate), int(own[0]) if own else epochs
    return Column(name, title, epochs, settings, read, warm_up)


_MNIST = Settings(
    rule="LG-FG-A",
    combine=None,
    density=None,
    epsilon=None,
    guess_decay=None,
    optimizer="momentum",
    schedule="cosine",
    weight_decay=1e-4,
    batch_size=128,
    data="mnist",
    objective="supervised",
)
_CIFAR = replace(_MNIST, data="cifar10", size="S/4/8")
_LARGE = replace(
    _CIFAR, size="M/8/16", batch_size=256, data_parallel=True, dtype="bfloat16"
)
_CONTRASTIVE = replace(
    _LARGE, objective="contrastive", optimizer="lars", batch_size=512
)

_CIFAR_RATES = """
    *BP 0.2
    *FA 0.2
    *DFA 0.2
    *LF  0.2
    *FG-W 0.2
    *FG-A 0.2
"""
_ALL = (
    _column(
        "mnist-s",
        replace(_MNIST, size="S/1/1"),
        """
        *BP       0.1
        *FA       0.1
        *DFA      0.2
        *LF       0.2
        *FG-W     0.02   60
        *FG-A     0.005  150
        LG-BP     0.2
        LG-FA     0.2
        L-FG-A    0.01   150
        LG-FG-A   0.01   150
        FG-A:8    0.03   30
        LG-FG-A:8 0.03   30
        """,
    ),
    _column(
        "mnist-m",
        replace(_MNIST, size="M/1/16"),
        """
        *BP        0.1
        *FA        0.1
        *DFA       0.2
        *LF        0.1
        LF         0.2
        *FG-W      0.04  40
        *FG-A      0.05  120
        LG-BP      0.2
        LG-FA      0.2
        FG-A       0.03  120
        L-FG-A     0.05  60
        FG-A:4     0.06  30
        LG-FG-A:4  0.1   30
        LG-FG-A:8  0.1   30
        LG-FG-A:16 0.2   20
        """,
    ),
    _column(
        "cifar-small",
        _CIFAR,
        """
        *BP   0.05
        *FA   0.05
        *DFA  0.02
        *LF   0.2
        *FG-W 0.005
        *FG-A 0.02
        """,
    ),
    _column(
        "cifar-small-contrastive",
        replace(_CIFAR, objective="contrastive", batch_size=256),
        """
        *BP   0.1
        *FA   0.1
        *DFA  0.1
        *LF   0.1
        *FG-W 0.02
        *FG-A 0.05
        """,
    ),
    _column(
        "cifar-m",
        _LARGE,
        """
        *BP   0.1
        *FA   0.05
        *DFA  0.02
        *LF   0.02
        *FG-W 0.005
        *FG-A 0.02
        """,
    ),
    _column(
        "cifar-m-contrastive",
        _CONTRASTIVE,
        _CIFAR_RATES,
        warm_up=10,
    ),
    _column(
        "cifar-l-contrastive",
        replace(_CONTRASTIVE, size="L/8/64"),
        _CIFAR_RATES,
        warm_up=10,
    ),
)
COLUMNS: Mapping[str, Column] = {column.name: column for column in _ALL}
"""Every column by its name."""

DEFAULT = "mnist-m"
"""The column that an experiment without further words is."""


def column_of(settings: Settings) -> Column:
    """Give the column with the settings' size, data and objective, or the nearest.

    That is one with their data and objective, else their objective, else the default.

    >>> column_of(COLUMNS["mnist-s"].settings).name
    'mnist-s'
    """
    for names in (("size", "data", "objective"), ("data", "objective"), ("objective",)):
        known = attrgetter(*names)
        for column in COLUMNS.values():
            if known(column.settings) == known(settings):
                return column
    return COLUMNS[DEFAULT]


def row_of(settings: Any) -> str:
    """Give the row of settings, or of an entry, by which a column knows its rate and epochs.

    It is the rule, with the number of its noises where there are several.

    >>> row_of(replace(COLUMNS["mnist-m"].settings, num_tangents=16))
    'LG-FG-A:16'
    """
    is_several = (settings.num_tangents or 1) > 1
    return f"{settings.rule}:{settings.num_tangents}" if is_several else settings.rule


def suggested(settings: Settings) -> tuple[float, int]:
    """Give the rate and the epochs of the settings' row in the column nearest to the settings.

    >>> suggested(COLUMNS["mnist-m"].settings)
    (0.05, 120)
    """
    return column_of(settings).of_row(row_of(settings))


def configurations() -> dict[str, Settings]:
    """Give every column's settings by its name, with steps for the whole data set.

    >>> configurations()["mnist-m"].steps
    56160
    """
    sizes = {"mnist": 60_000, "cifar10": 50_000}
    found = {}
    for name, column in COLUMNS.items():
        settings = column.settings
        per_epoch = sizes[settings.data or ""] // settings.batch_size
        steps = suggested(settings)[1] * per_epoch
        found[name] = column.warmed_up(replace(settings, steps=steps))
    return found


def build_model(settings: Settings) -> ModelFactory:
    """Give the model factory of the settings' size and objective.

    >>> model = build_model(COLUMNS["mnist-m"].settings)((28, 28, 1), 10, jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(model))
    429076
    """
    size = settings.size or COLUMNS[DEFAULT].settings.size or ""
    projection = PROJECTION if settings.objective == "contrastive" else None
    options: Json = dict(SIZES[size].options, projection=projection)
    return lambda shape, classes, key: LocalMixer(shape, classes, **options, key=key)
