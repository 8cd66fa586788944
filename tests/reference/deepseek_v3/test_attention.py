"""Attention: its two forms, its cache, and paged decoding, against one another and by hand."""

from collections.abc import Callable

import pytest
import torch

from nvfp4ref.deepseek_v3.attention import AttentionForm, attention, mla_decode
from nvfp4ref.deepseek_v3.cache import CacheFormat, LatentCache
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.model import ModelWeights, empty_caches, forward
from nvfp4ref.deepseek_v3.weights import StateDict, attention_weights, model_weights

Make = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def model(odd_config: DeepseekV3Config, random_tensors: Make) -> ModelWeights:
    return model_weights(StateDict(random_tensors(odd_config)), odd_config)


def sequences(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(61, (length,), generator=generator) for length in lengths]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


#: Ten layers of sums of at most 160 products in float64, each growing the error by less than 100.
FLOAT64_FLOOR = 1e-11


def test_the_absorbed_form_equals_the_direct_one(
    model: ModelWeights, odd_config: DeepseekV3Config
) -> None:
    tokens = sequences(7, 12)

    direct, _, _ = forward(tokens, model, odd_config, torch.float64)
    absorbed, _, _ = forward(tokens, model, odd_config, torch.float64, form=AttentionForm.ABSORBED)

    for one, other in zip(absorbed, direct, strict=True):
        assert relative(one, other) < FLOAT64_FLOOR


@pytest.mark.parametrize("form", AttentionForm)
def test_decoding_token_by_token_equals_prefill(
    model: ModelWeights, odd_config: DeepseekV3Config, form: AttentionForm
) -> None:
    tokens = sequences(9, 9)
    prefill, _, _ = forward(tokens, model, odd_config, torch.float64)

    steps, caches = [], None
    for t in range(9):
        logits, _, caches = forward(
            [sequence[t : t + 1] for sequence in tokens],
            model,
            odd_config,
            torch.float64,
            caches=caches,
            form=form,
        )
        steps.append(torch.stack(logits))
    decoded = torch.cat(steps, dim=1)

    assert relative(decoded, torch.stack(prefill)) < FLOAT64_FLOOR


@pytest.mark.parametrize("format", [CacheFormat.FP8, CacheFormat.BFLOAT16])
def test_decoding_through_a_rounding_cache_equals_prefill_through_it(
    model: ModelWeights, odd_config: DeepseekV3Config, format: CacheFormat
) -> None:
    tokens = sequences(6)[0]
    empty = [empty_caches(1, odd_config, torch.float64, format, scale=0.25) for _ in model.layers]
    prefill, _, _ = forward([tokens], model, odd_config, torch.float64, caches=empty)
    plain, _, _ = forward([tokens], model, odd_config, torch.float64)

    steps, caches = [], empty
    for token in tokens:
        logits, _, caches = forward([token[None]], model, odd_config, torch.float64, caches=caches)
        steps.append(logits[0])

    assert relative(torch.cat(steps), prefill[0]) < FLOAT64_FLOOR
    assert relative(plain[0], prefill[0]) > 1e-4


def test_prompts_do_not_see_one_another(model: ModelWeights, odd_config: DeepseekV3Config) -> None:
    one, other = sequences(6, 11)

    together, _, _ = forward([one, other], model, odd_config, torch.float64)
    alone, _, _ = forward([other], model, odd_config, torch.float64)

    assert relative(together[1], alone[0]) < FLOAT64_FLOOR


def test_a_token_does_not_see_the_future(model: ModelWeights, odd_config: DeepseekV3Config) -> None:
    tokens = sequences(8)[0]
    changed = tokens.clone()
    changed[5] = (changed[5] + 1) % 61

    before, _, _ = forward([tokens], model, odd_config, torch.float64)
    after, _, _ = forward([changed], model, odd_config, torch.float64)

    assert relative(after[0][:5], before[0][:5]) < FLOAT64_FLOOR
    assert relative(after[0][5:], before[0][5:]) > 1e-3


