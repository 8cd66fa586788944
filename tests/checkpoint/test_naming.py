from collections import Counter
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import (
    FUSED_GROUPS,
    Layout,
    LogicalWeight,
    Part,
    WeightFormat,
    logical_weights,
)
from nvfp4check.checkpoint.opening import open_checkpoint

LINEAR = "model.layers.1.mlp.experts.3.gate_proj"


def gathered(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, LogicalWeight]:
    """Logical weights of one module `m`, from leaf -> (dtype, shape)."""
    return logical_weights(
        TensorEntry(f"m.{leaf}", dtype, shape, "x.safetensors", 0, 0)
        for leaf, (dtype, shape) in tensors.items()
    )


@pytest.mark.parametrize(
    ("which", "format_", "layout", "count"),
    [
        ("bf16", WeightFormat.BF16, Layout.PLAIN, 326),
        ("fp8", WeightFormat.FP8_BLOCK, Layout.DEEPSEEK_FP8, 288),
        ("nvfp4", WeightFormat.NVFP4, Layout.MODELOPT, 212),
        ("ct", WeightFormat.NVFP4, Layout.COMPRESSED_TENSORS, 104),
    ],
)
def test_the_weights_of_each_producer_are_recognised(
    golden: SimpleNamespace, which: str, format_: WeightFormat, layout: Layout, count: int
) -> None:
    weights = open_checkpoint(getattr(golden, which)).weights
    assert Counter((w.format, w.layout) for w in weights.values())[format_, layout] == count


@pytest.mark.parametrize("which", ["fp8", "nvfp4"])
def test_logical_weights_bear_the_names_and_shapes_of_the_bf16_model(
    golden: SimpleNamespace, which: str
) -> None:
    ours = open_checkpoint(getattr(golden, which)).weights
    base = open_checkpoint(golden.bf16).weights
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in base.items()}


@pytest.mark.parametrize("which", ["bf16", "fp8", "nvfp4", "ct"])
def test_every_tensor_belongs_to_exactly_one_weight(golden: SimpleNamespace, which: str) -> None:
    checkpoint = open_checkpoint(getattr(golden, which))
    parts = [entry.name for w in checkpoint.weights.values() for entry in w.entries]
    assert sorted(parts) == sorted(checkpoint.tensors)


def test_a_modelopt_weight_has_its_four_parts(golden: SimpleNamespace) -> None:
    weight = open_checkpoint(golden.nvfp4).weights[f"{LINEAR}.weight"]
    assert {part: entry.name for part, entry in weight.parts.items()} == {
        Part.CODES: f"{LINEAR}.weight",
        Part.BLOCK_SCALES: f"{LINEAR}.weight_scale",
        Part.GLOBAL_SCALE: f"{LINEAR}.weight_scale_2",
        Part.INPUT_SCALE: f"{LINEAR}.input_scale",
    }
    assert weight.shape == (64, 256)
    assert not weight.global_scale_is_reciprocal
    assert weight.nbytes == 64 * 128 + 64 * 16 + 4 + 4


