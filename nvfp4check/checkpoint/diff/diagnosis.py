"""Faults recognised in one pair of weights: the cheap looks first.

A recogniser says what was done to a, or b, to make the other; what it says holds of the whole
weight, never of a sample alone. Where nothing is recognised, nothing is said.
"""

from nvfp4check.checkpoint.diff.diagnosis_codes import name_codes, name_zero_blocks
from nvfp4check.checkpoint.diff.diagnosis_conventions import name_choice_of_scales
from nvfp4check.checkpoint.diff.diagnosis_scales import (
    name_global_scale,
    name_made_up,
    name_scales,
)
from nvfp4check.checkpoint.diff.diagnosis_values import name_across, name_values
from nvfp4check.checkpoint.diff.measured import Measured
from nvfp4check.checkpoint.diff.operands import Stored
from nvfp4check.checkpoint.naming import WeightFormat


def diagnose(a: Stored, b: Stored, found: Measured) -> str | None:
    """Name what distinguishes two weights, or return None.

    Raises:
        StorageError: Bytes cannot be read.
    """
    if a.operand.format is not b.operand.format:
        return name_across(a, b, found)
    if a.operand.format is not WeightFormat.NVFP4:
        return name_values(a, b, found)
    said = [name_global_scale(a, b, found)]
    if found.changed_codes:
        said.append(name_codes(a, b, found))
    if found.changed_scales:
        said.append(name_scales(a, b, found))
    if found.changed_scales and not any(said):
        said += [name_zero_blocks(a, b, found), name_choice_of_scales(a, b, found)]
    if not any(said):
        said.append(name_made_up(a, b, found))
    return "; ".join(text for text in said if text) or None
