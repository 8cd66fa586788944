"""F7, F8, F13, F18 and F19 in files: single scales in the wrong direction, place or pair."""

import math
import struct

import torch

from nvfp4check.checkpoint.faults.base import Planting, fault, is_expert, leaf
from nvfp4check.checkpoint.faults.blocks import another_expert
from nvfp4check.checkpoint.naming import FUSED_GROUPS, LogicalWeight, Part, WeightFormat
from nvfp4ref import e4m3
from nvfp4ref.formats import E4M3

#: Ratios of up to gate, and of the shared maximum to its own, that were seen in public.
_SEEN_RATIO, _OTHER_SEEN_RATIO = 1.2547, 1.163
_MLP = ("gate_proj", "up_proj", "w1", "w3")


def _fusible(names: tuple[str, ...]) -> dict[str, str]:
    """Map each member of the fused groups to another one, where both are among the names."""
    return {members[-1]: members[0] for members in FUSED_GROUPS.values() if members[-1] in names}


def _half(p: Planting) -> LogicalWeight:
    """Choose an up projection that has its gate beside it."""
    pairs = _fusible(_MLP)
    return p.nvfp4(
        lambda w: leaf(w) in pairs and p.sibling(w, pairs[leaf(w)]) is not None,
        "up projection in NVFP4 with its gate",
    )


@fault(
    "F7a",
    "global-scale-reciprocal",
    does="The global scale is stored as its reciprocal.",
    threads=("modular/modular/issues/6600", "vllm-project/vllm/pull/35733"),
    found_by=("NV302",),
    found_with_base=("NV701", "NV705"),
    also=(
        "NV303",
        "NV501",
        "NV503",
        "NV703",
    ),
)
def _reciprocal(p: Planting) -> None:
    weight = p.nvfp4()
    value = 1 / p.scalar(weight, Part.GLOBAL_SCALE)
    p.set_scalar(weight, Part.GLOBAL_SCALE, value, "global scale")


@fault(
    "F7b",
    "global-scale-dropped",
    does="The global scale is stored as 1.",
    threads=("ggml-org/llama.cpp/pull/23629",),
    found_by=("NV303",),
    found_with_base=("NV701", "NV705"),
    also=(
        "NV302",
        "NV501",
        "NV503",
        "NV703",
    ),
)
def _dropped(p: Planting) -> None:
    p.set_scalar(p.nvfp4(), Part.GLOBAL_SCALE, 1.0, "global scale")


@fault(
    "F7c",
    "global-scale-squared",
    does="The global scale was applied twice: its square is stored.",
    threads=("charlie12345/ROCmFPX/issues/85", "charlie12345/ROCmFPX/pull/87"),
    found_by=("NV303",),
    found_with_base=("NV701", "NV705"),
    also=(
        "NV501",
        "NV503",
        "NV703",
    ),
)
def _squared(p: Planting) -> None:
    weight = p.nvfp4()
    value = p.scalar(weight, Part.GLOBAL_SCALE) ** 2
    p.set_scalar(weight, Part.GLOBAL_SCALE, value, "global scale")


@fault(
    "F7e",
    "global-scale-bits-misread",
    does="The BF16 bits of the global scale are stored as the low half of a float32.",
    threads=(
        "flashinfer-ai/flashinfer/pull/3497",
        "flashinfer-ai/flashinfer/issues/3398",
    ),
    found_by=("NV301",),
    found_with_base=("NV701", "NV705"),
    also=(
        "NV303",
        "NV501",
        "NV503",
    ),
)
def _misread(p: Planting) -> None:
    weight = p.nvfp4(lambda w: w.parts[Part.GLOBAL_SCALE].dtype == "F32")
    upper = struct.pack("<f", p.scalar(weight, Part.GLOBAL_SCALE))[2:]
    value: float = struct.unpack("<f", upper + b"\0\0")[0]
    p.set_scalar(weight, Part.GLOBAL_SCALE, value, "global scale")


@fault(
    "F8a",
    "gate-up-global-scales-differ",
    does="Gate and up were quantised under global scales of their own; engines that fuse them keep "
    "one.",
    threads=(
        "vllm-project/vllm/issues/54150",
        "NVIDIA/TensorRT-LLM/pull/14199",
        "sgl-project/sglang/pull/27588",
        "NVIDIA/Model-Optimizer/pull/1033",
    ),
    found_by=("NV501",),
    found_with_base=("NV701", "NV705"),
    also=(
        "NV702",
        "NV205",
    ),
)
def _own_scales(p: Planting) -> None:
    weight = _half(p)
    scales = e4m3.encode(e4m3.decode(p.scales(weight)) / _SEEN_RATIO)
    p.set_scales(weight, scales.view(torch.uint8), f"block scales divided by {_SEEN_RATIO}")
    p.scale_global(weight, _SEEN_RATIO, f"global scale times {_SEEN_RATIO}")


