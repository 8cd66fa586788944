"""Errors of attention in its absorbed form, which rounds elsewhere than the direct one.

T tokens, H heads, C = kv_lora_rank, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim;
W_k [N, C] and W_v [V, C] the halves of kv_b_proj of a head, c_j the latents, p_j the weights of a
row; u = q_nope W_k, w = sum_j p_j c_j; s_j = u . c_j + q_rope . k_rope_j, o = W_v w.

Contract, where it differs from the direct form (`attention`):
    query    u: its sum of N terms, one rounding to the dtype, and the weights where they are
             rounded. This moves all scores of a row together: var s = c**2 (var u)
    keys     independent from key to key: var s = u**2 (var c) + q_rope**2 (var k_rope), times the
             gain of C + R terms. What an FP8 cache changes in c and k_rope, both forms see
    scores   a sum of C + R terms; to the dtype the two products, their sum, and that scaled
    values   W_v**2 (sum_j p_j**2 var c_j), and what is common to c_j times v_j**2
    output   w: its sum over keys and one rounding to the dtype, W_v**2 (var w): of the mean of the
             latents, so it does not average out over keys; then a sum of C terms, the weights where
             they are rounded, one to the dtype
    input    kv_b_proj may quantise its input; the absorbed form has none to quantise, and weights
             that are rounded to the dtype. How far its output lies from the direct one's is then
             known, element by element, and held as a bounded error
"""

from dataclasses import dataclass
from typing import Self

import torch

from nvfp4check.forward.bounds.arithmetic import FRESH_BOUNDED, Roundings
from nvfp4check.forward.bounds.linear import InputForm, SquaringLinear, gain
from nvfp4check.forward.bounds.uncertain import Uncertain, through_matrix
from nvfp4ref.deepseek_v3.config import DeepseekV3Config


@dataclass(frozen=True, slots=True)
class Halves:
    """What kv_b_proj is folded into queries and outputs as."""

    #: float64 [H, N, C] and [H, V, C].
    of_keys: torch.Tensor
    of_values: torch.Tensor
    of_keys_squared: torch.Tensor
    of_values_squared: torch.Tensor
    #: Whether they are rounded to the dtype of the activations.
    rounds: bool
    #: Whether the direct form quantises what this one does not.
    quantised: bool

    @classmethod
    def of(cls, kv_b_proj: SquaringLinear, config: DeepseekV3Config) -> Self:
        """Return the halves of a layer."""
        form = kv_b_proj.input()
        weight = kv_b_proj.dequantized(torch.float64)
        if form.pre_quant_scale is not None:
            weight = weight * form.pre_quant_scale.double()
        by_head = weight.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        squares = by_head.square()
        nope = config.qk_nope_head_dim
        quantised = form.form is not InputForm.PLAIN
        return cls(
            of_keys=by_head[:, :nope],
            of_values=by_head[:, nope:],
            of_keys_squared=squares[:, :nope],
            of_values_squared=squares[:, nope:],
            rounds=quantised or form.weight_rounds,
            quantised=quantised,
        )


@dataclass(frozen=True, slots=True)
class Absorbed:
    """One prompt's attention with keys and values left in the latent space."""

    halves: Halves
    #: [T, C], as the cache gives it back.
    latent: Uncertain
    #: [T, R], rotated.
    k_rope: Uncertain
    softmax_scale: float
    roundings: Roundings

    def scores(
        self, q: torch.Tensor, seen: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the scores [H, t, S] of queries [H, t, N + R], and their variances.

        The first, [A, KINDS, H, t, S], is of the query beyond what is in q itself, the second of
        the keys and of the scores' own roundings.
        """
        scale2, roundings = self.softmax_scale**2, self.roundings
        nope_width = self.halves.of_keys.shape[1]
        q_nope, q_rope = q[..., :nope_width], q[..., nope_width:]
        latent, k_rope = self.latent.rows(seen), self.k_rope.rows(seen)
        u = q_nope @ self.halves.of_keys  # (H, t, C)
        terms = q_nope.square() @ self.halves.of_keys_squared
        u_variance = roundings.of_sum(nope_width, u, terms) + roundings.of_output(u)
        u_variance = u_variance + self._of_weights(terms)

        nope = u @ latent.value.T * self.softmax_scale
        rope = q_rope @ k_rope.value.T * self.softmax_scale
        scores = nope + rope
        u2, q2, c2 = u.square(), q_rope.square(), latent.value.square()
        squares = (u2 @ c2.T + q2 @ k_rope.value.square().T) * scale2
        amplified = (scores.square() / squares).nan_to_num(1.0).clamp(min=1.0)
        of_query = through_matrix(u_variance @ c2.T * scale2, amplified)
        of_key = torch.einsum("htc,aksc->akhts", u2, latent.variance)
        of_key = of_key + torch.einsum("htr,aksr->akhts", q2, k_rope.variance)
        of_key = through_matrix(of_key * scale2, amplified)
        of_key = of_key + latent.common[:, :, None, None] * nope.square()
        of_key = of_key + k_rope.common[:, :, None, None] * rope.square()
        own = (
            roundings.of_sum(latent.value.shape[-1] + q_rope.shape[-1], scores, squares)
            + roundings.of_output(nope)
            + roundings.of_output(rope)
            + roundings.of_output(scores, 2)
            + roundings.of_internal(scores, 2)  # scaled, and less the row's largest
            + roundings.of_functions(torch.ones_like(scores))
        )
        return scores, of_query, of_key + own

    def output(
        self, p: torch.Tensor, own_p: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Return the variance [A, KINDS, H, t, V] of what is summed and rounded after the weights.

        p [H, t, S] are the direct form's weights, own_p this one's, v [H, S, V] the direct form's
        values and out its output.
        """
        roundings, squares = self.roundings, self.halves.of_values_squared.mT
        latent = self.latent.rows(slice(0, p.shape[-1]))
        p2 = p.square()
        w = own_p @ latent.value  # (H, t, C)
        w_variance = torch.einsum("hts,aksc->akhtc", p2, latent.variance)
        w_variance = w_variance + roundings.of_sum(p.shape[-1], w, p2 @ latent.value.square())
        w_variance = w_variance + roundings.of_output(w)
        terms = w.square() @ squares
        variance = through_matrix(w_variance @ squares, gain(out, terms))
        of_tokens = (p2 * latent.common[:, :, None, None]) @ v.square()
        variance = variance + through_matrix(of_tokens, torch.ones_like(out))
        variance = variance + roundings.of_sum(w.shape[-1], out, terms) + roundings.of_output(out)
        variance = variance + self._of_weights(terms)
        if self.halves.quantised:
            variance[:, FRESH_BOUNDED] += (w @ self.halves.of_values.mT - out).square()
        return variance

    def _of_weights(self, terms: torch.Tensor) -> torch.Tensor:
        """Return what rounding the weights adds to sums of these squares, [A, KINDS, ...]."""
        return self.roundings.of_weights(terms) if self.halves.rounds else terms.new_zeros(())
