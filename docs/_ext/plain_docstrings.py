"""A Sphinx extension for docstrings that are plain prose: |g|², v* and "0." are just that."""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx


def escaped(lines: list[str]) -> Iterator[str]:
    """The lines with | and * escaped, but for doctests and what stands between backticks."""
    in_doctest = False
    for line in lines:
        in_doctest = line.lstrip().startswith(">>>") or (
            in_doctest and bool(line.strip())
        )
        yield line if in_doctest else _outside_backticks(line)


def _outside_backticks(line: str) -> str:
    line = re.sub(
        r"^(\s*\d+)\.$", r"\1\\.", line
    )  # a number alone is a value, not the start of a list
    parts = line.split("`")
    return "`".join(
        part if i % 2 else re.sub(r"(?=[|*])", r"\\", part)
        for i, part in enumerate(parts)
    )


def escape(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = escaped(lines)


def setup(app: Sphinx) -> dict:
    app.connect(
        "autodoc-process-docstring", escape, priority=400
    )  # before napoleon, at 500
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
