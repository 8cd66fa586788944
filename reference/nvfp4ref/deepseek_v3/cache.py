"""The key-value cache of MLA: one latent and one rotated key a token, for all heads.

S tokens in the cache, C = kv_lora_rank, R = qk_rope_head_dim.

Contract:
    COMPUTED  values as they were computed
    BFLOAT16  rounded to bfloat16
    FP8       E4M3 of value / scale (float32 division, to nearest even, saturating at 448);
              read back as E4M3 * scale in float32. One scale for latent and key; it is the
              checkpoint's k_scale, 1.0 where it has none, as in vLLM and TensorRT-LLM
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

from nvfp4ref import e4m3


class CacheFormat(StrEnum):
    """How a cache stores its values."""

    COMPUTED = "computed"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentCache:
    """What attention has to remember of one sequence."""

    #: After kv_a_layernorm, as stored, [S, C].
    latent: torch.Tensor
    #: After the rotation, as stored, [S, R].
    rope: torch.Tensor
    #: Dtype of the values when read.
    dtype: torch.dtype
    format: CacheFormat = CacheFormat.COMPUTED
    #: Decode scale of FP8.
    scale: float = 1.0

    @classmethod
    def empty(
        cls,
        latent_width: int,
        rope_width: int,
        dtype: torch.dtype,
        format: CacheFormat = CacheFormat.COMPUTED,
        scale: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> "LatentCache":
        """Return a cache without tokens."""
        stored = {
            CacheFormat.COMPUTED: dtype,
            CacheFormat.BFLOAT16: torch.bfloat16,
            CacheFormat.FP8: torch.uint8,
        }[format]
        return cls(
            latent=torch.empty(0, latent_width, dtype=stored, device=device),
            rope=torch.empty(0, rope_width, dtype=stored, device=device),
            dtype=dtype,
            format=format,
            scale=scale,
        )

    def extended(self, latent: torch.Tensor, rope: torch.Tensor) -> "LatentCache":
        """Return this cache with further tokens, latent [T, C] and rope [T, R], at its end."""
        return LatentCache(
            latent=torch.cat((self.latent, self._store(latent))),
            rope=torch.cat((self.rope, self._store(rope))),
            dtype=self.dtype,
            format=self.format,
            scale=self.scale,
        )

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latent [S, C] and rope [S, R] as attention sees them."""
        return self._load(self.latent), self._load(self.rope)

    def __len__(self) -> int:
        return self.latent.shape[0]

    def _store(self, values: torch.Tensor) -> torch.Tensor:
        if self.format is CacheFormat.FP8:
            return e4m3.encode(values.to(torch.float32) / self.scale)
        return values.to(self.latent.dtype)

    def _load(self, stored: torch.Tensor) -> torch.Tensor:
        if self.format is CacheFormat.FP8:
            return (e4m3.decode(stored) * self.scale).to(self.dtype)
        return stored.to(self.dtype)
