"""Attention in its absorbed form, as engines decode: correct, and so within the bounds."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.layers import VALUE_POINTS
from nvfp4check.agreement.statistics import Decision
from nvfp4check.forward.bounds.absorbed import Absorbed, Halves
from nvfp4check.forward.bounds.arithmetic import Declared, Roundings
from nvfp4check.forward.bounds.attention import attended
from nvfp4check.forward.bounds.uncertain import Uncertain
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions, LayerRange
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3 import attention
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Linear

TINY = Path(__file__).parents[3] / "goldens" / "tiny-deepseek-v3"
TINY_CONFIG = DeepseekV3Config.from_dict(json.loads((TINY / "bf16" / "config.json").read_text()))
ARITHMETICS = ("float32", "bfloat16")


def absorbed(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    kv_b_proj: Linear,
    config: DeepseekV3Config,
) -> torch.Tensor:
    """Decode as an engine does: each product summed in float32 and rounded to the dtype."""
    dtype = q_nope.dtype

    def product(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, a.float(), b.float()).to(dtype)

    weight = kv_b_proj.dequantized(dtype).unflatten(0, (config.num_attention_heads, -1))
    w_k, w_v = weight[:, : config.qk_nope_head_dim], weight[:, config.qk_nope_head_dim :]
    q_latent = product("thn,hnc->thc", q_nope, w_k)
    nope = product("thc,sc->hts", q_latent, latent)
    scores = (nope + product("thr,sr->hts", q_rope, k_rope)) * config.softmax_scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    p = scores.masked_fill(later, float("-inf")).softmax(-1, dtype=torch.float32).to(dtype)
    out_latent = product("hts,sc->thc", p, latent)
    return product("thc,hvc->thv", out_latent, w_v)


def without_mscale(*given: Any) -> torch.Tensor:
    *tensors, config = given
    return absorbed(*tensors, replace(config, rotary=replace(config.rotary, rope_scaling=None)))


def queries_half_split(q_nope: torch.Tensor, q_rope: torch.Tensor, *given: Any) -> torch.Tensor:
    """Take the queries' rotated pairs for (i, i + R/2), the keys' for (2i, 2i + 1)."""
    return absorbed(q_nope, q_rope.unflatten(-1, (2, -1)).mT.flatten(-2), *given)


def scale_lost(
    q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, *given: Any
) -> torch.Tensor:
    """Read a cache of latents without its scale of 0.5."""
    return absorbed(q_nope, q_rope, latent / 0.5, *given)


def heads_shifted(*given: Any) -> torch.Tensor:
    """Give each head the output of the one before."""
    return absorbed(*given).roll(1, dims=1)


@pytest.fixture(scope="module")
def long_prompts() -> list[Prompt]:
    golden = Run.open(TINY / "activations" / "transformers-float32")
    tokens = {"prompt0": golden.tokens("prompt0"), "passage0": golden.tokens("passage0")[:100]}
    return [Prompt(id=name, tokens=tuple(row.tolist())) for name, row in tokens.items()]


@pytest.fixture(scope="module")
def bounded(
    tmp_path_factory: pytest.TempPathFactory, long_prompts: list[Prompt]
) -> Callable[[str], Run]:
    """Compute the tiny model in one of its formats with bounds, once."""
    torch.set_num_threads(1)
    options = ForwardOptions(activations=Activations.ALL, bounds=("float32", "bfloat16"))
    folder = tmp_path_factory.mktemp("bounded")

    @cache
    def run(checkpoint: str) -> Run:
        return run_forward(TINY / checkpoint, long_prompts, folder / checkpoint, options).run

    return run


def run_of(reference: Run, arithmetic: str, form: Callable[..., torch.Tensor], out: Path) -> Run:
    """Run an engine that attends in this form, each layer given the reference's states."""
    prompts = [
        Prompt(id=name, tokens=tuple(reference.tokens(name).tolist())) for name in reference.prompts
    ]
    options = ForwardOptions(
        activations=Activations.ALL, arithmetic=Arithmetic(arithmetic), inputs=reference.path
    )
    checkpoint = Path(str(reference.info.checkpoint["location"]))
    with patch.object(attention, "direct", form):
        return run_forward(checkpoint, prompts, out / form.__name__, options).run


def held(reference: Run, arithmetic: str, form: Callable[..., torch.Tensor], out: Path) -> Any:
    """Hold such an engine against the bounds of its arithmetic."""
    return agree(reference, run_of(reference, arithmetic, form, out))


def ratios(result: AgreeResult, point: str) -> list[float]:
    return [
        h.bound.ratio for h in result.layers if h.bound is not None and h.agreement.point == point
    ]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("checkpoint", ["bf16", "nvfp4", "fp8"])
def test_a_correct_absorbed_engine_lies_inside_at_every_layer(
    checkpoint: str, arithmetic: str, bounded: Callable[[str], Run], tmp_path: Path
) -> None:
    result = held(bounded(checkpoint), arithmetic, absorbed, tmp_path)

    assert result.verdict is Decision.PASS
    assert result.bounds.dtype == arithmetic
    for point in VALUE_POINTS:
        assert max(ratios(result, point)) < 1
    found = ratios(result, "attn_output")
    assert len(found) == 5
    # In float32 no code of o_proj's NVFP4 input flips.
    least = 0.0 if (checkpoint, arithmetic) == ("nvfp4", "float32") else 0.02
    assert all(ratio >= least for ratio in found)


