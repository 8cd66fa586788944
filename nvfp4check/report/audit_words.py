"""What an audit found, in sentences and rows that text, Markdown and HTML share."""

from collections.abc import Iterator, Mapping
from typing import Any

from nvfp4check.report.fold import plural

#: How many conventions, foreign weights and names are written out.
SHOWN = 4

_WAYS = {
    "direct": "",
    "fp8-128x128": " by way of FP8 128x128",
    "fp8-128x128-ue8m0": " by way of FP8 128x128 with ue8m0 scales",
    "smoothed": " divided by the pre_quant_scale that is stored",
    "smoothed-by-the-linear": " with factors moved between it and the linear before or behind",
    "smoothed-by-the-norm": " divided by what the norm before it was multiplied by",
}

_COPIED = {
    "bytes": "with the same bytes",
    "dequantised": "dequantised exactly",
    "cast": "rounded once to another dtype",
}

CONVENTION_HEADERS = ("convention", "scale bytes that differ", "codes that differ", "weights alike")


def audit_sentences(audit: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the audit found, one sentence each."""
    quantized = audit["quantized"]
    elements = quantized["elements"]
    if elements:
        yield _made(quantized)
        yield _nearest(quantized)
        yield _convention(audit["conventions"])
    if quantized["searched_blocks"]:
        yield _searched(quantized)
    if audit["copied"]:
        yield _copied(audit["copied"])
    if audit["foreign"]:
        yield f"{plural(len(audit['foreign']), 'weight')} of another place: NV703."
    for pattern in audit["patterns"]:
        yield f"{pattern}."
    missing = audit["only_in_base"]
    if missing["count"]:
        yield (
            f"Of the base's weights, {missing['count']:,} are not in the checkpoint, the first "
            f"{missing['first'][0]}."
        )


def convention_rows(audit: Mapping[str, Any]) -> list[list[str]]:
    """Return the conventions that fit best, one row each."""
    return [
        [
            fit["convention"],
            f"{fit['scale_bytes']:,}",
            f"{fit['codes']:,}",
            f"{fit['weights']:,}",
        ]
        for fit in audit["conventions"][:SHOWN]
    ]


def _made(quantized: Mapping[str, Any]) -> str:
    made = [
        f"{entry['weights']:,} from {entry['format']}{_WAYS.get(entry['way'], '')}"
        f"{'' if entry['format'] == _short(entry['dtype']) else ' in ' + entry['dtype']}"
        for entry in quantized["made_from"]
    ]
    return f"{plural(quantized['weights'], 'NVFP4 weight')}: {', '.join(made)}."


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(dtype, dtype)


def _nearest(quantized: Mapping[str, Any]) -> str:
    elements = quantized["elements"]
    wrong = quantized["off"] + quantized["beyond"]
    said = (
        f"Of {elements:,} elements {_percent(quantized['nearest'], elements)} have the exactly "
        f"nearest code and {quantized['other_side_of_a_tie']:,} its neighbour across a tie"
    )
    if not wrong:
        return f"{said}; every one is within its block's rounding."
    return (
        f"{said}; {quantized['off']:,} are not the nearest, and {quantized['beyond']:,} are beyond "
        "their block's rounding."
    )


def _percent(part: int, whole: int) -> str:
    """Spell a share; only a whole is 100 %."""
    share = f"{100 * part / whole:.3f}"
    if part < whole and share == "100.000":
        share = "99.999"
    return f"{share} %"


def _convention(fits: list[Mapping[str, Any]]) -> str:
    if not fits:
        return "All were smoothed, so the convention that made them cannot be told."
    best = fits[0]
    differs = best["scale_bytes"] + best["codes"]
    alike = [fit["convention"] for fit in fits[1:] if fit["scale_bytes"] + fit["codes"] == differs]
    also = f", and so does {' and '.join(alike)}" if alike else ""
    if not differs:
        return (
            f"Convention {best['convention']} makes every scale byte and every code of them{also}."
        )
    return (
        f"Convention {best['convention']} comes nearest{also}: {best['scale_bytes']:,} scale bytes "
        f"and {best['codes']:,} codes differ."
    )


def _searched(quantized: Mapping[str, Any]) -> str:
    four = quantized["four_over_six_blocks"]
    kind = "4-over-6" if 2 * four > quantized["searched_blocks"] else "MSE or the like"
    return (
        f"{quantized['searched_blocks']:,} of {quantized['blocks']:,} blocks have another scale "
        f"than their amax gives, with the nearest codes under it: legal, found by search ({kind})."
    )


def _copied(copied: Mapping[str, int]) -> str:
    ways = ", ".join(f"{count:,} {_COPIED.get(how, how)}" for how, count in copied.items())
    return f"Copied: {plural(sum(copied.values()), 'weight')}: {ways}."
