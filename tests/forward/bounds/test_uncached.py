"""What keeping values in an FP8 cache changes in the output of attention, against computing it."""

import itertools
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nvfp4check.forward.bounds import uncached
from nvfp4check.forward.bounds.absorbed import Halves
from nvfp4check.forward.bounds.linear import Input, InputForm
from nvfp4check.forward.bounds.uncached import Kept, Uncached
from nvfp4ref.deepseek_v3 import attention
from nvfp4ref.deepseek_v3.config import DeepseekV3Config

HEADS, NOPE, ROPE, VALUE, RANK, HIDDEN = 3, 16, 8, 24, 32, 40
CONFIG = DeepseekV3Config.from_dict(
    {
        "vocab_size": 100,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 0,
    }
)
SEEDS = itertools.count()


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(next(SEEDS))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def heads_of(q: list[torch.Tensor], latent: torch.Tensor, key: torch.Tensor, w: Any) -> Any:
    """The direct form in float64, [T, H V]."""
    queries = [part.unflatten(-1, (HEADS, -1)) for part in q]
    return attention.direct(*queries, latent, key, lambda x: x @ w.T, CONFIG).flatten(1)


@pytest.mark.parametrize("at_once", [2**25, 2000])
def test_the_direction_is_what_the_elements_that_are_off_change(at_once: int) -> None:
    weight, of_output, smooth = normal(HEADS * 40, RANK) / 6, normal(HIDDEN, 72), normal(72).abs()
    keys, values = weight.unflatten(0, (-1, 40)).split((NOPE, VALUE), dim=1)
    halves = Halves(keys, values, keys.square(), values.square(), ROPE, False, False)
    o_proj: Any = SimpleNamespace(
        input=lambda: Input(InputForm.NVFP4, pre_quant_scale=smooth),
        plain=lambda rows: rows @ of_output.float().T,
    )
    found = Uncached(CONFIG)
    expected = []
    with patch.object(uncached, "SCORES_AT_ONCE", at_once):
        for tokens in (9, 5):
            q = [normal(tokens, HEADS * width) for width in (NOPE, ROPE)]
            latent = Kept(normal(tokens, RANK), 0.03 * normal(2, tokens, RANK))
            key = Kept(normal(tokens, ROPE), 0.03 * normal(2, tokens, ROPE))
            found.attended(*q, latent, key, halves)
            before = heads_of(q, latent.value, key.value, weight)
            moved = [
                heads_of(q, latent.value + by_latent, key.value + by_key, weight) - before
                for by_latent, by_key in zip(latent.off, key.off, strict=True)
            ]
            expected.append(torch.stack(moved) * smooth @ of_output.T)
        direction = found.direction(o_proj).double()

    whole = torch.cat(expected, dim=1)
    assert direction.shape == (2, 14, HIDDEN)
    assert float((direction - whole).norm() / whole.norm()) < 1e-4
    # Each arithmetic has its own elements that cannot flip.
    assert float((direction[0] - direction[1]).norm() / whole[0].norm()) > 0.5
