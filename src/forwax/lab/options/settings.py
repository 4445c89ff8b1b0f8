"""The settings of a run as options, and the names that they may have."""

from dataclasses import Field, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro

from forwax.lab.catalogue import menu
from forwax.lab.catalogue.settings import Settings
from forwax.lab.flags import Chosen, given
from forwax.lab.report import Json
from forwax.lab.terminal import left_open

if TYPE_CHECKING:
    ExperimentName = OneLossName = str
else:
    ExperimentName = Literal[tuple(sorted(menu.EXPERIMENTS))]
    OneLossName = Literal[tuple(sorted({*menu.EXPERIMENTS} - {menu.MIXER}))]


def _option(field: Field[Any], kind: Any) -> tuple[str, Any, None]:
    """Leave a field of the settings open: its names, its text, and None where it is not named."""
    if field.name in menu.NAMES:
        kind = Literal[menu.NAMES[field.name]]
    return field.name, left_open(kind, field.metadata["help"]), None


def _given(self: Any) -> Json:
    """Give what the user named, by field; fields of subclasses are left out."""
    return given(self, (field.name for field in fields(SettingOptions)))


_EPOCHS = "The number of passes over the training set, instead of --steps."
_KINDS = get_type_hints(Settings, include_extras=True)
SettingOptions: Any = make_dataclass(
    "SettingOptions",
    [_option(field, _KINDS[field.name]) for field in fields(Settings)]
    + [("epochs", Annotated[Chosen[float], tyro.conf.arg(help=_EPOCHS)], None)],
    frozen=True,
    kw_only=True,
    namespace={"given": _given},
)
"""The settings that a user may name; what is left out comes from the configuration.

>>> SettingOptions(steps=10).given()
{'steps': 10}
"""
