"""What is wrong with a run, or cannot be compared."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One way in which a run is not what it says."""

    kind: str
    #: `reference` or `candidate`, or `both` where the two do not fit together.
    run: str
    message: str
    layer: int | None = None
    point: str | None = None
    prompt: str | None = None
    #: Whether it makes the comparison wrong, or was only cut or left out.
    fatal: bool = True
