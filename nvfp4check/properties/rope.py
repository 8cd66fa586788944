"""The laws of `rope`: DeepSeek's rotary embedding of interleaved pairs, with YaRN.

Contract, for a pair (a, b) turned by an angle t = position * frequency, F and u of `functions`:
    angle    |t| (2 F + 4 u): the power that gives the frequency, YaRN's interpolation, the product
    sin,cos  F each, absolute
    turn     3 u (|a| + |b|), two products and a sum
    allowed  (|a| + |b|) (all of these + u of the dtype that sines are stored in), and the rounding
             of the output
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from nvfp4check import compare, inputs
from nvfp4check.properties import common, functions
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.tolerance import Tolerance, output_terms
from nvfp4ref.deepseek_v3.config import RotaryConfig
from nvfp4ref.deepseek_v3.rotary import angles, rope

NAME = "rope"

#: DeepSeek-V3's own fields, the same without stretching, and one whose two mscales differ.
_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {"qk_rope_head_dim": 64, "rope_theta": 10000.0, "rope_scaling": _YARN},
    "no stretching": {"qk_rope_head_dim": 64, "rope_theta": 10000.0, "rope_scaling": None},
    "mscale 0.7": {
        "qk_rope_head_dim": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {**_YARN, "mscale": 0.7},
    },
}

#: Position 0, small ones, round the original length, and the end of the context.
POSITIONS = (0, 1, 2, 3, 7, 31, 63, 511, 4095, 4096, 4097, 20000, 163839)


def _case(label: str, x: torch.Tensor, positions: torch.Tensor, config: dict[str, Any]) -> Case:
    return Case(label, {"x": x, "positions": positions, "config": config})


def _x(setting: Setting, salt: int, tokens: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    generator = setting.generator(salt, tokens, heads)
    return torch.randn(tokens, heads, 64, generator=generator).to(dtype)


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case of each dtype."""
    for dtype in inputs.INPUT_DTYPES:
        x = _x(setting, 1, 6, 3, dtype)
        positions = torch.tensor([0, 1, 2, 9, 100, 5000])
        yield _case(f"6 tokens, 3 heads, {_short(dtype)}", x, positions, CONFIGS["DeepSeek-V3"])


def _positions(setting: Setting) -> Iterator[Case]:
    for name, config in CONFIGS.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = _x(setting, 2, len(POSITIONS), 2, dtype)
            yield _case(f"{name}, {_short(dtype)}", x, torch.tensor(POSITIONS), config)


def _consecutive(setting: Setting) -> Iterator[Case]:
    for tokens, heads in ((1, 1), (33, 128), (129, 1), (64, 5)):
        x = _x(setting, 3, tokens, heads, torch.float32)
        for start in (0, 40):
            positions = torch.arange(start, start + tokens)
            label = f"{tokens} tokens from {start}, {heads} heads"
            yield _case(label, x, positions, CONFIGS["DeepSeek-V3"])


def _pairs(setting: Setting) -> Iterator[Case]:
    x = torch.eye(64).unsqueeze(1)
    for position in (1, 3):
        positions = torch.full((64,), position)
        label = f"element i of token i alone, position {position}"
        yield _case(label, x, positions, CONFIGS["DeepSeek-V3"])


def allowed(case: Case, runner: Runner) -> Tolerance:
    """Return the rotated values and what float32 arithmetic may add."""
    x, positions = case.inputs["x"], case.inputs["positions"]
    config = RotaryConfig.of(case.inputs["config"])
    facts = runner.setting.facts
    real = rope(x.double(), positions, config)
    turned = angles(positions, config).double().abs().repeat_interleave(2, -1).unsqueeze(1)
    pairs = x.double().abs().view(*x.shape[:-1], -1, 2).sum(-1).repeat_interleave(2, -1)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.rotary_factor
    angle = turned * (2 * facts.function_error + 4 * functions.ROUNDING)
    rest = facts.function_error + 4 * functions.ROUNDING + functions.stored(facts)
    terms = {
        "angle": factor * pairs * angle,
        "sine, cosine and products": factor * pairs * rest,
        **output_terms(real, x.dtype),
    }
    return Tolerance(
        expected=real,
        terms=terms,
        exact=torch.zeros_like(real, dtype=torch.bool),
        dtype=x.dtype,
        why=f"angles, sines and products in float32, functions to {facts.function_ulps:g} ulp",
    )


