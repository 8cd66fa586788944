"""What a validation covered, in sentences that every format shares."""

from collections.abc import Iterator, Mapping
from typing import Any

from nvfp4check.report.fold import plural, size_text


def coverage_sentences(document: Mapping[str, Any]) -> Iterator[str]:
    """Say how much was checked, by what, and what a sample may have missed."""
    coverage = document["coverage"]
    what = f"the headers of {plural(coverage['tensors'], 'tensor')}"
    if coverage["bytes_checked"]:
        what += (
            f" and the bytes of {coverage['tensors_checked']:,} of them "
            f"({size_text(coverage['bytes_checked'])} of codes and scales)"
        )
    by = plural(len(coverage["rules"]), "rule")
    yield f"Checked {what}, by {by}, in {document['seconds']:.1f} s."
    sample = coverage.get("sample")
    if sample is None:
        return
    yield (
        f"A sample: {sample['weights_read']:,} of {plural(sample['weights'], 'weight')}, in "
        f"{sample['groups_read']:,} of {plural(sample['groups'], 'group')} (one MLP, expert or "
        f"attention), drawn with seed {sample['seed']}."
    )
    for entry in sample["missed"]:
        size = plural(entry["defective_groups"], "group")
        yield f"A defect in {size} is missed with probability {entry['probability']:.3g}."
