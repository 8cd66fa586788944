"""FP8 that compressed-tensors and ModelOpt write, recognised bit for bit as theirs.

The attention of the tiny model is converted by the producers themselves, and exported. What is
declared is understood, what is stored dequantises as theirs does, and the audit makes the same
bits from the bfloat16 model.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4check.checkpoint.audit.sources import Reader, Source
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.validation import ValidationOptions, validate

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what these libraries import is deprecated

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3" / "bf16"
LINEARS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


@pytest.fixture
def model() -> Any:
    loaded = transformers.DeepseekV3ForCausalLM.from_pretrained(TINY, torch_dtype=torch.bfloat16)
    return loaded.eval()


def assert_understood(path: Path, theirs: dict[str, torch.Tensor]) -> None:
    checkpoint, base = open_checkpoint(path), open_checkpoint(TINY)
    assert len(theirs) == 5 * len(LINEARS)
    for name, values in theirs.items():
        weight = checkpoint.weights[f"{name}.weight"]
        ours = Source(Reader(checkpoint), weight).tensor(0, weight.shape[0], values.dtype)
        assert torch.equal(ours, values)
    # The MTP layer is not in their model.
    options = ValidationOptions(select=("NV1", "NV7", "NV8"), ignore=("NV109",), base=base)
    result = validate(checkpoint, options)
    assert result.findings == ()
    assert not [gap for gap in result.coverage.skipped if "map" in gap.why or "fp8" in gap.why]
    assert result.audit is not None
    assert result.audit.to_json()["copied"]["converted to FP8"] == len(theirs)


@pytest.mark.parametrize("name", ["FP8_BLOCK", "FP8_DYNAMIC"])
def test_compressed_tensors(model: Any, name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor, NaiveQuantizationCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
        quant_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    preset = getattr(quant_scheme, name)
    scheme = QuantizationScheme(targets=[f"re:.*{linear}$" for linear in LINEARS], **preset)
    status = QuantizationStatus.INITIALIZED
    config = QuantizationConfig(config_groups={"group_0": scheme}, quantization_status=status)
    apply_quantization_config(model, config)
    quantized = {n: m for n, m in model.named_modules() if hasattr(m, "weight_scale")}
    for module in quantized.values():
        x = module.weight.detach()
        if name == "FP8_BLOCK":
            padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 128, 0, -x.shape[0] % 128))
            tiles = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
        else:
            low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        module.weight_scale.data, _ = calculate_qparams(low, high, scheme.weights)
        assert module.weight_scale.dtype is torch.bfloat16
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    theirs = {
        n: NaiveQuantizationCompressor.decompress(dict(module.state_dict()), scheme)["weight"]
        for n, module in quantized.items()
    }
    model.save_pretrained(tmp_path / "checkpoint")
    compressor.update_config(tmp_path / "checkpoint")

    assert_understood(tmp_path / "checkpoint", theirs)


@pytest.mark.parametrize(
    "recipe", ["FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"]
)
def test_modelopt(model: Any, recipe: str, tmp_path: Path) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint

    config = copy.deepcopy(getattr(mtq, recipe))
    left = ("*mlp*", "*lm_head*", "*kv_b_proj*")
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in left]
    tokens = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(0))

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            model(tokens)

    quantized = mtq.quantize(model, config, calibrate)
    export_hf_checkpoint(quantized, dtype=torch.bfloat16, export_dir=tmp_path / "checkpoint")
    exported = open_checkpoint(tmp_path / "checkpoint")
    theirs = {
        name.removesuffix(".weight"): dequantized_by_modelopt(exported, name)
        for name in exported.weights
        if name.removesuffix(".weight").endswith(LINEARS)
    }

    assert_understood(tmp_path / "checkpoint", theirs)


def dequantized_by_modelopt(exported: Any, name: str) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor import FP8QTensor

    elements = exported.torch(exported.tensors[name])
    scale = exported.torch(exported.tensors[f"{name}_scale"])
    if scale.ndim == 1:
        return elements.float() * scale.unsqueeze(1)
    padding = (0, -elements.shape[1] % 128, 0, -elements.shape[0] % 128)
    padded = torch.nn.functional.pad(elements.float(), padding).to(torch.float8_e4m3fn)
    tensor = FP8QTensor(padded.shape, torch.float32, padded)
    scales = scale.squeeze(3).squeeze(1)
    values = tensor.dequantize(torch.float32, scale=scales, block_sizes={-1: 128, -2: 128})
    return values[: elements.shape[0], : elements.shape[1]]
