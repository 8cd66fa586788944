"""transformers' own layers, each given the reference's states, lie within the derived bounds.

The weights are those of the trained model, loaded in float32 and in bfloat16; transformers rounds
its norms twice, its scores and weights of attention, and the products of its experts.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import agree
from nvfp4check.agreement.assertion import assert_agrees
from nvfp4check.agreement.layers import VALUE_POINTS
from nvfp4check.capture import capture
from nvfp4check.forward.options import Activations, ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

transformers = pytest.importorskip("transformers")

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"
PROMPTS = [
    Prompt(id="long", tokens=tuple((7 * i * i + 3 * i) % 1024 for i in range(90))),
    Prompt(id="short", tokens=(3, 1, 4, 1, 5)),
]


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = ForwardOptions(activations=Activations.ALL, bounds=("float32", "bfloat16"))
    return run_forward(TINY / "bf16", PROMPTS, tmp_path_factory.mktemp("b") / "run", options).run


def captured(dtype: str, run: Path, inputs: Run) -> Run:
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(
        TINY / "bf16", torch_dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    with torch.no_grad(), capture(model, run, engine="transformers", inputs=inputs) as session:
        for prompt in PROMPTS:
            with session.prompt(prompt.id, prompt.tokens or ()):
                model(input_ids=torch.tensor([prompt.tokens]), use_cache=False)
    return Run.open(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_lies_within_every_bound(dtype: str, bounded: Run, tmp_path: Path) -> None:
    run = captured(dtype, tmp_path / "run", bounded)

    result = assert_agrees(run, bounded)

    held = {h.agreement.key: h.bound for h in result.layers}
    assert {point for _, point in held} == set(VALUE_POINTS)
    assert all(bound is not None and bound.whole for bound in held.values())
    worst = max(bound.ratio for bound in held.values() if bound is not None)
    assert 0.02 < worst < 1


def test_transformers_without_its_interleaved_rotation_lies_beyond(
    bounded: Run, tmp_path: Path
) -> None:
    module = transformers.models.deepseek_v3.modeling_deepseek_v3

    def halves(q: Any, k: Any, *args: Any, **more: Any) -> Any:
        return module.apply_rotary_pos_emb(q, k, *args[:2])

    with patch.object(module, "apply_rotary_pos_emb_interleave", halves):
        run = captured("bfloat16", tmp_path / "run", bounded)

    result = agree(bounded, run)

    assert result.divergence is not None
    assert (result.divergence.layer, result.divergence.point) == (0, "attn_output")
    assert {h.agreement.layer for h in result.layers if h.bound and h.bound.exceeding} == set(
        range(5)
    )
