"""Synthetic weights: sound in each format, the same in all, and what they are said to be."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.synth import synthesize
from nvfp4check.checkpoint.synth_config import SynthFormat, make_config
from nvfp4check.checkpoint.synth_values import Values
from nvfp4check.checkpoint.validation import validate
from nvfp4check.findings import Verdict
from nvfp4ref import fp8_block, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import NVFP4

Make = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def made(golden: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a checkpoint of two layers and four experts, once for each way of asking."""
    config = json.loads((golden.nvfp4 / "config.json").read_text())
    known: dict[tuple[SynthFormat, int, Convention, int], Checkpoint] = {}

    def make(
        format: SynthFormat,
        seed: int = 0,
        convention: Convention = Convention.MODELOPT,
        shards: int = 3,
    ) -> Checkpoint:
        key = (format, seed, convention, shards)
        if key not in known:
            files = make_config(config, None, layers=2, experts=4, format=format)
            target = tmp_path_factory.mktemp("synth") / format.value
            synthesize(
                files.config,
                files.hf_quant_config,
                files.quantization,
                target,
                shards,
                values=Values(seed, convention),
                generation_config=files.generation_config,
            )
            known[key] = open_checkpoint(target)
        return known[key]

    return make


@pytest.mark.parametrize("format", SynthFormat)
def test_a_synthetic_checkpoint_is_sound(made: Make, format: SynthFormat) -> None:
    result = validate(made(format))
    assert result.verdict is Verdict.PASS
    assert {finding.rule for finding in result.findings} == {"NV607"}  # it has no tokenizer


@pytest.mark.parametrize("convention", Convention)
def test_the_weights_of_every_convention_are_sound(made: Make, convention: Convention) -> None:
    assert validate(made(SynthFormat.NVFP4, convention=convention)).verdict is Verdict.PASS


def test_bf16_is_fp8_dequantised_bit_for_bit(made: Make) -> None:
    fp8, bf16 = made(SynthFormat.FP8), made(SynthFormat.BF16)
    compared = 0
    for name, entry in bf16.tensors.items():
        base = fp8.tensors[name]
        values = fp8.torch(base)
        if base.dtype == "F8_E4M3":
            scale = fp8.torch(fp8.tensors[f"{name}_scale_inv"])
            assert (scale.log2() % 1 == 0).all()
            values = fp8_block.dequantize(values, scale, torch.bfloat16)
            compared += 1
        assert torch.equal(bf16.torch(entry).view(torch.uint8), values.view(torch.uint8))
    assert compared > 20


def test_nvfp4_is_bf16_quantised_bit_for_bit(made: Make) -> None:
    quantised, bf16 = made(SynthFormat.NVFP4), made(SynthFormat.BF16)
    compared = 0
    for name, entry in bf16.tensors.items():
        values, module = bf16.torch(entry), name.removesuffix(".weight")
        if f"{name}_scale" not in quantised.tensors:
            stored = quantised.torch(quantised.tensors[name])
            assert torch.equal(stored.view(torch.uint8), values.view(torch.uint8))
            continue
        scale = quantised.torch(quantised.tensors[f"{module}.weight_scale_2"])
        codes, scales = nvfp4.quantize(values, scale, Convention.MODELOPT)
        assert torch.equal(quantised.torch(quantised.tensors[name]), codes)
        stored = quantised.torch(quantised.tensors[f"{name}_scale"])
        assert torch.equal(stored.view(torch.uint8), scales.view(torch.uint8))
        compared += 1
    assert compared == 2 + 4 * 3 + 2 * 3  # o_proj, experts, dense and shared MLP


def test_the_global_scale_is_that_of_the_fused_weights_amax(made: Make) -> None:
    quantised, bf16 = made(SynthFormat.NVFP4), made(SynthFormat.BF16)
    for name, entry in quantised.tensors.items():
        if name.endswith(".weight_scale_2"):
            amax = bf16.torch(bf16.tensors[name.removesuffix("_scale_2")]).abs().max()
            expected = nvfp4.global_decode_scale(amax, Convention.MODELOPT)
            assert quantised.scalar(entry) == expected.item()


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(
    made: Make, golden: SimpleNamespace, tmp_path: Path
) -> None:
    first = made(SynthFormat.NVFP4)
    config = json.loads((golden.nvfp4 / "config.json").read_text())
    files = make_config(config, None, layers=2, experts=4, format=SynthFormat.NVFP4)
    synthesize(
        files.config,
        files.hf_quant_config,
        files.quantization,
        tmp_path / "again",
        3,
        values=Values(0, Convention.MODELOPT),
    )
    for shard in first.shards:
        assert (tmp_path / "again" / shard).read_bytes() == (
            Path(first.location) / shard
        ).read_bytes()
    name = "model.layers.0.self_attn.o_proj.weight"
    other = made(SynthFormat.NVFP4, seed=1)
    assert not torch.equal(first.torch(first.tensors[name]), other.torch(other.tensors[name]))


def test_weights_do_not_depend_on_the_number_of_shards(made: Make) -> None:
    one, three = made(SynthFormat.NVFP4, shards=1), made(SynthFormat.NVFP4)
    assert len(one.shards) == 1
    for name, entry in one.tensors.items():
        assert (
            one.tensor_bytes(entry).tobytes() == three.tensor_bytes(three.tensors[name]).tobytes()
        )


def test_a_matrix_has_the_spread_it_is_said_to_have(made: Make) -> None:
    checkpoint = made(SynthFormat.BF16)
    weight = checkpoint.torch(checkpoint.tensors["model.layers.0.mlp.gate_proj.weight"]).double()
    # Log-normal rows of sigma 0.25 raise the mean square by exp(2 * 0.25**2), outliers by 2 %.
    expected = 0.0141 * math.exp(0.25**2) * math.sqrt(1 + 99 / 5000)
    # 384 rows: the mean of exp(0.5 n) scatters by 0.53 / sqrt(384) of itself, its root by half.
    assert abs(float(weight.std()) / expected - 1) < 5 * 0.53 / math.sqrt(384) / 2
    assert float(weight.abs().max()) / float(weight.std()) > 6


def test_the_router_bias_is_told_apart_in_float32_only(made: Make) -> None:
    checkpoint = made(SynthFormat.NVFP4)
    entry = checkpoint.tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    bias = checkpoint.torch(entry)
    assert bias.dtype == torch.float32
    assert len(set(bias.tolist())) == 4 > len(set(bias.to(torch.bfloat16).tolist()))


def test_every_quantised_weight_reaches_the_largest_block_scale(made: Make) -> None:
    checkpoint = made(SynthFormat.NVFP4)
    for name, entry in checkpoint.tensors.items():
        if name.endswith(".weight_scale"):
            scales = checkpoint.torch(entry).view(torch.uint8)
            assert int(scales.max()) == 0x7E
    assert NVFP4.full_scale == 2688
