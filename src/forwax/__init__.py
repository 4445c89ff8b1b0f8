"""forwax: train and optimise JAX programs without backpropagation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forwax._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import JAX, which takes seconds, with the first name that needs it (PEP 562)."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from forwax import _public

    # A submodule that `_public` imports, such as `forwax.tangents`, is here by now.
    if name not in globals():
        if not hasattr(_public, name):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(_public, name)
    return globals()[name]


def __dir__() -> list[str]:
    from forwax import _public

    return [*_public.__all__, "__version__"]
