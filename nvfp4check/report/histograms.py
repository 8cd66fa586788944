"""Histograms of codes and scales, as bars with heights in per cent of the tallest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvfp4ref.formats import E2M1, E4M3, ElementFormat

#: A bar that stands for anything at all is drawn at least this high, in per cent.
_LEAST_HEIGHT = 0.7

#: Steps of a scale at most.
_MOST_STEPS = 4


@dataclass(frozen=True, slots=True)
class Bar:
    """One value, how often it occurs, and how high that is drawn."""

    count: int
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Plot:
    """A histogram: its bars, and the words that stand evenly spaced below them."""

    title: str
    caption: str
    bars: tuple[Bar, ...]
    ticks: tuple[str, ...]
    #: Words at the left, and how far from the top they stand, in per cent.
    scale: tuple[tuple[str, float], ...] = ()
    #: What the ticks are.
    axis: str = ""


def histogram(
    title: str,
    caption: str,
    counts: Mapping[str, int],
    ticks: Sequence[str] | None = None,
    axis: str = "",
) -> Plot:
    """Return the histogram of counts by label; the labels are the ticks unless others are given."""
    total = sum(counts.values())
    tallest = max(counts.values(), default=0)
    bars = tuple(
        Bar(
            count,
            max(_LEAST_HEIGHT, round(100 * count / tallest, 2)) if count else 0.0,
            f"{label}: {count:,} ({count / total:.2%})" if total else f"{label}: 0",
        )
        for label, count in counts.items()
    )
    words = tuple(counts if ticks is None else ticks)
    return Plot(title, caption, bars, words, count_scale(tallest), axis)


def count_scale(tallest: int) -> tuple[tuple[str, float], ...]:
    """Return round counts from 0 to the tallest bar, and how far from the top each stands."""
    if tallest <= 0:
        return ()
    step = 1
    while step * _MOST_STEPS < tallest:
        # 1, 2, 5, 10, 20 ...
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    steps = range(0, tallest + 1, step)
    return tuple((_short(count), round(100 - 100 * count / tallest, 2)) for count in steps)


def _short(count: int) -> str:
    """Return a count in few characters; it is round."""
    for size, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size:
            return f"{count // size:,} {name}"
    return f"{count:,}"


def code_label(code: int) -> str:
    """Return the value of an E2M1 code as people write it: `-1.5`."""
    return _label(E2M1, code)


def scale_label(byte: int) -> str:
    """Return the value of an E4M3 byte as people write it, or `NaN`."""
    return "NaN" if byte in E4M3.nan_codes else _label(E4M3, byte)


def code_counts(counts: Sequence[int]) -> dict[str, int]:
    """Return the counts of the 16 codes by value, from -6 to 6."""
    negative, positive = range(15, 7, -1), range(8)
    return {code_label(code): counts[code] for code in (*negative, *positive)}


def scale_counts(counts: Sequence[int]) -> dict[str, int]:
    """Return the counts of the scale bytes by power of two, zero, negative and NaN apart.

    A row `2**3` holds the scales from 8 to below 16.
    """
    positive = [byte for byte in range(1, E4M3.sign_bit) if byte not in E4M3.nan_codes]
    rows = {"0": counts[0] + counts[E4M3.sign_bit]}
    for byte in positive:
        exponent = _floor_exponent(byte)
        rows[f"2**{exponent}"] = rows.get(f"2**{exponent}", 0) + counts[byte]
    rows["negative"] = sum(counts[byte | E4M3.sign_bit] for byte in positive)
    rows["NaN"] = sum(counts[byte] for byte in E4M3.nan_codes)
    return rows


def weight_plots(codes: Sequence[int] | None, scales: Sequence[int] | None) -> list[Plot]:
    """Return the plots of both histograms of a checkpoint or weight, as far as they were read."""
    plots = []
    if codes is not None:
        caption = f"{sum(codes):,} E2M1 codes, by value"
        plots.append(histogram("Codes", caption, code_counts(codes)))
    if scales is not None:
        shown = E4M3.sign_bit if not any(scales[E4M3.sign_bit :]) else len(scales)
        counts = {f"0x{byte:02X} = {scale_label(byte)}": scales[byte] for byte in range(shown)}
        if len(counts) != shown:
            raise ValueError("two scale bytes have one label")
        caption = f"{sum(scales):,} E4M3 block scales, by byte"
        # A tick stands in the middle of its 16 bytes.
        ticks = [f"{float(scale_label(byte)):.3g}" for byte in range(8, shown, 16)]
        plots.append(histogram("Block scales", caption, counts, ticks))
    return plots


def _label(form: ElementFormat, code: int) -> str:
    sign = "-" if code & form.sign_bit else ""
    return f"{sign}{_magnitude(form, code):.6g}"


def _magnitude(form: ElementFormat, code: int) -> float:
    exponent = (code & (form.sign_bit - 1)) >> form.mantissa_bits
    fraction = (code & ((1 << form.mantissa_bits) - 1)) / (1 << form.mantissa_bits)
    if exponent == 0:
        return float(fraction * 2.0 ** (1 - form.bias))
    return float((1 + fraction) * 2.0 ** (exponent - form.bias))


def _floor_exponent(byte: int) -> int:
    """Return the power of two at or below a positive E4M3 byte's value."""
    exponent, mantissa = byte >> E4M3.mantissa_bits, byte & ((1 << E4M3.mantissa_bits) - 1)
    if exponent:
        return exponent - E4M3.bias
    return mantissa.bit_length() - E4M3.mantissa_bits - E4M3.bias
