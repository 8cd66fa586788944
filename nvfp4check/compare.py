"""Two tensors compared by bit pattern, or within a derived tolerance. Nothing is printed here.

Contract:
    bits     shape, dtype and every bit; the sign of a zero counts unless `Zeros.UNSIGNED`; a NaN
             equals a NaN of any payload unless `Nans.SAME_BITS`; infinities by position and sign
    within   NaN exactly where the real result is NaN; the rounded result bit for bit where the
             tolerance says so (but for the sign of a zero); elsewhere between the ends of what may
             be rounded, each rounded to the dtype: so an infinity only where an end overflows

A result is frozen and says how many, where first, where worst, both values and both bit patterns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from nvfp4check.tolerance import Tolerance
from nvfp4ref.rounding import round_to


class Zeros(StrEnum):
    """Whether -0.0 and 0.0 are two values."""

    SIGNED = "signed"
    UNSIGNED = "unsigned"


class Nans(StrEnum):
    """Which NaN equals a NaN."""

    ANY_PAYLOAD = "any-payload"
    SAME_BITS = "same-bits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """One element that is not what it should be."""

    index: tuple[int, ...]
    actual: float | int
    expected: float | int
    actual_bits: str
    expected_bits: str
    #: Distance of the two values; infinite where one is NaN or infinite.
    error: float
    #: What the tolerance allows here, and of what it consists; zero where bits are due.
    allowed: float = 0.0
    terms: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return the mismatch as plain JSON; NaN and infinities as text."""
        return {
            "index": list(self.index),
            "actual": _json_number(self.actual),
            "expected": _json_number(self.expected),
            "actual_bits": self.actual_bits,
            "expected_bits": self.expected_bits,
            "error": _json_number(self.error),
            "allowed": _json_number(self.allowed),
            "terms": {name: _json_number(value) for name, value in self.terms.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two tensors have in common, and what not."""

    what: str
    total: int
    count: int
    #: Elements that were demanded bit for bit.
    bitwise: int
    why: str
    first: Mismatch | None = None
    worst: Mismatch | None = None
    #: A difference of shape or dtype, which leaves nothing to compare.
    form: str | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return self.count == 0 and self.form is None

    @property
    def share(self) -> float:
        """Share of the elements that differ."""
        return self.count / self.total if self.total else 0.0

    def __str__(self) -> str:
        """Render the comparison as text."""
        return render(self)

    def require(self) -> None:
        """Raise where something differs, for use in a test.

        Raises:
            AssertionError: The tensors differ; the message is the rendered comparison.
        """
        __tracebackhide__ = True
        if not self.holds:
            raise AssertionError(render(self))


def bits(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    what: str = "values",
    zeros: Zeros = Zeros.SIGNED,
    nans: Nans = Nans.ANY_PAYLOAD,
) -> Comparison:
    """Compare two tensors bit for bit."""
    why = "none: these must be bitwise equal"
    form = _form(actual, expected.shape, expected.dtype)
    if form:
        return _unlike(what, expected, why, form)
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    differs = _raw(actual) != _raw(expected)
    if expected.dtype.is_floating_point:
        wide_actual, wide_expected = _wide(actual), _wide(expected)
        if zeros is Zeros.UNSIGNED:
            differs &= ~((wide_actual == 0) & (wide_expected == 0))
        if nans is Nans.ANY_PAYLOAD:
            differs &= ~(wide_actual.isnan() & wide_expected.isnan())
    return _result(what, actual, expected, differs, None, why, actual.numel())


def within(actual: torch.Tensor, tolerance: Tolerance, *, what: str = "values") -> Comparison:
    """Compare a tensor with the real result under a derived tolerance."""
    rounded = tolerance.rounded
    form = _form(actual, rounded.shape, rounded.dtype)
    if form:
        return _unlike(what, rounded, tolerance.why, form)
    actual = actual.detach().cpu().contiguous()
    values, expected = _wide(actual), tolerance.expected
    low, high = (
        round_to(expected + side * tolerance.unrounded, actual.dtype).double() for side in (-1, 1)
    )
    inside = (low <= values) & (values <= high)
    same = (_raw(actual) == _raw(rounded)) | ((values == 0) & (rounded == 0))
    holds = torch.where(tolerance.exact, same, inside)
    holds = torch.where(expected.isnan(), values.isnan(), holds)
    due = int(tolerance.exact.sum())
    return _result(what, actual, rounded, ~holds, tolerance, tolerance.why, due)


def render(comparison: Comparison) -> str:
    """Return a comparison as text, the same everywhere it is shown."""
    if comparison.form:
        return f"{comparison.what}: {comparison.form}"
    if comparison.holds:
        return (
            f"{comparison.what}: all {comparison.total} hold, {comparison.bitwise} bit for bit, "
            f"{comparison.total - comparison.bitwise} within the bound"
        )
    lines = [
        f"{comparison.what} differ: {comparison.count} of {comparison.total} "
        f"({comparison.share:.2%}), actual against expected"
    ]
    shown = [("first", comparison.first), ("worst", comparison.worst)]
    for name, mismatch in shown:
        if mismatch is not None:
            lines.append(f"  {name:<7} {_line(mismatch)}")
    worst = comparison.worst
    if worst is not None and worst.terms:
        total = worst.allowed or 1.0
        parts = ", ".join(
            f"{cause} {value:.3g} ({value / total:.0%})" for cause, value in worst.terms.items()
        )
        lines.append(f"  error   {worst.error / total:.3g} times what is allowed there: {parts}")
    lines.append(f"  allowed {comparison.why}")
    return "\n".join(lines)


def _line(mismatch: Mismatch) -> str:
    place = f"[{', '.join(map(str, mismatch.index))}]"
    return (
        f"{place:<12} {mismatch.actual_bits} ({mismatch.actual:g})"
        f"   {mismatch.expected_bits} ({mismatch.expected:g})"
    )


def _result(
    what: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    differs: torch.Tensor,
    tolerance: Tolerance | None,
    why: str,
    bitwise: int,
) -> Comparison:
    count = int(differs.sum())
    if count == 0:
        return Comparison(what=what, total=actual.numel(), count=0, bitwise=bitwise, why=why)
    places = differs.flatten().nonzero().flatten()
    errors = (_wide(actual) - _wide(expected)).abs().flatten()[places]
    if tolerance is not None:
        due = tolerance.exact.flatten()[places]
        allowed = torch.where(due, 0.0, tolerance.allowed.flatten()[places])
        errors = errors / torch.where(allowed == 0, SMALLEST_STEP, allowed)
    worst = int(places[int(errors.nan_to_num(torch.inf, torch.inf).argmax())])
    return Comparison(
        what=what,
        total=actual.numel(),
        count=count,
        bitwise=bitwise,
        why=why,
        first=_mismatch(int(places[0]), actual, expected, tolerance),
        worst=_mismatch(worst, actual, expected, tolerance),
    )


#: Stands for no allowance where a ratio is formed: float64's smallest normal number.
SMALLEST_STEP = torch.finfo(torch.float64).tiny


def _mismatch(
    place: int, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance | None
) -> Mismatch:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), actual.shape))
    found, wanted = _wide(actual)[index].item(), _wide(expected)[index].item()
    error = abs(found - wanted)
    terms: dict[str, float] = {}
    if tolerance is not None and not tolerance.exact[index]:
        terms = {
            name: float(term.expand_as(tolerance.expected)[index])
            for name, term in tolerance.terms.items()
        }
        error = abs(found - float(tolerance.expected[index]))
    whole = not actual.dtype.is_floating_point
    return Mismatch(
        index=index,
        actual=int(found) if whole else found,
        expected=int(wanted) if whole else wanted,
        actual_bits=_hex(actual, index),
        expected_bits=_hex(expected, index),
        error=error if error == error else float("inf"),
        allowed=sum(terms.values()),
        terms=terms,
    )


def _form(actual: object, shape: torch.Size, dtype: torch.dtype) -> str | None:
    if not isinstance(actual, torch.Tensor):
        return f"a {type(actual).__name__}, expected a tensor {tuple(shape)} of {dtype}"
    if actual.shape != shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(shape)}"
    if actual.dtype != dtype:
        return f"dtype {actual.dtype}, expected {dtype}"
    return None


def _unlike(what: str, expected: torch.Tensor, why: str, form: str) -> Comparison:
    total = expected.numel()
    return Comparison(what=what, total=total, count=total, bitwise=total, why=why, form=form)


def _raw(values: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if values.dtype.is_floating_point:
        return values.contiguous().view(kinds[values.element_size()])
    return values


def _wide(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.float8_e4m3fn:
        return values.float().double()
    return values.double()


def _hex(values: torch.Tensor, index: tuple[int, ...]) -> str:
    width = values.element_size() * 8
    return f"{int(_raw(values)[index]) & ((1 << width) - 1):#0{width // 4 + 2}x}"


def _json_number(value: float) -> float | int | str:
    finite = value == value and value not in (float("inf"), float("-inf"))
    return value if finite else str(value)
