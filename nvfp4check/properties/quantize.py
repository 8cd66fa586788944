"""The laws of `quantize`: x [M, K] and a global decode scale to packed codes and block scales."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from nvfp4check import compare, inputs, strategies
from nvfp4check.ops import UnsupportedError
from nvfp4check.properties import common
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.properties.quantized import check_values, nan_scales
from nvfp4ref import nvfp4, packing
from nvfp4ref.formats import BLOCK_SIZE, NVFP4

NAME = "quantize"


def _case(label: str, x: torch.Tensor, scale: float | torch.Tensor) -> Case:
    return Case(label, {"x": x, "global_decode_scale": torch.as_tensor(scale).float()})


def _amax_scale(x: torch.Tensor) -> torch.Tensor:
    """Return amax / 2688, as a calibrated tensor has it; 1 for one without a live element."""
    finite = x.float().nan_to_num(0.0, 0.0, 0.0).abs()
    amax = finite.max() if finite.numel() else finite.new_tensor(0.0)
    return torch.where(amax > 0, amax / NVFP4.full_scale, 1.0)


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case of each dtype."""
    for dtype in inputs.INPUT_DTYPES:
        generator = setting.generator(1, inputs.INPUT_DTYPES.index(dtype))
        x = inputs.heavy_tailed(generator, 5, 96).to(dtype)
        yield _case(f"{_short(dtype)} 5 x 96", x, _amax_scale(x))


def _families(setting: Setting) -> Iterator[Case]:
    for number, (name, family) in enumerate(inputs.FAMILIES.items()):
        for dtype in inputs.INPUT_DTYPES:
            x = family(setting.generator(2, number), 33, 272).to(dtype)
            for note, factor in (("", 1.0), (", global scale 1.37 amax / 2688", 1.37)):
                yield _case(f"{name} {_short(dtype)}{note}", x, _amax_scale(x) * factor)


def _shapes(setting: Setting) -> Iterator[Case]:
    for rows, blocks in inputs.shapes():
        x = inputs.gaussian(setting.generator(3, rows, blocks), rows, blocks * BLOCK_SIZE)
        x = x.to(torch.bfloat16)
        yield _case(f"{rows} x {blocks * BLOCK_SIZE} bfloat16", x, _amax_scale(x))


def _no_rows(setting: Setting) -> Iterator[Case]:
    yield _case("0 x 64 bfloat16", torch.empty(0, 64, dtype=torch.bfloat16), 0.01)


def _every_width(setting: Setting) -> Iterator[Case]:
    for blocks in range(1, 41):
        x = inputs.gaussian(setting.generator(4, blocks), 2, blocks * BLOCK_SIZE)
        x = x.to(torch.bfloat16)
        yield _case(f"2 x {blocks * BLOCK_SIZE} bfloat16", x, _amax_scale(x))


def _element_ties(setting: Setting) -> Iterator[Case]:
    for dtype in inputs.INPUT_DTYPES:
        for scale in (1.0, 2.0**-12, 2.0**-7):
            x = inputs.element_boundaries(dtype, scale)
            yield _case(f"{_short(dtype)}, global scale {scale}", x, scale)


def _scale_ties(setting: Setting) -> Iterator[Case]:
    for dtype in inputs.INPUT_DTYPES:
        for scale in (1.0, 2.0**-7):
            x = inputs.scale_boundaries(dtype, scale)
            yield _case(f"{_short(dtype)}, global scale {scale}", x, scale)


def _zeros(setting: Setting) -> Iterator[Case]:
    for dtype in inputs.INPUT_DTYPES:
        for scale in (1.0, 0.00041):
            yield _case(f"{_short(dtype)}, global scale {scale}", inputs.zero_blocks(dtype), scale)
    side_by_side = inputs.zero_blocks(torch.float32).view(1, -1)
    yield _case("zero blocks beside live ones", side_by_side, 0.015625 / NVFP4.full_scale)


def _nonfinite(setting: Setting) -> Iterator[Case]:
    for dtype in inputs.INPUT_DTYPES:
        yield _case(_short(dtype), inputs.nonfinite_blocks(dtype), 2.0 / NVFP4.full_scale)


def _range_ends(setting: Setting) -> Iterator[Case]:
    for dtype in inputs.INPUT_DTYPES:
        small = inputs.small_blocks(dtype)
        yield _case(f"{_short(dtype)}, block scales down to zero", small, 1.0)
        yield _case(f"{_short(dtype)}, amax four times the tensor's", small[:4], 0.25)
    tiny = inputs.small_blocks(torch.float32) * 2.0**-100
    yield _case("float32, values down to 2**-114", tiny, 2.0**-100)
    large = inputs.small_blocks(torch.float32) * 2.0**100
    yield _case("float32, values up to 2**111", large, 2.0**100)
    rows = torch.cat((torch.ones(1, 32), torch.full((3, 32), 1e-6)))
    rows = rows * torch.linspace(-1, 1, 32)
    yield _case("float32, rows a million times smaller", rows, 1.0 / NVFP4.full_scale)


