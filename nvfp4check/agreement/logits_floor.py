"""Logits held against those of noise runs: the norm and the head behind the last layer.

Contract:
    error     of a position sqrt(KL), which is proportional to a small change of its logits
    unit      the unit roundoff of the dtype in which the logits are stored
    held      as a point of a layer is, by `divergence`, at a level of its own; where candidate and
              noise runs store full logits in one dtype, so that rounding is the same
"""

from collections.abc import Mapping, Sequence

import torch

from nvfp4check.activations import FINAL_HIDDEN_FILE, LOGITS_FILE, Run, opened
from nvfp4check.agreement.divergence import TESTS, HeldPoint, against
from nvfp4check.agreement.layers import PointAgreement
from nvfp4check.agreement.logits import PositionMetrics
from nvfp4check.agreement.outliers import Kept

_UNITS = {
    name: torch.finfo(dtype).eps / 2
    for name, dtype in (
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F32", torch.float32),
        ("F64", torch.float64),
    )
}

Metrics = Mapping[str, PositionMetrics]


def hold_logits(
    runs: Sequence[Run],
    metrics: Sequence[Metrics],
    kept: Sequence[Kept],
    alpha: float,
    seed: int,
) -> HeldPoint | None:
    """Hold the candidate's logits against the noise runs; None where that cannot be done.

    `runs`, `metrics` and `kept` are those of the candidate, then of each noise run.
    """
    units = {_unit(run) for run in runs}
    if len(runs) < 2 or len(units) > 1 or None in units:
        return None
    unit = units.pop()
    candidate, *noise = (_point(of, runs[0]) for of in metrics)
    if unit is None or not candidate.errors:
        return None
    return against(candidate, noise, unit, alpha / TESTS, seed, kept)


def _point(metrics: Metrics, run: Run) -> PointAgreement:
    """Return logits as the point that follows the last layer."""
    errors = {prompt: of.kl.clamp(min=0).sqrt() for prompt, of in metrics.items()}
    every = torch.cat(list(errors.values())) if errors else torch.empty(0, dtype=torch.float64)
    every = every[~every.isnan()]
    return PointAgreement(
        layer=max(run.layers, default=-1) + 1,
        point="logits",
        relative_error=float(every.square().mean().sqrt()) if len(every) else 0.0,
        sqnr_db=float("nan"),
        bitwise=bool((every == 0).all()),
        tokens=len(every),
        worst=None,
        worst_error=0.0,
        first_difference=None,
        nonfinite_reference=0,
        nonfinite_candidate=0,
        errors=errors,
    )


def _unit(run: Run) -> float | None:
    """Return the unit roundoff of the stored logits, or of the states that the head takes."""
    for name in (LOGITS_FILE, FINAL_HIDDEN_FILE):
        if (run.path / name).is_file():
            with opened(run.path / name) as file:
                keys = list(file.keys())
                if not keys or any(key.endswith("/values") for key in keys):
                    return None  # the best tokens of a server
                return _UNITS.get(str(file.get_slice(keys[0]).get_dtype()))
    return None
