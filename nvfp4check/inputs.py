"""Inputs that find faults: tables of boundaries, and seeded random families.

Contract:
    boundaries   every value a rounding decides on, exactly, and both its neighbours in the dtype
                 of the input: 7 midpoints of E2M1 under all 126 block scales, 127 midpoints of
                 E4M3, both signs
    families     seeded by a torch.Generator, the same on every machine

Random data does not reach a tie: a million Gaussian values show no difference between ties to even
and ties away, and the tables show one element in six.
"""

import itertools
from collections.abc import Callable, Iterator

import torch

from nvfp4ref import e2m1, e4m3
from nvfp4ref.formats import BLOCK_SIZE, E2M1

#: Rows round the tile sizes of real kernels.
ROWS = (1, 7, 8, 9, 31, 32, 33, 127, 128, 129)

#: Blocks in a row: fewer than, as many as and more than the 4 of a scale tile.
BLOCKS = (1, 2, 3, 4, 5, 7, 8, 9, 17)

#: Bytes of every positive finite block scale.
SCALE_BYTES = tuple(range(1, 127))

#: What stale or padding memory may hold: both NaN, the largest scale, and a mixed pattern.
POISONS = (0x7F, 0xFF, 0x7E, 0xA5)

#: Dtypes an activation comes in.
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Dtypes a product or a dequantised weight leaves in.
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scales_from_bytes(raw: torch.Tensor) -> torch.Tensor:
    """Return uint8 bytes as block scales."""
    return raw.to(torch.uint8).contiguous().view(torch.float8_e4m3fn)


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """Return each value with the next one below and above in its dtype, [..., 3]."""
    if values.dtype == torch.float16:  # torch steps through float16 on no CPU
        raw = values.contiguous().view(torch.int16)
        step = torch.where(values == 0, 0, 1).to(torch.int16)
        return torch.stack((raw - step, raw, raw + step), dim=-1).view(torch.float16)
    infinity = torch.full_like(values, torch.inf)
    return torch.stack(
        (torch.nextafter(values, -infinity), values, torch.nextafter(values, infinity)), dim=-1
    )


def element_boundaries(dtype: torch.dtype, global_decode_scale: float = 1.0) -> torch.Tensor:
    """Return blocks [R, 16] in which every element but the first decides a rounding of E2M1.

    The first element of a block is 6 * scale, so a quantiser's block scale is that scale exactly
    (with a power of two for the global scale); the rest are midpoint * scale and its neighbours.
    Scales that the dtype cannot hold times a midpoint are left out, as float16's smallest are.
    """
    scales = torch.tensor([e4m3.VALUES[byte] for byte in SCALE_BYTES], dtype=torch.float64)
    scales = scales * global_decode_scale
    midpoints = torch.tensor(e2m1.MIDPOINTS, dtype=torch.float64)
    ties = scales.unsqueeze(1) * midpoints
    largest = scales * E2M1.max
    held = (ties.to(dtype).double() == ties).all(-1) & (largest.to(dtype).double() == largest)
    held &= ties[:, 0] > 2 * torch.finfo(dtype).tiny  # neighbours stay normal
    near = neighbours(ties[held].to(dtype)).flatten(1)  # (S, 21)
    both = torch.cat((near, -near), dim=1)  # (S, 42)
    width = BLOCK_SIZE - 1
    padded = torch.nn.functional.pad(both, (0, -both.shape[1] % width))
    blocks = padded.view(len(padded), -1, width)  # (S, B, 15)
    first = largest[held].to(dtype).view(-1, 1, 1).expand(-1, blocks.shape[1], 1)
    return torch.cat((first, blocks), dim=-1).flatten(0, 1)


def scale_boundaries(dtype: torch.dtype, global_decode_scale: float = 1.0) -> torch.Tensor:
    """Return blocks [R, 16] whose amax decides a rounding of their E4M3 block scale.

    Amax is 6 * midpoint and its neighbours, the underflow at 2**-10 and the overflow at 464 among
    them, at every place of the block in turn and with both signs; the rest of a block is a ramp.
    """
    midpoints = torch.tensor(e4m3.MIDPOINTS, dtype=torch.float64) * global_decode_scale
    ideal = midpoints * E2M1.max
    held = (ideal.to(dtype).double() == ideal) & (ideal > 2 * torch.finfo(dtype).tiny)
    amax = neighbours(ideal[held].to(dtype)).flatten()
    ramp = torch.linspace(-0.9, 0.9, BLOCK_SIZE, dtype=torch.float64)
    blocks = (amax.double().unsqueeze(1) * ramp).to(dtype)
    rows = torch.arange(len(amax))
    sign = torch.where(rows % 2 == 0, 1, -1).to(dtype)
    blocks[rows, rows % BLOCK_SIZE] = amax * sign
    return blocks


def zero_blocks(dtype: torch.dtype) -> torch.Tensor:
    """Return blocks of zeros of either sign, alone, mixed, and beside one small value."""
    positive = torch.zeros(BLOCK_SIZE, dtype=dtype)
    mixed = positive.clone()
    mixed[1::2] = -0.0
    one_live = mixed.clone()
    one_live[5] = 0.015625
    negative_live = mixed.clone()
    negative_live[6] = -0.015625
    return torch.stack((positive, -positive, mixed, one_live, negative_live))


