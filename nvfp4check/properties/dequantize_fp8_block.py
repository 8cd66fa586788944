"""The laws of `dequantize_fp8_block`: E4M3 weights times one float32 scale a 128 x 128 tile.

Contract:
    value    element * scale: 4 + 24 significant bits, exact in float64
    allowed  float32: the product rounded once, bits; narrower: that product rounded again
"""

from collections.abc import Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs, tolerance
from nvfp4check.properties import common
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4ref import e4m3
from nvfp4ref.formats import FP8_BLOCK

NAME = "dequantize_fp8_block"

TILE_ROWS, TILE_COLUMNS = FP8_BLOCK.block_shape

#: Whole tiles, ragged rows (576 = 4.5 tiles, as kv_a_proj_with_mqa), ragged columns, both, few.
SHAPES = ((128, 128), (256, 384), (576, 128), (128, 200), (130, 259), (1, 16), (127, 129))


def _case(label: str, w: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> Case:
    return Case(label, {"w": w, "scale_inv": scale_inv, "dtype": dtype})


def _scales(
    generator: torch.Generator, rows: int, columns: int, *, powers: bool = False
) -> torch.Tensor:
    shape = (-(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS))
    spread = torch.exp2(torch.randint(-14, 3, shape, generator=generator).float())
    return spread if powers else spread * (1 + torch.rand(shape, generator=generator))


def _weights(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    raw = torch.randint(0, 256, (rows, columns), generator=generator)
    finite = torch.where((raw & 0x7F) == 0x7F, raw - 1, raw)
    return inputs.scales_from_bytes(finite)


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case of each dtype."""
    for number, dtype in enumerate(inputs.OUTPUT_DTYPES):
        generator = setting.generator(1, number)
        w, scales = _weights(generator, 130, 144), _scales(generator, 130, 144)
        yield _case(f"130 x 144 {_short(dtype)}", w, scales, dtype)


def _shapes(setting: Setting) -> Iterator[Case]:
    for rows, columns in SHAPES:
        for dtype in inputs.OUTPUT_DTYPES:
            generator = setting.generator(2, rows, columns)
            w = _weights(generator, rows, columns)
            for powers in (True, False):
                scales = _scales(generator, rows, columns, powers=powers)
                label = f"{rows} x {columns} {_short(dtype)}"
                yield _case(f"{label}{', scales of 2**k' if powers else ''}", w, scales, dtype)


def _every_byte(setting: Setting) -> Iterator[Case]:
    w = inputs.scales_from_bytes(torch.arange(256).view(2, 128))
    for dtype in inputs.OUTPUT_DTYPES:
        for scale in (1.0, 0.0123456):
            label = f"every byte, scale {scale}, {_short(dtype)}"
            yield _case(label, w, torch.tensor([[scale]]), dtype)


def _tile_places(setting: Setting) -> Iterator[Case]:
    rows, columns = 576, 320
    shape = (-(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS))
    ids = (torch.arange(shape[0] * shape[1]).view(shape) + 1).float()
    w = inputs.scales_from_bytes(torch.full((rows, columns), 0x38))
    yield _case("scales that name their tile", w, ids, torch.float32)


def _check(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    w, scale_inv, dtype = (case.inputs[name] for name in ("w", "scale_inv", "dtype"))
    rows, columns = w.shape
    spread = scale_inv.double().repeat_interleave(TILE_ROWS, 0)[:rows]
    spread = spread.repeat_interleave(TILE_COLUMNS, 1)[:, :columns]
    real = e4m3.decode(w).double() * spread
    mantissa, _ = torch.frexp(spread)
    due = (mantissa.abs() == 0.5) | (dtype == torch.float32)
    allowed = tolerance.of_roundings(real, 1, dtype, due & ~real.isnan(), "one float32 product")
    comparison = compare.within(actual[0], allowed, what="values")
    return failed(case, comparison, actual, (allowed.rounded,))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_law = partial(Property, operation=NAME)

PROPERTIES = (
    _law(
        name="every-byte",
        law="each of the 256 bytes decodes to its value times the scale, both NaN to NaN",
        generate=_every_byte,
        check=_check,
    ),
    _law(
        name="every-shape",
        law="whole tiles and ragged last tiles of rows and columns take their own scale",
        generate=_shapes,
        check=_check,
    ),
    _law(
        name="scales-that-name-their-tile",
        law="every 128 x 128 tile reads its own scale",
        generate=_tile_places,
        check=_check,
    ),
    common.takes_any_view(NAME, ordinary, ("w", "scale_inv")),
    common.ignores_poison(NAME, ordinary, ("w", "scale_inv")),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
