"""What was found of one pair of weights, in plain numbers that survive a journey through JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from nvfp4check.checkpoint.diff.classes import WeightClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Worst:
    """The element that differs most."""

    row: int
    column: int
    a: float
    b: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDiff:
    """One logical weight in both checkpoints.

    `sqnr_db` is that of the difference against the mean energy of both sides, so that it does not
    depend on the order of the checkpoints; None where nothing differs, or nothing was compared.
    `beyond` counts elements that no common original explains.

    `max_ulp` is the largest distance of two elements in steps of the stored format: from number to
    number of a plain dtype, from byte to byte of FP8, whatever their scales, and of NVFP4 from code
    to code, on the coarser grid of both blocks, the one of the larger scale: other scales that hold
    the same values are 0 steps apart, and a step is what the format cannot tell better. None where
    the sides have different formats or dtypes, where a global scale is not a number, and where no
    value was compared. `ulp_histogram` counts elements by these steps; the key is the least step of
    its column.

    `relative_error` is the predicted relative error of the linear's output.
    """

    name: str
    cls: WeightClass
    formats: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    elements: int = 0
    sqnr_db: float | None = None
    max_abs: float | None = None
    worst: Worst | None = None
    max_ulp: int | None = None
    ulp_histogram: Mapping[str, int] = field(default_factory=dict)
    changed_codes: int | None = None
    changed_scales: int | None = None
    bound_holds: bool | None = None
    beyond: int = 0
    not_finite: tuple[int, int] = (0, 0)
    global_scales: tuple[float | None, float | None] = (None, None)
    input_scales: tuple[float | None, float | None] = (None, None)
    relative_error: float | None = None
    #: Whether `relative_error` is weighted by recorded activations.
    weighted: bool = False
    diagnosis: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, with the names of the contract."""
        document = {each.name: getattr(self, each.name) for each in fields(self)}
        document["ulp_histogram"] = dict(self.ulp_histogram)
        document["worst"] = None if self.worst is None else asdict(self.worst)
        document["class"] = document.pop("cls").value
        for scales in ("global_scales", "input_scales"):
            document[scales] = [number_json(value) for value in document[scales]]
        if self.worst is not None:
            document["worst"] |= {"a": number_json(self.worst.a), "b": number_json(self.worst.b)}
        document["max_abs"] = number_json(self.max_abs)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Make a result of what `to_json` gave."""
        held = dict(document)
        held["cls"] = WeightClass(held.pop("class"))
        held["formats"] = tuple(held["formats"])
        held["shapes"] = tuple(None if s is None else tuple(s) for s in held["shapes"])
        for name in ("not_finite", "global_scales", "input_scales"):
            held[name] = tuple(held[name])
        if held["worst"] is not None:
            held["worst"] = Worst(**held["worst"])
        return cls(**held)


def number_json(value: float | None) -> float | str | None:
    """Return a number as JSON holds it: infinities and NaN as words."""
    if value is None or abs(value) <= 1.7976931348623157e308:
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
