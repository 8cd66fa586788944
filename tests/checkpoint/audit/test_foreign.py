"""Planted foreign tensors, each named by what it is."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from nvfp4check.checkpoint.audit.regions import RegionSearch, strange_regions
from nvfp4check.checkpoint.audit.sources import Reader
from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4ref.conventions import Convention
from nvfp4ref.nvfp4 import global_decode_scale, quantize

EXPERTS = "model.layers.2.mlp.experts"
GATE, UP = f"{EXPERTS}.5.gate_proj", f"{EXPERTS}.5.up_proj"
PARTS = ("weight", "weight_scale", "weight_scale_2")

Bytes = npt.NDArray[np.uint8]
Run = Callable[[CheckpointEditor], ValidationResult]


@pytest.fixture(scope="module")
def base(golden: SimpleNamespace) -> Checkpoint:
    return open_checkpoint(golden.fp8)


@pytest.fixture
def run(base: Checkpoint, tmp_path: Path) -> Run:
    def with_base(clone: CheckpointEditor) -> ValidationResult:
        options = ValidationOptions(base=base, journal=tmp_path / "journal.jsonl", select=("NV7",))
        return validate(open_checkpoint(clone.path), options)

    return with_base


def named(result: ValidationResult) -> dict[str, object]:
    """What each foreign weight holds; nothing else may have been found."""
    assert {finding.rule for finding in result.findings} == {"NV703"}
    return {f"{f.tensor}".removesuffix(".weight"): f.observed for f in result.findings}


def exchange(clone: CheckpointEditor, first: str, second: str) -> None:
    for part in PARTS:
        clone.swap(f"{first}.{part}", f"{second}.{part}")


def test_experts_in_one_anothers_place_are_named_with_the_permutation(
    clone: CheckpointEditor, run: Run
) -> None:
    projections = ("gate_proj", "up_proj", "down_proj")
    for projection in projections:
        exchange(clone, f"{EXPERTS}.5.{projection}", f"{EXPERTS}.6.{projection}")
        exchange(clone, f"{EXPERTS}.6.{projection}", f"{EXPERTS}.9.{projection}")
    result = run(clone)

    assert named(result) == {
        f"{EXPERTS}.{here}.{projection}": f"{EXPERTS}.{there}.{projection}.weight"
        for here, there in ((5, 6), (6, 9), (9, 5))
        for projection in projections
    }
    assert result.audit is not None
    assert result.audit.to_json()["patterns"] == [
        f"{EXPERTS}: experts in other places: 5 holds 6, 6 holds 9, 9 holds 5"
    ]


def test_gate_and_up_exchanged_are_named(clone: CheckpointEditor, run: Run) -> None:
    exchange(clone, GATE, UP)
    result = run(clone)

    assert named(result) == {GATE: f"{UP}.weight", UP: f"{GATE}.weight"}
    assert result.audit is not None
    assert "what it is fused with" in result.audit.to_json()["patterns"][0]


def test_rows_of_gate_and_up_exchanged_are_named(clone: CheckpointEditor, run: Run) -> None:
    for part in PARTS[:2]:
        gate, up = clone.raw(f"{GATE}.{part}"), clone.raw(f"{UP}.{part}")
        half = len(gate) // 2
        kept = np.array(gate[half:])
        gate[half:] = up[half:]
        up[half:] = kept
    result = run(clone)

    assert named(result) == {GATE: f"{UP}.weight", UP: f"{GATE}.weight"}
    [gate, up] = result.findings
    assert gate.count == up.count == 32
    assert f"in 32 of 64 rows: rows 32 to 63 are those of {UP}.weight" in gate.message
    assert f"in 32 of 64 rows: rows 32 to 63 are those of {GATE}.weight" in up.message


def test_layers_in_one_anothers_place_are_named(clone: CheckpointEditor, run: Run) -> None:
    other = EXPERTS.replace("layers.2", "layers.3")
    for expert in range(16):
        exchange(clone, f"{EXPERTS}.{expert}.down_proj", f"{other}.{expert}.down_proj")
    result = run(clone)

    assert len(named(result)) == 32
    assert result.audit is not None
    assert result.audit.to_json()["patterns"] == [
        "16 weights hold that of the layer 1 below",
        "16 weights hold that of the layer 1 above",
    ]


def _nibbles(codes: Bytes) -> Bytes:
    return (codes >> 4) | (codes << 4)


@pytest.mark.parametrize(
    ("change", "scales_too", "how"),
    [
        (_nibbles, False, "with the nibbles of every byte swapped"),
        (lambda codes: codes ^ 0x88, False, "negated"),
        (lambda a: np.roll(a, len(a) // 2, 0), True, "with the halves of its rows swapped"),
        (lambda a: a[::-1], True, "with its rows in reverse"),
        (lambda a: np.roll(a, a.shape[1] // 2, 1), True, "with the halves of its columns swapped"),
        (
            lambda a: a.reshape(2, len(a) // 2, -1).swapaxes(0, 1).reshape(a.shape),
            True,
            "with the halves of its rows interleaved",
        ),
        (
            lambda a: a[np.random.default_rng(0).permutation(len(a))],
            True,
            "rows in other places: row 0 is the base's row",
        ),
    ],
)
def test_the_own_tensor_changed_is_named_by_the_change(
    clone: CheckpointEditor,
    run: Run,
    change: Callable[[Bytes], Bytes],
    scales_too: bool,
    how: str,
) -> None:
    for part in PARTS[: 2 if scales_too else 1]:
        raw = clone.raw(f"{GATE}.{part}")
        raw[...] = change(np.array(raw))
    result = run(clone)

    [(name, holds)] = named(result).items()
    assert name == GATE
    assert f"{holds}".startswith(f"{GATE}.weight ")
    assert how in f"{holds}"
    assert how in result.findings[0].message


def test_a_square_tensor_transposed_is_named(tmp_path: Path) -> None:
    x = (torch.randn(128, 128, generator=torch.manual_seed(0)) * 0.02).bfloat16()
    decode = global_decode_scale(x.abs().amax(), Convention.MODELOPT)
    codes, scales = quantize(x.T.contiguous(), decode, Convention.MODELOPT)
    stored = {f"{GATE}.weight": codes, f"{GATE}.weight_scale": scales}
    stored[f"{GATE}.weight_scale_2"] = decode
    for folder, tensors in (("ours", stored), ("base", {f"{GATE}.weight": x})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    options = ValidationOptions(
        base=open_checkpoint(tmp_path / "base"), journal=tmp_path / "j", select=("NV7",)
    )
    result = validate(open_checkpoint(tmp_path / "ours"), options)

    assert named(result) == {GATE: f"{GATE}.weight transposed"}
    assert result.findings[0].expected == f"{GATE}.weight"


def test_what_is_no_tensor_of_the_base_is_said_so(clone: CheckpointEditor, run: Run) -> None:
    raw = clone.raw(f"{GATE}.weight")
    raw[...] = np.random.default_rng(0).integers(0, 256, raw.shape)

    assert named(run(clone)) == {GATE: "no tensor of the base"}


Box = tuple[int, int, int, int]
"""Rows from and to, columns from and to."""


def copy_box(clone: CheckpointEditor, source: str, box: Box, target: str, at: Box) -> None:
    """Put codes and scales of some rows and columns where others are."""
    for part, size in (("weight", 2), ("weight_scale", 16)):
        there = np.array(clone.raw(f"{source}.{part}"))
        here = clone.raw(f"{target}.{part}")
        here[at[0] : at[1], at[2] // size : at[3] // size] = there[
            box[0] : box[1], box[2] // size : box[3] // size
        ]


def swap_boxes(clone: CheckpointEditor, name: str, one: Box, two: Box) -> None:
    for part, size in (("weight", 2), ("weight_scale", 16)):
        raw = clone.raw(f"{name}.{part}")
        boxes = [
            (slice(box[0], box[1]), slice(box[2] // size, box[3] // size)) for box in (one, two)
        ]
        kept = np.array(raw[boxes[0]])
        raw[boxes[0]] = raw[boxes[1]]
        raw[boxes[1]] = kept


def only_message(result: ValidationResult) -> str:
    [finding] = result.findings
    assert finding.rule == "NV703"
    return finding.message


def test_one_foreign_row_is_named_with_the_row_it_is(clone: CheckpointEditor, run: Run) -> None:
    copy_box(clone, GATE, (40, 41, 0, 256), GATE, (7, 8, 0, 256))
    result = run(clone)

    assert only_message(result).endswith("in 1 of 64 rows: row 7 is the base's row 40")
    assert result.findings[0].count == 1


def test_one_row_of_another_expert_is_named(clone: CheckpointEditor, run: Run) -> None:
    other = f"{EXPERTS}.11.gate_proj"
    copy_box(clone, other, (7, 8, 0, 256), GATE, (7, 8, 0, 256))
    result = run(clone)

    assert only_message(result).endswith(f"row 7 is that of {other}.weight")
    assert result.findings[0].observed == f"{other}.weight"


def test_one_row_that_is_nobodys_is_said_so(clone: CheckpointEditor, run: Run) -> None:
    raw = clone.raw(f"{GATE}.weight")
    raw[7] = np.random.default_rng(0).integers(0, 256, raw.shape[1])

    assert only_message(run(clone)).endswith("row 7 is not the base's, and found nowhere")


def test_heads_in_one_anothers_place_are_named_by_their_rows(
    clone: CheckpointEditor, run: Run
) -> None:
    swap_boxes(clone, GATE, (8, 16, 0, 256), (24, 32, 0, 256))

    assert only_message(run(clone)).endswith(
        "in 16 of 64 rows: rows 8 to 15 are the base's rows 24 to 31; "
        "rows 24 to 31 are the base's rows 8 to 15"
    )


def test_ranks_that_changed_places_along_the_columns_are_named(
    clone: CheckpointEditor, run: Run
) -> None:
    swap_boxes(clone, GATE, (0, 64, 0, 64), (0, 64, 128, 192))
    message = only_message(run(clone))

    assert "columns 0 to 63 of all 64 rows are the base's columns 128 to 191" in message
    assert "columns 128 to 191 of all 64 rows are the base's columns 0 to 63" in message


def test_a_rank_of_another_tensor_is_named(clone: CheckpointEditor, run: Run) -> None:
    other = f"{EXPERTS}.11.gate_proj"
    copy_box(clone, other, (0, 64, 64, 128), GATE, (0, 64, 64, 128))

    assert only_message(run(clone)).endswith(
        f"columns 64 to 127 of all 64 rows are those of {other}.weight"
    )


def test_a_few_damaged_bytes_are_damage_and_nobody_elses_row(
    clone: CheckpointEditor, run: Run
) -> None:
    clone.raw(f"{GATE}.weight")[7, 8:48] ^= 0xFF

    assert {finding.rule for finding in run(clone).findings} == {"NV701"}


def test_a_weight_that_is_strange_in_many_places_is_not_searched_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.manual_seed(0)
    x = (torch.randn(256, 1024, generator=generator) * 0.02).bfloat16()
    decode = global_decode_scale(x.abs().amax(), Convention.MODELOPT)
    codes, scales = quantize(x, decode, Convention.MODELOPT)
    patches = torch.rand(256, 64, generator=generator) < 0.4
    codes.view(256, 64, 8)[patches] ^= 0x88  # all signs of these blocks
    stored = {f"{GATE}.weight": codes, f"{GATE}.weight_scale": scales}
    stored[f"{GATE}.weight_scale_2"] = decode
    for folder, tensors in (("ours", stored), ("base", {f"{GATE}.weight": x})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    ours, base = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "base")
    readers = Reader(ours), Reader(base)
    name = f"{GATE}.weight"
    looks: list[int] = []
    rows_with = RegionSearch._rows_with

    def counted(*arguments: Any) -> Any:
        looks.append(1)
        return rows_with(*arguments)

    monkeypatch.setattr(RegionSearch, "_rows_with", counted)
    regions = strange_regions(readers[0], ours.weights[name], readers[1], base.weights[name])

    assert len(regions) > 100
    assert RegionSearch(*readers, base).name(ours.weights[name]) is None
    assert len(looks) == 8
