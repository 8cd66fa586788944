"""F20 in files beside the tensors: index, configuration, headers, lengths."""

from nvfp4check.checkpoint.faults.base import Planting, fault
from nvfp4check.checkpoint.index import INDEX_FILE
from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.quant_config import CONFIG, HF_QUANT_CONFIG
from nvfp4check.findings import CheckError

_SCALE_LEAVES = ("weight_scale", "weight_scale_2", "input_scale")
_CUT = 4096


def _need(p: Planting, file: str) -> None:
    if file not in p.checkpoint.files:
        raise CheckError(f"cannot plant: the checkpoint has no {file}")


@fault(
    "F20a1",
    "scale-not-indexed",
    does="The index leaves out one block scale tensor.",
    threads=("NVIDIA/TensorRT-LLM/pull/16437",),
    found_by=("NV004",),
)
def _one_unindexed(p: Planting) -> None:
    _need(p, INDEX_FILE)
    entry = p.nvfp4().parts[Part.BLOCK_SCALES]
    with p.editor.edit_json(INDEX_FILE) as index:
        index["weight_map"].pop(entry.name)
    p.note_file(INDEX_FILE, f"weight_map loses {entry.name}", count=1)


@fault(
    "F20a2",
    "scales-not-indexed",
    does="The index leaves out every scale, as DeepSeek's conversion script does.",
    threads=("NVIDIA/TensorRT-LLM/pull/16437",),
    found_by=("NV004",),
)
def _none_indexed(p: Planting) -> None:
    _need(p, INDEX_FILE)
    with p.editor.edit_json(INDEX_FILE) as index:
        scales = [n for n in index["weight_map"] if n.rpartition(".")[2] in _SCALE_LEAVES]
        for name in scales:
            index["weight_map"].pop(name)
    p.note_file(INDEX_FILE, f"weight_map loses {len(scales):,} scales", count=len(scales))


@fault(
    "F20d",
    "stale-fp8-config",
    does="config.json keeps the source's FP8 quantization_config beside hf_quant_config.json.",
    threads=("sgl-project/sglang/issues/7593", "NVIDIA/Model-Optimizer/pull/753"),
    found_by=("NV602",),
    also=("NV603", "NV605"),
)
def _stale(p: Planting) -> None:
    _need(p, CONFIG)
    with p.editor.edit_json(CONFIG) as config:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    p.note_file(CONFIG, "quantization_config says fp8 with blocks of 128 x 128")


@fault(
    "F20g",
    "group-size-32",
    does="The declared group size is 32.",
    threads=("ml-explore/mlx/issues/3557",),
    found_by=("NV604",),
)
def _group_size(p: Planting) -> None:
    _need(p, HF_QUANT_CONFIG)
    with p.editor.edit_json(HF_QUANT_CONFIG) as document:
        document["quantization"]["group_size"] = 32
    p.note_file(HF_QUANT_CONFIG, "quantization.group_size becomes 32")


@fault(
    "F20k1",
    "shard-truncated",
    does="A shard ends early.",
    threads=("sgl-project/sglang/pull/32279",),
    found_by=("NV001",),
)
def _truncated(p: Planting) -> None:
    shard = p.weight(lambda w: True, "tensor").entries[0].shard
    size = p.checkpoint.files[shard]
    p.editor.truncate(shard, size - min(_CUT, size // 2))
    p.note_file(shard, f"cut to {p.editor.size(shard):,} bytes", count=size - p.editor.size(shard))


@fault(
    "F20k2",
    "header-offsets-wrong",
    does="Two tensors of a header lay claim to the same bytes.",
    threads=("safetensors/safetensors/pull/749",),
    found_by=("NV001",),
)
def _offsets(p: Planting) -> None:
    pairs = [
        (first, second)
        for shard in p.checkpoint.shards.values()
        for first, second in zip(shard.entries, shard.entries[1:], strict=False)
        if first.nbytes == second.nbytes > 0
    ]
    if not pairs:
        raise CheckError("cannot plant: no two neighbouring tensors have one size")
    first, second = pairs[int(p.rng.integers(len(pairs)))]
    with p.editor.edit_header(first.shard) as header:
        header[second.name]["data_offsets"] = header[first.name]["data_offsets"]
    p.note(second, f"data_offsets are those of {first.name}")


FAULTS = (_one_unindexed, _none_indexed, _stale, _group_size, _truncated, _offsets)
