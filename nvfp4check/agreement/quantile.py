"""Quantiles of Student's t and of the beta distribution, to eight digits.

Contract:
    student_t(share, freedom)   the t below which `share` of the distribution lies; `freedom` may be
                                any number above 0
    beta(share, a, b)           likewise; 0 for a = 0 and 1 for b = 0

Both bisect the regularised incomplete beta function, which is its continued fraction (DLMF 8.17.22,
evaluated forwards by Lentz's method).
"""

import math
from collections.abc import Callable
from functools import lru_cache

#: Halvings of an interval: more than a float64 has bits.
_HALVINGS = 60
_FARTHEST = 1e9
#: Terms of the fraction: their number grows as the root of the larger parameter.
_MOST_STEPS = 100_000
_ENOUGH = 1e-14


@lru_cache(maxsize=1024)
def student_t(share: float, freedom: float) -> float:
    """Return the quantile of Student's t."""
    if share < 0.5:
        return -student_t(1 - share, freedom)

    def above(t: float) -> float:
        x = freedom / (freedom + t * t)
        return beta_share(freedom / 2, 0.5, x) / 2

    return _halved(lambda t: above(t) > 1 - share, 0.0, _FARTHEST)


@lru_cache(maxsize=1024)
def beta(share: float, a: float, b: float) -> float:
    """Return the quantile of the beta distribution."""
    if a <= 0 or b <= 0:
        return 0.0 if a <= 0 else 1.0
    return _halved(lambda x: beta_share(a, b, x) < share, 0.0, 1.0)


def beta_share(a: float, b: float, x: float) -> float:
    """Return the share of the beta distribution below x: the regularised incomplete beta."""
    if not 0 < x < 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1 - beta_share(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(front + a * math.log(x) + b * math.log1p(-x)) / a
    return front / _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """Return 1 + d1 / (1 + d2 / (1 + ...))."""
    value = upper = 1.0
    lower = 0.0
    for step in range(1, _MOST_STEPS):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / (1 + term * lower)
        upper = 1 + term / upper
        value *= upper * lower
        if abs(upper * lower - 1) < _ENOUGH:
            break
    return value


def _halved(too_low: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `too_low` ceases to be true."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if too_low(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2
