"""In which direction attention errs whose cache keeps values where it should keep FP8 codes.

T tokens of one prompt, H heads, D = hidden_size, A declared arithmetics.

Contract:
    why        in bfloat16 so many codes of a cache flip that the error of a correct engine is as
               large as that of one which never quantises: no norm tells them apart. But the latter
               errs in a direction that is known
    off        by how much an element of the cache would be another if it were not quantised, where
               its code cannot flip (`straddles`), and 0 where it may: a correct engine holds the
               former elements as the reference does, code by code, so its error has no part in what
               comes of them but by chance. A code that flips errs towards its value: it would
    direction  what that changes in the output of o_proj, [A, T, D]. Nothing is quantised on the way
               (the absorbed form, o_proj dequantised), or codes that flip there would err along it
    use        `nvfp4check.agreement.uncached`; float32 is enough for a direction
"""

from dataclasses import dataclass

import torch

from nvfp4check.forward.bounds.absorbed import Halves
from nvfp4check.forward.bounds.linear import SquaringLinear
from nvfp4check.forward.bounds.uncertain import split_last
from nvfp4ref.deepseek_v3.attention import SCORES_AT_ONCE, absorbed
from nvfp4ref.deepseek_v3.config import DeepseekV3Config


@dataclass(frozen=True, slots=True)
class Kept:
    """What a cache gives back of one prompt."""

    #: [T, *]
    value: torch.Tensor
    #: [A, T, *]
    off: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Folded:
    """kv_b_proj as the absorbed form takes it."""

    halves: Halves

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantized(x.dtype).T

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [H (N + V), C]."""
        both = torch.cat((self.halves.of_keys, self.halves.of_values), dim=1)
        return both.flatten(0, 1).to(dtype)


class Uncached:
    """Collects how heads move, prompt by prompt."""

    def __init__(self, config: DeepseekV3Config) -> None:
        self._config = config
        self._moved: list[torch.Tensor] = []

    def attended(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, latent: Kept, key: Kept, halves: Halves
    ) -> None:
        """Hear of a prompt's queries [T, H N] and [T, H R], and of what its cache holds."""
        heads, weight = self._config.num_attention_heads, _Folded(halves)
        queries = tuple(split_last(q.float(), heads, -1) for q in (q_nope, q_rope))
        held = latent.value.float(), key.value.float()
        moved = [
            self._heads(queries, (held[0] + by_latent.float(), held[1] + by_key.float()), weight)
            for by_latent, by_key in zip(latent.off, key.off, strict=True)
        ]
        self._moved.append(torch.stack(moved) - self._heads(queries, held, weight))

    def direction(self, o_proj: SquaringLinear) -> torch.Tensor:
        """Return the direction of all prompts."""
        moved = torch.cat(self._moved, dim=1)
        scale = o_proj.input().pre_quant_scale
        if scale is not None:
            moved = moved * scale.float()
        return o_proj.plain(moved.flatten(0, 1)).reshape(*moved.shape[:2], -1)

    def _heads(
        self,
        queries: tuple[torch.Tensor, ...],
        held: tuple[torch.Tensor, torch.Tensor],
        weight: _Folded,
    ) -> torch.Tensor:
        """Return the heads' outputs [T, H V], some queries at a time."""
        config, (latent, key), tokens = self._config, held, len(held[0])
        width = tokens + 3 * config.kv_lora_rank
        step = max(1, SCORES_AT_ONCE // (config.num_attention_heads * width))
        parts = []
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            q_nope, q_rope = (q[start:stop] for q in queries)
            parts.append(absorbed(q_nope, q_rope, latent[:stop], key[:stop], weight, config))
        return torch.cat(parts).flatten(1)
