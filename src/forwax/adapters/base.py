"""What adapters share: the model that they were made for, and checks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen model: its name, and the hash of its file."""

    name: str = ""
    sha256: str = ""


UNKNOWN = Base()


def check_rank(caller: str, rank: int, most: int) -> None:
    """Raise a ValueError for a rank that the matrices cannot have."""
    if isinstance(rank, int) and 1 <= rank <= most:
        return
    raise ValueError(f"{caller}: expected a rank in [1, {most}], got {rank!r}.")
