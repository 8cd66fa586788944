"""What two weights of one name are to one another, and what fails a comparison."""

from enum import StrEnum


class WeightClass(StrEnum):
    """The class of a pair. Members stand from nothing to everything."""

    #: Every stored byte is equal.
    IDENTICAL = "identical"
    #: Other bytes, and exactly the same numbers.
    SAME_VALUES = "same-values"
    #: At headers level: dtypes and shapes are equal, and no byte was read.
    SAME_FORM = "same-form"
    #: Same values; the scale of the input differs.
    INPUT_SCALE_ONLY = "input-scale-only"
    #: Same codes, other scales.
    SCALES_ONLY = "scales-only"
    #: One format, and both can come from one original.
    REQUANTIZED = "requantized"
    #: Two formats.
    FORMAT_CHANGED = "format-changed"
    DIFFERENT = "different"
    SHAPE_CHANGED = "shape-changed"
    ONLY_IN_A = "only-in-a"
    ONLY_IN_B = "only-in-b"


class FailOn(StrEnum):
    """The least difference that fails a comparison."""

    #: A weight that is not the same up to rounding, or a setting that changes what is computed.
    DIFFERENT = "different"
    #: Also weights made anew within the bound of rounding, and other scales.
    REQUANTIZED = "requantized"
    #: Anything but equal bytes and equal settings.
    BYTES = "bytes"


_EQUAL = frozenset({WeightClass.IDENTICAL, WeightClass.SAME_VALUES, WeightClass.SAME_FORM})
_WITHIN_BOUND = frozenset(
    {
        WeightClass.INPUT_SCALE_ONLY,
        WeightClass.SCALES_ONLY,
        WeightClass.REQUANTIZED,
        WeightClass.FORMAT_CHANGED,
    }
)


def fails(found: WeightClass, bound_holds: bool | None, fail_on: FailOn) -> bool:
    """Whether a pair of this class fails the comparison.

    `scales-only` and `format-changed` weights whose values leave the bound of rounding are as
    different as any.
    """
    if fail_on is FailOn.BYTES:
        return found not in (WeightClass.IDENTICAL, WeightClass.SAME_FORM)
    if found in _EQUAL:
        return False
    if found in _WITHIN_BOUND:
        return fail_on is FailOn.REQUANTIZED or bound_holds is False
    return True
