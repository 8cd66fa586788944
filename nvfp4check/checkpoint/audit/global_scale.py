"""Which global scales follow from an amax, under every formula that producers are known to use.

Contract:
    ModelOpt's layout            amax/2688 in one step or two, by division or (as torch does on a
                                 GPU) by a rounded reciprocal; or 1 / (2688/amax)
    compressed-tensors' layout   2688/amax in float32 or in the dtype of the weight
    distance                     in units of the last place of float32, of the scale as stored
"""

from collections.abc import Sequence

import torch

from nvfp4ref import nvfp4
from nvfp4ref.conventions import Convention

_MODELOPT_LIKE = (Convention.MODELOPT_0_39, Convention.MODELOPT, Convention.TRANSFORMER_ENGINE)


def ulps_away(
    stored: Sequence[float], amaxes: Sequence[float], dtype: torch.dtype, *, reciprocal: bool
) -> list[int]:
    """Return for each stored global scale how far the nearest legal one of its amax is.

    `reciprocal` says that 2688/amax is stored.
    """
    scales = torch.tensor(stored, dtype=torch.float32)
    amax = torch.tensor(amaxes, dtype=torch.float64).to(dtype)
    if reciprocal:
        legal = [
            nvfp4.global_encode_scale(amax, Convention.COMPRESSED_TENSORS),
            nvfp4.global_encode_scale(amax.float(), Convention.COMPRESSED_TENSORS),
            nvfp4.global_encode_scale(amax, Convention.TRANSFORMER_ENGINE),
        ]
    else:
        legal = [
            scale
            for convention in _MODELOPT_LIKE
            for scale in nvfp4.legal_global_decode_scales(amax, convention)
        ]
    bits = scales.view(torch.int32).long()
    away = torch.stack([(bits - scale.view(torch.int32).long()).abs() for scale in legal])
    return [int(ulps) for ulps in away.amin(0)]
