"""FP8 attention as ModelOpt and compressed-tensors export it, against their own quantised models.

Every linear is given the input that it had in their model. Held against one another are the
quantised input, element by element, and the product of theirs with the weight that they exported.
(ModelOpt's own model multiplies with another: it rounds x * (448 / amax) where the export rounds
x / (amax / 448), which differ at ties.) So the exported tensors, what is declared of the input,
and the arithmetic are tested together.

kv_b_proj stays as it is: transformers hands it [1, 1, T, K], of which both libraries make one
scale for all T tokens where they say "per token". Engines hand it [T, K].
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4check.checkpoint.naming import Part
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.forward.linears import LinearSettings
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.reading import ReadAhead
from nvfp4check.forward.setup import config_of
from nvfp4check.forward.source import StreamedSource
from nvfp4ref import e4m3, fp8
from nvfp4ref.deepseek_v3.linear import LinearMode

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what these libraries import is deprecated

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3" / "bf16"
TOKENS = [(5 * i * i + i) % 1024 for i in range(40)]
#: What a module makes of its input.
Taken = Callable[[Any, torch.Tensor], torch.Tensor]
LINEARS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


@pytest.fixture
def model() -> Any:
    loaded = transformers.DeepseekV3ForCausalLM.from_pretrained(
        TINY, torch_dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def inputs_of(model: Any, taken: Taken) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input [T, K] of every linear of attention but kv_b_proj, plain and quantised, by its name."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def note(module: Any, inputs: Any, output: Any) -> None:
            (x,) = inputs
            seen[name] = (x.flatten(0, -2).clone(), taken(module, x).flatten(0, -2).clone())

        return note

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name.endswith(LINEARS)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([TOKENS]), use_cache=False)
    for its in hooks:  # an export runs the model again
        its.remove()
    return seen


def assert_linears_agree(
    checkpoint: Path, seen: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    opened = open_checkpoint(checkpoint)
    settings = LinearSettings(
        mode=LinearMode.STORED,
        device=torch.device("cpu"),
        chunk=2**20,
        quantization=opened.quantization,
    )
    assert len(seen) == 5 * len(LINEARS)
    with ReadAhead(opened.storage, 0, Meter()) as reader:
        source = StreamedSource(opened, config_of(opened), reader, settings, Meter())
        for name, (x, theirs) in seen.items():
            parts = source.weight(f"{name}.weight").parts
            if Part.INPUT_SCALE in parts:
                scales = opened.torch(parts[Part.INPUT_SCALE]).float()
                values = fp8.quantize_static(x, scales)
            else:
                values, scales = fp8.quantize_per_token(x)
            moved = ((values * scales - theirs) / theirs).abs() > 4 * 2.0**-24
            assert (from_a_tie(x / scales)[moved] < 4 * 2.0**-24).all()
            same = ~moved.any(dim=1)
            assert int(same.sum()) > len(x) // 2

            weight = source.linear(name).dequantized(torch.float64)
            error = (source.linear(name)(x).double() - theirs.double() @ weight.T).abs()
            # Rounded: their element times scale, the weight's, the product; both scales twice.
            bound = 5 * 2.0**-24 * theirs.double().abs() @ weight.abs().T
            assert (error <= bound)[same].all()
            assert int((theirs != x).sum()) > x.numel() // 2  # it is quantised at all


def from_a_tie(values: torch.Tensor) -> torch.Tensor:
    """Relative distance of each value from the nearest midpoint of two elements."""
    ties = torch.tensor(e4m3.MIDPOINTS, dtype=torch.float64)
    sizes = values.double().abs().unsqueeze(-1)
    return ((sizes - ties).abs() / ties).amin(dim=-1)


def test_modelopts_stored_input_scales(model: Any, tmp_path: Path) -> None:
    modelopt_agrees(model, "FP8_DEFAULT_CFG", tmp_path)


def test_modelopts_scales_by_channel_and_token(model: Any, tmp_path: Path) -> None:
    modelopt_agrees(model, "FP8_PER_CHANNEL_PER_TOKEN_CFG", tmp_path)


def modelopt_agrees(model: Any, recipe: str, tmp_path: Path) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint

    config = copy.deepcopy(getattr(mtq, recipe))
    left = ("*mlp*", "*lm_head*", "*kv_b_proj*")
    config["quant_cfg"] += [{"quantizer_name": name, "enable": False} for name in left]
    generator = torch.Generator().manual_seed(0)

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            model(torch.randint(0, 1024, (2, 64), generator=generator))

    quantized = mtq.quantize(model, config, calibrate)
    seen = inputs_of(quantized, lambda module, x: module.input_quantizer(x))
    export_hf_checkpoint(quantized, dtype=torch.float32, export_dir=tmp_path / "checkpoint")

    assert_linears_agree(tmp_path / "checkpoint", seen)


def test_compressed_tensors_scales_by_channel_and_token(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
        forward_quantize,
    )
    from compressed_tensors.quantization.quant_scheme import FP8_DYNAMIC

    scheme = QuantizationScheme(targets=[f"re:.*{name}$" for name in LINEARS], **FP8_DYNAMIC)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, quantization_status=QuantizationStatus.INITIALIZED
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            amax = module.weight.detach().abs().amax(dim=1, keepdim=True)
            module.weight_scale.data = amax / 448
    seen = inputs_of(
        model,
        lambda module, x: forward_quantize(
            module, x, "input", module.quantization_scheme.input_activations
        ),
    )
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "checkpoint")
    compressor.update_config(tmp_path / "checkpoint")

    assert_linears_agree(tmp_path / "checkpoint", seen)
