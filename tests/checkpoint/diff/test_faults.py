"""Every fault of the catalogue that a tensor can carry is classed, and named where it can be."""

import numpy as np
import pytest
import torch

from nvfp4check.checkpoint.diff.classes import FailOn
from nvfp4check.checkpoint.diff.run import DiffOptions, diff_checkpoints
from nvfp4check.checkpoint.faults.injection import inject
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4ref import packing

#: Fault, class of the weights it changes, words of the diagnosis, and whether the default fails.
PLANTED = [
    ("nibbles-swapped", "different", "nibbles of every byte swapped", True),
    ("block-split-in-halves", "different", "as GGML does", True),
    ("codes-transposed", "shape-changed", "transposed", True),
    ("codes-truncated", "requantized", "one step nearer to zero", False),
    ("codes-all-zero", "different", "every code of b is 0", True),
    ("scale-bytes-as-numbers", "shape-changed", "block-scales F8_E4M3", True),
    ("scales-in-e4m3fnuz", "scales-only", "are NaN, the others times 2", True),
    ("scale-overflows-to-nan", "scales-only", "are NaN, the others times 1.2", True),
    ("scale-clipped", "different", "over 3", True),
    ("scale-clamped-at-240", "different", "clamped at 240", True),
    ("dead-block", "different", "became 0", True),
    ("zero-block-nan", "different", "are NaN", True),
    ("global-scale-folded-in", "scales-only", "folded into the block scales", False),
    ("global-scale-without-6", "scales-only", "times 6, the largest code", False),
    ("scales-raised-to-powers-of-two", "scales-only", "rounded up to powers of two", True),
    ("scales-cut-to-powers-of-two", "scales-only", "cut to powers of two", True),
    ("scale-exponent-twice", "scales-only", "the exponent is off", True),
    ("scales-of-the-next-block", "scales-only", "shifted by one block", True),
    ("blocks-of-32", "requantized", "blocks of 32", False),
    ("scales-of-another-expert", "scales-only", "its block scales are those of", True),
    ("global-scale-reciprocal", "scales-only", "is the reciprocal of a's", True),
    ("global-scale-dropped", "scales-only", "is 1: dropped", True),
    ("global-scale-squared", "scales-only", "is the square of a's", True),
    ("global-scale-bits-misread", "scales-only", "a constant factor", True),
    ("gate-up-maximum-without-rescale", "scales-only", "on the average of all blocks", True),
    ("gate-up-input-scales-differ", "input-scale-only", "another calibration", False),
    ("scales-swizzled", "scales-only", "swizzled into 128x4 tiles", True),
    ("scales-swizzled-twice", "scales-only", "into 128x4 tiles twice", True),
    ("scales-in-8x4-tiles", "scales-only", "in 8x4 tiles", True),
    ("scale-rows-permuted", "scales-only", "rows of every 128 permuted", True),
    ("input-scale-missing", "input-scale-only", "b has no input scale", False),
    ("input-scale-1000-times-too-large", "input-scale-only", "times 1000", False),
    ("router-bias-rounded", "different", "b is a rounded to bfloat16", True),
    ("router-bias-not-finite", "different", "NaN or infinite", True),
    ("every-rank-took-shard-0", "scales-only", "every rank took shard 0", True),
    ("weights-moved-without-scales", "different", "its block scales stayed behind", True),
    ("global-scale-of-another-expert", "scales-only", "a constant factor", True),
    ("global-scale-divided-by-tp", "scales-only", "over 4: a constant factor", True),
    ("quantised-though-excluded", "format-changed", "", False),
    ("unquantised-though-listed", "format-changed", "", False),
    ("expert-scales-removed", "shape-changed", "becomes none", True),
    ("mtp-dropped", "only-in-a", "", True),
    ("mtp-halves-swapped", "different", "halves of its columns swapped", True),
    ("mtp-norms-swapped", "different", "it is a's model.layers.5", True),
    ("codes-not-packed", "shape-changed", "codes stand one a byte", True),
    ("scales-transposed", "shape-changed", "[16, 64]", True),
]


