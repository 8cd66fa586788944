"""Errors of attention in its absorbed form, which rounds elsewhere than the direct one.

T tokens, H heads, C = kv_lora_rank, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim;
W_k [N, C] and W_v [V, C] the halves of kv_b_proj of a head, c_j the latents, p_j the weights of a
row; u = q_nope W_k, w = sum_j p_j c_j; s_j = u . c_j + q_rope . k_rope_j, o = W_v w.

Contract, where it differs from the direct form (`attention`):
    inherited  both forms are one function of q, c_j and k_rope_j: what is off in these, by an FP8
               cache too, moves scores and outputs alike, and is derived in the direct form
    query      u: its sum of N terms, one rounding to the dtype, and the weights where they are
               rounded. This moves all scores of a row together: var s = c**2 (var u)
    scores     a sum of C + R terms; to the dtype the two products, their sum, and that scaled
    output     w: its sum over keys and one rounding to the dtype, W_v**2 (var w): of the mean of
               the latents, so it does not average out over keys; then a sum of C terms, the weights
               where they are rounded, one to the dtype
    input      kv_b_proj may quantise its input; the absorbed form has none to quantise, and weights
               that are rounded to the dtype. How far its output lies from the direct one's is then
               known, element by element, and held as a bounded error; keys and values inherit the
               larger of what is off in the latent and what that becomes in codes
"""

from dataclasses import dataclass
from typing import Self

import torch

from nvfp4check.forward.bounds.arithmetic import FRESH_BOUNDED, Roundings
from nvfp4check.forward.bounds.linear import InputForm, SquaringLinear, gain
from nvfp4check.forward.bounds.uncertain import split_last, through_matrix
from nvfp4ref.deepseek_v3.config import DeepseekV3Config


@dataclass(frozen=True, slots=True)
class Halves:
    """What kv_b_proj is folded into queries and outputs as."""

    #: float64 [H, N, C] and [H, V, C].
    of_keys: torch.Tensor
    of_values: torch.Tensor
    of_keys_squared: torch.Tensor
    of_values_squared: torch.Tensor
    rope_width: int
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
            rope_width=config.qk_rope_head_dim,
            rounds=quantised or form.weight_rounds,
            quantised=quantised,
        )


@dataclass(frozen=True, slots=True)
class Absorbed:
    """One prompt's attention with keys and values left in the latent space."""

    halves: Halves
    #: float64 [T, C], as the cache gives it back.
    latent: torch.Tensor
    softmax_scale: float
    roundings: Roundings

    @property
    def declared(self) -> bool:
        """Whether any engine may attend so."""
        return bool(self.roundings.absorbs.any())

    def scores(
        self, q_nope: torch.Tensor, rope: torch.Tensor, rope_squares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scores [H, t, S], and the variances that rounding queries and scores adds to them.

        q_nope is [H, t, N]; rope [H, t, S] the rotated part of the scores, rope_squares the sum of
        its terms' squares.
        """
        scale2, roundings = self.softmax_scale**2, self.roundings
        width, latent = q_nope.shape[-1], self.latent[: rope.shape[-1]]
        u = q_nope @ self.halves.of_keys  # (H, t, C)
        terms = q_nope.square() @ self.halves.of_keys_squared
        u_variance = roundings.of_sum(width, u, terms) + roundings.of_output(u)
        u_variance = u_variance + self._of_weights(terms)

        nope = u @ latent.T * self.softmax_scale
        scores, c2 = nope + rope, latent.square()
        squares = u.square() @ c2.T * scale2 + rope_squares
        amplified = (scores.square() / squares).nan_to_num(1.0).clamp(min=1.0)
        of_query = through_matrix(_times(u_variance, c2.T * scale2), amplified)
        own = (
            roundings.of_sum(latent.shape[-1] + self.halves.rope_width, scores, squares)
            + roundings.of_output(nope)
            + roundings.of_output(rope)
            + roundings.of_output(scores, 2)
            + roundings.of_internal(scores, 2)  # scaled, and less the row's largest
            + roundings.of_functions(torch.ones_like(scores))
        )
        return scores, self._where_declared(of_query), self._where_declared(own)

    def output(self, p: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return the variance [A, KINDS, H, t, V] that is added after the weights.

        p [H, t, S] are the weights of the absorbed form, out the output of the direct one.
        """
        roundings, squares = self.roundings, self.halves.of_values_squared.mT
        latent = self.latent[: p.shape[-1]]
        w = p @ latent  # (H, t, C)
        w_variance = roundings.of_sum(p.shape[-1], w, p.square() @ latent.square())
        w_variance = w_variance + roundings.of_output(w)
        terms = w.square() @ squares
        variance = through_matrix(_times(w_variance, squares), gain(out, terms))
        variance = variance + roundings.of_sum(w.shape[-1], out, terms) + roundings.of_output(out)
        variance = variance + self._of_weights(terms)
        if self.halves.quantised:
            variance[:, FRESH_BOUNDED] += (w @ self.halves.of_values.mT - out).square()
        return self._where_declared(variance)

    def _where_declared(self, variance: torch.Tensor) -> torch.Tensor:
        """Return variances [A, KINDS, ...], nothing for engines of the direct form alone."""
        absorbs = self.roundings.absorbs.to(variance.device)
        return variance * split_last(absorbs, -1, *(1,) * (variance.dim() - 1))

    def _of_weights(self, terms: torch.Tensor) -> torch.Tensor:
        """Return what rounding the weights adds to sums of these squares, [A, KINDS, ...]."""
        return self.roundings.of_weights(terms) if self.halves.rounds else terms.new_zeros(())


def _times(variance: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Return variances [A, KINDS, H, t, C] times squares [C, *] or [H, C, *]."""
    out = variance.new_zeros(*variance.shape[:-1], squares.shape[-1])
    for of_kind, product in zip(variance.flatten(0, 1), out.flatten(0, 1), strict=True):
        if of_kind.any():  # what is rounded is of few kinds
            product.copy_(of_kind @ squares)
    return out