def test_a_compressed_tensors_weight_is_named_as_in_the_model_and_has_reciprocals(
    golden: SimpleNamespace,
) -> None:
    weight = open_checkpoint(golden.ct).weights["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert weight.parts[Part.CODES].name.endswith(".weight_packed")
    assert weight.parts[Part.GLOBAL_SCALE].name.endswith(".weight_global_scale")
    assert weight.parts[Part.INPUT_SCALE].name.endswith(".input_global_scale")
    assert weight.global_scale_is_reciprocal


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2", "input_scale"])
def test_a_weight_that_lost_a_part_is_still_that_weight(clone: CheckpointEditor, part: str) -> None:
    clone.drop(f"{LINEAR}.{part}")
    weight = open_checkpoint(clone.path).weights[f"{LINEAR}.weight"]
    assert weight.format is WeightFormat.NVFP4
    assert len(weight.parts) == 3


def test_scales_beside_an_unquantised_weight_are_kept_with_it() -> None:
    weight = gathered(weight=("BF16", (4, 32)), weight_scale=("F8_E4M3", (4, 2)))["m.weight"]
    assert weight.format is WeightFormat.BF16
    assert weight.parts.keys() == {Part.PLAIN, Part.BLOCK_SCALES}


@pytest.mark.parametrize(
    ("tensors", "format_"),
    [
        ({"weight": ("U8", (4, 16))}, WeightFormat.NVFP4),
        ({"weight": ("F4", (4, 32)), "weight_scale": ("F8_E4M3", (4, 2))}, WeightFormat.NVFP4),
        ({"weight": ("U8", (4, 16)), "weight_scale": ("U8", (4, 1))}, WeightFormat.MXFP4),
        ({"weight": ("U8", (4, 16)), "weight_scale": ("F8_E8M0", (4, 1))}, WeightFormat.MXFP4),
        ({"weight": ("F8_E4M3", (4, 32))}, WeightFormat.FP8),
        ({"weight": ("F8_E4M3", (4, 32)), "weight_scale": ("F32", ())}, WeightFormat.FP8),
        (
            {"weight": ("F8_E4M3", (4, 32)), "weight_scale_inv": ("F32", (1, 1))},
            WeightFormat.FP8_BLOCK,
        ),
        ({"weight_scale_inv": ("F32", (1, 1))}, WeightFormat.FP8_BLOCK),
        (
            {"weight_packed": ("I32", (4, 4)), "weight_shape": ("I64", (2,))},
            WeightFormat.PACKED_INT,
        ),
        ({"weight": ("F32", (4,))}, WeightFormat.F32),
        ({"weight": ("F16", (4,))}, WeightFormat.F16),
        ({"weight": ("I64", (4,))}, WeightFormat.OTHER),
    ],
    ids=range(12),
)
def test_the_format_follows_from_dtypes_and_partners(
    tensors: dict[str, tuple[str, tuple[int, ...]]], format_: WeightFormat
) -> None:
    assert gathered(**tensors)["m.weight"].format is format_


def test_packed_codes_have_twice_the_columns_and_f4_counts_them_itself() -> None:
    assert gathered(weight=("U8", (4, 16)))["m.weight"].shape == (4, 32)
    assert gathered(weight=("F4", (4, 32)))["m.weight"].shape == (4, 32)
    assert gathered(weight=("U8", (8, 4, 16)))["m.weight"].shape == (8, 4, 32)
    assert gathered(weight=("U8", ()))["m.weight"].shape == ()


def test_scales_of_the_cache_and_biases_stand_alone_under_their_own_names() -> None:
    weights = gathered(k_scale=("F32", ()), v_scale=("F32", ()), bias=("BF16", (4,)))
    assert weights["m.k_scale"].format is WeightFormat.KV_SCALE
    assert weights["m.k_scale"].parts.keys() == {Part.K_SCALE}
    assert weights["m.v_scale"].parts.keys() == {Part.V_SCALE}
    assert weights["m.bias"].format is WeightFormat.BF16


def test_a_scale_of_the_cache_beside_a_weight_is_its_part() -> None:
    weight = gathered(k_scale=("F32", ()), weight=("BF16", (4, 4)))["m.weight"]
    assert weight.parts.keys() == {Part.PLAIN, Part.K_SCALE}


def test_a_tensor_of_another_name_is_a_weight_of_its_own() -> None:
    weights = gathered(e_score_correction_bias=("F32", (16,)))
    assert weights["m.e_score_correction_bias"].format is WeightFormat.F32


def test_a_packed_and_a_plain_weight_of_one_module_are_both_kept() -> None:
    weight = gathered(weight=("BF16", (4, 32)), weight_packed=("U8", (4, 16)))["m.weight"]
    assert weight.format is WeightFormat.NVFP4
    assert weight.parts.keys() == {Part.CODES, Part.PLAIN}


def test_a_name_without_dots_and_an_empty_name_are_weights() -> None:
    entries = [TensorEntry(name, "BF16", (1,), "x", 0, 2) for name in ("weight", "", "x", ".")]
    assert set(logical_weights(entries)) == {"weight", "", "x", "."}


def test_fused_groups_are_those_that_engines_concatenate() -> None:
    assert FUSED_GROUPS["gate_up_proj"] == ("gate_proj", "up_proj")
    members = [member for group in FUSED_GROUPS.values() for member in group]
    assert len(members) == len(set(members))


@pytest.mark.parametrize(
    ("shape", "scale", "tiles"),
    [
        ((256, 384), (2, 3), (2, 3)),
        ((256, 384), (2, 1, 3, 1), (2, 3)),
        ((192, 96), (2, 1), (2, 1)),
        ((100, 100), (1, 1), (1, 1)),
        ((256, 384), (256, 1), None),
        ((256, 384), (256,), None),
        ((256, 384), (), None),
        ((256, 384), (3, 2), None),
        ((256, 384), (2, 3, 1, 1), None),
        ((2, 256, 384), (2, 3), None),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_shape_of_fp8s_scales_says_what_they_are_for(
    shape: tuple[int, ...], scale: tuple[int, ...], tiles: tuple[int, ...] | None, dtype: str
) -> None:
    [weight] = gathered(weight=("F8_E4M3", shape), weight_scale=(dtype, scale)).values()
    assert weight.format is (WeightFormat.FP8 if tiles is None else WeightFormat.FP8_BLOCK)
    assert weight.layout is Layout.MODELOPT
    entry = weight.parts[Part.SCALE if tiles is None else Part.SCALE_INV]
    assert (entry.name, entry.shape) == ("m.weight_scale", tiles or scale)


def test_deepseeks_scale_is_not_taken_for_another() -> None:
    parts = {"weight": ("F8_E4M3", (256, 384)), "weight_scale": ("F32", (2, 3))}
    [weight] = gathered(**parts, weight_scale_inv=("F32", (2, 3))).values()
    assert weight.parts[Part.SCALE_INV].name == "m.weight_scale_inv"
    assert weight.parts[Part.SCALE].name == "m.weight_scale"
