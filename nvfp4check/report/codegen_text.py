"""What a compiler made of kernels, as text and as Markdown: a table for each kernel."""

from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate


def codegen_text(document: Mapping[str, Any], tablefmt: str = "simple") -> str:
    """Return a table for each kernel, a column for each architecture, and what does not hold."""
    kernels: dict[str, list[Mapping[str, Any]]] = {}
    for result in document["results"]:
        kernels.setdefault(result["kernel"], []).append(result)
    blocks = ["\n".join(_kernel(name, results, tablefmt)) for name, results in kernels.items()]
    failed = [result for result in document["results"] if result["verdict"] == "fail"]
    triton = document["triton"]
    compiled = f"{len(document['results'])} compiled with Triton {triton}, {len(failed)} not as"
    return "\n\n".join([*blocks, f"{document['verdict'].upper()}: {compiled} needed"]) + "\n"


def _kernel(name: str, results: list[Mapping[str, Any]], tablefmt: str) -> Iterator[str]:
    headers = [name, *(result["arch"] for result in results)]
    columns = [_column(result) for result in results]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    yield tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True)
    for result in results:
        for check in result["checks"]:
            if not check["holds"]:
                yield (
                    f"  {result['arch']}: {check['name']}: found {check['found']}, "
                    f"expected {check['expected']}"
                )


def _column(result: Mapping[str, Any]) -> dict[str, str]:
    m = result["measurement"]
    labels = {"verdict": result["verdict"]}
    if m is None:
        return {**labels, **dict.fromkeys(_LABELS, "-")}
    values = (
        _instructions(m["matrix_instructions"]),
        f"{m['tma_loads']} / {m['tma_stores']}",
        f"{m['e2m1_encodes']} / {m['e2m1_decodes']}",
        _widths(m["load_widths"]),
        _widths(m["store_widths"]),
        str(m["registers"]),
        f"{m['spill_stores']} / {m['spill_loads']}",
        str(m["shared_memory"]),
        str(m["tensor_memory_columns"]),
        str(m["barriers"]),
        str(m["instructions"]),
    )
    return {**labels, **dict(zip(_LABELS, values, strict=True))}


_LABELS = (
    "tensor-core instructions",
    "TMA loads / stores",
    "E2M1 encodes / decodes",
    "global loads, bytes x count",
    "global stores, bytes x count",
    "registers a thread",
    "spill stores / loads",
    "shared memory, bytes",
    "tensor memory, columns",
    "barriers",
    "instructions",
)


def _instructions(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{n}" for name, n in counts.items()) or "none"


def _widths(widths: Mapping[str, int]) -> str:
    falling = sorted(widths.items(), key=lambda item: -int(item[0]))
    return ", ".join(f"{width} x{n}" for width, n in falling) or "none"