@pytest.mark.parametrize(("fault", "cls", "said", "fails"), PLANTED, ids=[p[0] for p in PLANTED])
def test_a_planted_fault_is_classed_and_named(golden, tmp_path, fault, cls, said, fails):
    inject(golden.nvfp4, tmp_path / "faulty", fault)

    found = diff_checkpoints(open_checkpoint(golden.nvfp4), open_checkpoint(tmp_path / "faulty"))

    changed = [diff for diff in found.weights if diff.cls.value != "identical"]
    assert {diff.cls.value for diff in changed} == {cls}
    assert all(said in (diff.diagnosis or "") for diff in changed)
    assert bool(found.failing(FailOn.DIFFERENT)[0]) is fails
    assert found.failing(FailOn.BYTES)[0]


def compare(a, b):
    return diff_checkpoints(open_checkpoint(a), open_checkpoint(b), DiffOptions())


def test_permuted_experts_are_named_with_their_permutation(golden, clone):
    moves = {0: 3, 3: 7, 7: 0}
    parts = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for part in parts:
            names = {n: f"model.layers.2.mlp.experts.{n}.{leaf}.{part}" for n in moves}
            held = {n: clone.read(name) for n, name in names.items()}
            for here, there in moves.items():
                clone.patch(names[here], held[there])

    found = compare(golden.nvfp4, clone)

    assert found.summary["different"] == 9
    assert found.patterns == (
        "model.layers.2.mlp.experts: experts in other places: 0 holds 3, 3 holds 7, 7 holds 0",
    )


def test_exchanged_gate_and_up_are_named(golden, clone):
    for part in ("weight", "weight_scale", "weight_scale_2"):
        parent = "model.layers.0.mlp"
        clone.swap(f"{parent}.gate_proj.{part}", f"{parent}.up_proj.{part}")

    found = compare(golden.nvfp4, clone)

    assert "2 linears hold what it is fused with" in found.patterns[0]
    assert "up_proj" in next(d for d in found.weights if d.cls.value == "different").diagnosis


def test_a_layer_that_holds_the_next_one_is_named(golden, clone):
    for leaf in ("q_a_proj", "kv_a_proj_with_mqa"):
        name = f"model.layers.1.self_attn.{leaf}.weight"
        clone.patch(name, clone.read(name.replace("layers.1", "layers.2")))

    found = compare(golden.nvfp4, clone)

    assert found.patterns == ("2 weights hold that of the layer 1 above",)


def test_a_factor_that_is_a_power_of_two_is_exact(golden, clone):
    name = "model.layers.1.self_attn.q_a_proj.weight"
    raw = np.frombuffer(clone.read(name), np.uint16)
    moved = np.where((raw & 0x7F80) > 0, raw + np.uint16(2 << 7), raw).astype(np.uint16)
    clone.patch(name, moved.tobytes())

    changed = [d for d in compare(golden.nvfp4, clone).weights if d.cls.value != "identical"]

    assert [diff.diagnosis for diff in changed] == ["b is a times 4: a constant factor"]


def test_ties_that_are_rounded_the_other_way_are_a_matter_of_convention(golden, clone):
    """Codes one step apart under equal scales: the original lay between, at the tie."""
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    rows, half = clone.entry(name).shape
    packed = torch.frombuffer(bytearray(clone.read(name)), dtype=torch.uint8).view(rows, half)
    codes = packing.unpack(packed)
    even = (codes & 1 == 0) & ((codes & 7) < 6)
    chosen = even & (torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.01)
    clone.patch(name, packing.pack(torch.where(chosen, codes + 1, codes)).numpy().tobytes())

    (changed,) = [d for d in compare(golden.nvfp4, clone).weights if d.cls.value != "identical"]

    assert changed.cls.value == "requantized"
    assert changed.changed_codes == int(chosen.sum())
    assert changed.ulp_histogram == {"1": int(chosen.sum())}
    assert changed.bound_holds
    assert "nearer to zero" in changed.diagnosis


def test_the_worst_element_is_where_it_was_planted(golden, clone):
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    codes = clone.raw(name)
    place = (11, 17)
    codes[place] ^= 0x80
    codes.flush()

    (changed,) = [d for d in compare(golden.nvfp4, clone).weights if d.cls.value != "identical"]

    assert (changed.worst.row, changed.worst.column) == (11, 35)
    assert changed.worst.a == -changed.worst.b
    assert changed.max_abs == abs(changed.worst.a - changed.worst.b)
    assert changed.changed_codes == 1
    assert changed.cls.value == "different"
