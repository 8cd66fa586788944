"""The laws of `mla_decode`: absorbed latent attention over a paged cache.

Contract, for scores s = scale (q_latent . latent + q_rope . rope) and p = softmax(s):
    score    (S + 4) u_acc scale sum |q||k|, S roundings over latent and rope width, and 2 u |s|
    weight   relative: twice the largest error of a score (its own and the maximum's), and exp's
             F + |s - max| 2**-23; u of the dtype that weights are stored in
    output   2 (weight) sum p |v|, since numerator and denominator are both off; (S' + 4) u_acc
             sum p |v| for the sums over the tokens; the rounding of the output
    batch    the bits of a sequence in another batch are due of kernels that declare
             `batch_invariant`: others may split its tokens by the batch
"""

from collections.abc import Iterator
from functools import partial

import torch

from nvfp4check import compare
from nvfp4check.properties import common, functions
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.tolerance import EPILOGUE_ROUNDINGS, Tolerance, output_terms

NAME = "mla_decode"

LATENT, ROPE = 512, 64

#: DeepSeek-V3's softmax scale: 192**-0.5 (0.1 ln 40 + 1)**2.
SCALE = 0.1352337788608801

#: Tokens in a sequence, round pages of 16.
LENGTHS = (1, 5, 15, 16, 17, 33, 64, 100)

PAGE = 16