def _check(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    tolerance = allowed(case, runner)
    comparison = compare.within(actual[0], tolerance, what="rotated")
    return failed(case, comparison, actual, (tolerance.rounded,))


def _start(setting: Setting) -> Iterator[Case]:
    for dtype in inputs.INPUT_DTYPES:
        x = _x(setting, 4, 5, 3, dtype)
        positions = torch.zeros(5, dtype=torch.long)
        yield _case(f"position 0, {_short(dtype)}", x, positions, CONFIGS["DeepSeek-V3"])


def _is_identity(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    expected = case.inputs["x"]
    comparison = compare.bits(actual[0], expected, what="rotated", zeros=compare.Zeros.UNSIGNED)
    return failed(case, comparison, actual, (expected,))


def _keeps_lengths(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    tolerance = allowed(case, runner)
    shape = (*case.inputs["x"].shape[:-1], -1, 2)
    bound = tolerance.allowed.view(shape)
    lengths = actual[0].double().view(shape).norm(dim=-1)
    before = case.inputs["x"].double().view(shape).norm(dim=-1)
    length = Tolerance(
        expected=before,
        terms={"rotation": bound.norm(dim=-1)},
        exact=torch.zeros_like(before, dtype=torch.bool),
        dtype=torch.float64,
        why="what the two elements of a pair may be off, together",
    )
    return failed(case, compare.within(lengths, length, what="lengths of pairs"), actual)


def _relative(runner: Runner, case: Case) -> Failure | None:
    """Scores of a query and a key depend on the distance of their positions only."""
    x = case.inputs["x"]
    config = case.inputs["config"]
    half = x.shape[0] // 2
    positions = case.inputs["positions"]
    scores, bounds = [], []
    for shift in (0, 37):
        moved = _case(case.label, x, positions + shift, config)
        rotated = runner(moved.inputs)[0].double()
        query, key = rotated[:half], rotated[half : 2 * half]
        scores.append((query * key).sum(-1))
        error = allowed(moved, runner).allowed
        bounds.append(
            (error[:half] * key.abs()).sum(-1)
            + (error[half : 2 * half] * query.abs()).sum(-1)
            + (error[:half] * error[half : 2 * half]).sum(-1)
        )
    same = Tolerance(
        expected=scores[0],
        terms={"rotation at both places": bounds[0] + bounds[1]},
        exact=torch.zeros_like(scores[0], dtype=torch.bool),
        dtype=torch.float64,
        why="what both rotations may be off",
    )
    return failed(case, compare.within(scores[1], same, what="scores after a shift of 37"))


def _distances(setting: Setting) -> Iterator[Case]:
    positions = torch.tensor([5, 9, 20, 100, 3, 2, 20, 40])
    x = _x(setting, 5, 8, 2, torch.float32)
    yield _case("queries and keys 2 to 60 apart", x, positions, CONFIGS["DeepSeek-V3"])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_law = partial(Property, operation=NAME)

PROPERTIES = (
    _law(
        name="every-kind-of-position",
        law="positions from 0 to the end of the context turn every pair by YaRN's angle",
        generate=_positions,
        check=_check,
    ),
    _law(
        name="every-shape",
        law="any number of tokens and heads is rotated alike",
        generate=_consecutive,
        check=_check,
    ),
    _law(
        name="one-live-element",
        law="element 2i turns into 2i and 2i + 1 and nothing else: pairs are interleaved",
        generate=_pairs,
        check=_check,
    ),
    _law(
        name="position-zero-is-the-identity",
        law="at position 0 every bit stays",
        generate=_start,
        check=_is_identity,
    ),
    _law(
        name="lengths-are-kept",
        law="a rotation keeps the length of every pair",
        generate=ordinary,
        check=_keeps_lengths,
    ),
    _law(
        name="only-distances-count",
        law="the score of a query and a key depends on the distance of their positions only",
        generate=_distances,
        check=_relative,
    ),
    common.permutes_rows(NAME, ordinary, ("x", "positions")),
    common.takes_any_view(NAME, ordinary, ("x",)),
    common.ignores_poison(NAME, ordinary, ("x",)),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
