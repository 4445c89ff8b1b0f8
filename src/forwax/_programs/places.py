"""Where in the user's code something was called, and of whose library it is."""

import dataclasses
import os
import sysconfig
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

_NOT_USERS = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    os.path.dirname(jax.__file__),
    os.path.dirname(os.__file__) + os.sep + "contextlib",
    os.path.dirname(os.__file__) + os.sep + "functools",
    "<frozen",
)

_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))

WAYS = {
    "diffrax": (
        "Pass adjoint=diffrax.ForwardMode() to diffrax.diffeqsolve, or "
        "adjoint=diffrax.DirectAdjoint()"
    ),
    "optimistix": "Pass adjoint=optimistix.ImplicitAdjoint(), which is its default",
    "jaxopt": "Pass implicit_diff=False to jaxopt's solver",
    "jax/experimental/ode.py": (
        "Solve it by diffrax.diffeqsolve with adjoint=diffrax.ForwardMode() in place of odeint"
    ),
    "equinox": (
        "Write it with equinox.filter_custom_jvp; a loop of equinox.internal with kind='lax'"
    ),
}
"""For each library with reverse rules what to write instead; what builds on others comes first."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A line of a call stack.

    Attributes:
        file: its file.
        line: its number there.
        function: the function that it is of.
    """

    file: str
    line: int
    function: str

    def is_of(self, library: str) -> bool:
        """Whether it lies in a library: a package, or a file of one."""
        path = self.file.replace(os.sep, "/")
        return f"/{library}/" in path or path.endswith(f"/{library}")

    @property
    def is_users(self) -> bool:
        """Whether it is none of JAX, of forwax, of what these call, or of a library in `WAYS`."""
        if self.file.startswith(_NOT_USERS):
            return False
        return not any(self.is_of(name) for name in WAYS)

    @property
    def is_installed(self) -> bool:
        """Whether it lies where packages are installed."""
        return self.file.startswith(_INSTALLED)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


def of_equation(equation: Any) -> list[Frame]:
    """The calls that led to a jaxpr's equation, outermost first."""
    found = equation.source_info.traceback
    if found is None:
        return []
    frames = [Frame(f.file_name, f.line_num, f.function_name) for f in found.frames]
    return frames[::-1]


def own_line(equation: Any) -> str:
    """The user's own line that an equation comes from, not a library's; "" if unknown."""
    frames = of_equation(equation)
    own = [frame for frame in frames if frame.is_users and not frame.is_installed]
    return str(own[-1]) if own else ""


def of_error(found: TracebackType | None) -> list[Frame]:
    """The calls that led to an error, outermost first."""
    stack = traceback.extract_tb(found)
    return [Frame(f.filename, f.lineno or 0, f.name) for f in stack]


def library_of(frames: Sequence[Frame]) -> str | None:
    """The library of `WAYS` that was called."""
    for name in WAYS:
        if any(frame.is_of(name) for frame in frames):
            return name
    return None


def call_of(frames: Sequence[Frame], library: str | None) -> str:
    """Where the user called a library or, without one, the user's last line; "" if unknown."""
    before = list(frames)
    if library is not None:
        own = [i for i, frame in enumerate(frames) if frame.is_of(library)]
        before = before[: min(own, default=len(frames))]
    users = [frame for frame in before if frame.is_users]
    return str(users[-1]) if users else ""
