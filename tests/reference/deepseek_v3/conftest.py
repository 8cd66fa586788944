"""Small random models of DeepSeek-V3 with dimensions that are odd on purpose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nvfp4ref.deepseek_v3.config import DeepseekV3Config

#: Nothing is a multiple of 128; v_head_dim is not qk_nope_head_dim.
ODD: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 80,
    "intermediate_size": 112,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


@pytest.fixture
def odd_config() -> DeepseekV3Config:
    return DeepseekV3Config.from_dict(ODD)


@pytest.fixture
def random_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    """Return a function from a configuration to the tensors of a random model."""

    def make(config: DeepseekV3Config, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            values = torch.randn(shape, generator=generator)
            return values / shape[-1] ** 0.5 if len(shape) == 2 else 1 + 0.1 * values

        d, h = config.hidden_size, config.num_attention_heads
        tensors = {
            "model.embed_tokens.weight": random(config.vocab_size, d) * d**0.5,
            "model.norm.weight": random(d),
            "lm_head.weight": random(config.vocab_size, d),
        }
        for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
            at = f"model.layers.{layer}"
            mlps = {f"{at}.mlp": config.intermediate_size}
            if layer >= config.num_hidden_layers or config.is_moe(layer):
                inner = config.moe_intermediate_size
                mlps = {f"{at}.mlp.experts.{e}": inner for e in range(config.n_routed_experts)}
                mlps[f"{at}.mlp.shared_experts"] = inner * config.n_shared_experts
                bias = -0.75 + 0.1 * torch.randn(config.n_routed_experts, generator=generator)
                tensors[f"{at}.mlp.gate.weight"] = random(config.n_routed_experts, d)
                tensors[f"{at}.mlp.gate.e_score_correction_bias"] = bias
            for name, inner in mlps.items():
                tensors[f"{name}.gate_proj.weight"] = random(inner, d)
                tensors[f"{name}.up_proj.weight"] = random(inner, d)
                tensors[f"{name}.down_proj.weight"] = random(d, inner)
            attention = {
                "q_a_proj": random(config.q_lora_rank or 0, d),
                "q_a_layernorm": random(config.q_lora_rank or 0),
                "q_b_proj": random(h * config.qk_head_dim, config.q_lora_rank or 0),
                "kv_a_proj_with_mqa": random(config.kv_lora_rank + config.qk_rope_head_dim, d),
                "kv_a_layernorm": random(config.kv_lora_rank),
                "kv_b_proj": random(
                    h * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank
                ),
                "o_proj": random(d, h * config.v_head_dim),
            }
            for name, tensor in attention.items():
                tensors[f"{at}.self_attn.{name}.weight"] = tensor
            tensors[f"{at}.input_layernorm.weight"] = random(d)
            tensors[f"{at}.post_attention_layernorm.weight"] = random(d)
            if layer >= config.num_hidden_layers:
                tensors[f"{at}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
                tensors[f"{at}.enorm.weight"] = random(d)
                tensors[f"{at}.hnorm.weight"] = random(d)
                tensors[f"{at}.eh_proj.weight"] = random(d, 2 * d)
                tensors[f"{at}.shared_head.norm.weight"] = random(d)
                tensors[f"{at}.shared_head.head.weight"] = tensors["lm_head.weight"]
        return tensors

    return make