@fault(
    "F8b",
    "gate-up-maximum-without-rescale",
    does="Up was quantised under its own, smaller global scale and is stored under the pair's "
    "maximum, its block scales unchanged: it decodes 1.163 times too large.",
    threads=("vllm-project/vllm/pull/47515", "vllm-project/vllm/pull/41769"),
    found_with_base=("NV701",),
    also=("NV204",),
)
def _maximum(p: Planting) -> None:
    weight = _half(p)
    scales = e4m3.encode(e4m3.decode(p.scales(weight)) * _OTHER_SEEN_RATIO)
    p.set_scales(
        weight,
        scales.view(torch.uint8),
        f"block scales times {_OTHER_SEEN_RATIO}, at most {E4M3.max:g}",
    )


@fault(
    "F8d",
    "attention-global-scales-differ",
    does="Attention projections that engines fuse, as q_a_proj and kv_a_proj_with_mqa, differ in "
    "global scale.",
    threads=(
        "vllm-project/llm-compressor/issues/2360",
        "vllm-project/llm-compressor/pull/2437",
        "intel/auto-round/issues/2380",
    ),
    found_by=("NV503",),
    found_with_base=("NV701", "NV705"),
    also=(
        "NV702",
        "NV205",
    ),
)
def _attention_scales(p: Planting) -> None:
    pairs = {
        members[-1]: members[0] for members in FUSED_GROUPS.values() if members[-1] not in _MLP
    }
    weight = p.nvfp4(
        lambda w: leaf(w) in pairs and p.sibling(w, pairs[leaf(w)]) is not None,
        "fused attention projections in NVFP4",
    )
    scales = e4m3.encode(e4m3.decode(p.scales(weight)) / _SEEN_RATIO)
    p.set_scales(weight, scales.view(torch.uint8), f"block scales divided by {_SEEN_RATIO}")
    p.scale_global(weight, _SEEN_RATIO, f"global scale times {_SEEN_RATIO}")


@fault(
    "F8e",
    "gate-up-input-scales-differ",
    does="Gate and up have input scales of their own; a fused layer has room for one.",
    threads=("vllm-project/vllm/issues/54189", "NVIDIA/TensorRT-LLM/pull/18772"),
    found_by=("NV502",),
)
def _input_scales(p: Planting) -> None:
    weight = _half(p)
    value = p.scalar(weight, Part.INPUT_SCALE) * _SEEN_RATIO
    p.set_scalar(weight, Part.INPUT_SCALE, value, "input scale")


@fault(
    "F13a",
    "input-scale-missing",
    does="An expert that met no calibration token has no input scale.",
    threads=("vllm-project/vllm/issues/45212", "vllm-project/vllm/pull/52501"),
    found_by=("NV304",),
    also=("NV101", "NV502"),
)
def _no_input_scale(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: is_expert(w) and leaf(w) in ("down_proj", "w2") and Part.INPUT_SCALE in w.parts,
        "expert's down projection with an input scale",
    )
    entry = weight.parts[Part.INPUT_SCALE]
    p.editor.drop(entry.name)
    p.note(entry, "taken out of the shard and of the index")


@fault(
    "F13b",
    "input-scale-uninitialised",
    does="An input scale is memory that was never written: 3e38.",
    threads=("sgl-project/sglang/pull/29151", "sgl-project/sglang/pull/14102"),
    found_by=("NV305",),
    also=("NV304", "NV306", "NV502"),
)
def _uninitialised(p: Planting) -> None:
    weight = _down(p)
    p.set_scalar(weight, Part.INPUT_SCALE, 3e38, "input scale")


@fault(
    "F13d",
    "input-scale-of-another-expert",
    does="An expert's up projection has the input scale of another expert.",
    threads=("sgl-project/sglang/issues/21602",),
    found_by=("NV502",),
    also=("NV306",),
)
def _foreign_input_scale(p: Planting) -> None:
    pairs = _fusible(_MLP)
    weight = p.nvfp4(
        lambda w: is_expert(w) and leaf(w) in pairs and Part.INPUT_SCALE in w.parts,
        "expert's up projection with an input scale",
    )
    other = another_expert(p, weight)
    p.set_scalar(
        weight,
        Part.INPUT_SCALE,
        p.scalar(other, Part.INPUT_SCALE),
        f"input scale of {other.module}",
    )


@fault(
    "F13e",
    "input-scale-1000-times-too-large",
    does="An expert's input scale is 1000 times too large: block scales of its input vanish.",
    threads=("NVIDIA/Model-Optimizer/pull/1380",),
    found_by=("NV306",),
    also=("NV305",),
)
def _large_input_scale(p: Planting) -> None:
    weight = _down(p)
    value = p.scalar(weight, Part.INPUT_SCALE) * 1000
    p.set_scalar(weight, Part.INPUT_SCALE, value, "input scale")


