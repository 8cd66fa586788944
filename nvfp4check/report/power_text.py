"""Planted faults, who saw them, and what tolerance rules would see: as text and as Markdown."""

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate


def power_text(document: Mapping[str, Any], table_format: str = "simple") -> str:
    """Return the tables of faults, correct kernels and rules."""
    return "\n".join(_lines(document, table_format)).rstrip() + "\n"


def power_markdown(document: Mapping[str, Any]) -> str:
    """Return the same as Markdown."""
    return "\n".join(_lines(document, "github", "## ")).rstrip() + "\n"


def _lines(document: Mapping[str, Any], table_format: str, heading: str = "") -> Iterator[str]:
    faults, variants, rules = document["faults"], document["variants"], document["rules"]
    yield f"{heading}Faults planted in the {document['impl']}: {document['verdict']}"
    yield ""
    yield summary(document)
    yield ""
    yield tabulate(
        list(fault_rows(faults)),
        headers=["fault", "what it is", "operations", "forms", "seen by"],
        tablefmt=table_format,
    )
    for one in variants:
        if one["rejected_by"]:
            yield ""
            who = f"{one['operation']}, {one['name']}"
            yield f"rejected though correct: {who}, by {one['rejected_by']}"
            yield textwrap.indent(one["message"], "  ")
    if rules:
        yield ""
        yield from _rule_lines(document, table_format, heading)


def summary(document: Mapping[str, Any]) -> str:
    """Return the counts in one line."""
    faults, variants = document["faults"], document["variants"]
    seen = sum(one["seen_by"] is not None for one in faults)
    kept = sum(one["rejected_by"] is None for one in variants)
    text = f"{len({one['id'] for one in faults})} faults in {len(faults)} forms, {seen} seen"
    if variants:
        text += f"; {len(variants)} correct kernels, {kept} accepted"
    return f"{text}; {document['seconds']} s"


def fault_rows(faults: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """Return a row for each fault: id, name, operations, number of forms, what saw it."""
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in faults:
        grouped[one["id"]].append(one)
    for identifier, forms in grouped.items():
        operations = list(dict.fromkeys(one["operation"] for one in forms))
        missed = [one for one in forms if one["seen_by"] is None]
        laws = list(dict.fromkeys(one["seen_by"] for one in forms if one["seen_by"]))
        if missed:
            names = ", ".join(f"{one['operation']} {one['form']}".strip() for one in missed)
            shown = f"MISSED in {names}"
        else:
            shown = laws[0] if len(laws) == 1 else f"{laws[0]} and {len(laws) - 1} other"
        if any(one["message"] for one in forms):
            shown += ", where the kernel's process ended"
        listed = ", ".join(operations[:2]) + (
            f" and {len(operations) - 2} more" if len(operations) > 2 else ""
        )
        yield [identifier, forms[0]["name"], listed, len(forms), shown]


#: The kinds of inputs that rules are tried on, and their headings.
_INPUTS = {
    "own_inputs": "its own inputs",
    "model_sized_inputs": "model-sized inputs",
    "suite_inputs": "this suite's inputs",
}

RULE_HEADERS = (
    "rule",
    "accepts",
    *_INPUTS.values(),
    "smallest scale error seen",
    "fewest flipped signs seen",
    "correct refused",
)


def rule_rows(document: Mapping[str, Any]) -> list[list[Any]]:
    """Return a row for each rule: what it accepts, what it sees, and correct kernels it refuses.

    The last row is the derived bound's.
    """
    rows = [
        [
            one["name"],
            one["rule"],
            *(f"{_seen(one[kind])} of {one[kind]['showing']}" for kind in _INPUTS),
            *_smallest(one["smallest_seen"]),
            max(len(one[kind]["refused_correct"]) for kind in _INPUTS),
        ]
        for one in document["rules"]
    ]
    bound = document["derived_bound"]["smallest_seen"]
    return [*rows, ["derived bound", "", "", "", "", *_smallest(bound), ""]]


def _smallest(seen: Mapping[str, Any]) -> list[str]:
    error, flipped = seen["scale_error"], seen["flipped_signs"]
    return [
        "none" if error is None else f"{100 * error:.3g} %",
        "none" if flipped is None else str(flipped),
    ]


def _rule_lines(document: Mapping[str, Any], table_format: str, heading: str) -> Iterator[str]:
    rules = document["rules"]
    yield f"{heading}What tolerance rules see of the faults of matmul"
    yield ""
    yield tabulate(
        rule_rows(document), headers=RULE_HEADERS, tablefmt=table_format, disable_numparse=True
    )
    yield ""
    yield (
        "Forms of faults that the rule sees, of those whose result differs from the right one "
        "on these inputs at all. On model-sized inputs: the smallest error of every element by "
        "one factor, and the fewest elements of wrong sign."
    )
    if len(rules) == 1:
        for kind, name in _INPUTS.items():
            missed = rules[0][kind]["missed"]
            if missed:
                yield ""
                yield f"accepted on {name}:"
                yield textwrap.indent("\n".join(missed), "  ")


def _seen(part: Mapping[str, Any]) -> int:
    """Return how many faults that show are seen."""
    return int(part["showing"]) - len(part["missed"])
