"""Which of the arithmetics that bounds were derived for a candidate is held against.

Contract:
    asked    the one that `--bounds` names
    dtype    else that of the candidate's run.json, or the next coarser one that is there
    form     of bounds for either form of attention and for the direct one alone, the former
    ranks    of these the fewest that are no fewer than run.json says (`ranks`), for more ranks
             round more. One that does not say is taken to have as many as bounds are there for:
             an engine need not know what stood around it
"""

from nvfp4check.activations import RunInfo
from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.arithmetic import split_name

#: Dtypes that bounds are derived for, from fine to coarse.
_COARSENESS = ("float64", "float32", "float16", "bfloat16")


def declared(reference: RunInfo, candidate: RunInfo, asked: str | None = None) -> str | None:
    """Return what a candidate is held against; None where no bounds are for it.

    Raises:
        CheckError: The reference has no bounds of the name that was asked for.
    """
    if asked is not None:
        if asked not in reference.bounds:
            there = ", ".join(reference.bounds) or "none"
            raise CheckError(
                f"--bounds {asked!r}: the reference's bounds are for {there}; make others with "
                "`nvfp4check forward --bounds`"
            )
        return asked
    if candidate.dtype not in _COARSENESS:
        return None
    of_dtype: dict[str, dict[int, str]] = {}
    for name in sorted(reference.bounds, key=len, reverse=True):  # `/direct` before what takes both
        dtype, ranks = split_name(name)
        of_dtype.setdefault(dtype, {})[ranks] = name
    for dtype in _COARSENESS[_COARSENESS.index(candidate.dtype) :]:
        names = of_dtype.get(dtype, {})
        if candidate.ranks is None and names:
            return names[max(names)]
        enough = [ranks for ranks in names if ranks >= (candidate.ranks or 1)]
        if enough:
            return names[min(enough)]
    return None


def described(candidate: RunInfo) -> str:
    """Say what arithmetic a candidate is of."""
    ranks = f" on {candidate.ranks} ranks" if (candidate.ranks or 1) > 1 else ""
    return f"its dtype is {candidate.dtype!r}{ranks}"
