"""What is kept of the logits: all of them, the best, or the state they come from."""

from collections.abc import Callable
from pathlib import Path

import torch

from nvfp4check.forward.options import (
    ForwardOptions,
    Logits,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt


def test_the_best_logits_are_those_of_the_whole_vocabulary(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    full = run_forward(tiny / "bf16", prompts, tmp_path / "full").run
    best = run_forward(
        tiny / "bf16", prompts, tmp_path / "best", ForwardOptions(logits=Logits("topk", 7))
    ).run

    assert not best.has_logits
    for prompt in full.prompts:
        logits = full.logits(prompt)
        values, tokens, total = best.top_logits(prompt)
        expected = logits.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :7])
        assert torch.equal(tokens.long(), expected.indices[:, :7])
        # 1024 positive terms in float64: relative error of the sum below 1024 * 2**-53
        assert ((total - logits.double().logsumexp(1)).abs() < 1e-12).all()


def test_the_kept_state_gives_the_logits_when_it_meets_the_head(
    tiny: Path,
    prompts: list[Prompt],
    stored_tensors: Callable[[Path], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    full = run_forward(tiny / "bf16", prompts, tmp_path / "full").run
    state = run_forward(
        tiny / "bf16", prompts, tmp_path / "state", ForwardOptions(logits=Logits("hidden"))
    ).run

    head = stored_tensors(tiny / "bf16")["lm_head.weight"].double()
    for prompt in full.prompts:
        x = state.final_hidden(prompt).double()
        bound = 258 * 2.0**-24 * (x.abs() @ head.abs().T)  # a float32 sum of 256 products
        assert ((full.logits(prompt) - x @ head.T).abs() <= bound).all()
