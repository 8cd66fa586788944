"""The class of one pair of weights, and what is measured of it.

Equal bytes are found without decoding anything; of what differs, only the parts that do are read
twice.
"""

import math
from dataclasses import dataclass

from nvfp4check.checkpoint.audit.sources import FP8_FORMATS, Reader
from nvfp4check.checkpoint.diff.classes import WeightClass
from nvfp4check.checkpoint.diff.diagnosis import diagnose
from nvfp4check.checkpoint.diff.diagnosis_scales import systematic_factor
from nvfp4check.checkpoint.diff.effect import Moments, output_error
from nvfp4check.checkpoint.diff.measured import Measured, same_bytes
from nvfp4check.checkpoint.diff.nvfp4_pair import compare_nvfp4
from nvfp4check.checkpoint.diff.operands import Operand, Stored
from nvfp4check.checkpoint.diff.pairing import Pair
from nvfp4check.checkpoint.diff.results import WeightDiff
from nvfp4check.checkpoint.diff.through_fp8 import explain_by_roundings
from nvfp4check.checkpoint.diff.values_pair import compare_values
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import Part, WeightFormat
from nvfp4ref.formats import BLOCK_SIZE

#: Bytes compared at a time.
_PIECE = 1 << 21
#: A reciprocal that was rounded to float32 twice is this near to the original.
_ULP = 2.0**-23


@dataclass(frozen=True, slots=True)
class Skip:
    """A pair that could not be compared, and why."""

    name: str
    why: str


def class_of_headers(pair: Pair) -> WeightDiff:
    """Compare names, shapes and formats."""
    if pair.a is None or pair.b is None:
        cls = WeightClass.ONLY_IN_B if pair.a is None else WeightClass.ONLY_IN_A
        return _described(pair, cls)
    if pair.a.shape != pair.b.shape:
        return _described(pair, WeightClass.SHAPE_CHANGED, _shapes_differ(pair.a, pair.b))
    if pair.a.format is not pair.b.format:
        return _described(pair, WeightClass.FORMAT_CHANGED)
    forms = [_form(side) for side in (pair.a, pair.b)]
    whole = pair.a.is_whole and pair.b.is_whole
    if whole and pair.a.weight.layout is pair.b.weight.layout and forms[0] != forms[1]:
        return _described(pair, WeightClass.SHAPE_CHANGED, _parts_differ(pair.a, pair.b))
    return _described(pair, WeightClass.SAME_FORM)


def compare(
    a_reader: Reader, b_reader: Reader, pair: Pair, moments: Moments | None = None
) -> WeightDiff | Skip:
    """Compare one pair, bytes included.

    Raises:
        StorageError: Bytes cannot be read.
    """
    outline = class_of_headers(pair)
    if outline.cls in (
        WeightClass.ONLY_IN_A,
        WeightClass.ONLY_IN_B,
        WeightClass.SHAPE_CHANGED,
    ):
        return outline
    left, right = pair.both
    a, b = Stored(a_reader, left), Stored(b_reader, right)
    differing = _differing_parts(a, b)
    if differing is not None and not differing:
        return _described(pair, WeightClass.IDENTICAL)
    why = left.why_not() or right.why_not()
    if why is not None:
        if differing is not None and left.format is right.format:
            return _described(
                pair,
                WeightClass.DIFFERENT,
                f"{', '.join(part.value for part in differing)} differ; values not read: {why}",
            )
        return Skip(pair.name, why)
    if differing == {Part.INPUT_SCALE}:
        cls, said = _input_scales(a, b)
        return _finish(pair, cls, Measured(), a, b, said, moments)
    both_nvfp4 = left.format is right.format is WeightFormat.NVFP4
    found = compare_nvfp4(a, b) if both_nvfp4 else compare_values(a, b)
    cls = _class(a, b, found)
    said = explained = None
    if found.beyond and cls in (WeightClass.DIFFERENT, WeightClass.FORMAT_CHANGED):
        explained = explain_by_roundings(a, b, found)
        if explained is not None and cls is WeightClass.DIFFERENT:
            cls = WeightClass.REQUANTIZED
    if cls is WeightClass.SAME_VALUES and both_nvfp4:
        input_cls, input_said = _input_scales(a, b)
        if input_cls is WeightClass.INPUT_SCALE_ONLY:
            cls, said = input_cls, input_said
    if cls not in (WeightClass.SAME_VALUES, WeightClass.INPUT_SCALE_ONLY):
        said = explained or diagnose(a, b, found)
    holds = found.beyond == 0 or explained is not None
    if cls is WeightClass.SCALES_ONLY and both_nvfp4:
        factor = systematic_factor(a, b)
        if factor is not None:
            holds = False
            said = said or f"b is a times {factor:.6g} on the average of all blocks"
    return _finish(pair, cls, found, a, b, said, moments, holds=holds)