@pytest.mark.parametrize("fault", [without_mscale, queries_half_split, scale_lost, heads_shifted])
def test_a_faulty_absorbed_engine_exceeds_the_bound_in_bfloat16(
    fault: Callable[..., torch.Tensor], bounded: Callable[[str], Run], tmp_path: Path
) -> None:
    result = held(bounded("bf16"), "bfloat16", fault, tmp_path)

    assert result.verdict is Decision.FAIL
    assert result.divergence is not None
    assert result.divergence.held_against == "bound"
    assert result.divergence.point == "attn_output"
    assert all(ratio > 1 for ratio in ratios(result, "attn_output"))


def test_where_kv_b_proj_quantises_its_input_the_forms_differ_by_more_than_rounding(
    long_prompts: list[Prompt], tmp_path: Path
) -> None:
    names = ("float32", "float32/direct", "bfloat16/direct")
    options = ForwardOptions(activations=Activations.ALL, bounds=names)
    reference = run_forward(TINY / "fp8", long_prompts, tmp_path / "both", options).run

    direct, other = (
        agree(
            reference,
            run_of(reference, "float64", form, tmp_path),
            AgreeOptions(bounds="float32/direct"),
        )
        for form in (attention.direct, absorbed)
    )

    assert direct.verdict is Decision.PASS
    assert 0 < max(ratios(direct, "attn_output")) < 1
    assert other.verdict is Decision.FAIL
    assert min(ratios(other, "attn_output")) > 1
    wide, narrow = (
        torch.cat([reference.bound(layer, "passage0", "attn_output", name) for layer in range(5)])
        for name in names[:2]
    )
    assert (narrow <= wide).all()
    assert float((wide / narrow).median()) > 10


def test_an_engine_that_does_not_say_its_form_is_held_to_the_bounds_of_either(
    long_prompts: list[Prompt], tmp_path: Path
) -> None:
    options = ForwardOptions(activations=Activations.ALL, layers=LayerRange(0, 1))
    bounded = replace(options, bounds=("float32/direct", "float32", "bfloat16/direct"))
    reference = run_forward(TINY / "fp8", long_prompts, tmp_path / "reference", bounded).run
    one, other = (
        run_forward(
            TINY / "fp8", long_prompts, tmp_path / dtype, replace(options, arithmetic=dtype)
        )
        for dtype in (Arithmetic.FLOAT64, Arithmetic.BFLOAT16)
    )

    assert agree(reference, one.run).bounds.dtype == "float32"
    assert agree(reference, other.run).bounds.dtype == "bfloat16/direct"


def test_a_weighted_latent_that_the_values_cancel_needs_the_bound_of_the_absorbed_form() -> None:
    heads, tokens, rank = 2, 512, 32
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16().double()

    # Latents lie around a mean that W_v takes to nothing: its rounding is what is left of it.
    mean = normal(rank)
    latent = (mean + 0.05 * normal(tokens, rank)).bfloat16().double()
    w_v = normal(heads, 32, rank)
    w_v = w_v - (w_v @ mean / mean.square().sum()).unsqueeze(-1) * mean
    w_k = torch.zeros(heads, 32, rank, dtype=torch.float64)
    unfolded = torch.einsum("sc,hnc->shn", latent, torch.cat((w_k, w_v), dim=1)).flatten(1)
    config = replace(TINY_CONFIG, num_attention_heads=heads, kv_lora_rank=rank)
    halves = Halves(w_k, w_v, w_k.square(), w_v.square(), 16, rounds=False, quantised=False)
    nothing = Uncertain.exactly(torch.zeros(tokens, 16), 1)
    q_nope = Uncertain.exactly(torch.zeros(tokens, heads * 32), 1)
    q_rope = Uncertain.exactly(torch.zeros(tokens, heads * 16), 1)

    def bound(name: str) -> torch.Tensor:
        side = Declared.of_candidate(name)
        roundings = Roundings([side], Declared.of_reference(torch.float64))
        exact = Uncertain.exactly(unfolded, 1).plus(roundings.of_output(unfolded))
        form = Absorbed(halves, latent, 1.0, roundings)
        return attended(q_nope, q_rope, exact, nothing, form, config, shared_weights=False).bound[0]

    later = torch.ones(tokens, tokens).triu(1).bool()
    p = torch.zeros(tokens, tokens).double().masked_fill(later, float("-inf")).softmax(-1)
    weighted = p.bfloat16().double() @ latent / p.bfloat16().double().sum(-1, keepdim=True)
    out = torch.einsum("tc,hvc->thv", weighted.bfloat16().double(), w_v).bfloat16().double()
    error = (out.flatten(1) - torch.einsum("ts,sc,hvc->thv", p, latent, w_v).flatten(1)).norm(
        dim=-1
    )

    assert (error < bound("bfloat16")).all()
    assert (error > bound("bfloat16/direct")).any()
