"""The audit of what nvidia-modelopt really exports with AWQ, against the model it was made from.

ModelOpt simulates FP4 on a GPU only; the search runs here with the reference's arithmetic in place
of that kernel. Everything else, the factors, their averages, where they are folded to, and the
export, is ModelOpt's own.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import Verdict
from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention

modelopt = pytest.importorskip("modelopt")
transformers = pytest.importorskip("transformers")

# its imports use what torch, transformers and the standard library have deprecated
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = Path(__file__).parents[2] / "goldens" / "small-deepseek-v3" / "bf16"


def simulate(x: torch.Tensor, _block_size: int, amax: torch.Tensor, *_: Any) -> torch.Tensor:
    """Quantise and dequantise, as the kernel that ModelOpt calls here."""
    flat = x.reshape(-1, x.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 16))
    decode = nvfp4.global_decode_scale(amax.float().amax(), Convention.MODELOPT)
    codes, scales = nvfp4.quantize(padded, decode, Convention.MODELOPT)
    values = nvfp4.dequantize(codes, scales, decode, x.dtype)
    return values[:, : x.shape[-1]].reshape(x.shape)


def awq_export(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Write a model as it is, and quantised with NVFP4_AWQ_LITE."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization import tensor_quant

    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", simulate)
    generator = torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones otherwise, which hides what is done to them
            parameter.data = 0.25 + 1.5 * torch.rand(parameter.shape, generator=generator)
    model.bfloat16()
    model.save_pretrained(folder / "base")

    def calibrate(model: Any) -> None:
        for _ in range(2):
            model(torch.randint(0, model.config.vocab_size, (4, 32), generator=generator))

    quantized = mtq.quantize(model, mtq.NVFP4_AWQ_LITE_CFG, calibrate)
    export_hf_checkpoint(quantized, dtype=torch.bfloat16, export_dir=folder / "awq")
    return folder / "awq", folder / "base"


def audit(checkpoint: Path, base: Path, folder: Path) -> ValidationResult:
    options = ValidationOptions(
        base=open_checkpoint(base), journal=folder / "journal.jsonl", select=("NV7",)
    )
    return validate(open_checkpoint(checkpoint), options)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_llama_that_modelopt_smoothed_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, vocab_size=256, head_dim=32,
    )  # fmt: skip
    checkpoint, base = awq_export(transformers.LlamaForCausalLM(config), tmp_path, monkeypatch)
    result = audit(checkpoint, base, tmp_path)

    assert result.findings == ()
    assert result.verdict is Verdict.PASS
    assert result.audit is not None
    ways = Counter(weight.way for weight in result.audit.weights.values())
    # Fewer key-value heads than heads: o_proj keeps its factors, v_proj cannot take them.
    assert ways["smoothed-by-the-norm"] == (6 if kv_heads == 4 else 8)
    assert ways["smoothed-by-the-linear"] == (8 if kv_heads == 4 else 4)
    assert ways["smoothed"] == (0 if kv_heads == 4 else 2)


def test_modelopt_smooths_a_norm_for_shared_experts_that_routed_ones_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ModelOpt 0.47: the router and the routed experts see the changed norm."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32)
    checkpoint, base = awq_export(model, tmp_path, monkeypatch)
    result = audit(checkpoint, base, tmp_path)

    assert [(finding.rule, finding.tensor) for finding in result.findings] == [
        ("NV704", f"model.layers.{layer}.post_attention_layernorm.weight") for layer in (1, 2, 3)
    ]
    assert all(
        f"model.layers.{layer}.mlp.shared_experts.gate_proj" in finding.message
        and f"as model.layers.{layer}.mlp.experts.0.gate_proj" in finding.message
        for layer, finding in enumerate(result.findings, 1)
    )

    assert result.audit is not None
    assert {weight.way for weight in result.audit.weights.values()} == {
        "direct", "smoothed", "smoothed-by-the-norm",
    }  # fmt: skip
