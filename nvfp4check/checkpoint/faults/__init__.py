"""The catalogue of faults that a stored checkpoint can carry, and how one is planted in a copy.

The ids are those of twenty classes of faults that public threads report: F1 codes in the wrong
order, F2 rounding, F3 scales misspelt, F4 their range, F5 codes of other scales, F6 the block, F7
the global scale, F8 fused halves, F9 layout, F13 input scales, F14 the router, F18 the KV cache,
F19 shards, F20 structure and metadata. Faults of a computation are not among them.
"""

from nvfp4check.checkpoint.faults import (
    blocks,
    codes,
    layout,
    metadata,
    model,
    scales,
    structure,
)
from nvfp4check.checkpoint.faults.base import Change, CheckpointFault

__all__ = ["CHECKPOINT_FAULTS", "Change", "CheckpointFault"]


def _order(fault: CheckpointFault) -> tuple[int, str]:
    number = "".join(filter(str.isdigit, fault.id[1:3]))
    return int(number), fault.id


#: Every fault by its id.
CHECKPOINT_FAULTS: dict[str, CheckpointFault] = {
    fault.id: fault
    for fault in sorted(
        (
            fault
            for group in (codes, blocks, scales, layout, model, structure, metadata)
            for fault in group.FAULTS
        ),
        key=_order,
    )
}