def _class(a: Stored, b: Stored, found: Measured) -> WeightClass:
    if found.equal:
        return WeightClass.SAME_VALUES
    if a.operand.format is not b.operand.format:
        return WeightClass.FORMAT_CHANGED
    if a.operand.format is WeightFormat.NVFP4 and found.changed_codes == 0:
        return WeightClass.SCALES_ONLY
    if a.operand.format in FP8_FORMATS and found.changed_codes == 0:
        return WeightClass.SCALES_ONLY
    if found.beyond == 0 and found.not_finite == [0, 0]:
        return WeightClass.REQUANTIZED
    return WeightClass.DIFFERENT


def _input_scales(a: Stored, b: Stored) -> tuple[WeightClass, str | None]:
    """Compare the scales of the inputs, in whichever direction they are stored."""
    left, right = a.decode_scale(Part.INPUT_SCALE), b.decode_scale(Part.INPUT_SCALE)
    if left == right:
        return WeightClass.SAME_VALUES, None
    if left is None or right is None:
        side = "a" if left is None else "b"
        return WeightClass.INPUT_SCALE_ONLY, f"{side} has no input scale"
    other_way = (
        a.operand.weight.global_scale_is_reciprocal != b.operand.weight.global_scale_is_reciprocal
    )
    if other_way and math.isclose(left, right, rel_tol=_ULP, abs_tol=0.0):
        return WeightClass.SAME_VALUES, "input scale inverse to 1 ulp"
    if left and math.isclose(right * left, 1.0, rel_tol=2 * _ULP, abs_tol=0.0):
        return WeightClass.INPUT_SCALE_ONLY, "input scale is the reciprocal of the other"
    ratio = right / left if left else math.inf
    return WeightClass.INPUT_SCALE_ONLY, f"another calibration: input scale times {ratio:.4g}"


def _differing_parts(a: Stored, b: Stored) -> set[Part] | None:
    """Name the stored tensors whose bytes differ; None where the sides are stored otherwise."""
    left, right = a.operand, b.operand
    if left.weight.layout is not right.weight.layout or not (left.is_whole and right.is_whole):
        return None
    if (left.weight.parts.keys() ^ right.weight.parts.keys()) - {Part.INPUT_SCALE}:
        return None
    differing: set[Part] = set()
    for part in {*left.weight.parts, *right.weight.parts}:
        one, two = left.weight.parts.get(part), right.weight.parts.get(part)
        if one is None or two is None:
            differing.add(part)
        elif one.dtype != two.dtype or one.shape != two.shape:
            return None
        elif not _same(a.reader, one, b.reader, two):
            differing.add(part)
    return differing


def _same(a: Reader, one: TensorEntry, b: Reader, two: TensorEntry) -> bool:
    for start in range(0, one.nbytes, _PIECE):
        stop = min(one.nbytes, start + _PIECE)
        if not same_bytes(
            a.rows(one, start, stop, 1).reshape(-1), b.rows(two, start, stop, 1).reshape(-1)
        ):
            return False
    return True


