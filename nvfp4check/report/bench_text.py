"""Limits and timings of kernels as text and as Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate


def bench_text(document: Mapping[str, Any], tablefmt: str = "simple") -> str:
    """Return the predicted limits, or the measured times beside them."""
    return _limits(document, tablefmt) if document["predicted"] else _timings(document, tablefmt)


def _limits(document: Mapping[str, Any], tablefmt: str) -> str:
    chips = [chip["name"] for chip in document["chips"]]
    rows = [
        [
            work["operation"],
            work["sizes"],
            f"{work['bytes'] / 1e6:.1f}",
            f"{work['operations'] / 1e9:.1f}",
            *(_limit_text(work["limits"][chip]) for chip in chips),
        ]
        for work in document["workloads"]
    ]
    headers = ["operation", "sizes", "MB", "Gop", *(f"{chip}, us" for chip in chips)]
    lines = [tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True), ""]
    lines.append("Least time by the data sheet, m: memory bounds it, t: tensor cores do.")
    for chip in document["chips"]:
        lines.append(
            f"  {chip['name']}: {chip['bandwidth'] / 1e12:g} TB/s, {chip['sixteen_bit'] / 1e12:g} "
            f"Top/s in 16 bit, {chip['nvfp4'] / 1e12:g} in NVFP4. {chip['source']}."
        )
    return "\n".join(lines) + "\n"


def _limit_text(limit: Mapping[str, Any]) -> str:
    return f"{limit['seconds'] * 1e6:.1f} {limit['bound'][0]}"


def _timings(document: Mapping[str, Any], tablefmt: str) -> str:
    rates = document["rates"]
    rows = [
        [
            timing["operation"],
            timing["sizes"],
            timing["implementation"],
            f"{timing['seconds'] * 1e6:.1f}",
            f"{timing['bytes_per_second'] / 1e9:.0f}",
            f"{timing['operations_per_second'] / 1e12:.1f}",
            f"{timing['share']:.0%} of {timing['bound']}",
            document["correct"].get(f"{timing['implementation']} {timing['operation']}", "-"),
        ]
        for timing in document["timings"]
    ]
    headers = ["operation", "sizes", "kernel", "us", "GB/s", "Top/s", "share", "laws"]
    return (
        f"{rates['gpu']}: copies {rates['copy_bandwidth'] / 1e9:.0f} GB/s, bfloat16 products "
        f"{rates['matrix_rate'] / 1e12:.0f} Top/s, measured in this run\n\n"
        f"{tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True)}\n"
        f"{''.join(_refusals(document))}"
    )


def _refusals(document: Mapping[str, Any]) -> Iterator[str]:
    for one in document["refused"]:
        yield f"{one['implementation']} refused {one['operation']} {one['sizes']}: {one['why']}\n"
