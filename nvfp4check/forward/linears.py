"""Linear layers over stored bytes, dequantised a few rows at a time.

The arithmetic is that of `nvfp4ref.deepseek_v3.linear`, output row by output row. Products that
are exact (STORED) have the reference's bits; others may be summed in another order within a row's
float32 or float64 sum, as the shapes of the matrix products differ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.quant_config import QuantConfig
from nvfp4check.dequantize import dequantize_fp8_block, dequantize_nvfp4
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.linear import Input, InputForm
from nvfp4check.forward.exact import FEW_ROWS, engine_operand, product_of_few, squares_of_few
from nvfp4check.forward.fp8_inputs import fp8_activations, quantizes_tile_inputs
from nvfp4check.forward.meter import Meter
from nvfp4check.forward.reading import RawParts, ReadAhead, as_stored
from nvfp4ref import e4m3, fp8, fp8_block, matmul, nvfp4
from nvfp4ref.conventions import Convention
from nvfp4ref.deepseek_v3.linear import (
    LinearMode,
    fp8_block_product,
    quantize_fp8_activations,
)
from nvfp4ref.deepseek_v3.norm import arithmetic
from nvfp4ref.formats import FP8_BLOCK
from nvfp4ref.fp8 import Fp8Activations

#: Of more tokens than these, each with a row for its value and one for each of its errors, the
#: squares are multiplied faster as a matrix. Not by rows: bounds are the same whatever is declared.
_FEW_TOKENS = 6

_OF_FP8 = {
    Fp8Activations.NONE: InputForm.PLAIN,
    Fp8Activations.STATIC: InputForm.FP8_STATIC,
    Fp8Activations.PER_TOKEN: InputForm.FP8_PER_TOKEN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSettings:
    """What all linears of a run have in common."""

    mode: LinearMode
    device: torch.device
    #: Bytes of dequantised values held at one time.
    chunk: int
    #: What the checkpoint declares.
    quantization: QuantConfig

    @property
    def power_of_two_scales(self) -> bool:
        """Whether the scales of a DeepSeek FP8 checkpoint are powers of two."""
        return self.quantization.scale_fmt == "ue8m0"


class StreamedLinear:
    """A stored weight that is read when it is first multiplied with.

    Its bytes are let go after a product, unless it is `kept` for more of them.
    """

    def __init__(
        self,
        weight: LogicalWeight,
        reader: ReadAhead,
        settings: LinearSettings,
        meter: Meter,
        *,
        kept: bool = False,
    ) -> None:
        self._weight = weight
        self._reader = reader
        self._settings = settings
        self._meter = meter
        self._kept = kept
        self._raw: RawParts | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] times the transposed weight, [M, N] in the dtype of x."""
        raw = self._bytes()
        if Part.PRE_QUANT_SCALE in raw:
            x = x * self._tensor(raw, Part.PRE_QUANT_SCALE).to(x.dtype)
        match self._form(raw):
            case InputForm.NVFP4:
                return self._nvfp4_product(x, raw)
            case InputForm.FP8 | InputForm.FP8_POWER_OF_TWO:
                return self._fp8_block_product(x, raw)
            case InputForm.FP8_STATIC | InputForm.FP8_PER_TOKEN as form:
                return self._fp8_product(x, raw, form)
        a = x.to(arithmetic(x.dtype))
        product = self._by_rows(
            a, lambda rows: self._values(raw, rows, x.dtype).to(a.dtype), lambda w: a @ w.T
        )
        return product.to(x.dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [N, K]."""
        return self._values(self._bytes(), slice(0, self._weight.shape[0]), dtype)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the weight's bytes as long as the context is open, to multiply with them again."""
        kept, self._kept = self._kept, True
        try:
            yield
        finally:
            self._kept = kept
            if not kept:
                self._raw = None

    def input(self) -> Input:
        """Return how the input is taken."""
        raw = self._bytes()
        form = self._form(raw)
        scaled = form in (InputForm.NVFP4, InputForm.FP8_STATIC)
        smooth = self._tensor(raw, Part.PRE_QUANT_SCALE) if Part.PRE_QUANT_SCALE in raw else None
        return Input(
            form,
            encode=self._input_scales(raw)[1] if scaled else None,
            pre_quant_scale=smooth,
            weight_rounds=form is InputForm.PLAIN and self._weight.format is not WeightFormat.BF16,
        )

    def squares(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return float32 rows [R, K] of so many tokens times the weight's squares, [R, N]."""
        raw = self._bytes()
        few = tokens <= _FEW_TOKENS and rows.device.type == "cpu"
        if few and self._weight.format is WeightFormat.NVFP4:
            codes, scales = self._tensor(raw, Part.CODES), self._tensor(raw, Part.BLOCK_SCALES)
            with self._meter.timing("multiply"):
                product = squares_of_few(rows, codes, scales)
            return product * self._scale(raw, Part.GLOBAL_SCALE).square()
        return self._by_rows(
            rows,
            lambda chunk: self._values(raw, chunk, torch.float32).square(),
            lambda squares: rows @ squares.T,
        )

    def plain(self, rows: torch.Tensor) -> torch.Tensor:
        """Return float32 rows [R, K] times the transposed weight; nothing is quantised."""
        raw = self._bytes()
        return self._by_rows(
            rows, lambda chunk: self._values(raw, chunk, torch.float32), lambda w: rows @ w.T
        )

    def squares_by_part(self, x: torch.Tensor, parts: int) -> torch.Tensor:
        """Return, of float32 x [M, K] in so many parts, the sum of their products' squares."""
        raw, width = self._bytes(), x.shape[1] // parts

        def product(weight: torch.Tensor) -> torch.Tensor:
            total = x.new_zeros(len(x), len(weight))
            for start in range(0, x.shape[1], width):
                part = slice(start, start + width)
                total += (x[:, part] @ weight[:, part].T).square_()
            return total

        return self._by_rows(x, lambda rows: self._values(raw, rows, torch.float32), product)

    def _form(self, raw: RawParts) -> InputForm:
        """Return what is made of the input."""
        if self._settings.mode is not LinearMode.STORED:
            return InputForm.PLAIN
        quantization = self._settings.quantization
        match self._weight.format:
            case WeightFormat.NVFP4 if Part.INPUT_SCALE in raw:
                return InputForm.NVFP4
            case WeightFormat.FP8_BLOCK if quantizes_tile_inputs(self._weight, quantization):
                power_of_two = self._settings.power_of_two_scales
                return InputForm.FP8_POWER_OF_TWO if power_of_two else InputForm.FP8
            case WeightFormat.FP8:
                return _OF_FP8[fp8_activations(self._weight, quantization)]
        return InputForm.PLAIN

    def _bytes(self) -> RawParts:
        raw = self._raw if self._raw is not None else self._reader.take(self._weight)
        self._raw = raw if self._kept else None
        return raw

    def _by_rows(
        self,
        a: torch.Tensor,
        values: Callable[[slice], torch.Tensor],
        product: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return the product [M, N], with the weight's values made a few rows at a time."""
        rows, columns = self._weight.shape
        height = FP8_BLOCK.block_shape[0]
        step = max(1, self._settings.chunk // (columns * 8 * height)) * height
        out = torch.empty(len(a), rows, dtype=a.dtype, device=a.device)
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))
            with self._meter.timing("dequantize"):
                weight = values(chunk)
            with self._meter.timing("multiply"):
                out[:, chunk] = product(weight)
        return out

    def _nvfp4_product(self, x: torch.Tensor, raw: RawParts) -> torch.Tensor:
        decode, encode = self._input_scales(raw)
        alpha = decode * self._scale(raw, Part.GLOBAL_SCALE)
        with self._meter.timing("quantize"):
            a = self._activations(x, decode, encode)
        if len(a) <= FEW_ROWS and a.device.type == "cpu":
            codes = self._tensor(raw, Part.CODES)
            with self._meter.timing("multiply"):
                product = product_of_few(a, codes, self._tensor(raw, Part.BLOCK_SCALES))
        else:
            product = self._by_rows(
                a, lambda rows: self._nvfp4(raw, rows, None, torch.float64), lambda w: a @ w.T
            )
        return (alpha.double() * product).to(x.dtype)

    def _activations(
        self, x: torch.Tensor, decode: torch.Tensor, encode: torch.Tensor
    ) -> torch.Tensor:
        """Return codes times block scales of x, [M, K] in float64."""
        if x.device.type == "cpu":
            return engine_operand(x, encode)
        codes, scales = nvfp4.quantize(
            x.to(torch.float32), decode, Convention.ENGINE, global_encode_scale=encode
        )
        return matmul.operand(codes, scales)

    def _input_scales(self, raw: RawParts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input scale that decodes and the one that encodes; one of them is stored."""
        decode = self._scale(raw, Part.INPUT_SCALE)
        if self._weight.global_scale_is_reciprocal:
            encode = self._tensor(raw, Part.INPUT_SCALE).reshape(()).to(torch.float32)
        else:
            encode = 1.0 / decode
        if not 0 < float(decode) < float("inf") or not 0 < float(encode) < float("inf"):
            name = self._weight.parts[Part.INPUT_SCALE].name
            raise CheckError(f"{name}: {float(decode)}, expected a positive number; run validate")
        return decode, encode

    def _fp8_product(self, x: torch.Tensor, raw: RawParts, form: InputForm) -> torch.Tensor:
        with self._meter.timing("quantize"):
            if form is InputForm.FP8_PER_TOKEN:
                a, a_scales = fp8.quantize_per_token(x)
            else:
                a_scales = self._input_scales(raw)[0]
                a = fp8.quantize_static(x, a_scales)
        elements, operand = self._tensor(raw, Part.CODES), a.double()
        product = self._by_rows(
            operand, lambda rows: elements[rows].to(torch.float64), lambda w: operand @ w.T
        )
        scales = fp8.row_scales(self._tensor(raw, Part.SCALE), len(elements))
        return (product * a_scales.double() * scales.double()).to(x.dtype)

    def _fp8_block_product(self, x: torch.Tensor, raw: RawParts) -> torch.Tensor:
        with self._meter.timing("quantize"):
            a, a_scales = quantize_fp8_activations(x, self._settings.power_of_two_scales)
        scales = self._tensor(raw, Part.SCALE_INV).to(torch.float32)
        height = FP8_BLOCK.block_shape[0]
        elements = self._tensor(raw, Part.CODES)
        out = torch.empty(len(x), len(elements), dtype=torch.float64, device=x.device)
        for start in range(0, len(elements), height):
            with self._meter.timing("dequantize"):
                weight = e4m3.decode(elements[start : start + height])
            with self._meter.timing("multiply"):
                out[:, start : start + height] = fp8_block_product(
                    a, a_scales, weight, scales[start // height, None]
                )
        return out.to(x.dtype)

    def _values(self, raw: RawParts, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return some rows of the weight, dequantised and rounded to a dtype."""
        if self._weight.format is WeightFormat.NVFP4:
            return self._nvfp4(raw, rows, self._scale(raw, Part.GLOBAL_SCALE), dtype)
        if self._weight.format is WeightFormat.FP8_BLOCK:
            return self._fp8_block(raw, rows, dtype)
        if self._weight.format is WeightFormat.FP8:
            scales = fp8.row_scales(self._tensor(raw, Part.SCALE), self._weight.shape[0])
            of_rows = scales[rows] if len(scales) > 1 else scales
            values = self._tensor(raw, Part.CODES)[rows].to(torch.float32)
            return (values * of_rows.unsqueeze(1)).to(dtype)
        return self._tensor(raw, Part.PLAIN)[rows].to(dtype)

    def _nvfp4(
        self, raw: RawParts, rows: slice, scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return rows of an NVFP4 weight; without a scale its codes times block scales."""
        codes = self._tensor(raw, Part.CODES)[rows]
        scales = self._tensor(raw, Part.BLOCK_SCALES)[rows]
        if scale is None:
            scale = torch.ones((), dtype=torch.float32, device=self._settings.device)
        if self._settings.device.type != "cpu":
            return nvfp4.dequantize(codes, scales, scale, dtype)
        narrow = torch.float32 if dtype == torch.float64 else dtype
        threads = torch.get_num_threads()
        return dequantize_nvfp4(codes, scales, scale, narrow, threads=threads).to(dtype)

    def _fp8_block(self, raw: RawParts, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        height = FP8_BLOCK.block_shape[0]
        elements = self._tensor(raw, Part.CODES)[rows]
        blocks = slice(rows.start // height, -(-rows.stop // height))
        scales = self._tensor(raw, Part.SCALE_INV)[blocks].to(torch.float32)
        if self._settings.device.type != "cpu":
            return fp8_block.dequantize(elements, scales, dtype)
        narrow = torch.float32 if dtype == torch.float64 else dtype
        threads = torch.get_num_threads()
        return dequantize_fp8_block(elements, scales, narrow, threads=threads).to(dtype)

    def _scale(self, raw: RawParts, part: Part) -> torch.Tensor:
        """Return a global scale as the multiplier that decodes, float32 []."""
        stored = self._tensor(raw, part)
        if stored.numel() != 1:
            name = self._weight.parts[part].name
            raise CheckError(f"{name}: {stored.numel()} elements, expected one; run validate")
        value = stored.reshape(()).to(torch.float32)
        return 1.0 / value if self._weight.global_scale_is_reciprocal else value

    def _tensor(self, raw: RawParts, part: Part) -> torch.Tensor:
        return as_stored(raw[part], self._weight.parts[part]).to(self._settings.device)
