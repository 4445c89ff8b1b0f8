"""How options read in `--help`."""

from __future__ import annotations

from typing import Annotated, TypeVar

import tyro

_T = TypeVar("_T")

Chosen = Annotated[_T | None, tyro.conf.arg(help_behavior_hint="")]
"""An option whose text tells what holds where it is left out: tyro's own "(default: None)" would tell nothing.

Texts of options are one line each, since tyro keeps their line breaks.
"""