def nonfinite_blocks(dtype: torch.dtype) -> torch.Tensor:
    """Return blocks with one infinity or NaN, of either sign, among ordinary values."""
    ordinary = torch.linspace(-2, 2, BLOCK_SIZE, dtype=dtype)
    blocks = ordinary.repeat(6, 1)
    blocks[0, 3] = torch.inf
    blocks[1, 3] = -torch.inf
    blocks[2, 15] = torch.nan
    blocks[3, 0] = torch.nan
    blocks[4] = torch.nan
    blocks[5, 2], blocks[5, 9] = torch.inf, -torch.inf
    return blocks


def small_blocks(dtype: torch.dtype) -> torch.Tensor:
    """Return blocks whose amax falls by powers of two until block scales underflow to zero."""
    ramp = torch.linspace(-1, 1, BLOCK_SIZE, dtype=torch.float64)
    exponents = torch.arange(0, 26, dtype=torch.float64)
    return (2688.0 * torch.exp2(-exponents).unsqueeze(1) * ramp).to(dtype)


def one_hot(k: int, value: float, dtype: torch.dtype) -> torch.Tensor:
    """Return K rows of K elements, row i zero but for its element i."""
    return torch.eye(k, dtype=torch.float64).mul(value).to(dtype)


def gaussian(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return standard normal values, float32."""
    return torch.randn(rows, columns, generator=generator)


def heavy_tailed(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return rows of log-normal size with rare outliers of ten times, float32."""
    values = torch.randn(rows, columns, generator=generator)
    sizes = torch.randn(rows, 1, generator=generator).exp()
    outlier = torch.rand(rows, columns, generator=generator) < 1 / 64
    return values * sizes * torch.where(outlier, 10.0, 1.0)


def wide_range(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return blocks with amplitudes spread evenly over twenty octaves, float32."""
    values = torch.randn(rows, columns, generator=generator)
    octaves = 20 * torch.rand(rows, columns // BLOCK_SIZE, generator=generator)
    return values * torch.exp2(-octaves).repeat_interleave(BLOCK_SIZE, dim=1)


def uneven_neighbours(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return blocks eight times as large as the block beside them, by turns, float32."""
    values = torch.randn(rows, columns, generator=generator)
    turn = torch.arange(columns // BLOCK_SIZE) % 2
    return values * torch.exp2(3.0 * turn).repeat_interleave(BLOCK_SIZE)


def coarse(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return multiples of one eighth, which bfloat16, float16 and float32 all hold."""
    whole = torch.randint(-48, 49, (rows, columns), generator=generator)
    return whole.float() / 8


#: The random families by name.
FAMILIES: dict[str, Callable[[torch.Generator, int, int], torch.Tensor]] = {
    "gaussian": gaussian,
    "heavy-tailed": heavy_tailed,
    "wide-range": wide_range,
    "uneven-neighbours": uneven_neighbours,
}


def random_codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Return packed codes, every byte equally likely, uint8."""
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def random_scales(
    generator: torch.Generator, *shape: int, lowest: int = 1, highest: int = 126
) -> torch.Tensor:
    """Return block scales, every byte between the two equally likely."""
    return scales_from_bytes(torch.randint(lowest, highest + 1, shape, generator=generator))


#: Scale bytes of 1.0 to 1.875: products of such operands are multiples of 2**-8 below 2**7, so
#: that every float32 order is exact up to K = 512.
EXACT_SCALES = (0x38, 0x3F)


def scale_ids(rows: int, columns: int, plane: int) -> torch.Tensor:
    """Return scales that name their place: plane 0 by r + 37 c, plane 1 by 5 (r / 4) + 11 c + r.

    Two planes tell any two of a 128 x 4 tile's places apart, in the 126 positive finite bytes.
    """
    r = torch.arange(rows).unsqueeze(1)
    c = torch.arange(columns).unsqueeze(0)
    ids = r + 37 * c if plane == 0 else 5 * (r // 4) + 11 * c + r
    return scales_from_bytes(ids % len(SCALE_BYTES) + 1)


def shapes(
    rows: tuple[int, ...] = ROWS, blocks: tuple[int, ...] = BLOCKS
) -> Iterator[tuple[int, int]]:
    """Return rows and blocks such that every one of either occurs, in few pairs."""
    count = max(len(rows), len(blocks))
    yield from zip(
        itertools.islice(itertools.cycle(rows), count),
        itertools.islice(itertools.cycle(blocks), count),
        strict=True,
    )


def views(values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the same values in other strides and alignments, each with a name."""
    yield "transposed storage", values.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = torch.empty(*values.shape[:-1], values.shape[-1] + 16, dtype=values.dtype)
    _fill_with_poison(wide)
    wide[..., 8 : 8 + values.shape[-1]] = values
    yield "columns of a wider tensor", wide[..., 8 : 8 + values.shape[-1]]
    flat = torch.empty(values.numel() + 1, dtype=values.dtype)
    _fill_with_poison(flat)
    flat[1:] = values.flatten()
    yield "one element off alignment", flat[1:].view(values.shape)
    spread = torch.empty(2 * values.shape[0], *values.shape[1:], dtype=values.dtype)
    _fill_with_poison(spread)
    spread[::2] = values
    yield "every second row", spread[::2]


def among_poison(values: torch.Tensor, byte: int, rows: int = 128) -> torch.Tensor:
    """Return the values as the contiguous middle rows of a tensor that is poison elsewhere."""
    whole = torch.empty(values.shape[0] + 2 * rows, *values.shape[1:], dtype=values.dtype)
    _fill_with_poison(whole, byte)
    whole[rows : rows + values.shape[0]] = values
    return whole[rows : rows + values.shape[0]]


def _fill_with_poison(values: torch.Tensor, byte: int = 0x7F) -> None:
    values.view(torch.uint8).fill_(byte)
