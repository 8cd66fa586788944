"""F20 in tensors and shards: what is missing, doubled, misshapen, or quantised against the word."""

import torch

from nvfp4check.checkpoint.faults.base import Planting, fault, is_expert, leaf
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.writing import TensorSpec, encode_header
from nvfp4ref import e2m1, e4m3, layout, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE

_UNUSABLE = (0.0, float("inf"), float("nan"))


@fault(
    "F20b1",
    "tensor-absent-from-its-shard",
    does="The index names a tensor that its shard does not hold.",
    threads=("huggingface/huggingface_hub/issues/4725",),
    found_by=("NV003",),
    also=("NV007",),
)
def _absent(p: Planting) -> None:
    entry = p.nvfp4().parts[Part.BLOCK_SCALES]
    p.editor.drop(entry.name, index=False)
    p.note(entry, "taken out of the shard, and left in the index")


@fault(
    "F20b2",
    "tensor-twice",
    does="A tensor stands in two shards, with different bytes.",
    threads=("JustVugg/colibri/issues/1479", "vllm-project/vllm/pull/54230"),
    found_by=("NV005",),
    also=("NV007",),
)
def _twice(p: Planting) -> None:
    entry = p.nvfp4().parts[Part.CODES]
    others = [shard for shard in p.editor.shards if shard != entry.shard]
    data = bytes(byte ^ 0x88 for byte in p.editor.read(entry.name))  # every sign turned
    shard = others[0] if others else "model-overlay.safetensors"
    if others:
        p.editor.add(
            entry.name, data, dtype=entry.dtype, shape=entry.shape, shard=shard, index=False
        )
    else:
        spec = TensorSpec(entry.name, entry.dtype, entry.shape)
        p.editor.write_file(shard, encode_header([spec], {"format": "pt"}) + data)
    p.note_file(shard, f"a second {entry.name} with every sign turned", count=len(data))


@fault(
    "F20b3",
    "stray-shard",
    does="A shard of another export lies beside the index, which does not name it.",
    threads=("Blaizzy/mlx-vlm/pull/1464", "Blaizzy/mlx-vlm/pull/1827"),
    found_by=("NV006",),
)
def _stray(p: Planting) -> None:
    entry = p.weight(lambda w: len(w.shape) == 1 and len(w.parts) == 1, "vector").entries[0]
    spec = TensorSpec(f"old.{entry.name}", entry.dtype, entry.shape)
    data = p.editor.read(entry.name)
    p.editor.write_file("model.old.safetensors", encode_header([spec], {"format": "pt"}) + data)
    p.note_file("model.old.safetensors", f"holds one tensor, {spec.name}", count=spec.nbytes)


@fault(
    "F20c1",
    "quantised-though-excluded",
    does="A linear that the exclude list leaves in BF16 is stored as NVFP4.",
    threads=("NVIDIA/TensorRT-LLM/issues/16196", "sgl-project/sglang/pull/9712"),
    found_by=("NV105",),
    also=("NV109",),
)
def _excluded(p: Planting) -> None:
    excluded, mtp = p.checkpoint.quantization.excludes, _mtp_prefix(p)
    weight = p.weight(
        lambda w: (
            w.format is WeightFormat.BF16
            and len(w.shape) == 2
            and w.shape[1] % BLOCK_SIZE == 0
            and ".self_attn." in w.name
            and not w.name.startswith(mtp)
            and excluded(w.module)
        ),
        "excluded BF16 projection of attention",
    )
    _quantise(p, weight)


@fault(
    "F20c2",
    "unquantised-though-listed",
    does="An expert that met no calibration token stayed in BF16, though no exclude pattern "
    "covers it.",
    threads=("sgl-project/sglang/pull/39317",),
    found_by=("NV106",),
    also=("NV101", "NV103", "NV104", "NV502", "NV007"),
    found_with_base=("NV704",),
)
def _unquantised(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: is_expert(w) and leaf(w) in ("down_proj", "w2"), "expert's down projection"
    )
    spread = e4m3.decode(p.scales(weight)).repeat_interleave(BLOCK_SIZE, 1)
    stored = p.scalar(weight, Part.GLOBAL_SCALE)
    decode_scale = 1 / stored if weight.global_scale_is_reciprocal else stored
    values = (e2m1.decode(p.codes(weight)) * (spread * decode_scale)).to(torch.bfloat16)
    codes = weight.parts[Part.CODES]
    for part, entry in weight.parts.items():
        if part is not Part.CODES:
            p.editor.drop(entry.name)
            p.note(entry, "taken out")
    if codes.name != weight.name:
        p.editor.rename(codes.name, weight.name)
    data = values.view(torch.uint8).numpy().tobytes()
    p.editor.replace(weight.name, data, dtype="BF16", shape=tuple(values.shape))
    p.note(p.editor.entry(weight.name), "stored as BF16")