def _case(
    setting: Setting,
    label: str,
    lengths: tuple[int, ...],
    *,
    heads: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    page: int = PAGE,
    sharpness: float = 0.25,
    poison: float | None = None,
) -> Case:
    generator = setting.generator(len(label), len(lengths), heads)
    batch, deepest = len(lengths), max(-(-length // page) for length in lengths)
    count = batch * deepest + 3
    table = torch.randperm(count, generator=generator)[: batch * deepest]
    table = table.view(batch, deepest).to(torch.int32)
    latent = torch.randn(count, page, LATENT, generator=generator)
    rope = torch.randn(count, page, ROPE, generator=generator)
    if poison is not None:
        live = torch.zeros(count, page, dtype=torch.bool)
        for b, length in enumerate(lengths):
            for token in range(length):
                live[table[b, token // page], token % page] = True
        latent[~live], rope[~live] = poison, poison
    q_latent = sharpness * torch.randn(batch, heads, LATENT, generator=generator)
    q_rope = sharpness * torch.randn(batch, heads, ROPE, generator=generator)
    return Case(
        label,
        {
            "q_latent": q_latent.to(dtype),
            "q_rope": q_rope.to(dtype),
            "latent_pages": latent.to(dtype),
            "rope_pages": rope.to(dtype),
            "page_table": table,
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "scale": SCALE,
        },
    )


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case of each of two dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(setting, f"lengths 5, 17, 33, {_short(dtype)}", (5, 17, 33), dtype=dtype)


def _lengths(setting: Setting) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(setting, f"lengths {LENGTHS}, {_short(dtype)}", LENGTHS, dtype=dtype)
    yield _case(setting, "128 heads", (20,), heads=128)
    yield _case(setting, "pages of 64", (1, 64, 65, 130), page=64)
    yield _case(setting, "sharp attention", LENGTHS, sharpness=4.0, dtype=torch.float32)


def allowed(runner: Runner, case: Case) -> Tolerance:
    """Return the real result and what a correct kernel may add."""
    taken, facts = case.inputs, runner.setting.facts
    page = taken["latent_pages"].shape[1]
    scale = taken["scale"]
    width = (facts.roundings(LATENT + ROPE) + EPILOGUE_ROUNDINGS) * facts.accumulator_roundoff
    real, weights, sums = [], [], []
    for b, length in enumerate(taken["lengths"].tolist()):
        pages = taken["page_table"][b, : -(-length // page)].long()
        latent = taken["latent_pages"][pages].flatten(0, 1)[:length].double()
        rope = taken["rope_pages"][pages].flatten(0, 1)[:length].double()
        query, turned = taken["q_latent"][b].double(), taken["q_rope"][b].double()
        scores = scale * (query @ latent.T + turned @ rope.T)
        magnitude = abs(scale) * (query.abs() @ latent.abs().T + turned.abs() @ rope.abs().T)
        score_error = width * magnitude + 2 * functions.ROUNDING * scores.abs()
        below = scores - scores.amax(-1, keepdim=True)
        relative = torch.expm1(2 * score_error.amax(-1, keepdim=True))
        relative = relative + functions.exponential(below, facts) + functions.stored(facts)
        p = scores.softmax(-1)
        real.append(p @ latent)
        weights.append(2 * (p * relative) @ latent.abs())
        tokens = (facts.roundings(length) + EPILOGUE_ROUNDINGS) * facts.accumulator_roundoff
        sums.append(tokens * (p @ latent.abs()))
    expected = torch.stack(real)
    return Tolerance(
        expected=expected,
        terms={
            "softmax weights": torch.stack(weights) + functions.FLUSH,
            "weighted sum": torch.stack(sums),
            **output_terms(expected, taken["q_latent"].dtype),
        },
        exact=torch.zeros_like(expected, dtype=torch.bool),
        dtype=taken["q_latent"].dtype,
        why=f"{facts.accumulator} scores and sums, weights in {facts.intermediate}, "
        f"exp to {facts.function_ulps:g} ulp",
    )


def _check(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    tolerance = allowed(runner, case)
    comparison = compare.within(actual[0], tolerance, what="attended")
    return failed(case, comparison, actual, (tolerance.rounded,))


def _one_token(setting: Setting) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(setting, f"one token, {_short(dtype)}", (1, 1), dtype=dtype)


def _returns_the_token(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    page = case.inputs["page_table"][:, 0].long()
    only = case.inputs["latent_pages"][page, 0]
    heads = case.inputs["q_latent"].shape[1]
    expected = only.unsqueeze(1).expand(-1, heads, -1).contiguous()
    return failed(case, compare.bits(actual[0], expected, what="attended"), actual, (expected,))


def _moved_pages(runner: Runner, case: Case) -> Failure | None:
    taken = case.inputs
    count = taken["latent_pages"].shape[0]
    order = torch.randperm(count, generator=runner.setting.generator(5))
    new_place = torch.empty_like(order)
    new_place[order] = torch.arange(count)
    moved = Case(
        f"{case.label}, pages elsewhere",
        {
            **taken,
            "latent_pages": taken["latent_pages"][order],
            "rope_pages": taken["rope_pages"][order],
            "page_table": new_place[taken["page_table"].long()].to(torch.int32),
        },
    )
    return common.same_outputs(runner, moved, runner(moved.inputs), runner(taken))


def _poisoned(setting: Setting) -> Iterator[Case]:
    for poison in (float("nan"), float("inf"), 3e38):
        label = f"{poison} behind the last token and in free pages"
        yield _case(setting, label, LENGTHS, poison=poison)


def _prefix(setting: Setting) -> Iterator[Case]:
    yield _case(setting, "one sequence of 40 tokens", (40,))


def _decode_is_prefill(runner: Runner, case: Case) -> Failure | None:
    """Every prefix of a sequence, asked in one batch, gives what asking it alone gives."""
    taken = case.inputs
    prefixes = torch.tensor([1, 2, 16, 17, 40], dtype=torch.int32)
    many = len(prefixes)
    generator = runner.setting.generator(6)
    batch = {
        **taken,
        "q_latent": _varied(taken["q_latent"], many, generator),
        "q_rope": _varied(taken["q_rope"], many, generator),
        "page_table": taken["page_table"].expand(many, -1).contiguous(),
        "lengths": prefixes,
    }
    together = runner(batch)[0]
    prefill = Case(f"{case.label}, prefixes {prefixes.tolist()}", batch)
    tolerance = allowed(runner, prefill)
    failure = failed(prefill, compare.within(together, tolerance, what="prefill"), (together,))
    if failure:
        return failure
    for b, length in enumerate(prefixes.tolist()):
        alone = {
            **batch,
            **{
                name: batch[name][b : b + 1]
                for name in ("q_latent", "q_rope", "page_table", "lengths")
            },
        }
        single = Case(f"{prefill.label}, {length} tokens alone", alone)
        comparison = compare.within(runner(alone)[0], allowed(runner, single), what="decode")
        failure = failed(single, comparison)
        if failure:
            return failure
    return None


def _varied(query: torch.Tensor, many: int, generator: torch.Generator) -> torch.Tensor:
    factors = 0.5 + torch.rand(many, 1, 1, generator=generator)
    return (query.float() * factors).to(query.dtype)


def _shared_scale(runner: Runner, case: Case) -> Failure | None:
    taken = case.inputs
    scaled = Case(
        f"{case.label}, queries times 4 and scale by 4",
        {
            **taken,
            "q_latent": taken["q_latent"] * 4,
            "q_rope": taken["q_rope"] * 4,
            "scale": taken["scale"] / 4,
        },
    )
    return common.same_outputs(runner, scaled, runner(scaled.inputs), runner(taken))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_law = partial(Property, operation=NAME)
_QUERY = ("q_latent", "q_rope", "page_table", "lengths")

PROPERTIES = (
    _law(
        name="every-length",
        law="sequences of 1 to 100 tokens, on page borders and off them, lie within the bound",
        generate=_lengths,
        check=_check,
    ),
    _law(
        name="one-token-is-returned",
        law="with one token in the cache the result is its latent, bit for bit",
        generate=_one_token,
        check=_returns_the_token,
    ),
    _law(
        name="pages-lie-anywhere",
        law="pages in another order, with the table to match, give the same bits",
        generate=ordinary,
        check=_moved_pages,
    ),
    _law(
        name="poison-beyond-the-length-changes-nothing",
        law="NaN, infinity and 3e38 behind the last token and in free pages reach no result",
        generate=_poisoned,
        check=_check,
    ),
    _law(
        name="prefill-is-decode",
        law="the prefixes of one sequence, together or one by one, lie within the bound",
        generate=_prefix,
        check=_decode_is_prefill,
    ),
    _law(
        name="powers-of-two-move-into-the-scale",
        law="queries times a power of two and the softmax scale by it give the same bits",
        generate=ordinary,
        check=_shared_scale,
    ),
    common.permutes_rows(NAME, ordinary, _QUERY, truth=_check),
    common.takes_any_view(NAME, ordinary, ("q_latent", "q_rope"), truth=_check),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
