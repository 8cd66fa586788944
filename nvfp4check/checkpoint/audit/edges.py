"""Blocks that no glance can judge, held against the reference quantiser of every convention.

Contract:
    differs    codes and scale bytes that `nvfp4ref.nvfp4` makes otherwise, under the stored scale
    good       a code that some convention makes, or that decodes to within the reach of rounding
    rounding   as in `kernel`; under scale 0 everything decodes to 0, which is right where some
               convention makes the scale 0, or the block is zero
    slack      as in `smoothing`
    not finite elements of the base that are NaN or infinite are counted, and their block is not
               judged
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nvfp4check.checkpoint.audit.numbers import CONVENTIONS, ZONE
from nvfp4ref import e2m1, e4m3, nvfp4


@dataclass(frozen=True, slots=True)
class EdgeFindings:
    """What came of some edge blocks. `off` and `beyond` are elements; masks [blocks, 16]."""

    scale_differs: npt.NDArray[np.int64]
    code_differs: npt.NDArray[np.int64]
    unexplained: int
    off: npt.NDArray[np.bool_]
    beyond: npt.NDArray[np.bool_]
    worst: float
    not_finite: int


def judge_edges(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    global_decode: torch.Tensor,
    global_encode: torch.Tensor,
    slack: float = 0.0,
) -> EdgeFindings:
    """Judge blocks x [n, 16] in their dtype, codes uint8 [n, 16], scales float8_e4m3fn [n, 1].

    With `slack`, x is what was quantised but for that relative distance: what some convention makes
    of a value so much smaller or larger is right too.
    """
    stored = scales.view(torch.uint8)
    finite = x.float().isfinite()
    whole = finite.all(1, keepdim=True)
    made_codes = torch.zeros_like(codes, dtype=torch.bool)
    explained = torch.zeros_like(whole)
    scale_differs = np.zeros(len(CONVENTIONS), np.int64)
    code_differs = np.zeros(len(CONVENTIONS), np.int64)
    for place, convention in enumerate(CONVENTIONS):
        made = nvfp4.quantize_block_scales(
            x, global_decode, convention, global_encode_scale=global_encode
        ).view(torch.uint8)
        elements = nvfp4.quantize_elements(
            x, scales, global_decode, convention, global_encode_scale=global_encode
        )
        scale_differs[place] = int((made != stored).sum())
        code_differs[place] = int((elements != codes).sum())
        explained |= made == stored
        made_codes |= elements == codes
        if slack:
            least, most = (
                nvfp4.quantize_block_scales(
                    x * (1 + side), global_decode, convention, global_encode_scale=global_encode
                ).view(torch.uint8)
                for side in (-slack, slack)
            )
            explained |= (least <= stored) & (stored <= most)
            below, above = (
                nvfp4.quantize_elements(
                    x * (1 + side),
                    scales,
                    global_decode,
                    convention,
                    global_encode_scale=global_encode,
                )
                for side in (-slack, slack)
            )
            between = ((below & 7) <= (codes & 7)) & ((codes & 7) <= (above & 7))
            made_codes |= between & ((codes >> 3 == above >> 3) | (codes & 7 == 0))
    units = e4m3.decode(scales).double() * global_decode.double()
    values = x.double()
    decoded = e2m1.decode(codes).double() * units
    error = torch.where(whole, (values - decoded).abs(), 0.0)
    distance = torch.where(units > 0, error / units, torch.where(error > 0, torch.inf, 0.0))
    right = made_codes | (error == 0) | ~whole
    zero_scale = units == 0
    # Under scale 0 no code matters: what counts is whether the scale may be 0.
    right = torch.where(zero_scale, explained | (error == 0) | ~whole, right)
    reach = torch.where(units > 0, (values.abs() / units).clamp_min(1), 1.0)
    beyond = ~right & (distance > 1 + (ZONE + slack) * reach)
    wrong = distance[beyond & distance.isfinite()]
    return EdgeFindings(
        scale_differs=scale_differs,
        code_differs=code_differs,
        unexplained=int((~explained & whole).sum()),
        off=(~right & ~beyond).numpy(),
        beyond=beyond.numpy(),
        worst=float(wrong.max()) if wrong.numel() else 0.0,
        not_finite=int((~finite).sum()),
    )