@fault(
    "F20e1",
    "expert-scales-removed",
    does="The block scales of an expert are not there.",
    threads=("NVIDIA/Model-Optimizer/pull/384",),
    found_by=("NV107",),
    also=("NV101",),
)
def _no_scales(p: Planting) -> None:
    _drop(p, p.nvfp4(is_expert, "expert in NVFP4").parts[Part.BLOCK_SCALES])


@fault(
    "F20e2",
    "global-scale-unusable",
    does="A global scale is 0, infinite or NaN.",
    threads=("vllm-project/compressed-tensors/pull/595", "kekzl/imp/pull/113"),
    found_by=("NV301",),
    also=("NV302", "NV303", "NV501", "NV503", "NV701", "NV705"),
)
def _unusable(p: Planting) -> None:
    value = _UNUSABLE[int(p.rng.integers(len(_UNUSABLE)))]
    p.set_scalar(p.nvfp4(), Part.GLOBAL_SCALE, value, "global scale")


@fault(
    "F20f1",
    "mtp-dropped",
    does="The layer of multi-token prediction that config.json promises was lost on the way "
    "through transformers.",
    threads=("vllm-project/llm-compressor/issues/2735", "osaurus-ai/vmlx-swift/pull/388"),
    found_by=("NV109",),
    also=("NV605",),
)
def _no_mtp(p: Planting) -> None:
    layer = _mtp_layer(p)
    names = {name for name in p.checkpoint.tensors if name.startswith(layer)}
    for entry in p.checkpoint.tensors.values():
        if entry.name in names:
            p.note(entry, "taken out")
    p.editor.drop_all(names)


@fault(
    "F20f2",
    "mtp-quantised",
    does="A projection of the layer of multi-token prediction is NVFP4, though it is excluded.",
    threads=("sgl-project/sglang/pull/7376", "ROCm/ATOM/pull/755"),
    found_by=("NV109",),
    also=("NV105",),
)
def _quantised_mtp(p: Planting) -> None:
    layer = _mtp_layer(p)
    weight = p.weight(
        lambda w: (
            w.name.startswith(layer)
            and w.format is WeightFormat.BF16
            and leaf(w) in ("o_proj", "down_proj")
            and w.shape[1] % BLOCK_SIZE == 0
        ),
        "BF16 projection of multi-token prediction",
    )
    _quantise(p, weight)


@fault(
    "F20h",
    "router-bias-in-bf16",
    does="e_score_correction_bias is stored in BF16.",
    threads=("sgl-project/sglang/pull/31213", "vllm-project/vllm/pull/23640"),
    found_by=("NV104",),
    also=("NV007", "NV704"),
)
def _bias_dtype(p: Planting) -> None:
    weight = p.weight(
        lambda w: w.name.endswith("e_score_correction_bias") and w.format is WeightFormat.F32,
        "router bias in F32",
    )
    values = p.tensor(weight.name).to(torch.bfloat16)
    p.editor.replace(weight.name, values.view(torch.uint8).numpy().tobytes(), dtype="BF16")
    p.note(weight.entries[0], "F32 becomes BF16")


@fault(
    "F20i1",
    "codes-not-packed",
    does="Codes are stored one a byte: U8 [N, K], not [N, K/2].",
    threads=("safetensors/safetensors/issues/839", "NVIDIA/TensorRT-LLM/issues/9503"),
    found_by=("NV103",),
    also=("NV108",),
)
def _not_packed(p: Planting) -> None:
    weight = p.nvfp4()
    entry, codes = weight.parts[Part.CODES], p.codes(weight)
    p.editor.replace(entry.name, codes.numpy().tobytes(), shape=tuple(codes.shape))
    p.note(entry, f"shape {[*entry.shape]} becomes {[*codes.shape]}")


