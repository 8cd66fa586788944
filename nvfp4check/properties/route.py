"""The laws of `route`: group-limited choice of experts, and their weights.

Contract:
    score    sigmoid(logit) + bias, known to the sigmoid's error (`functions.sigmoid`) and u of
             the sum
    choice   legal where scores within what each may be off could have led to it: some set of groups
             none of which is certainly below one left out, and of their experts likewise; so ties
             and near ties may go either way, and the lower index is due only where it is declared
    weights  of the experts that were chosen: twice the sigmoid's error, k u for their sum, F + 2 u
             for quotient and scaling; what flushing a sigmoid to zero may add
    order    of the k experts is free
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch

from nvfp4check import compare
from nvfp4check.compare import Comparison
from nvfp4check.ops import Inputs
from nvfp4check.properties import common, functions
from nvfp4check.properties.law import Case, Failure, Property, Runner, Setting, failed
from nvfp4check.tolerance import Facts, Ties, Tolerance, output_terms

NAME = "route"

#: What the sum of chosen scores is raised by, so that it is never zero.
EPSILON = 1e-20

#: DeepSeek-V3's router, and a small one.
SIZES = {
    "256 experts in 8 groups": (256, 8, 4, 8),
    "16 experts in 4 groups": (16, 4, 2, 3),
    "64 experts in one group": (64, 1, 1, 6),
}


def _case(
    label: str,
    logits: torch.Tensor,
    bias: torch.Tensor,
    size: tuple[int, int, int, int] = (256, 8, 4, 8),
    scaling: float = 2.5,
) -> Case:
    _, n_group, topk_group, top_k = size
    return Case(
        label,
        {
            "logits": logits,
            "bias": bias,
            "n_group": n_group,
            "topk_group": topk_group,
            "top_k": top_k,
            "scaling": scaling,
        },
    )


def _logits(setting: Setting, salt: int, tokens: int, experts: int = 256) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=setting.generator(salt, tokens, experts))


def _bias(setting: Setting, salt: int, size: float, experts: int = 256) -> torch.Tensor:
    return size * torch.randn(experts, generator=setting.generator(salt, experts))


def ordinary(setting: Setting) -> Iterator[Case]:
    """One small case."""
    yield _case("9 tokens", _logits(setting, 1, 9), _bias(setting, 2, 0.1))


def _biases(setting: Setting) -> Iterator[Case]:
    logits = _logits(setting, 3, 64)
    yield _case("no bias", logits, torch.zeros(256))
    yield _case("bias of size 0.1", logits, _bias(setting, 4, 0.1))
    yield _case("bias as large as scores", logits, _bias(setting, 5, 1.0))
    yield _case(
        "bias round -1.2: every choice score below zero", logits, _bias(setting, 6, 0.1) - 1.2
    )
    band = 11.2 + 0.05 * torch.rand(256, generator=setting.generator(7))
    yield _case("bias in a narrow band round 11.2", logits, band)
    yield _case("bias round 300", logits, 300 + _bias(setting, 8, 0.01))


def _sizes(setting: Setting) -> Iterator[Case]:
    for name, size in SIZES.items():
        for tokens in (0, 1, 7, 33, 129):
            logits = _logits(setting, 9, tokens, size[0])
            bias = _bias(setting, 10, 0.2, size[0])
            for scaling in (2.5, 1.0):
                yield _case(f"{name}, {tokens} tokens", logits, bias, size, scaling)


def _extremes(setting: Setting) -> Iterator[Case]:
    spread = _logits(setting, 11, 16)
    yield _case("logits round -30", spread - 30, _bias(setting, 12, 0.1))
    yield _case("logits round -30, bias 11.2", spread - 30, _bias(setting, 13, 0.1) + 11.2)
    yield _case("logits round -100", spread - 100, _bias(setting, 14, 0.1))
    yield _case("logits round 20", spread + 20, _bias(setting, 15, 0.1))
    one = torch.full((4, 256), -20.0)
    one[torch.arange(4), torch.tensor([0, 31, 32, 255])] = 20.0
    yield _case("one expert far above", one, torch.zeros(256))
    pairs = torch.full((2, 256), -3.0)
    pairs[:, 0] = 4.0  # one lonely best score: its group's best two sum to less than the others'
    pairs[:, 64:256] = 0.5 * torch.rand(192, generator=setting.generator(16))
    yield _case("the best expert stands in a poor group", pairs, torch.zeros(256))


@dataclass(frozen=True, slots=True)
class Scores:
    """The real scores of a case, and how far a correct kernel's may lie from them."""

    scores: torch.Tensor
    error: torch.Tensor
    n_group: int
    topk_group: int

    @classmethod
    def of(cls, taken: Inputs, facts: Facts) -> "Scores":
        """Return the choice scores of logits and bias."""
        logits, bias = taken["logits"].double(), taken["bias"].double()
        gate = logits.sigmoid()
        scores = gate + bias
        error = functions.sigmoid(logits, facts) * gate + functions.FLUSH
        error = error + functions.ROUNDING * scores.abs()
        return cls(scores, error, taken["n_group"], taken["topk_group"])

    def by_group(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of experts as [T, groups, experts of one group]."""
        return values.view(*values.shape[:-1], self.n_group, -1)

    def legal(self, chosen: torch.Tensor) -> torch.Tensor:
        """Tell for which tokens [T] a choice [T, E] is one that scores within the error allow."""
        if not len(chosen):
            return torch.ones(0, dtype=torch.bool)
        lowest = torch.where(chosen, self.scores + self.error, torch.inf).amin(-1, keepdim=True)
        passed_over = ~chosen & (self.scores - self.error > lowest)
        used, spoilt = self.by_group(chosen).any(-1), self.by_group(passed_over).any(-1)
        if self.n_group == 1:
            return ~spoilt.squeeze(-1)
        sets = self._group_sets()
        fits = (~used.unsqueeze(1) | sets).all(-1) & ~(spoilt.unsqueeze(1) & sets).any(-1)
        return (fits & self._open(sets)).any(-1)

    def _group_sets(self) -> torch.Tensor:
        """Return every set of open groups as a mask [sets, groups]."""
        chosen = list(combinations(range(self.n_group), self.topk_group))
        sets = torch.zeros(len(chosen), self.n_group, dtype=torch.bool)
        return sets.scatter_(-1, torch.tensor(chosen), True)

    def _open(self, sets: torch.Tensor) -> torch.Tensor:
        """Tell for which tokens a set [T, sets] holds no group that is certainly below another."""
        best = self.by_group(self.scores).topk(2, dim=-1).values.sum(-1)
        error = 2 * self.by_group(self.error).amax(-1) + functions.ROUNDING * best.abs()
        high = torch.where(sets, (best + error).unsqueeze(1), torch.inf).amin(-1)
        low = torch.where(sets, -torch.inf, (best - error).unsqueeze(1)).amax(-1)
        return low <= high


def _mask(experts: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(len(experts), count, dtype=torch.bool).scatter_(-1, experts.long(), True)


def _check(runner: Runner, case: Case) -> Failure | None:
    actual = runner(case.inputs)
    form = _form(case, actual)
    if form:
        return form
    scores = Scores.of(case.inputs, runner.setting.facts)
    legal = scores.legal(_mask(actual[0], scores.scores.shape[1]))
    wrong = (~legal).nonzero().flatten()
    if len(wrong):
        return _wrong_experts(runner, case, actual, int(wrong[0]), len(wrong))
    return failed(case, _compare_weights(runner, case, actual), actual)


def _form(case: Case, actual: tuple[torch.Tensor, ...]) -> Failure | None:
    tokens, experts = case.inputs["logits"].shape
    shape = (tokens, case.inputs["top_k"])
    for name, found, dtype in (
        ("experts", actual[0], torch.int32),
        ("weights", actual[1], torch.float32),
    ):
        if tuple(found.shape) != shape or found.dtype != dtype:
            message = f"{name}: {found.dtype}{list(found.shape)}, expected {dtype}{list(shape)}"
            return Failure(message=message, case=case, actual=actual)
    ids = actual[0]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= experts):
        message = f"experts: an id outside 0..{experts - 1}: {int(ids.min())}..{int(ids.max())}"
        return Failure(message=message, case=case, actual=actual)
    if (ids.sort(-1).values.diff(dim=-1) == 0).any():
        return Failure(message="experts: one expert twice for a token", case=case, actual=actual)
    return None


def _wrong_experts(
    runner: Runner, case: Case, actual: tuple[torch.Tensor, ...], token: int, count: int
) -> Failure:
    expected = runner.reference(case.inputs)
    found, wanted = (sorted(out[0][token].tolist()) for out in (actual, expected))
    scores = case.inputs["logits"][token].double().sigmoid() + case.inputs["bias"].double()
    strange = ", ".join(f"{e} ({scores[e]:.7g})" for e in sorted(set(found) - set(wanted)))
    missing = ", ".join(f"{e} ({scores[e]:.7g})" for e in sorted(set(wanted) - set(found)))
    message = (
        f"experts differ for {count} of {len(actual[0])} tokens\n"
        f"  first token {token}: chosen {found}, expected {wanted}\n"
        f"  chosen in error (choice score): {strange}; left out: {missing}"
    )
    return Failure(message=message, case=case, actual=actual, expected=expected)


def _compare_weights(runner: Runner, case: Case, actual: tuple[torch.Tensor, ...]) -> Comparison:
    facts, taken = runner.setting.facts, case.inputs
    logits = taken["logits"].double().gather(-1, actual[0].long())
    gate = logits.sigmoid()
    total = gate.sum(-1, keepdim=True) + EPSILON
    real = gate / total * taken["scaling"]
    error = functions.sigmoid(logits, facts)
    relative = error + error.amax(-1, keepdim=True) if error.numel() else error
    rounding = (taken["top_k"] + 3) * functions.ROUNDING + facts.function_error
    flushed = functions.FLUSH * (1 + taken["top_k"]) / total * taken["scaling"]
    terms = {
        "sigmoid": relative * real,
        "sum, quotient and scaling": rounding * real,
        "flushing to zero": flushed,
        **output_terms(real, torch.float32),
    }
    allowed = Tolerance(
        expected=real,
        terms=terms,
        exact=torch.zeros_like(real, dtype=torch.bool),
        dtype=torch.float32,
        why=f"float32 sigmoids to {facts.function_ulps:g} ulp, their sum and quotient",
    )
    return compare.within(actual[1], allowed, what="weights, in the order returned")


def _ties(setting: Setting) -> Iterator[Case]:
    yield _case("all logits equal", torch.zeros(2, 256), torch.zeros(256))
    levels = torch.randint(0, 4, (32, 256), generator=setting.generator(17)).float()
    yield _case("four levels of logits", levels, torch.zeros(256))


def _either_way(runner: Runner, case: Case) -> Failure | None:
    if runner.setting.facts.ties is Ties.ANY:
        return _check(runner, case)
    actual = runner(case.inputs)
    form = _form(case, actual)
    if form:
        return form
    expected = runner.reference(case.inputs)
    ids = tuple(out.sort(-1).values for out in (actual[0], expected[0]))
    return failed(case, compare.bits(ids[0], ids[1], what="experts, sorted"), actual, expected)


def _permuted(runner: Runner, case: Case) -> Failure | None:
    taken = case.inputs
    size = taken["logits"].shape[1] // taken["n_group"]
    within = torch.randperm(size, generator=runner.setting.generator(18))
    order = (torch.arange(taken["n_group"]).roll(3).unsqueeze(1) * size + within).flatten()
    moved = Case(
        f"{case.label}, groups rolled and experts permuted within them",
        {**taken, "logits": taken["logits"][:, order], "bias": taken["bias"][order]},
    )
    return _check(runner, moved)


_law = partial(Property, operation=NAME)

PROPERTIES = (
    _law(
        name="biases-choose-and-do-not-weigh",
        law="experts are those of the highest sigmoid + bias wherever the gap decides, and weights "
        "come from the sigmoid alone, under biases of every size and sign",
        generate=_biases,
        check=_check,
    ),
    _law(
        name="every-size",
        law="0 to 129 tokens, one or several groups, any scaling are routed alike",
        generate=_sizes,
        check=_check,
    ),
    _law(
        name="extremes",
        law="logits from -100 to 20 give finite weights, and a lone expert in a poor group is left",
        generate=_extremes,
        check=_check,
    ),
    _law(
        name="tie-breaking",
        law="of equal scores any group and expert may be chosen, or those of lower index where the "
        "kernel declares it",
        generate=_ties,
        check=_either_way,
    ),
    _law(
        name="experts-are-exchangeable",
        law="groups and experts in another order are chosen all the same",
        generate=ordinary,
        check=_permuted,
    ),
    common.permutes_rows(NAME, ordinary, ("logits",)),
    common.takes_any_view(NAME, ordinary, ("logits",)),
    common.ignores_poison(NAME, ordinary, ("logits",)),
    common.repeats(NAME, ordinary),
    common.writes_only_its_outputs(NAME, ordinary),
)
