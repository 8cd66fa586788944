"""Plausible values for the tensors of a synthetic checkpoint.

Contract:
    matrix      w = std * row * tail * n, n normal, row log-normal with sigma 0.25, tail 10 for
                one element in 5,000 and else 1; clamped to +-limit, one element set to limit
    limit       the E4M3 value at or below 12 std: the matrix keeps its amax through FP8, and
                weights that engines fuse have one limit, so one global scale fits them
    fp8         128x128 blocks, scales powers of two: elements and scales as `nvfp4ref.fp8_block`
    bf16        elements * scales, exact in bfloat16, for scales are powers of two
    nvfp4       the bf16 values by `nvfp4ref.nvfp4` under a convention, global scale limit / 2688
    norms       log-normal about 1, of q_a and kv_a about 0.2 and 0.007; embeddings std 0.02
    router      bias about 11, in float32, told apart only in float32
    input scale amax / 2688 of activations, log-normal with sigma 0.2, one for what shares an input

Values of a matrix are made 128 rows at a time from a stream of its own, so that memory is bounded
and any part can be made alone. Standard deviations are those that Tenstorrent's tests fitted to
DeepSeek-V3 where they are public (q_a_proj, kv_a_layernorm), and of usual size elsewhere.
"""

import hashlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from nvfp4check.checkpoint.naming import FUSED_GROUPS
from nvfp4ref import e4m3, fp8_block, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import FP8_BLOCK, NVFP4

_ROWS = FP8_BLOCK.block_shape[0]
_LIMIT = 12.0
_OUTLIER_ONE_IN, _OUTLIER = 5000, 10.0
_ROW_SIGMA, _NORM_SIGMA, _INPUT_SIGMA = 0.25, 0.1, 0.2
#: Standard deviation by the last part of a module's name.
_STD = {
    "q_a_proj": 0.0187,
    "q_b_proj": 0.0202,
    "kv_a_proj_with_mqa": 0.0217,
    "kv_b_proj": 0.0150,
    "o_proj": 0.0107,
    "gate_proj": 0.0141,
    "up_proj": 0.0141,
    "down_proj": 0.0135,
    "gate": 0.0063,
    "lm_head": 0.0200,
    "embed_tokens": 0.0200,
}
_USUAL_STD = 0.0150
_NORM_MEAN = {"kv_a_layernorm": 0.007, "q_a_layernorm": 0.2}
_ACTIVATION_AMAX = 8.0
_ROUTER_BIAS, _ROUTER_BIAS_STD = 11.0, 0.02
_FUSED = {leaf: name for name, leaves in FUSED_GROUPS.items() for leaf in leaves}


class Values:
    """Values of any tensor, by its name and a seed, in any format."""

    def __init__(self, seed: int, convention: Convention) -> None:
        self.seed = seed
        self.convention = convention

    def _rng(self, *what: object) -> np.random.Generator:
        digest = hashlib.sha256("\0".join(map(str, (self.seed, *what))).encode()).digest()
        return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))

    # Matrices

    def fp8(self, module: str, shape: tuple[int, int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield elements float8_e4m3fn and scales float32, 128 rows at a time."""
        for start in range(0, shape[0], _ROWS):
            rows = min(_ROWS, shape[0] - start)
            values = self._master(module, start, rows, shape)
            yield fp8_block.quantize(values, fp8_block.ScaleFormat.UE8M0)

    def bf16(self, module: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Yield values bfloat16, 128 rows at a time."""
        for elements, scale_inv in self.fp8(module, shape):
            yield fp8_block.dequantize(elements, scale_inv, torch.bfloat16)

    def nvfp4(self, module: str, shape: tuple[int, int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield packed codes uint8 and block scales float8_e4m3fn, 128 rows at a time."""
        decode_scale = self.global_decode_scale(module)
        for values in self.bf16(module, shape):
            yield nvfp4.quantize(values, decode_scale, self.convention)

    def global_decode_scale(self, module: str) -> torch.Tensor:
        """Return the global decode scale of a matrix."""
        amax = torch.tensor(self.limit(module), dtype=torch.bfloat16)
        return nvfp4.global_decode_scale(amax, self.convention)

    def limit(self, module: str) -> float:
        """Return the largest magnitude of a matrix, the same for matrices that engines fuse."""
        parent, _, leaf = module.rpartition(".")
        std = _std(leaf) * float(self._rng("limit", parent, _FUSED.get(leaf, leaf)).uniform(0.8, 1))
        return _e4m3_at_most(_LIMIT * std)

    def _master(self, module: str, start: int, rows: int, shape: tuple[int, int]) -> torch.Tensor:
        """Make some rows of a matrix, float32."""
        columns, limit = shape[1], self.limit(module)
        rng = self._rng("rows", module, start)
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        values *= np.exp(_ROW_SIGMA * rng.standard_normal((rows, 1), dtype=np.float32))
        values *= np.float32(_std(module.rpartition(".")[2]))
        outliers = rng.integers(rows * columns, size=rows * columns // _OUTLIER_ONE_IN)
        values.reshape(-1)[outliers] *= np.float32(_OUTLIER)
        np.clip(values, -limit, limit, out=values)
        place = self._rng("largest", module)
        row, column = int(place.integers(shape[0])), int(place.integers(columns))
        if start <= row < start + rows:
            values[row - start, column] = limit * (1 if place.integers(2) else -1)
        return torch.from_numpy(values)

    # The rest

    def input_scale(self, module: str) -> torch.Tensor:
        """Return the input scale of a linear; gate and up share their input, experts theirs."""
        parent, _, leaf = module.rpartition(".")
        rng = self._rng("input", parent, _FUSED.get(leaf, leaf))
        amax = _ACTIVATION_AMAX * float(np.exp(_INPUT_SIGMA * rng.standard_normal()))
        return torch.tensor(amax / NVFP4.full_scale)

    def plain(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Yield the rows of a tensor that no format quantises."""
        module, _, parameter = _original(name).rpartition(".")
        if len(shape) == 2:
            for values in self.bf16(module, (shape[0], shape[1])):
                yield values.to(dtype)
            return
        normal = self._rng("vector", name).standard_normal(shape or 1)
        if parameter == "e_score_correction_bias":
            vector = _ROUTER_BIAS + _ROUTER_BIAS_STD * normal
        elif parameter == "bias":
            vector = 0.1 * normal
        else:
            mean = _NORM_MEAN.get(module.rpartition(".")[2], 1.0)
            vector = mean * np.exp(_NORM_SIGMA * normal)
        yield torch.from_numpy(vector).view(shape).to(torch.float32).to(dtype)


def _original(name: str) -> str:
    """Name the tensor that a layer of multi-token prediction has a copy of."""
    if name.startswith("model.layers."):
        if name.endswith(".embed_tokens.weight"):
            return "model.embed_tokens.weight"
        if name.endswith(".shared_head.head.weight"):
            return "lm_head.weight"
    return name


def _std(leaf: str) -> float:
    return _STD.get(leaf, _USUAL_STD)


@cache
def _e4m3_at_most(value: float) -> float:
    """Return the largest number m * 2**e at or below a value, m of E4M3's four bits."""
    scale = 2.0 ** np.floor(np.log2(value))
    mantissas = e4m3.decode(torch.arange(0x38, 0x40, dtype=torch.uint8)).double()
    return float(mantissas[mantissas * scale <= value].max() * scale)
