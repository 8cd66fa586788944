"""The number formats as data, and the only home of their constants.

Contract:
    E2M1       sign, 2 exponent bits (bias 1), 1 mantissa bit; no infinity, no NaN; largest 6
    E4M3       sign, 4 exponent bits (bias 7), 3 mantissa bits; no infinity; NaN is 0x7F and 0xFF;
               largest 448 ("FN": finite, with NaN)
    E8M0       8 exponent bits (bias 127), no sign, no zero; 0xFF is NaN
    NVFP4      E2M1 elements, one E4M3 block scale for 16 consecutive elements along K, and one
               float32 global scale a tensor: value = code * block scale * global decode scale
    FP8 block  E4M3 elements, one float32 scale for each 128 x 128 tile: value = element * scale

Sources: OCP Microscaling Formats (MX) v1.0, tables 1, 5 and 7; OCP 8-bit Floating Point (OFP8)
v1.0, table 1; DeepSeek-V3 README_WEIGHTS.md for the 128 x 128 tiles.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementFormat:
    """A small float: its fields and what follows from them."""

    name: str
    #: Bits of one code, the sign included.
    bits: int
    exponent_bits: int
    #: Explicit mantissa bits; the leading one of a normal number is not counted.
    mantissa_bits: int
    #: value = (1 + mantissa / 2**mantissa_bits) * 2**(exponent - bias) for a normal number.
    bias: int
    signed: bool
    #: Largest finite magnitude.
    max: float
    #: Codes that mean NaN.
    nan_codes: tuple[int, ...]

    @property
    def smallest_normal(self) -> float:
        """Smallest magnitude with an implicit leading one."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest magnitude above zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def sign_bit(self) -> int:
        """Mask of the sign in a code; zero for an unsigned format."""
        return 1 << (self.bits - 1) if self.signed else 0


E2M1 = ElementFormat(
    name="e2m1",
    bits=4,
    exponent_bits=2,
    mantissa_bits=1,
    bias=1,
    signed=True,
    max=6.0,
    nan_codes=(),
)

E4M3 = ElementFormat(
    name="e4m3",
    bits=8,
    exponent_bits=4,
    mantissa_bits=3,
    bias=7,
    signed=True,
    max=448.0,
    nan_codes=(0x7F, 0xFF),
)

E8M0 = ElementFormat(
    name="e8m0",
    bits=8,
    exponent_bits=8,
    mantissa_bits=0,
    bias=127,
    signed=False,
    max=2.0**127,
    nan_codes=(0xFF,),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScaledFormat:
    """Elements that share a scale with their block."""

    name: str
    element: ElementFormat
    #: Format of a block scale; None is float32.
    scale: ElementFormat | None
    #: Rows and columns of one block.
    block_shape: tuple[int, int]
    has_global_scale: bool

    @property
    def block_size(self) -> int:
        """Elements in one block."""
        return self.block_shape[0] * self.block_shape[1]

    @property
    def full_scale(self) -> float:
        """Largest value with a global scale of one: largest element times largest block scale."""
        return self.element.max * (self.scale.max if self.scale is not None else 1.0)


NVFP4 = BlockScaledFormat(
    name="nvfp4", element=E2M1, scale=E4M3, block_shape=(1, 16), has_global_scale=True
)

FP8_BLOCK = BlockScaledFormat(
    name="fp8-block", element=E4M3, scale=None, block_shape=(128, 128), has_global_scale=False
)

#: Elements along K that share one block scale.
BLOCK_SIZE = NVFP4.block_size

#: Rows and scale columns of one tile of the 128x4 scale layout (cuBLAS, section 3.1.4.4.2).
SCALE_TILE_ROWS = 128
SCALE_TILE_COLUMNS = 4