def _check(runner: Runner, case: Case) -> Failure | None:
    actual, expected = runner(case.inputs), runner.reference(case.inputs)
    return check_values(runner, case, actual, expected, case.inputs["x"])


def _shrink(case: Case, failure: Failure) -> Iterable[Case]:
    """Yield single blocks of the input, then the block with elements set to zero."""
    x, scale = case.inputs["x"], case.inputs["global_decode_scale"]
    if x.numel() > BLOCK_SIZE:
        yield from (
            _case(f"{case.label}, row {row}, block {column // BLOCK_SIZE}", block, scale)
            for row, column, block in _likely_blocks(x, failure)
        )
        return
    live = int((x != 0).sum())  # the last one stays: an empty block is another case
    for place in range(x.numel()):
        if x[0, place] != 0 and live > 1:
            fewer = x.clone()
            fewer[0, place] = 0
            yield _case(case.label, fewer, scale)


def _likely_blocks(x: torch.Tensor, failure: Failure) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield blocks, that of the worst mismatch first and then those where any code differs."""
    columns = x.shape[1] // BLOCK_SIZE
    places: list[tuple[int, int]] = []
    if failure.worst is not None and len(failure.worst.index) == 2:
        row, place = failure.worst.index
        per_block = {columns: 1, columns * 8: 8, columns * 16: 16}
        width = next((w for size, w in per_block.items() if _width(failure) == size), BLOCK_SIZE)
        places.append((row, place // width))
    places += [(row, block) for row in range(x.shape[0]) for block in range(columns)]
    for row, block in dict.fromkeys(places[: 1 + 64]):
        if row < x.shape[0] and block < columns:
            first = block * BLOCK_SIZE
            yield row, first, x[row : row + 1, first : first + BLOCK_SIZE].contiguous()


def _width(failure: Failure) -> int:
    text = failure.message
    if not failure.expected:
        return 0
    codes, scales = failure.expected[0], failure.expected[1]
    if "packed codes" in text:
        return int(codes.shape[-1])
    return int(scales.shape[-1] if "block scales" in text else codes.shape[-1] * 2)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _round_trip(runner: Runner, case: Case) -> Failure | None:
    scale = case.inputs["global_decode_scale"]
    first = runner(case.inputs)
    full = (packing.unpack(first[0]) & 7).view(*first[1].shape, BLOCK_SIZE).amax(-1) == 7
    full = full.repeat_interleave(BLOCK_SIZE, dim=-1) & ~nan_scales(first[1])
    values = nvfp4.dequantize(first[0], first[1], scale)
    values = torch.where(full, values, 0.0)
    again = runner({"x": values, "global_decode_scale": scale})
    back = nvfp4.dequantize(again[0], again[1], scale)
    comparison = compare.bits(
        back, values, what="values decoded after a second pass", zeros=compare.Zeros.UNSIGNED
    )
    second = Case(f"{case.label}, second pass", {"x": values, "global_decode_scale": scale})
    return failed(second, comparison, again, first)


def _round_trip_cases(setting: Setting) -> Iterator[Case]:
    for number, dtype in enumerate(inputs.INPUT_DTYPES):
        x = inputs.gaussian(setting.generator(5, number), 16, 128).to(dtype)
        yield _case(f"{_short(dtype)}, global scale 2**-9", x, 2.0**-9)


def _homogeneous(runner: Runner, case: Case) -> Failure | None:
    plain = runner(case.inputs)
    for power in (-8, 5):
        factor = 2.0**power
        scaled = _case(
            f"{case.label}, x and global scale times 2**{power}",
            case.inputs["x"] * factor,
            case.inputs["global_decode_scale"] * factor,
        )
        failure = common.same_outputs(runner, scaled, runner(scaled.inputs), plain)
        if failure:
            return failure
    return None


def _antisymmetric(runner: Runner, case: Case) -> Failure | None:
    plain = runner(case.inputs)
    negated = _case(f"{case.label}, negated", -case.inputs["x"], case.inputs["global_decode_scale"])
    mirrored = runner(negated.inputs)
    scales = failed(negated, compare.bits(mirrored[1], plain[1], what="block scales"))
    if scales:
        return scales
    codes = packing.unpack(plain[0])
    flipped = torch.where((codes & 7) == 0, codes, codes ^ 8)
    found = packing.unpack(mirrored[0])
    found = torch.where((found & 7) == 0, codes, found)
    return failed(negated, compare.bits(found, flipped, what="codes"), mirrored, plain)


def _dtypes_agree(setting: Setting) -> Iterator[Case]:
    x = inputs.coarse(setting.generator(6), 9, 64)
    yield _case("multiples of 1/8", x, 6.0 / NVFP4.full_scale)


def _dtypes_check(runner: Runner, case: Case) -> Failure | None:
    results: list[tuple[Case, tuple[torch.Tensor, ...]]] = []
    refused: UnsupportedError | None = None
    for dtype in inputs.INPUT_DTYPES:
        typed = _case(
            f"{case.label} as {_short(dtype)}",
            case.inputs["x"].to(dtype),
            case.inputs["global_decode_scale"],
        )
        try:
            results.append((typed, runner(typed.inputs)))
        except UnsupportedError as error:
            refused = error
    if len(results) < 2 and refused is not None:
        raise refused
    first_case, first = results[0]
    for typed, outputs in results[1:]:
        note = f"against {first_case.label}"
        failure = common.same_outputs(runner, typed, outputs, first, note)
        if failure:
            return failure
    return None


def _one_hot(setting: Setting) -> Iterator[Case]:
    for value in (6.0, -1.5):
        x = inputs.one_hot(4 * BLOCK_SIZE, value, torch.bfloat16)
        yield _case(f"{value} at each of 64 places in turn", x, 1.0 / 64)


def _examples(setting: Setting) -> Iterator[Case]:
    yield Case(f"{setting.max_examples} examples, seed {setting.seed}", {})


def _any_block(runner: Runner, case: Case) -> Failure | None:
    def broken(example: strategies.Example) -> Failure | None:
        tried = _case("drawn by hypothesis", example.x, example.global_decode_scale)
        return _check(runner, tried)

    return strategies.find(
        strategies.examples(), broken, runner.setting.max_examples, runner.setting.seed
    )


_law = partial(Property, operation=NAME)

PROPERTIES = (
    _law(
        name="codes-are-the-conventions",
        law="codes and block scales are those of the convention: Gaussian, heavy-tailed, twenty "
        "octaves, blocks eight times their neighbour",
        generate=_families,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="every-tie-and-its-neighbours",
        law="under each of the 126 block scales, the 7 midpoints of E2M1 and the values next to "
        "them round as the convention says, with both signs",
        generate=_element_ties,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="every-scale-tie-and-its-neighbours",
        law="an amax at, below and above each midpoint of E4M3 gives the convention's block scale, "
        "from underflow to overflow",
        generate=_scale_ties,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="zero-blocks",
        law="blocks of zeros of either sign, and with one live element, are the convention's",
        generate=_zeros,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="infinities-and-nans",
        law="an infinity or a NaN spoils its own block as the convention says, and no other",
        generate=_nonfinite,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="ends-of-the-range",
        law="block scales that underflow, saturate or are subnormal are the convention's, and so "
        "are tiny and huge values under a fitting global scale",
        generate=_range_ends,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="every-shape",
        law="rows round every tile size, with 1 to 17 blocks in a row, are quantised alike",
        generate=_shapes,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="no-rows",
        law="no rows give no codes and no block scales",
        generate=_no_rows,
        check=_check,
    ),
    _law(
        name="every-width",
        law="every multiple of 16 up to 640 columns is quantised to the end",
        generate=_every_width,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="one-hot-elements",
        law="a single live element lands in its own nibble, byte and block",
        generate=_one_hot,
        check=_check,
        shrink=_shrink,
    ),
    _law(
        name="any-block",
        law="no block that hypothesis can think of is quantised otherwise",
        generate=_examples,
        check=_any_block,
    ),
    _law(
        name="quantising-twice-changes-nothing",
        law="decoded values quantise to themselves, in blocks whose largest code is 6",
        generate=_round_trip_cases,
        check=_round_trip,
    ),
    _law(
        name="powers-of-two-move-into-the-global-scale",
        law="x and the global scale times one power of two give the same codes and block scales",
        generate=ordinary,
        check=_homogeneous,
    ),
    _law(
        name="signs-mirror",
        law="-x has the block scales of x and the codes with the other sign",
        generate=ordinary,
        check=_antisymmetric,
    ),
    _law(
        name="dtypes-agree",
        law="the same values as bfloat16, float16 and float32 give the same bytes",
        generate=_dtypes_agree,
        check=_dtypes_check,
    ),
    common.permutes_rows(NAME, ordinary, ("x",)),
    common.takes_any_view(NAME, ordinary, ("x",)),
    common.ignores_poison(NAME, ordinary, ("x",)),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