def _down(p: Planting) -> LogicalWeight:
    return p.nvfp4(
        lambda w: is_expert(w) and leaf(w) in ("down_proj", "w2") and Part.INPUT_SCALE in w.parts,
        "expert's down projection with an input scale",
    )


def _kv_scale(p: Planting, value: float) -> None:
    """Overwrite a scale of the KV cache, or add one where the checkpoint has none."""
    stored = [w for w in p.checkpoint.weights.values() if w.format is WeightFormat.KV_SCALE]
    if stored:
        weight = p.one_of(stored, "KV scale")
        (entry,) = weight.entries
        p.overwrite(entry.name, torch.full_like(p.tensor(entry.name), value), f"becomes {value:g}")
        return
    beside = p.weight(lambda w: leaf(w) in ("o_proj", "wo"), "attention")
    module = beside.module.rpartition(".")[0]
    name, shard = f"{module}.k_proj.k_scale", beside.entries[0].shard
    p.editor.add(name, struct.pack("<f", value), dtype="F32", shape=(), shard=shard)
    p.note(p.editor.entry(name), f"added, with the value {value:g}")


@fault(
    "F18d",
    "kv-scale-reciprocal",
    does="A scale of the KV cache is 448/amax where amax/448 is meant.",
    threads=("intel/auto-round/pull/2366",),
    found_by=("NV308",),
    remark="only where the layer's weights bound its keys: either direction is a sane number",
)
def _kv_reciprocal(p: Planting) -> None:
    _kv_scale(p, 20.0)


@fault(
    "F18h",
    "kv-scale-not-finite",
    does="A scale of the KV cache is infinite, NaN or 0.",
    threads=("sgl-project/sglang/pull/40243",),
    found_by=("NV307",),
)
def _kv_not_finite(p: Planting) -> None:
    _kv_scale(p, (math.inf, math.nan, 0.0)[int(p.rng.integers(3))])


@fault(
    "F19a",
    "every-rank-took-shard-0",
    does="Block scales were gathered from tensor parallel ranks that all held shard 0.",
    threads=("vllm-project/vllm-gguf-plugin/issues/103",),
    found_with_base=("NV701",),
    also=("NV203",),
)
def _shard_zero(p: Planting) -> None:
    weight = p.nvfp4(lambda w: w.shape[0] % 2 == 0)
    first = p.scales(weight).chunk(2)[0]
    p.set_scales(weight, first.repeat(2, 1), "the second half of the rows repeats the first")


@fault(
    "F19d",
    "weights-moved-without-scales",
    does="Two experts changed places, their scales did not.",
    threads=("vllm-project/vllm/pull/37322",),
    found_with_base=("NV703",),
    also=("NV203", "NV701", "NV705"),
)
def _moved(p: Planting) -> None:
    weight = p.nvfp4(is_expert, "expert in NVFP4")
    other = another_expert(p, weight)
    mine, theirs = p.codes(weight), p.codes(other)
    p.set_codes(weight, theirs, f"codes of {other.module}")
    p.set_codes(other, mine, f"codes of {weight.module}")


@fault(
    "F19e",
    "global-scale-of-another-expert",
    does="A global scale was looked up under the local number of an expert.",
    threads=("sgl-project/sglang/pull/31503", "sgl-project/sglang/issues/36597"),
    found_with_base=("NV701", "NV705"),
    also=(),
)
def _foreign_global(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: is_expert(w) and leaf(w) in ("down_proj", "w2"), "expert's down projection"
    )
    other = another_expert(p, weight)
    value = p.scalar(other, Part.GLOBAL_SCALE)
    p.set_scalar(weight, Part.GLOBAL_SCALE, value, f"global scale of {other.module}")


@fault(
    "F19g",
    "global-scale-divided-by-tp",
    does="A global scale was divided by the number of tensor parallel ranks.",
    found_with_base=("NV701", "NV705"),
    also=("NV303",),
)
def _divided(p: Planting) -> None:
    weight = p.nvfp4(lambda w: leaf(w) in ("down_proj", "o_proj"), "down_proj or o_proj in NVFP4")
    p.scale_global(weight, 1 / 4, "global scale divided by 4")


FAULTS = (
    _reciprocal,
    _dropped,
    _squared,
    _misread,
    _own_scales,
    _maximum,
    _attention_scales,
    _input_scales,
    _no_input_scale,
    _uninitialised,
    _foreign_input_scale,
    _large_input_scale,
    _kv_reciprocal,
    _kv_not_finite,
    _shard_zero,
    _moved,
    _foreign_global,
    _divided,
)
