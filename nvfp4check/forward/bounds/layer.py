"""A layer's bounds, found while the layer is computed.

The layer is computed by `nvfp4ref`, untouched; its weights are handed over in wrappers that tell a
`LayerBounds` what was multiplied with what, while the bytes are at hand. Every weight is read once.

Contract:
    input    bit for bit the reference's, or that rounded to the declared dtype: the difference is
             known, element by element, and carried as what may be off
    causal   the bound of a token holds where the inputs of it and of all before it are so
    points   attn_input, attn_output, mlp_input, router_scores, router_weights, mlp_output, hidden:
             the norm of the error of a token, [A, T] each; router_weights, mlp_output and hidden
             for the reference's choice of experts
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from nvfp4check.activations import HIDDEN
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds import straddles
from nvfp4check.forward.bounds.absorbed import Absorbed, Halves
from nvfp4check.forward.bounds.arithmetic import FRESH_RANDOM, Roundings
from nvfp4check.forward.bounds.attention import attended
from nvfp4check.forward.bounds.linear import (
    InputForm,
    Operands,
    Passed,
    SquaringLinear,
    through,
)
from nvfp4check.forward.bounds.parallel import of_linear, split
from nvfp4check.forward.bounds.pointwise import gated, norm, residual, rotated
from nvfp4check.forward.bounds.routing import (
    ExpertSum,
    router_scores,
    router_weights,
    settled,
)
from nvfp4check.forward.bounds.uncached import Kept, Uncached
from nvfp4check.forward.bounds.uncertain import Uncertain
from nvfp4check.forward.bounds.watched import Watched
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.model import DecoderLayerWeights
from nvfp4ref.deepseek_v3.moe import MlpWeights, MoeWeights
from nvfp4ref.rounding import round_to

#: Linears of whose products ranks have shares.
_ROW_PARALLEL = ("o_proj", "down_proj")


class LayerBounds:
    """Follows one layer, and holds its bounds when it is done."""

    def __init__(
        self,
        lengths: Sequence[int],
        weights: DecoderLayerWeights,
        config: DeepseekV3Config,
        roundings: Roundings,
        cache_scale: float | None,
    ) -> None:
        """Take a layer over packed prompts; `cache_scale` is that of an FP8 cache, or None."""
        self._plain = weights
        self._lengths = list(lengths)
        self._config = config
        self._roundings = roundings
        self._cache_scale = cache_scale
        self._stream: Uncertain
        self._stored: torch.Tensor
        self._at: dict[str, Uncertain] = {}
        self._prompt = 0
        self._halves: Halves | None = None
        self._heads: list[Uncertain] = []
        self._experts: torch.Tensor | None = None
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sum: ExpertSum | None = None
        self._operands = Operands()
        self._uncached = Uncached(config) if cache_scale is not None else None
        self._kept: tuple[Kept, Kept] | None = None
        self._expert_input: Uncertain | None = None
        #: Point to the norm of each token's error, [A, T].
        self.bounds: dict[str, torch.Tensor] = {}
        #: Codes that were counted as flipped, [A, T].
        self.straddles = torch.zeros(len(roundings), sum(lengths), dtype=torch.int64)
        #: Whether no other choice of experts is legal, [A, T]; None in a dense layer.
        self.settled: torch.Tensor | None = None
        #: Where an FP8 cache that keeps values errs, [A, T, D]; None without one.
        self.uncached: torch.Tensor | None = None

    def begin(self, x: torch.Tensor, known: Uncertain | None = None) -> None:
        """Begin with the layer's input [T, D], and what is known of it; None: it was given."""
        self._stored = x
        self._stream = known or given(x, self._roundings)

    @property
    def after(self) -> Uncertain:
        """The state after the layer."""
        return self._at[HIDDEN]

    @property
    def weights(self) -> DecoderLayerWeights:
        """The layer's weights, watched."""
        plain = self._plain
        attention = plain.self_attn
        names = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        watched: dict[str, Any] = {
            name: Watched(linear, self.multiplied, name)
            for name in names
            if (linear := getattr(attention, name)) is not None
        }
        mlp: MlpWeights | MoeWeights
        if isinstance(plain.mlp, MoeWeights):
            shared = plain.mlp.shared_experts
            mlp = replace(
                plain.mlp,
                experts=self._watched_experts,
                shared_experts=self._watched_mlp(shared, "shared") if shared else None,
            )
        else:
            mlp = self._watched_mlp(plain.mlp, "dense")
        return replace(plain, self_attn=replace(attention, **watched), mlp=mlp)

    def record(self, point: str, value: torch.Tensor) -> None:
        """Hear of a point of the layer."""
        plain, eps, roundings = self._plain, self._config.rms_norm_eps, self._roundings
        match point:
            case "attn_input":
                found = norm(self._stream, plain.input_layernorm, eps, value, roundings)
            case "attn_output":
                found = self._at["o_proj"]
                self._stored = self._stored + value
                self._stream = residual(self._stream, found, self._stored, roundings)
            case "mlp_input":
                found = norm(self._stream, plain.post_attention_layernorm, eps, value, roundings)
            case "router_scores":
                gate = cast(MoeWeights, plain.mlp).gate
                found, self._sigmoid = router_scores(
                    self._at["mlp_input"], gate.weight, value, roundings
                )
            case "router_experts":
                self._experts = value
                self.settled = settled(self._at["router_scores"], value, self._config)
                return
            case "router_weights":
                found = self._routed(value)
            case "mlp_output":
                found = self._mlp_output(value)
            case _ if point == HIDDEN:
                found = residual(self._stream, self._at["mlp_output"], value, roundings)
            case _:
                return
        self._at[point] = found
        self.bounds[point] = found.bound

    def multiplied(
        self, role: str, linear: SquaringLinear, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Hear of a product."""
        source = self._input_of(role, x)
        passed = through(linear, source, y, self._roundings, self._operands)
        if role.endswith(_ROW_PARALLEL) and split(self._roundings):
            passed = self._over_ranks(role, linear, source, passed)
        self._at[role] = passed.output
        self._count(role, passed.straddles)
        if role == "o_proj" and self._uncached is not None:
            self.uncached = self._uncached.direction(linear)
        if role == "kv_b_proj":
            self._attend(self._unfolded(passed.output, linear, source), source.value, linear)
        if role.endswith("down_proj"):
            self._down(role, passed)

    def _input_of(self, role: str, x: torch.Tensor) -> Uncertain:
        """Return what is known of the input of a product."""
        eps, roundings = self._config.rms_norm_eps, self._roundings
        attention = self._plain.self_attn
        match role.rpartition(".")[2]:
            case "q_a_proj" | "q_proj" | "kv_a_proj_with_mqa":
                return self._at["attn_input"]
            case "q_b_proj":
                weight = cast(torch.Tensor, attention.q_a_layernorm)
                return norm(self._at["q_a_proj"], weight, eps, x, roundings)
            case "kv_b_proj":
                return self._latent(x)
            case "o_proj":
                parts = self._heads
                return Uncertain(
                    torch.cat([part.value for part in parts]),
                    torch.cat([part.variance for part in parts], dim=2),
                    torch.cat([part.common for part in parts], dim=2),
                )
            case "gate_proj" | "up_proj":
                expert = role.startswith("expert.") and self._expert_input is not None
                return cast(Uncertain, self._expert_input) if expert else self._at["mlp_input"]
            case _:
                prefix = role.rpartition(".")[0]
                gate, up = self._at[f"{prefix}.gate_proj"], self._at[f"{prefix}.up_proj"]
                return gated(gate, up, x, roundings)

    def _latent(self, x: torch.Tensor) -> Uncertain:
        """Return the latent of the prompt at hand as the cache gives it back, and keep its key."""
        config, roundings = self._config, self._roundings
        prompt = self._at["kv_a_proj_with_mqa"].rows(self._tokens_of("kv_b_proj"))
        raw = prompt.columns(slice(0, config.kv_lora_rank))
        key = prompt.columns(slice(config.kv_lora_rank, None))
        positions = torch.arange(len(x), device=x.device)
        weight = self._plain.self_attn.kv_a_layernorm
        normed = raw.value * torch.rsqrt(raw.value.square().mean(-1, True) + config.rms_norm_eps)
        latent = norm(raw, weight, config.rms_norm_eps, normed * weight.double(), roundings)
        self._key, kept_key = self._cached(rotated(key, positions, config.rotary, roundings))
        found, kept = self._cached(latent)
        self._kept = kept, kept_key
        return replace(found, value=x.double())

    def _cached(self, x: Uncertain) -> tuple[Uncertain, Kept]:
        """Return values as the cache gives them back, and what would be off if it kept them."""
        if self._cache_scale is None:
            return x, Kept(x.value, torch.zeros_like(x.value))
        kept = straddles.e4m3(x, self._cache_scale)
        self._count("kv_b_proj", kept.straddles)
        value = kept.value.value
        off = (x.value - value).masked_fill(kept.may_flip.to(value.device), 0.0)
        return kept.value, Kept(value, off)

    def _unfolded(
        self, direct: Uncertain, kv_b_proj: SquaringLinear, latent: Uncertain
    ) -> Uncertain:
        """Return keys and values with what either form of attention inherits from the latent."""
        form = kv_b_proj.input()
        absorbs = self._roundings.absorbs.to(direct.value.device)
        if form.form is InputForm.PLAIN or not absorbs.any():
            return direct
        plain = replace(form, form=InputForm.PLAIN, encode=None)
        folded = through(
            kv_b_proj, latent, direct.value, self._roundings, self._operands, plain
        ).output
        return Uncertain(
            direct.value,
            torch.maximum(direct.variance, folded.variance * absorbs[:, None, None, None]),
            torch.maximum(direct.common, folded.common * absorbs[:, None, None]),
        )

    def _attend(self, unfolded: Uncertain, latent: torch.Tensor, kv_b_proj: SquaringLinear) -> None:
        """Compute the attention of the prompt at hand, and go on to the next."""
        config, roundings = self._config, self._roundings
        halves = self._halves or Halves.of(kv_b_proj, config)
        tokens = self._tokens_of("kv_b_proj")
        name = "q_proj" if self._plain.self_attn.q_proj is not None else "q_b_proj"
        q = self._at[name].rows(tokens)
        head = torch.arange(q.value.shape[-1], device=q.value.device) % config.qk_head_dim
        nope = head < config.qk_nope_head_dim
        q_nope, q_rope = (
            Uncertain(q.value[:, part], q.variance[..., part], q.common) for part in (nope, ~nope)
        )
        positions = torch.arange(len(q.value), device=q.value.device)
        q_rope = rotated(q_rope, positions, config.rotary, roundings)
        if self._uncached is not None and self._kept is not None:
            self._uncached.attended(q_nope.value, q_rope.value, *self._kept, halves)
        self._heads.append(
            attended(
                q_nope,
                q_rope,
                unfolded,
                self._key,
                Absorbed(halves, latent, config.softmax_scale, roundings),
                config,
                shared_weights=kv_b_proj.input().weight_rounds,
            )
        )
        self._prompt += 1
        self._halves = halves if self._prompt < len(self._lengths) else None

    def _tokens_of(self, role: str) -> slice | torch.Tensor:
        """Return the tokens that a product has rows for."""
        if role == "kv_b_proj":
            start = sum(self._lengths[: self._prompt])
            return slice(start, start + self._lengths[self._prompt])
        if role.startswith("expert.") and self._rows is not None:
            return self._rows[0]
        return slice(None)

    def _count(self, role: str, flipped: torch.Tensor) -> None:
        """Count codes of a product's rows as flipped; the counts lie on the processor."""
        tokens = self._tokens_of(role)
        place = tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens
        self.straddles[:, place] += flipped.cpu()

    def _routed(self, weights: torch.Tensor) -> Uncertain:
        experts = cast(torch.Tensor, self._experts)
        found = router_weights(
            self._at["router_scores"],
            self._sigmoid,
            experts,
            weights,
            self._config,
            self._roundings,
        )
        self._sum = ExpertSum(found, self._stored.shape[-1], self._roundings)
        return found

    def _over_ranks(
        self, role: str, linear: SquaringLinear, source: Uncertain, passed: Passed
    ) -> Passed:
        """Return a product as it is where ranks have shares of it.

        Raises:
            CheckError: Each rank would quantise its share by a scale of its own.
        """
        if linear.input().form is InputForm.FP8_PER_TOKEN:
            raise CheckError(
                f"--bounds: {role} scales its input by token, which each of several ranks does by "
                "its own share; leave /tpN out"
            )
        if role not in ("o_proj", "dense.down_proj"):
            return passed  # experts are added up before their shares are
        x, squares, terms = source.value, passed.squares, source.value.shape[-1]
        if role == "o_proj":
            terms = self._config.num_attention_heads
            largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            parts = linear.squares_by_part((x / largest).float(), terms)
            squares = parts.double() * largest.square()
        output = passed.output
        added = of_linear(self._roundings, output.value, squares, terms)
        return replace(passed, output=output.plus(added))

    def _down(self, role: str, passed: Passed) -> None:
        if self._sum is None:
            return
        if self._rows is not None and role.startswith("expert."):
            self._sum.add(passed.output, passed.squares, *self._rows)
        else:
            self._sum.add_shared(passed.output, passed.squares)

    def _mlp_output(self, value: torch.Tensor) -> Uncertain:
        if self._sum is None:
            return self._at["dense.down_proj"]
        terms = self._config.num_experts_per_tok + self._config.n_shared_experts
        return self._sum.total(value, terms)

    def _watched_mlp(self, weights: MlpWeights, prefix: str) -> MlpWeights:
        return MlpWeights(
            gate_proj=Watched(weights.gate_proj, self.multiplied, f"{prefix}.gate_proj"),
            up_proj=Watched(weights.up_proj, self.multiplied, f"{prefix}.up_proj"),
            down_proj=Watched(weights.down_proj, self.multiplied, f"{prefix}.down_proj"),
        )

    def _watched_experts(self, chosen: Sequence[int]) -> Iterable[MlpWeights]:
        weights = cast(MoeWeights, self._plain.mlp).experts(chosen)
        return self._one_by_one(chosen, weights)

    def _one_by_one(
        self, chosen: Sequence[int], weights: Iterable[MlpWeights]
    ) -> Iterator[MlpWeights]:
        experts = cast(torch.Tensor, self._experts)
        for expert, its_weights in zip(chosen, weights, strict=True):
            token, slot = (experts == expert).nonzero(as_tuple=True)
            self._rows = token, slot
            self._expert_input = self._at["mlp_input"].rows(token)
            yield self._watched_mlp(its_weights, "expert")


def given(x: torch.Tensor, roundings: Roundings) -> Uncertain:
    """Return what a candidate is given, off by what rounding it to each declared dtype changes."""
    exact = Uncertain.exactly(x, len(roundings))
    for i, side in enumerate(roundings.declared):
        off = round_to(exact.value, side.dtype).double() - exact.value
        exact.variance[i, FRESH_RANDOM] = off.square()
    return exact
