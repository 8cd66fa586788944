"""What the compiled comparison promises, held against arithmetic of 60 digits."""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch

from nvfp4check.agreement.exponential import compiled, exponential
from nvfp4check.agreement.logits import PositionMetrics, compare_logits, log_totals

DIGITS = 60
ROUNDOFF = 2.0**-53
#: What the second order of the errors of d can add, which is all that is left of equal rows.
REMAINDER = 2.0**-85
INF = math.inf

Pair = tuple[torch.Tensor, torch.Tensor]


@compiled()
def fill(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(len(x)):
        y[i] = exponential(x[i])


def exponentials(x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    fill(x, y)
    return y


def test_the_exponential_is_off_by_less_than_an_ulp() -> None:
    generator = np.random.default_rng(0)
    halves = (np.arange(-1021, 1) + 0.5) * math.log(2)  # where n changes
    halves = np.concatenate([np.nextafter(halves, 0), np.nextafter(halves, -1e3)])
    scales = np.exp2(generator.uniform(-60, 9.4, 4000))
    x = -np.concatenate([-halves[(halves <= 0) & (halves >= -708)], scales[scales <= 708]])

    found = exponentials(x)

    with mpmath.workdps(DIGITS):
        worst = max(
            abs((mpmath.exp(mpmath.mpf(at)) - mpmath.mpf(value)) / mpmath.mpf(math.ulp(value)))
            for at, value in zip(x.tolist(), found.tolist(), strict=True)
        )
    assert worst < 1


def test_the_ends_of_the_exponential_are_exact() -> None:
    ends = np.array([0.0, -0.0, -708.0, np.nextafter(-708.0, -709), -1e9, -1e308, -np.inf])

    found = exponentials(ends)

    assert found[:2].tolist() == [1.0, 1.0]
    assert found[2] == pytest.approx(math.exp(-708), rel=2**-51)
    assert found[3:].tolist() == [0.0] * 4


def rows(seed: int, width: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, width, generator=generator, dtype=torch.float64) * spread


def near(size: float) -> Pair:
    row = rows(1, 700, 5.0)
    return row, row + rows(2, 700, size)


def one_ulp() -> Pair:
    row = rows(3, 600, 4.0).float()
    return row, row.nextafter(torch.where(rows(4, 600, 1.0) > 0, INF, -INF).float())


def ruled_out() -> Pair:
    left, right = rows(5, 530, 3.0), rows(6, 530, 3.0)
    left[0, ::3] = right[0, ::3] = -INF
    left[0, 1::6] = -INF  # the reference alone rules these out
    return left.float(), right.float()


def huge() -> Pair:
    left = rows(7, 600, 1e38).float()
    right = left.clone()
    right[0, left[0].topk(2).indices] = right[0, left[0].topk(2).indices].flip(0)
    return left, right


def one_hot() -> Pair:
    left, right = rows(8, 1000, 1.0).float(), rows(9, 1000, 1.0).float()
    left[0, 17] = right[0, 17] = 300.0
    return left, right


def opposed() -> Pair:
    left, right = rows(10, 1000, 1.0).float(), rows(11, 1000, 1.0).float()
    left[0, 3], right[0, 4] = 600.0, 650.0
    return left, right


def mixed() -> Pair:
    """Tokens that are all but equal, moderately apart and far apart in one row."""
    left = rows(12, 1500, 4.0)
    size = torch.logspace(-12, 1.3, 1500, dtype=torch.float64)
    return left, left + rows(13, 1500, 1.0) * size


def ties() -> Pair:
    return (rows(14, 1025, 2.0).round().float(), rows(15, 1025, 2.0).round().float())


HARD: dict[str, Callable[[], Pair]] = {
    "far": lambda: (rows(16, 900, 6.0), rows(17, 900, 6.0)),
    "a tenth apart": lambda: near(0.1),
    "a millionth apart": lambda: near(1e-6),
    "a float32 ulp apart": one_ulp,
    "by half": lambda: near(0.5),
    "ruled out": ruled_out,
    "huge": huge,
    "one hot": one_hot,
    "opposed": opposed,
    "mixed": mixed,
    "ties": ties,
    "one token": lambda: (torch.tensor([[3.0]]), torch.tensor([[-7.0]])),
    "two tokens": lambda: (torch.tensor([[0.0, -700.0]]), torch.tensor([[-700.0, 0.0]])),
}


class Truth:
    """The divergences of a pair of rows, their logarithms taken with 60 digits."""

    def __init__(self, pair: Pair) -> None:
        with mpmath.workdps(DIGITS):
            log_p, log_q = (self._log_softmax(side[0].double().tolist()) for side in pair)
            self.kl = self.kl_reverse = self.jsd = self.apart = mpmath.mpf(0)
            for lp, lq in zip(log_p, log_q, strict=True):
                p, q = mpmath.exp(lp), mpmath.exp(lq)
                log_m = mpmath.log((p + q) / 2) if p + q else mpmath.mpf(0)
                self.kl += p * (lp - lq) if p else 0
                self.kl_reverse += q * (lq - lp) if q else 0
                self.jsd += (p * (lp - log_m) if p else 0) / 2 + (q * (lq - log_m) if q else 0) / 2
                self.apart += abs(p - q)
        self.spread = max(self._spread(side[0].double()) for side in pair)

    @staticmethod
    def _log_softmax(logits: list[float]) -> list[mpmath.mpf]:
        exact = [mpmath.mpf(value) for value in logits]
        largest = max(exact)
        total = mpmath.log(mpmath.fsum(mpmath.exp(value - largest) for value in exact))
        return [value - largest - total for value in exact]

    @staticmethod
    def _spread(row: torch.Tensor) -> float:
        below = row.max() - row
        return float(below[below <= 708].max())

    def bound(self, name: str) -> float:
        """Return how far a result may be off, as the module derives it."""
        true = getattr(self, name)
        if true == INF:
            return 0.0
        reach = 3 * ROUNDOFF * (2 * self.spread) * self.apart
        return float(1200 * ROUNDOFF * true + reach + REMAINDER)


@pytest.mark.parametrize("name", HARD)
def test_a_hard_row_is_as_near_to_the_truth_as_derived(name: str) -> None:
    pair = HARD[name]()
    truth = Truth(pair)

    found = compare_logits(*pair)

    for metric in ("kl", "kl_reverse", "jsd"):
        value, true = getattr(found, metric).item(), getattr(truth, metric)
        assert value == true or abs(mpmath.mpf(value) - true) <= truth.bound(metric), metric


def test_a_divergence_far_below_a_rounding_of_the_logits_has_digits() -> None:
    found, truth = compare_logits(*near(1e-9)), Truth(near(1e-9))

    assert 0 < truth.kl < 1e-17
    assert abs(found.kl.item() - truth.kl) <= 1e-5 * truth.kl
    assert abs(found.jsd.item() - truth.jsd) <= 1e-5 * truth.jsd


def long_double(pair: Pair) -> tuple[float, float, float]:
    logs = []
    for side in pair:
        row = side[0].double().numpy().astype(np.longdouble)
        row = row - row.max()
        logs.append(row - np.log(np.exp(row).sum()))
    p, q = (np.exp(log) for log in logs)
    gap = logs[0] - logs[1]
    log_m = np.log((p + q) / 2)
    jsd = (p * (logs[0] - log_m) + q * (logs[1] - log_m)).sum() / 2
    return float((p * gap).sum()), float((q * -gap).sum()), float(jsd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_whole_vocabulary_of_every_type_agrees_with_long_double(dtype: torch.dtype) -> None:
    left = rows(20, 129_280, 3.0)
    pair = (left.to(dtype), (left + rows(21, 129_280, 0.3)).to(dtype))

    found = compare_logits(*pair)

    for name, true in zip(("kl", "kl_reverse", "jsd"), long_double(pair), strict=True):
        # The spread of these logits is below 40, and twice a long double's own 2**-64 * 40 is less.
        assert getattr(found, name).item() == pytest.approx(true, rel=1200 * 2**-53, abs=2**-50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_type_gives_what_its_float32_values_give(dtype: torch.dtype) -> None:
    left, right = rows(22, 777, 4.0).to(dtype), rows(23, 777, 4.0).to(dtype)

    short, wide = compare_logits(left, right), compare_logits(left.float(), right.float())

    assert short.kl.item() == wide.kl.item()
    assert short.jsd.item() == wide.jsd.item()
    assert compare_logits(left, right.float()).kl.item() == wide.kl.item()


def test_rows_that_are_not_contiguous_are_compared_as_any_others() -> None:
    left, right = rows(24, 4 * 300, 3.0).view(4, 300), rows(25, 4 * 300, 3.0).view(4, 300)

    cut = compare_logits(left[:, :290], right[:, :290])
    transposed = compare_logits(left.T.contiguous().T, right)

    assert torch.equal(cut.kl, compare_logits(left[:, :290].clone(), right[:, :290].clone()).kl)
    assert torch.equal(transposed.kl, compare_logits(left, right).kl)


def test_a_negative_nan_and_a_row_without_a_token_are_contaminated() -> None:
    bad = torch.zeros(3, 600)
    bad[0, 599] = math.copysign(math.nan, -1)
    bad[1] = -INF

    found = compare_logits(torch.zeros(3, 600), bad)

    assert found.contaminated.tolist() == [True, True, False]
    assert compare_logits(bad, torch.zeros(3, 600)).contaminated.tolist() == [True, True, False]


def test_the_log_of_the_sum_is_that_of_60_digits() -> None:
    for make in HARD.values():
        side = make()[0]
        with mpmath.workdps(DIGITS):
            exact = [mpmath.mpf(value) for value in side[0].double().tolist()]
            largest = max(exact)
            true = largest + mpmath.log(mpmath.fsum(mpmath.exp(v - largest) for v in exact))

        off = abs(mpmath.mpf(log_totals(side).item()) - true)

        assert off <= 600 * ROUNDOFF + 2 * ROUNDOFF * abs(true)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    left, right = rows(26, 7 * 600, 3.0).view(7, 600), rows(27, 7 * 600, 3.0).view(7, 600)
    once = compare_logits(left, right, torch.arange(7))
    torch.set_num_threads(threads)

    again = compare_logits(left, right, torch.arange(7))

    for name in PositionMetrics.__dataclass_fields__:
        assert getattr(once, name).nan_to_num(-1).equal(getattr(again, name).nan_to_num(-1)), name
