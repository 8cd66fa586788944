"""Errors through each operation, against errors that were put in: inside, and not by far."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nvfp4check.forward.bounds.absorbed import Absorbed, Halves
from nvfp4check.forward.bounds.arithmetic import (
    DEVIATIONS,
    DIRECTED_RANDOM,
    FRESH_RANDOM,
    KINDS,
    Declared,
    Roundings,
)
from nvfp4check.forward.bounds.attention import attended
from nvfp4check.forward.bounds.linear import gain
from nvfp4check.forward.bounds.pointwise import gated, norm, residual, rotated
from nvfp4check.forward.bounds.routing import router_scores, router_weights, settled
from nvfp4check.forward.bounds.uncertain import Uncertain, through_matrix
from nvfp4ref.deepseek_v3 import attention as reference_attention
from nvfp4ref.deepseek_v3 import routing as reference_routing
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.norm import rms_norm
from nvfp4ref.deepseek_v3.rotary import rope

SIGMA = 1e-4
SAMPLES = 60
#: float32 on both sides: what was put in is far larger than what is rounded.
ROUNDINGS = Roundings([Declared.of_candidate("float32")], Declared.of_reference(torch.float64))
CONFIG = DeepseekV3Config.from_dict(
    {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 0,
    }
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(value: torch.Tensor, kind: int = FRESH_RANDOM) -> Uncertain:
    """A value whose elements are each off by SIGMA times themselves."""
    found = Uncertain.exactly(value, 1)
    found.variance[0, kind] = (SIGMA * value).square()
    return found


def moved(value: torch.Tensor, seed: int) -> torch.Tensor:
    return value * (1 + SIGMA * normal(*value.shape, seed=seed))


def assert_holds(
    found: Uncertain, sample: Callable[[int], torch.Tensor], least: float = 0.04
) -> None:
    """Hold samples of the error against the bound: all inside, and not by orders of magnitude."""
    errors = torch.stack([sample(seed) - found.value for seed in range(SAMPLES)])
    ratios = errors.norm(dim=-1) / found.bound[0]
    assert float(ratios.max()) < 1
    assert float(ratios.median()) > least
    assert (errors.abs().amax(0) <= found.reach[0]).all()


def test_a_norm_passes_errors_on_and_adds_that_of_its_root() -> None:
    x, weight = normal(20, 64, seed=1) * 3, normal(64, seed=2)
    x[:, 5] *= 30  # one element rules the mean
    y = rms_norm(x, weight, 1e-6)

    found = norm(off(x), weight, 1e-6, y, ROUNDINGS)

    assert_holds(found, lambda seed: rms_norm(moved(x, seed), weight, 1e-6))


def test_an_error_common_to_a_token_does_not_come_through_a_norm() -> None:
    x = Uncertain.exactly(normal(4, 64, seed=1), 1)
    x.common[:, DIRECTED_RANDOM] = 1e-4
    y = rms_norm(x.value, torch.ones(64), 1e-6)

    found = norm(x, torch.ones(64), 1e-6, y, ROUNDINGS)

    assert float(found.bound.max()) < 1e-4 < float(x.bound.min())


def test_a_rotation_turns_errors_with_their_pairs() -> None:
    x, positions = normal(20, 3 * 8, seed=3), torch.arange(20)
    x[:, 0::8] *= 100

    def turned(value: torch.Tensor) -> torch.Tensor:
        return rope(value.unflatten(-1, (3, 8)), positions, CONFIG.rotary).flatten(1)

    found = rotated(off(x), positions, CONFIG.rotary, ROUNDINGS)

    assert torch.allclose(found.value, turned(x))
    assert_holds(found, lambda seed: turned(moved(x, seed)))


def test_a_gated_product_errs_by_both_of_its_factors() -> None:
    gate, up = normal(20, 64, seed=4) * 2, normal(20, 64, seed=5)

    def product(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(g) * u

    found = gated(off(gate), off(up), product(gate, up), ROUNDINGS)

    assert_holds(found, lambda seed: product(moved(gate, seed), moved(up, 1000 + seed)))
    # The worst of the correlations: both move the product the same way.
    assert_holds(found, lambda seed: product(moved(gate, seed), moved(up, seed)))


def test_a_residual_errs_by_what_came_and_what_is_added_even_if_they_are_one() -> None:
    x = normal(20, 64, seed=6)

    found = residual(off(x), off(x), 2 * x, ROUNDINGS)

    assert_holds(found, lambda seed: 2 * moved(x, seed))


def test_directed_errors_are_amplified_as_values_are() -> None:
    shared = normal(64, seed=7)
    weight = normal(48, 64, seed=8) * 0.1 + torch.outer(normal(48, seed=9), shared) / 8
    x = torch.outer(normal(20, seed=10).abs() + 1, shared)
    y = x @ weight.T
    variance = torch.zeros(1, KINDS, 20, 64, dtype=torch.float64)
    variance[0, DIRECTED_RANDOM] = (SIGMA * x).square()
    squares = weight.square()

    passed = through_matrix(variance @ squares.T, gain(y, x.square() @ squares.T))
    found = Uncertain(y, passed, torch.zeros(1, KINDS, 20, dtype=torch.float64))

    # The whole row moves along itself: independence would allow a fraction of that.
    along = (DEVIATIONS / 2) * SIGMA * y
    assert (along.norm(dim=-1) < found.bound[0]).all()
    independent = Uncertain(y, variance @ squares.T, found.common)
    assert (along.norm(dim=-1) > independent.bound[0]).all()


def attention_of(
    heads: int, q: torch.Tensor, unfolded: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """The direct form, q [T, H 24] of heads that have 16 and 8 rotated, k [T, 8]."""
    both = unfolded.unflatten(-1, (heads, -1))
    keys = torch.cat((both[..., :16], k[:, None].expand(-1, heads, -1)), dim=-1)
    q = q.unflatten(-1, (heads, -1))
    return reference_attention._causal(q, keys, both[..., 16:], CONFIG.softmax_scale).flatten(1)


def folded(weight: torch.Tensor) -> Halves:
    """kv_b_proj [H 40, C] as the absorbed form has it."""
    keys, values = weight.unflatten(0, (-1, 40)).split((16, 24), dim=1)
    return Halves(keys, values, keys.square(), values.square(), 8, rounds=False, quantised=False)


@pytest.mark.parametrize("what", ["q", "k", "v", "rope", "latent"])
def test_attention_errs_by_queries_keys_and_values(what: str) -> None:
    heads, tokens = CONFIG.num_attention_heads, 12
    weight = normal(heads * 40, 32, seed=13) / 32**0.5
    parts = {
        "q": normal(tokens, heads * 24, seed=11),
        "latent": normal(tokens, 32, seed=12),
        "rope": normal(tokens, 8, seed=14),
    }
    parts["unfolded"] = parts["latent"] @ weight.T
    which = {"k": "unfolded", "v": "unfolded"}.get(what, what)
    column = torch.arange(heads * 40) % 40
    moving = {
        "k": (column < 16).double(),
        "v": (column >= 16).double(),
    }.get(what, torch.ones(parts[which].shape[-1]).double())

    def output(error: torch.Tensor) -> torch.Tensor:
        values = {**parts, which: parts[which] + error}
        if what == "latent":
            values["unfolded"] = values["latent"] @ weight.T
        return attention_of(heads, values["q"], values["unfolded"], values["rope"])

    uncertain = {name: Uncertain.exactly(value, 1) for name, value in parts.items()}
    uncertain[which].variance[0, FRESH_RANDOM] = (SIGMA * parts[which] * moving).square()
    if what == "latent":  # the direct form has it from there
        through = uncertain["latent"].variance @ weight.square().T
        uncertain["unfolded"] = uncertain["unfolded"].plus(through)
    nope = torch.arange(heads * 24) % 24 < 16
    q_nope, q_rope = (
        replace(uncertain["q"], value=parts["q"][:, at], variance=uncertain["q"].variance[..., at])
        for at in (nope, ~nope)
    )
    absorbed = Absorbed(folded(weight), parts["latent"], CONFIG.softmax_scale, ROUNDINGS)

    found = attended(
        *(q_nope, q_rope, uncertain["unfolded"], uncertain["rope"], absorbed, CONFIG),
        shared_weights=False,
    )

    assert torch.allclose(found.value, output(torch.zeros_like(parts[which])))
    shape = parts[which].shape
    noise = {seed: SIGMA * normal(*shape, seed=1000 + seed) for seed in range(SAMPLES)}
    # The first token sees one key: whatever its score, its output is that key's value.
    rest = found.rows(slice(1, None))
    assert_holds(rest, lambda seed: output(parts[which] * noise[seed] * moving)[1:], least=0.01)


def test_what_a_router_chooses_within_the_reach_of_its_scores_is_called_settled() -> None:
    x, weight = normal(300, 64, seed=15), normal(16, 64, seed=16) / 8
    bias = normal(16, seed=17) * 0.1

    def scores_of(value: torch.Tensor) -> torch.Tensor:
        return reference_routing.choice_scores(value @ weight.T, bias)

    def experts_of(scores: torch.Tensor) -> torch.Tensor:
        return reference_routing.choose(scores, 4, 2, 3)

    scores = scores_of(x)
    big = Uncertain.exactly(x, 1)
    big.variance[0, FRESH_RANDOM] = (1e-3 * x).square()
    found, sigmoid = router_scores(big, weight, scores, ROUNDINGS)
    experts = experts_of(scores)

    certain = settled(found, experts, CONFIG)[0]

    assert 0.3 < float(certain.double().mean()) < 1
    changed = torch.zeros(300, dtype=torch.bool)
    for seed in range(SAMPLES):
        signs = normal(*scores.shape, seed=seed).sign()
        other = experts_of(scores + signs * found.reach[0] * 0.999)
        changed |= (other.sort(-1).values != experts.sort(-1).values).any(-1)
    assert not (changed & certain).any()
    assert float((changed | certain).double().mean()) > 0.95  # nearly all that could change did

    logits = x @ weight.T
    weights = reference_routing.weigh(logits, experts, 2.5)
    of_weights = router_weights(found, sigmoid, experts, weights, CONFIG, ROUNDINGS)

    def sample(seed: int) -> torch.Tensor:
        return reference_routing.weigh(
            (x * (1 + 1e-3 * normal(*x.shape, seed=seed))) @ weight.T, experts, 2.5
        )

    assert_holds(of_weights, sample, least=0.02)


def test_forced_experts_are_not_settled() -> None:
    scores = Uncertain.exactly(torch.arange(16.0)[None], 1)

    assert settled(scores, torch.tensor([[15, 14, 13]]), CONFIG).all()
    assert not settled(scores, torch.tensor([[15, 14, 1]]), CONFIG).any()
