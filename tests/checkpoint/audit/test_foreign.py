"""Planted foreign tensors, each named by what it is."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

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
    assert all("of its 64 rows 32 are" in finding.message for finding in result.findings)


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

    assert named(result) == {GATE: f"{GATE}.weight"}
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

    assert named(result) == {GATE: f"{GATE}.weight"}
    assert "transposed" in result.findings[0].message


def test_what_is_no_tensor_of_the_base_is_said_so(clone: CheckpointEditor, run: Run) -> None:
    raw = clone.raw(f"{GATE}.weight")
    raw[...] = np.random.default_rng(0).integers(0, 256, raw.shape)

    assert named(run(clone)) == {GATE: None}