@fault(
    "F20i2",
    "scales-transposed",
    does="Block scales are stored as [K/16, N].",
    threads=("unslothai/unsloth-zoo/pull/1114",),
    found_by=("NV108",),
    also=("NV701",),
)
def _scales_transposed(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: w.shape[0] != w.shape[1] // BLOCK_SIZE, "NVFP4 weight with unequal scale sides"
    )
    entry, turned = weight.parts[Part.BLOCK_SCALES], p.scales(weight).T.contiguous()
    p.editor.replace(entry.name, turned.numpy().tobytes(), shape=tuple(turned.shape))
    p.note(entry, f"shape {[*entry.shape]} becomes {[*turned.shape]}")


@fault(
    "F20i3",
    "scales-swizzled-and-padded",
    does="Block scales are stored in whole 128x4 tiles, padded where the weight ends.",
    threads=("NVIDIA/Model-Optimizer/pull/2038",),
    found_by=("NV108",),
)
def _padded(p: Planting) -> None:
    weight = p.nvfp4(
        lambda w: w.shape[0] % 128 != 0 or w.shape[1] % (4 * BLOCK_SIZE) != 0,
        "NVFP4 weight whose block scales do not fill 128x4 tiles",
    )
    entry, scales = weight.parts[Part.BLOCK_SCALES], p.scales(weight)
    shape = (layout.padded(scales.shape[0], 128), layout.padded(scales.shape[1], 4))
    p.editor.replace(entry.name, layout.swizzle(scales).numpy().tobytes(), shape=shape)
    p.note(entry, f"shape {[*entry.shape]} becomes {[*shape]}")


@fault(
    "F20j",
    "fp8-scale-missing",
    does="An FP8 weight has no weight_scale_inv.",
    threads=("deepseek-ai/DeepSeek-V3/pull/2", "unslothai/unsloth/pull/6749"),
    found_by=("NV801",),
    also=("NV101", "NV107"),
)
def _no_scale_inv(p: Planting) -> None:
    weight = p.weight(lambda w: w.format is WeightFormat.FP8_BLOCK, "FP8 weight with block scales")
    _drop(p, weight.parts[Part.SCALE_INV])


def _drop(p: Planting, entry: TensorEntry) -> None:
    p.editor.drop(entry.name)
    p.note(entry, "taken out of the shard and of the index")


def _mtp_layer(p: Planting) -> str:
    """Name the prefix of the first layer of multi-token prediction.

    Raises:
        CheckError: There is none.
    """
    prefix = _mtp_prefix(p)
    if not any(name.startswith(prefix) for name in p.checkpoint.tensors):
        p.one_of([], "layer of multi-token prediction")
    return prefix


def _mtp_prefix(p: Planting) -> str:
    return f"model.layers.{(p.checkpoint.config or {}).get('num_hidden_layers')}."


def _quantise(p: Planting, weight: LogicalWeight) -> None:
    """Store a BF16 weight as ModelOpt stores NVFP4."""
    values = p.tensor(weight.name).float()
    decode_scale = nvfp4.global_decode_scale(values.abs().max(), Convention.MODELOPT)
    packed, scales = nvfp4.quantize(values, decode_scale, Convention.MODELOPT)
    shard = weight.entries[0].shard
    rows, columns = values.shape
    p.editor.replace(weight.name, packed.numpy().tobytes(), dtype="U8", shape=(rows, columns // 2))
    p.note(p.editor.entry(weight.name), "stored as NVFP4 codes")
    one = decode_scale.reshape(1)
    for suffix, tensor, dtype, shape in (
        ("weight_scale", scales, "F8_E4M3", (rows, columns // BLOCK_SIZE)),
        ("weight_scale_2", one, "F32", ()),
        ("input_scale", one, "F32", ()),
    ):
        name = f"{weight.module}.{suffix}"
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        p.editor.add(name, data, dtype=dtype, shape=shape, shard=shard)
        p.note(p.editor.entry(name), "added")


FAULTS = (
    _absent,
    _twice,
    _stray,
    _excluded,
    _unquantised,
    _no_scales,
    _unusable,
    _no_mtp,
    _quantised_mtp,
    _bias_dtype,
    _not_packed,
    _scales_transposed,
    _padded,
    _no_scale_inv,
)