def _finish(
    pair: Pair,
    cls: WeightClass,
    found: Measured,
    a: Stored,
    b: Stored,
    said: str | None,
    moments: Moments | None,
    *,
    holds: bool = True,
) -> WeightDiff:
    same = cls in (WeightClass.SAME_VALUES, WeightClass.INPUT_SCALE_ONLY)
    error, weighted = (0.0, False) if same else output_error(a, b, found, moments)
    return WeightDiff(
        name=pair.name,
        cls=cls,
        formats=(a.operand.format.value, b.operand.format.value),
        shapes=(a.operand.shape, b.operand.shape),
        elements=a.operand.elements,
        sqnr_db=None if same else found.sqnr_db,
        max_abs=0.0 if same else found.max_abs,
        worst=None if same else found.worst,
        max_ulp=None if same else found.max_ulp,
        ulp_histogram={} if same else dict(found.ulp_histogram),
        changed_codes=found.changed_codes,
        changed_scales=found.changed_scales,
        bound_holds=same or holds,
        beyond=0 if same else found.beyond,
        not_finite=(found.not_finite[0], found.not_finite[1]),
        global_scales=(a.decode_scale(Part.GLOBAL_SCALE), b.decode_scale(Part.GLOBAL_SCALE)),
        input_scales=(a.decode_scale(Part.INPUT_SCALE), b.decode_scale(Part.INPUT_SCALE)),
        relative_error=error,
        weighted=weighted,
        diagnosis=said,
    )


def _described(pair: Pair, cls: WeightClass, said: str | None = None) -> WeightDiff:
    side = pair.a or pair.b
    return WeightDiff(
        name=pair.name,
        cls=cls,
        formats=(_format(pair.a), _format(pair.b)),
        shapes=(pair.a.shape if pair.a else None, pair.b.shape if pair.b else None),
        elements=side.elements if side else 0,
        max_abs=0.0 if cls is WeightClass.IDENTICAL else None,
        changed_codes=0 if cls is WeightClass.IDENTICAL else None,
        changed_scales=0 if cls is WeightClass.IDENTICAL else None,
        bound_holds=True if cls is WeightClass.IDENTICAL else None,
        relative_error=0.0 if cls is WeightClass.IDENTICAL else None,
        diagnosis=said,
    )


def _format(side: Operand | None) -> str | None:
    return None if side is None else side.format.value


def _form(side: Operand) -> dict[Part, tuple[str, tuple[int, ...]]]:
    skipped = (Part.INPUT_SCALE,)
    return {
        part: (entry.dtype, entry.shape)
        for part, entry in side.weight.parts.items()
        if part not in skipped and entry.numel != 1
    }


def _shapes_differ(a: Operand, b: Operand) -> str:
    change = f"shape {list(a.shape)} becomes {list(b.shape)}"
    if a.shape == b.shape[::-1]:
        return f"{change}: transposed"
    both_nvfp4 = a.format is b.format is WeightFormat.NVFP4
    if both_nvfp4 and a.shape[:-1] == b.shape[:-1]:
        for one, two, name in ((a, b, "b"), (b, a, "a")):
            scales = two.weight.parts.get(Part.BLOCK_SCALES)
            blocks = one.shape[-1] // BLOCK_SIZE
            if two.shape[-1] == 2 * one.shape[-1] and scales and scales.shape[-1:] == (blocks,):
                return f"twice the columns in {name}: its codes stand one a byte, not packed"
    return change


def _parts_differ(a: Operand, b: Operand) -> str:
    left, right = _form(a), _form(b)
    said = []
    for part in Part:
        if left.get(part) != right.get(part):
            one, two = (
                "none" if form is None else f"{form[0]} {list(form[1])}"
                for form in (left.get(part), right.get(part))
            )
            said.append(f"{part.value} {one} becomes {two}")
    return "; ".join(said)
