"""The faults of the catalogue that no call of a single operation can show, and who shows them.

They concern several tensors of a checkpoint, how an engine loads and shards them, or formats that
no operation of the contract takes. To plant one in an operation would be to test something else.
"""

from nvfp4check.faults.base import ElsewhereFault

_CHECKPOINT = "`validate`: the checkpoint's own faults, `faults list`"
_RUN = "`agree`: a run of the engine against the reference forward"

ELSEWHERE = (
    ElsewhereFault(
        id="F1d", does="a packed row sliced at an odd element", caught_by="tests of the loader"
    ),
    ElsewhereFault(
        id="F3g",
        does="scale bytes read as signed",
        caught_by="nothing in legal scales, whose sign bit is 0; `validate` reports others",
    ),
    ElsewhereFault(
        id="F7f",
        does="alpha without the activation scale, or with it twice",
        caught_by=f"{_RUN}; an operation is given alpha whole",
    ),
    ElsewhereFault(
        id="F7g",
        does="a global scale that is legal in float64 and 0 or infinite in float32",
        caught_by=_CHECKPOINT,
    ),
    ElsewhereFault(
        id="F7h",
        does="1 / (1 / g) for g",
        caught_by="no fault: conventions that store the reciprocal do so, and allow for it",
    ),
    ElsewhereFault(id="F8a", does="up under gate's global scale", caught_by=_CHECKPOINT),
    ElsewhereFault(
        id="F8b", does="both halves under the larger global scale", caught_by=_CHECKPOINT
    ),
    ElsewhereFault(id="F8c", does="one of two slots of a fused scale not filled", caught_by=_RUN),
    ElsewhereFault(id="F8d", does="F8a for q_a and kv_a, or for q, k and v", caught_by=_CHECKPOINT),
    ElsewhereFault(id="F8e", does="the input scale of up overwrites that of gate", caught_by=_RUN),
    ElsewhereFault(id="F9f", does="scales of V in another layout than those of K", caught_by=_RUN),
    ElsewhereFault(
        id="F9g",
        does="float32 scales packed as UE8M0 with their mantissa",
        caught_by="no operation of the contract packs UE8M0",
    ),
    ElsewhereFault(
        id="F12f",
        does="a check of sizes that refuses correct ones",
        caught_by="the suites: an example the kernel refuses is counted",
    ),
    ElsewhereFault(id="F13a", does="an expert without an input scale", caught_by=_CHECKPOINT),
    ElsewhereFault(id="F13b", does="an uninitialised scale wins a maximum", caught_by=_RUN),
    ElsewhereFault(id="F13c", does="the maximum over local experts instead of all", caught_by=_RUN),
    ElsewhereFault(id="F13f", does="scales kept from other weights", caught_by=_RUN),
    ElsewhereFault(id="F13g", does="the amax of one rank used by all", caught_by=_RUN),
    ElsewhereFault(
        id="F15f", does="the shared expert dropped, or scaled as a routed one", caught_by=_RUN
    ),
    ElsewhereFault(
        id="F17f",
        does="the indexer's halves used for MLA",
        caught_by="the suites: it is the computation of F17a",
    ),
    ElsewhereFault(id="F18", does="scales of the KV cache and of absorbed weights", caught_by=_RUN),
    ElsewhereFault(id="F19", does="shards of weights and scales paired wrongly", caught_by=_RUN),
    ElsewhereFault(
        id="F20", does="structure and metadata of the checkpoint", caught_by=_CHECKPOINT
    ),
)