def test_attention_in_rows_of_scores_is_attention_at_once(
    model: ModelWeights, odd_config: DeepseekV3Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = sequences(40)
    at_once, _, _ = forward(tokens, model, odd_config, torch.float64)

    monkeypatch.setattr("nvfp4ref.deepseek_v3.attention.SCORES_AT_ONCE", 3 * 40 * 7)
    in_rows, _, _ = forward(tokens, model, odd_config, torch.float64)

    assert relative(in_rows[0], at_once[0]) < FLOAT64_FLOOR


def test_attention_equals_a_loop_over_heads_and_tokens(
    odd_config: DeepseekV3Config, random_tensors: Make
) -> None:
    c = odd_config
    tensors = {
        k: v.double() for k, v in random_tensors(c).items() if k.startswith("model.layers.0.")
    }
    w = {k.rpartition("self_attn.")[2]: v for k, v in tensors.items() if "self_attn" in k}
    x = torch.randn(5, c.hidden_size, dtype=torch.float64)

    def norm(v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return v / (v.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * weight

    def turn(v: torch.Tensor, position: int) -> torch.Tensor:
        from nvfp4ref.deepseek_v3.rotary import frequencies

        angle = (frequencies(c.rotary) * position).double()
        pairs = torch.view_as_complex(v.reshape(-1, 2))
        return torch.view_as_real(pairs * torch.exp(1j * angle)).flatten()

    out = torch.zeros(5, c.hidden_size, dtype=torch.float64)
    for t in range(5):
        heads = []
        for h in range(c.num_attention_heads):
            scores, values = [], []
            q = norm(x[t] @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
            q = (q @ w["q_b_proj.weight"].T).reshape(c.num_attention_heads, -1)[h]
            for s in range(t + 1):
                both = x[s] @ w["kv_a_proj_with_mqa.weight"].T
                latent = norm(both[: c.kv_lora_rank], w["kv_a_layernorm.weight"])
                kv = (latent @ w["kv_b_proj.weight"].T).reshape(c.num_attention_heads, -1)[h]
                k_nope, v = kv[: c.qk_nope_head_dim], kv[c.qk_nope_head_dim :]
                k_rope = turn(both[c.kv_lora_rank :], s)
                q_rope = turn(q[c.qk_nope_head_dim :], t)
                score = q[: c.qk_nope_head_dim] @ k_nope + q_rope @ k_rope
                scores.append(score * c.softmax_scale)
                values.append(v)
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        out[t] = torch.cat(heads) @ w["o_proj.weight"].T

    weights = attention_weights(StateDict(tensors), "model.layers.0.self_attn", c)
    cache = LatentCache.empty(c.kv_lora_rank, c.qk_rope_head_dim, torch.float64)
    actual, _ = attention(x, [cache], [5], weights, c)
    assert relative(actual, out) < FLOAT64_FLOOR


def test_an_fp8_cache_holds_the_nearest_multiples_of_its_scale() -> None:
    cache = LatentCache.empty(2, 1, torch.float32, CacheFormat.FP8, scale=0.5)

    grown = cache.extended(torch.tensor([[1.03, -1000.0]]), torch.tensor([[0.0]]))

    latent, rope = grown.read()
    assert latent.tolist() == [[1.0, -224.0]]  # 2.06 -> 2; -2000 saturates at -448
    assert rope.tolist() == [[0.0]]
    assert len(grown) == 1


def test_a_bfloat16_cache_rounds_and_a_computed_one_does_not() -> None:
    value = torch.tensor([[1.00390625]])  # a tie between two bfloat16 numbers

    rounded = LatentCache.empty(1, 1, torch.float32, CacheFormat.BFLOAT16).extended(value, value)
    kept = LatentCache.empty(1, 1, torch.float32).extended(value, value)

    assert rounded.read()[0].item() == 1.0
    assert torch.equal(kept.read()[0], value)


class TestPagedDecoding:
    """`mla_decode` over shuffled pages."""

    heads, latent, rope, page = 3, 16, 4, 5
    lengths = torch.tensor([7, 0, 15], dtype=torch.int32)

    @pytest.fixture
    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        pages = random(8, self.page, self.latent), random(8, self.page, self.rope)
        return {
            "q_latent": random(3, self.heads, self.latent),
            "q_rope": random(3, self.heads, self.rope),
            "latent_pages": pages[0],
            "rope_pages": pages[1],
            "page_table": torch.tensor([[6, 1, 0], [2, 2, 2], [4, 7, 3]], dtype=torch.int32),
            "lengths": self.lengths,
        }

    def test_it_is_softmax_over_the_tokens_of_each_sequence(
        self, inputs: dict[str, torch.Tensor]
    ) -> None:
        actual = mla_decode(**inputs, scale=0.3)

        for b, length in enumerate(self.lengths.tolist()):
            for h in range(self.heads):
                total = torch.zeros(self.latent, dtype=torch.float64)
                weight_sum = 0.0
                for s in range(length):
                    page = inputs["page_table"][b, s // self.page]
                    latent = inputs["latent_pages"][page, s % self.page].double()
                    rope = inputs["rope_pages"][page, s % self.page].double()
                    score = inputs["q_latent"][b, h].double() @ latent
                    score += inputs["q_rope"][b, h].double() @ rope
                    weight = float((score * 0.3).exp())
                    total += weight * latent
                    weight_sum += weight
                expected = total / weight_sum if length else total
                bound = 2.0**-24 * expected.abs() + 1e-13  # one rounding to float32
                assert ((actual[b, h].double() - expected).abs() <= bound).all()

    def test_where_pages_lie_does_not_matter(self, inputs: dict[str, torch.Tensor]) -> None:
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        moved = {
            **inputs,
            "latent_pages": inputs["latent_pages"][order],
            "rope_pages": inputs["rope_pages"][order],
            "page_table": order.argsort()[inputs["page_table"].long()].int(),
        }

        assert torch.equal(mla_decode(**moved, scale=0.3), mla_decode(**inputs, scale=0.3))

    def test_what_lies_behind_the_length_is_not_read(self, inputs: dict[str, torch.Tensor]) -> None:
        expected = mla_decode(**inputs, scale=0.3)
        inputs["latent_pages"][1, 2:] = float("nan")  # token 7 and on of the first sequence

        assert torch.equal(mla_decode(**inputs, scale=0.3), expected)
