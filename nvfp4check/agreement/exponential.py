"""The exponential that the comparison of logits spends its time on, in vectors of the processor.

Contract:
    exp(x), x <= 0     n = x / ln 2 to the nearest integer, r = x - n ln 2 with ln 2 in two parts of
                       which the first has so few bits that n times it is exact; the Taylor
                       polynomial of exp(r) of degree 13, whose remainder at |r| <= 0.35 is below
                       2**-57 of it; times 2**n, exact. Off by less than 1 ulp
    exp(0)             1
    x < -708           0: below it the result would be subnormal

Compiled functions contract products and sums to fused operations where the processor has them, so
the last bit may differ from one machine to another.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np

#: A double that holds integers only: adding it rounds to one, which the low bits then hold.
_ROUNDER = 1.5 * 2.0**52
_PER_LN2 = 1 / math.log(2)
#: ln 2 in two parts, the first of 33 bits: times any n that occurs it is exact.
_LN2_HIGH = float.fromhex("0x1.62e42fefp-1")
_LN2_LOW = float.fromhex("0x1.473de6af278edp-34")
#: 1 / n!
_TAYLOR = tuple(1 / math.factorial(n) for n in range(14))
_LEAST = -708.0


def compiled(*, adds: bool = False, inlined: bool = False) -> Callable[..., Any]:
    """Compile on first use; keep the machine code on disk where there is a place for it.

    `adds` lets the compiler add a sum up in any order, which vectors need.
    """
    flags = {"contract", "reassoc"} if adds else {"contract"}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": flags}
    if inlined:
        options["forceinline"] = True

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no writable cache directory
            made = numba.njit(**options)(function)
        return cast("Callable[..., Any]", made)

    return compile


@compiled(inlined=True)
def exponential(x: Any) -> Any:
    """Return exp(x) of a float64 x <= 0."""
    shifted = x * _PER_LN2 + _ROUNDER
    n = shifted - _ROUNDER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _TAYLOR[13]
    for power in range(12, -1, -1):
        series = series * r + _TAYLOR[power]
    # numba knows views of numpy's scalars: the low bits of `shifted` are n.
    scale = np.int64((np.float64(shifted).view(np.int64) + 1023) << 52).view(np.float64)
    return series * scale if x >= _LEAST else 0.0
