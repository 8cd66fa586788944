"""Multi-token prediction against its formula over transformers' own layer, norm and embedding.

transformers has no MTP layer; a DeepseekV3DecoderLayer with experts, two norms and one matrix make
one, as DeepSeek-V3's report (2.2) puts them together.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nvfp4check.forward.options import ForwardOptions, KvCache
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

transformers = pytest.importorskip("transformers")

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3" / "bf16"
PREFIX = "model.layers.5."


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = transformers.DeepseekV3ForCausalLM.from_pretrained(
        TINY, torch_dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in TINY.glob("*.safetensors"):
        tensors.update(load_file(shard))
    return {
        name.removeprefix(PREFIX): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(PREFIX)
    }


def block_of(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """The decoder layer of MTP, loaded by transformers as the last of a model of six."""
    folder.mkdir()
    config = model.config.__class__.from_dict({**model.config.to_dict(), "num_hidden_layers": 6})
    tensors: dict[str, torch.Tensor] = {}
    for shard in TINY.glob("*.safetensors"):
        tensors.update(load_file(shard))
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    deeper = transformers.DeepseekV3ForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    )
    return deeper.eval().model.layers[5]


def test_streamed_mtp_logits_are_those_of_the_formula(
    model: Any, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tokens = torch.tensor([[(7 * i * i + 3 * i) % 1024 for i in range(60)]])
    block = block_of(model, weights, tmp_path / "deeper")
    norm = type(model.model.norm)

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        layer = norm(x.shape[-1], model.config.rms_norm_eps)
        layer.weight = nn.Parameter(weights[name])
        found: torch.Tensor = layer(x)
        return found

    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
        embedded = nn.functional.embedding(tokens[:, 1:], weights["embed_tokens.weight"])
        both = (normed(embedded, "enorm.weight"), normed(hidden, "hnorm.weight"))
        x = torch.cat(both, dim=-1) @ weights["eh_proj.weight"].T
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
        rotary = model.model.rotary_emb(x, positions)
        out = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        out = out[0] if isinstance(out, tuple) else out
        logits = normed(out, "shared_head.norm.weight") @ weights["shared_head.head.weight"].T

    run = run_forward(
        TINY,
        [Prompt(id="p", tokens=tuple(tokens[0].tolist()))],
        tmp_path / "run",
        ForwardOptions(mtp=True, kv_cache=KvCache.NONE),
    ).run

    found = run.mtp_logits(5, "p")
    assert float((found - logits[0]).norm() / logits.norm()) < 2e-5  # as for the trunk
