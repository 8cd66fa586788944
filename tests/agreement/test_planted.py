"""Faults planted in one layer of one run: the layer and the point are named, or the prompts are."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.statistics import Decision
from nvfp4check.forward import layers as forward_layers
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    KvCache,
    Perturbation,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3 import attention, moe, routing
from nvfp4ref.deepseek_v3.cache import LatentCache
from nvfp4ref.deepseek_v3.model import decoder_layer
from nvfp4ref.deepseek_v3.moe import MlpWeights, MoeWeights

TinyRun = Callable[..., Run]
TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"
LAYER = 2
ALL = ForwardOptions(activations=Activations.ALL, kv_cache=KvCache.NONE)

#: Changes a layer's weights, or stands around its computation.
Fault = Callable[[], AbstractContextManager[Any]]


def half_split(x: torch.Tensor, positions: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Rotary pairs (i, i + R/2) on weights that were trained with (2i, 2i + 1)."""
    order = torch.arange(x.shape[-1]).view(2, -1).T.flatten()
    turned = torch.empty_like(x)
    turned[..., order] = REAL_ROPE(x[..., order], positions, rotary)
    return turned


def without_mscale(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    return REAL_CAUSAL(q, k, v, q.shape[-1] ** -0.5)


def mask_of_zero(scores: torch.Tensor, n_group: int, topk_group: int, top_k: int) -> torch.Tensor:
    grouped = scores.view(len(scores), n_group, -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
    closed = torch.ones(len(scores), n_group, dtype=torch.bool).scatter_(1, best, False)
    masked = grouped.masked_fill(closed.unsqueeze(-1), 0.0).flatten(1)
    return masked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].to(torch.int32)


def gate_and_up_swapped(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    swapped = replace(weights, gate_proj=weights.up_proj, up_proj=weights.gate_proj)
    return REAL_MLP(x, swapped)


def factor_missing(
    logits: torch.Tensor, experts: torch.Tensor, scaling: float, *, normalize: bool = True
) -> torch.Tensor:
    return REAL_WEIGH(logits, experts, 1.0, normalize=normalize)


def scale_lost_at_read(cache: LatentCache) -> tuple[torch.Tensor, torch.Tensor]:
    latent, rope = REAL_READ(cache)
    return latent / 0.5, rope / 0.5


REAL_ROPE, REAL_CAUSAL = attention.rope, attention._causal
REAL_MLP, REAL_WEIGH, REAL_READ = moe.mlp, routing.weigh, LatentCache.read


def shared_dropped(weights: MoeWeights) -> MoeWeights:
    return replace(weights, shared_experts=None)


def alpha_of_one_expert(weights: MoeWeights) -> MoeWeights:
    """Expert 9's product times 1.25, as with the alpha of another expert."""

    def experts(chosen: Sequence[int]) -> Iterable[MlpWeights]:
        for expert, its_weights in zip(chosen, weights.experts(chosen), strict=True):
            down = its_weights.down_proj
            wrong: Any = (lambda x, down=down: down(x) * 1.25) if expert == 9 else down
            yield replace(its_weights, down_proj=wrong)

    return replace(weights, experts=experts)


#: Name to where it stands, what takes its place, and where the runs part by it.
IN_A_FUNCTION = {
    "rope-pairing": (attention, "rope", half_split, "attn_output"),
    "softmax-without-mscale": (attention, "_causal", without_mscale, "attn_output"),
    "gate-up-swapped": (moe, "mlp", gate_and_up_swapped, "mlp_output"),
    "routed-scaling-missing": (routing, "weigh", factor_missing, "router_weights"),
    "cache-scale-lost": (LatentCache, "read", scale_lost_at_read, "attn_output"),
    "group-mask-zero": (routing, "choose", mask_of_zero, "router_experts"),
}
IN_WEIGHTS = {"shared-dropped": shared_dropped, "expert-alpha": alpha_of_one_expert}


@contextmanager
def planted(fault: str) -> Any:
    """Plant a fault in one layer of every run that is computed inside."""
    layers = iter(range(1000))

    def wrong_layer(
        x: Any, caches: Any, lengths: Any, weights: Any, *args: Any, **more: Any
    ) -> Any:
        around: AbstractContextManager[Any] = nullcontext()
        if next(layers) == LAYER:
            if fault in IN_WEIGHTS:
                weights = replace(weights, mlp=IN_WEIGHTS[fault](weights.mlp))
            else:
                where, name, wrong, _ = IN_A_FUNCTION[fault]
                around = patch.object(where, name, wrong)
        with around:
            return decoder_layer(x, caches, lengths, weights, *args, **more)

    with patch.object(forward_layers, "decoder_layer", wrong_layer):
        yield


def compared(
    checkpoint: Path, prompts: list[Prompt], fault: str, folder: Path, *, noise: bool
) -> AgreeResult:
    """Hold a run with a fault against one without."""
    sound = run_forward(checkpoint, prompts, folder / "sound", ALL).run
    perturbed = replace(ALL, perturbation=Perturbation("bfloat16"), seed=1)
    floor = (run_forward(checkpoint, prompts, folder / "noise", perturbed).run,) if noise else ()
    with planted(fault):
        wrong = run_forward(checkpoint, prompts, folder / "wrong", ALL).run
    return agree(sound, wrong, AgreeOptions(noise=floor))


@pytest.fixture(scope="session")
def negative_bias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a bias so low that every choice score is negative."""
    folder = tmp_path_factory.mktemp("negative") / "bf16"
    shutil.copytree(TINY / "bf16", folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("e_score_correction_bias"):
                tensors[name] = tensor - tensor.max() - 1.5
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("fault", "point"),
    [
        *((name, entry[3]) for name, entry in IN_A_FUNCTION.items() if name != "group-mask-zero"),
        *((name, "mlp_output") for name in IN_WEIGHTS),
    ],
)
def test_a_fault_in_one_layer_is_named_by_layer_and_point(
    fault: str, point: str, tiny_run: TinyRun, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    with planted(fault):
        wrong = run_forward(TINY / "bf16", tiny_prompts, tmp_path / "wrong", ALL).run
    options = AgreeOptions(noise=(tiny_run("bf16", 1), tiny_run("bf16", 2)))

    result = agree(tiny_run("bf16"), wrong, options)

    assert result.verdict is Decision.FAIL
    assert result.divergence is not None
    assert (result.divergence.layer, result.divergence.point) == (LAYER, point)
    assert result.divergence.held_against == "noise floor"
    before = [held for held in result.layers if held.agreement.layer < LAYER]
    assert all(held.agreement.bitwise for held in before)
    (block,) = [held for held in result.layers if held.agreement.key == (LAYER, point)]
    assert block.input_bitwise is not False


@pytest.mark.parametrize("fault", ["rope-pairing", "softmax-without-mscale"])
def test_a_fault_of_positions_is_not_pinned_on_position_0(
    fault: str, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    result = compared(TINY / "bf16", tiny_prompts, fault, tmp_path, noise=False)

    attention_point = next(h for h in result.layers if h.agreement.key == (LAYER, "attn_output"))
    assert all(errors[0] == 0 for errors in attention_point.agreement.errors.values())
    assert result.divergence is not None
    assert result.divergence.place.token >= 1


@pytest.mark.parametrize("fault", ["rope-pairing", "softmax-without-mscale"])
def test_prompts_of_one_token_cannot_see_it_and_the_report_says_so(
    fault: str, tmp_path: Path
) -> None:
    prompts = [Prompt(id=f"p{token}", tokens=(token,)) for token in (5, 300, 701)]

    result = compared(TINY / "bf16", prompts, fault, tmp_path, noise=False)

    assert result.divergence is None
    assert any("at position 0" in blind.why and "rotary" in blind.what for blind in result.blind)


def test_longer_prompts_are_not_called_blind_to_positions(
    tiny_run: TinyRun,
) -> None:
    result = agree(tiny_run("bf16"), tiny_run("bf16"))

    assert not any("position 0" in blind.why for blind in result.blind)


def test_a_mask_of_zero_is_an_unexplained_choice_where_scores_are_negative(
    negative_bias: Path, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    result = compared(negative_bias, tiny_prompts, "group-mask-zero", tmp_path, noise=True)

    assert result.divergence is not None
    assert (result.divergence.layer, result.divergence.point) == (LAYER, "router_experts")
    assert result.divergence.held_against == "error of the scores"
    (layer,) = [layer for layer in result.routing if layer.layer == LAYER]
    assert layer.flips
    assert all(flip.legal is False for flip in layer.flips)
    assert not any("masked" in blind.what for blind in result.blind)


def test_a_positive_bias_hides_a_mask_of_zero_and_the_report_says_so(
    tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    result = compared(TINY / "bf16", tiny_prompts, "group-mask-zero", tmp_path, noise=False)

    assert result.divergence is None
    assert any("masked expert groups" in blind.what for blind in result.blind)


def test_a_run_without_its_cache_is_called_blind_to_the_cache(tiny_run: TinyRun) -> None:
    result = agree(tiny_run("bf16"), tiny_run("bf16"))

    assert any("KV cache" in blind.what for blind in result.blind)


def test_experts_that_no_token_reached_are_counted(tmp_path: Path) -> None:
    run = run_forward(TINY / "bf16", [Prompt(id="p", tokens=(5,))], tmp_path / "run", ALL).run

    result = agree(run, run)

    # One token reaches 4 of the 16 experts in each of four layers.
    assert any("48 of 64 experts" in blind.what for blind in result.blind)


@pytest.mark.parametrize(
    ("fault", "point", "arithmetic"),
    [
        ("expert-alpha", "mlp_output", Arithmetic.FLOAT32),
        ("rope-pairing", "attn_output", Arithmetic.FLOAT32),
        *(
            (name, entry[3], Arithmetic.BFLOAT16)
            for name, entry in IN_A_FUNCTION.items()
            if name != "group-mask-zero"
        ),
        *((name, "mlp_output", Arithmetic.BFLOAT16) for name in IN_WEIGHTS),
    ],
)
def test_a_fault_of_one_layer_exceeds_the_bound_of_that_layer_and_point_alone(
    fault: str,
    point: str,
    arithmetic: Arithmetic,
    bounded_run: Callable[[str], Run],
    tiny_prompts: list[Prompt],
    tmp_path: Path,
) -> None:
    reference = bounded_run("bf16")
    given = replace(ALL, kv_cache=KvCache.STORED, arithmetic=arithmetic, inputs=reference.path)
    with planted(fault):
        wrong = run_forward(TINY / "bf16", tiny_prompts, tmp_path / "wrong", given).run

    result = agree(reference, wrong)

    assert result.verdict is Decision.FAIL
    assert result.divergence is not None
    assert result.divergence.held_against == "bound"
    assert (result.divergence.layer, result.divergence.point) == (LAYER, point)
    # Every other layer was given sound states, and is sound.
    assert {held.agreement.layer for held in result.layers if held.diverges} == {LAYER}
    over_ranks = agree(reference, wrong, AgreeOptions(bounds="bfloat16/tp4"))
    if arithmetic is Arithmetic.BFLOAT16:
        assert over_ranks.divergence == result.divergence


def test_a_mask_of_zero_is_a_choice_that_the_bounds_of_the_scores_rule_out(
    negative_bias: Path, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    bounded = replace(ALL, bounds=("float32", "bfloat16"))
    reference = run_forward(negative_bias, tiny_prompts, tmp_path / "reference", bounded).run
    given = replace(ALL, arithmetic=Arithmetic.BFLOAT16, inputs=reference.path)
    sound = run_forward(negative_bias, tiny_prompts, tmp_path / "sound", given).run
    with planted("group-mask-zero"):
        wrong = run_forward(negative_bias, tiny_prompts, tmp_path / "wrong", given).run

    assert agree(reference, sound).verdict is Decision.PASS
    result = agree(reference, wrong)

    assert result.divergence is not None
    assert (result.divergence.layer, result.divergence.point) == (LAYER, "router_experts")
    assert result.divergence.held_against == "bound"
    assert {layer for layer, _ in result.bounds.illegal} == {LAYER}
