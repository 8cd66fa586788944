"""Linear layers, by the format their weight is stored in and the mode they are computed in.

M tokens, K = input features, N = output features.

Contract:
    UNQUANTIZED  y = x W^T, summed in float32 (float64 for float64), rounded once to the dtype of x;
                 the same where WEIGHT_ONLY and STORED meet a weight that is not quantised
    WEIGHT_ONLY  the same with W dequantised and rounded to the dtype of x
    STORED       as an engine computes it
      NVFP4      x quantised under `engine` with the stored input scale (in float32), the product
                 of codes and block scales exact in float64, times alpha = input scale * weight
                 scale (rounded to float32), rounded once to the dtype of x
      FP8 block  x in blocks of 128 along K, scale max(amax, 1e-4) / 448, its power of two above
                 if the checkpoint's scales are powers of two, E4M3 of x / scale; the product of
                 each block exact in float64, times both scales, summed in float64, rounded once
      FP8        x quantised with the stored input scale, or with one for each token, as
                 `nvfp4ref.fp8` says; the product exact in float64, times both scales, rounded once
    a weight without an input scale has no activations to quantise: STORED is WEIGHT_ONLY

Sources: TensorRT-LLM and vLLM for alpha; DeepSeek-V3 inference/kernel.py, act_quant and fp8_gemm.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch

from nvfp4ref import e4m3, fp8, fp8_block, matmul, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.deepseek_v3.norm import arithmetic
from nvfp4ref.formats import E4M3, FP8_BLOCK
from nvfp4ref.fp8 import Fp8Activations

#: Smallest amax an FP8 activation block is scaled by. DeepSeek-V3 inference/kernel.py.
FP8_ACTIVATION_AMAX_FLOOR = 1e-4


class LinearMode(StrEnum):
    """What a quantised weight means for the product."""

    STORED = "stored"
    WEIGHT_ONLY = "weight-only"
    UNQUANTIZED = "unquantized"


class Linear(Protocol):
    """A weight that can be multiplied with, whatever its format."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, [M, N] in the dtype of x."""
        ...

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        ...


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [M, K] times the transposed weight [N, K], in the dtype of x."""
    wide = arithmetic(x.dtype)
    return (x.to(wide) @ weight.to(wide).T).to(x.dtype)


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A weight in BF16, FP16 or float32."""

    weight: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, [M, N] in the dtype of x."""
        return multiply(x, self.weight)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        return self.weight.to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Linear:
    """A weight in NVFP4; both global scales are multipliers that decode."""

    packed_codes: torch.Tensor
    block_scales: torch.Tensor
    global_decode_scale: torch.Tensor
    input_decode_scale: torch.Tensor | None = None
    #: The stored reciprocal, of producers that store it: 1 / (1 / E) need not be E.
    input_encode_scale: torch.Tensor | None = None
    #: AWQ: what the input is multiplied with first, [K].
    pre_quant_scale: torch.Tensor | None = None
    mode: LinearMode = LinearMode.STORED

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, [M, N] in the dtype of x."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        if self.mode is not LinearMode.STORED or self.input_decode_scale is None:
            return multiply(x, self.dequantized(x.dtype))
        a_codes, a_scales = nvfp4.quantize(
            x.to(torch.float32),
            self.input_decode_scale,
            Convention.ENGINE,
            global_encode_scale=self.input_encode_scale,
        )
        product = matmul.exact(a_codes, a_scales, self.packed_codes, self.block_scales).value
        alpha = self.input_decode_scale * self.global_decode_scale
        return (alpha.double() * product).to(x.dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        return nvfp4.dequantize(
            self.packed_codes, self.block_scales, self.global_decode_scale, dtype
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8BlockLinear:
    """A weight in DeepSeek's FP8, with a scale for each tile of 128 x 128."""

    weight: torch.Tensor
    #: Multiplies, in spite of its name.
    weight_scale_inv: torch.Tensor
    #: Whether scales are powers of two (`scale_fmt` ue8m0), those of activations too.
    power_of_two_scales: bool = False
    mode: LinearMode = LinearMode.STORED

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, [M, N] in the dtype of x."""
        if self.mode is not LinearMode.STORED:
            return multiply(x, self.dequantized(x.dtype))
        a, a_scales = quantize_fp8_activations(x, self.power_of_two_scales)
        weight = e4m3.decode(self.weight)
        return fp8_block_product(a, a_scales, weight, self.weight_scale_inv).to(x.dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        return fp8_block.dequantize(self.weight, self.weight_scale_inv, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Linear:
    """A weight in FP8 with one scale, or one for each row."""

    weight: torch.Tensor
    #: [], [1], [N] or [N, 1]
    weight_scale: torch.Tensor
    activations: Fp8Activations = Fp8Activations.NONE
    #: Of STATIC: the multiplier that decodes.
    input_scale: torch.Tensor | None = None
    mode: LinearMode = LinearMode.STORED

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, [M, N] in the dtype of x."""
        if self.mode is not LinearMode.STORED or self.activations is Fp8Activations.NONE:
            return multiply(x, self.dequantized(x.dtype))
        if self.activations is Fp8Activations.PER_TOKEN:
            a, a_scales = fp8.quantize_per_token(x)
        elif self.input_scale is not None:
            a, a_scales = fp8.quantize_static(x, self.input_scale), self.input_scale.reshape(())
        else:
            raise ValueError("static activations need an input_scale")
        scales = fp8.row_scales(self.weight_scale, len(self.weight))
        return fp8.product(a, a_scales, e4m3.decode(self.weight), scales).to(x.dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        return fp8.dequantize(self.weight, self.weight_scale, dtype)


def quantize_fp8_activations(
    x: torch.Tensor, power_of_two_scales: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E4M3 values as float32 [M, K] and the scale of each 128, float32 [M, ceil(K/128)]."""
    width = FP8_BLOCK.block_shape[1]
    features = x.shape[-1]
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -features % width))
    blocks = padded.reshape(len(x), -1, width)  # (M, K / 128, 128)
    amax = blocks.abs().amax(dim=-1).clamp(min=FP8_ACTIVATION_AMAX_FLOOR)
    scales = amax / E4M3.max
    if power_of_two_scales:
        scales = torch.exp2(scales.log2().ceil())
    values = e4m3.round_(blocks / scales.unsqueeze(-1))
    return values.flatten(-2)[:, :features], scales


def fp8_block_product(
    a: torch.Tensor, a_scales: torch.Tensor, weight: torch.Tensor, weight_scale_inv: torch.Tensor
) -> torch.Tensor:
    """Return the product in float64 [M, N] of E4M3 values a [M, K] and weight [N, K].

    a_scales is [M, ceil(K/128)], weight_scale_inv [ceil(N/128), ceil(K/128)].
    """
    height, width = FP8_BLOCK.block_shape
    scales = weight_scale_inv.double().repeat_interleave(height, dim=0)[: len(weight)]
    total = torch.zeros(len(a), len(weight), dtype=torch.float64, device=a.device)
    for block in range(a_scales.shape[1]):
        columns = slice(block * width, (block + 1) * width)
        # Exact: a factor has 4 significant bits and a range of 2**18, of which 128 are summed.
        product = a[:, columns].double() @ weight[:, columns].double().T
        total += product * a_scales[:, block, None].double() * scales[:, block]
    return total
