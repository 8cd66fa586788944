"""What inspect shows, counted again by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.inspection import NonFinite, find_weight, inspect
from nvfp4check.checkpoint.naming import Part, WeightFormat
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.findings import CheckError
from nvfp4ref import nvfp4

WEIGHT = "model.layers.2.mlp.experts.5.down_proj.weight"


def test_a_whole_checkpoint_is_counted(golden: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(golden.nvfp4)
    found = inspect(checkpoint)
    quantised = [w for w in checkpoint.weights.values() if w.format is WeightFormat.NVFP4]
    codes = np.concatenate(
        [checkpoint.tensor_bytes(weight.parts[Part.CODES]) for weight in quantised]
    )
    scales = np.concatenate(
        [checkpoint.tensor_bytes(weight.parts[Part.BLOCK_SCALES]) for weight in quantised]
    )
    nibbles = np.concatenate([codes & 15, codes >> 4])

    assert found.code_histogram == tuple(np.bincount(nibbles, minlength=16).tolist())
    assert found.scale_histogram == tuple(np.bincount(scales, minlength=256).tolist())
    assert found.formats["nvfp4"].weights == len(quantised)
    assert found.formats["nvfp4"].elements == nibbles.size
    assert sum(totals.bytes for totals in found.formats.values()) == checkpoint.nbytes
    assert sum(row.count for row in found.kinds) == len(checkpoint.weights)
    assert sum(row.bytes for row in found.kinds) == checkpoint.nbytes
    assert found.sds is not None
    assert found.sds.count == len(quantised)
    assert found.skipped == found.non_finite == ()


def test_the_experts_of_all_layers_are_one_kind(golden: SimpleNamespace) -> None:
    rows = inspect(open_checkpoint(golden.nvfp4), level=RuleLevel.HEADERS).kinds
    experts = [row for row in rows if "experts.*.gate_proj" in row.kind and row.format == "nvfp4"]

    assert [(row.kind, row.count) for row in experts] == [
        ("model.layers.*.mlp.experts.*.gate_proj.weight", 4 * 16)
    ]


def test_one_weight_is_decoded_as_the_reference_does(golden: SimpleNamespace) -> None:
    checkpoint = open_checkpoint(golden.nvfp4)
    view = inspect(checkpoint, WEIGHT).weight
    parts = checkpoint.weights[WEIGHT].parts
    decoded = nvfp4.dequantize(
        checkpoint.torch(parts[Part.CODES]),
        checkpoint.torch(parts[Part.BLOCK_SCALES]),
        checkpoint.torch(parts[Part.GLOBAL_SCALE]),
    )

    assert view is not None
    assert [list(row) for row in view.values] == decoded[:4, :16].double().tolist()
    assert view.sd is not None
    # Each element is rounded once to float32, so sums differ by no more than that.
    assert view.sd == pytest.approx(float(decoded.double().std(correction=0)), rel=2**-23, abs=0)
    assert view.global_decode_scale == checkpoint.scalar(parts[Part.GLOBAL_SCALE])
    assert {stored.part for stored in view.stored} == {part.value for part in parts}


def test_compressed_tensors_scales_are_turned_to_multiply(golden: SimpleNamespace) -> None:
    found = inspect(open_checkpoint(golden.ct))

    assert found.global_scales is not None
    assert found.input_scales is not None
    assert found.global_scales.max < 1
    assert found.input_scales.max < 1


@pytest.mark.parametrize(
    "name", [WEIGHT, WEIGHT.removesuffix(".weight"), f"{WEIGHT}_scale", f"{WEIGHT}_scale_2"]
)
def test_a_weight_is_found_by_any_of_its_names(golden: SimpleNamespace, name: str) -> None:
    assert find_weight(open_checkpoint(golden.nvfp4), name).name == WEIGHT


def test_an_unknown_name_is_refused_with_close_ones(golden: SimpleNamespace) -> None:
    with pytest.raises(CheckError, match=r"close to it: .*experts\.5\.down_proj\.weight"):
        inspect(open_checkpoint(golden.nvfp4), WEIGHT.replace("proj", "porj"))


def test_the_fp8_base_is_decoded_too(golden: SimpleNamespace) -> None:
    view = inspect(open_checkpoint(golden.fp8), "model.layers.0.mlp.down_proj").weight

    assert view is not None
    assert view.format == "fp8-block"
    assert len(view.values) == 4
    assert len(view.values[0]) == 16


def test_headers_alone_read_no_byte_of_a_weight(golden: SimpleNamespace) -> None:
    found = inspect(open_checkpoint(golden.nvfp4), WEIGHT, level=RuleLevel.HEADERS)

    assert found.code_histogram is None
    assert found.global_scales is None
    assert found.weight is not None
    assert found.weight.values == ()


def test_numbers_that_are_not_finite_are_counted(
    clone_of: Callable[[Path], CheckpointEditor], golden: SimpleNamespace
) -> None:
    copy = clone_of(golden.bf16)
    name = "model.layers.1.self_attn.q_a_proj.weight"
    raw = copy.array(name, "<u2")
    raw[0, :3] = (0x7F80, 0xFFC0, 0x7F81)

    assert inspect(open_checkpoint(copy.path), name).non_finite == (NonFinite(name, 2, 1),)


def test_a_weight_without_scales_is_skipped_with_the_reason(clone: CheckpointEditor) -> None:
    clone.drop(f"{WEIGHT}_scale")
    found = inspect(open_checkpoint(clone.path))

    assert found.skipped == ((WEIGHT, "has no block-scales"),)


def test_the_document_is_plain_json_and_says_what_it_is(golden: SimpleNamespace) -> None:
    document = inspect(open_checkpoint(golden.nvfp4), WEIGHT).to_json()
    text = json.dumps(document, allow_nan=False)

    assert json.loads(text)["schema"] == "nvfp4check/inspect/1"
    assert json.loads(text)["tool"]["name"] == "nvfp4check"
    assert json.loads(text)["weight"]["shape"] == [256, 64]
