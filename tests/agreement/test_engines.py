"""A serving engine's own model, captured by hooks: vLLM 0.32.0, as recorded on a CPU."""

import json
from pathlib import Path

import pytest

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import agree
from nvfp4check.agreement.assertion import assert_agrees
from nvfp4check.agreement.statistics import Decision

VLLM = Path(__file__).parents[2] / "goldens" / "engines" / "vllm-0.32.0"
REFERENCE = VLLM / "reference"


def test_vllm_in_bfloat16_is_within_the_bound_at_every_point_of_every_layer() -> None:
    result = assert_agrees(VLLM / "bfloat16", REFERENCE, allow_skips=True)

    assert [criterion.what for criterion in result.criteria] == [
        "layers within their derived bounds"
    ]
    points = {point.agreement.key for point in result.layers}
    assert len(points) == 29  # five points of five layers, and the scores of four routers
    held = [point for point in result.layers if point.bound is not None]
    assert {point.agreement.key for point in held} == points
    assert all(0 < point.bound.ratio < 1 for point in held if point.bound)


@pytest.mark.parametrize(
    ("fault", "layer", "point"),
    [
        ("bfloat16-without-mscale", 2, "attn_output"),
        ("bfloat16-without-bias", 3, "router_scores"),
    ],
)
def test_a_fault_planted_in_one_layer_of_vllm_is_named(fault: str, layer: int, point: str) -> None:
    result = agree(Run.open(REFERENCE), Run.open(VLLM / fault))

    assert result.verdict is Decision.FAIL
    found = result.divergence
    assert found is not None
    assert (found.layer, found.point, found.held_against) == (layer, point, "bound")
    # Each layer was given the reference's states: no other is blamed.
    assert {p.agreement.layer for p in result.layers if p.diverges} == {layer}
    with pytest.raises(AssertionError, match=f"they part at layer {layer}, {point}, prompt"):
        assert_agrees(VLLM / fault, REFERENCE, allow_skips=True)


def test_what_vllm_chose_is_not_recorded_and_said_to_be_missing() -> None:
    result = agree(Run.open(REFERENCE), Run.open(VLLM / "bfloat16"))

    assert [problem.message for problem in result.skipped] == [
        "router_experts was not recorded at any layer",
        "router_weights was not recorded at any layer",
        "no logits were recorded, and the reference has them: they are not compared",
    ]
    with pytest.raises(AssertionError, match="candidate: router_experts was not recorded"):
        assert_agrees(VLLM / "bfloat16", REFERENCE)
    versions = json.loads((VLLM / "bfloat16" / "run.json").read_text())["versions"]
    assert versions["engine"] == "vllm 0.32.0"
