"""Faults planted in a user's kernel, in a process apart as `kernels test` asks its properties.

A planted fault under which the kernel's process ends or does not come back is seen by the property
under way: no test of the kernel would pass it. Of a kernel that does so, or breaks a law, with
nothing planted in it nothing can be said.
"""

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nvfp4check.cli import kernels_apart
from nvfp4check.cli.kernels_runs import UNUSABLE, Key, Record
from nvfp4check.findings import CheckError

if TYPE_CHECKING:
    from nvfp4check.faults.power import Planting
    from nvfp4check.ops import Kernel
    from nvfp4check.properties.law import Setting

#: What the trial of a kernel is called in which no fault is planted.
_UNPLANTED = ""


@dataclass(frozen=True, slots=True)
class Planted:
    """Which kernels faults are planted in, and what they are tried under."""

    impl: str
    op: str | None
    convention: str | None
    device: str
    seed: int

    def records(
        self, known: Mapping[Key, Record], lost: Collection[tuple[str, str]] = ()
    ) -> Iterator[Record]:
        """Try every planted fault but those whose outcome is known.

        Raises:
            CheckError: What was asked for is not there, a kernel breaks a law with nothing planted
                in it, or a fault has left the GPU unusable and there is no other process.
        """
        from nvfp4check.cli.kernels_found import bound, chosen
        from nvfp4check.faults.power import plantings
        from nvfp4check.properties.law import Setting, context_lost

        for one in chosen(self.impl, self.op, self.convention, self.device):
            kernel, facts = bound(one)
            setting = Setting(
                convention=one.convention, facts=facts, device=self.device, seed=self.seed
            )
            yield {"run": {"op": one.operation, "impl": one.name}}
            done = {name: told for (op, _, name), told in known.items() if op == one.operation}
            plain = done.get(_UNPLANTED)
            if plain is None:
                plain = yield from _asked(_UNPLANTED, kernel, one.operation, setting, _bare)
            if plain["seen_by"]:
                raise _broken(one.name, one.operation, plain)
            for planting in plantings(one.operation, one.convention, kernel):
                if planting.name in done:
                    yield {"found": planting.name, "outcome": done[planting.name]}
                    continue
                wrong, outcome = planting.kernel(kernel), partial(sighting, planting)
                yield from _asked(planting.name, wrong, one.operation, setting, outcome)
                if context_lost(self.device):
                    yield {"unusable": self.device}
                    raise CheckError(f"{planting.name} in {one.name}: {UNUSABLE}")


def _asked(
    name: str,
    kernel: "Kernel",
    operation: str,
    setting: "Setting",
    outcome: Callable[[str | None, float], Record],
) -> Generator[Record, None, Record]:
    """Ask properties of a kernel until one is broken; return what came of it."""
    from nvfp4check.faults.power import until_broken
    from nvfp4check.properties.law import Verdict

    started, seen_by = time.perf_counter(), None
    for law, found in until_broken(kernel, operation, setting):
        taken = time.perf_counter() - started
        if found is None:
            yield {"begun": name, "if_ended": outcome(law.name, taken)}
        elif found.verdict is Verdict.FAIL:
            seen_by = law.name
    told = outcome(seen_by, time.perf_counter() - started)
    yield {"found": name, "outcome": told}
    return told


def _bare(seen_by: str | None, seconds: float) -> Record:
    return {"seen_by": seen_by, "message": ""}


def _broken(impl: str, operation: str, plain: Record) -> CheckError:
    """Return the refusal of a kernel that is wrong with nothing planted in it."""
    how = f" ({plain['message']})" if plain["message"] else ""
    return CheckError(
        f"{impl} breaks {plain['seen_by']} of {operation}{how} with nothing planted in it, so "
        f"planted faults would show nothing: run `nvfp4check kernels test` first"
    )


def sighting(planting: "Planting", seen_by: str | None, seconds: float) -> Record:
    """Return a planted fault and what saw it, as it stands in the document."""
    return {
        "id": planting.fault.id,
        "name": planting.fault.name,
        "form": planting.form.label,
        "operation": planting.form.operation,
        "convention": planting.convention,
        "does": planting.fault.does,
        "needs": planting.fault.needs,
        "threads": list(planting.fault.urls),
        "seen_by": seen_by,
        "message": "",
        "seconds": round(seconds, 3),
    }


def of_kernel(planted: Planted, seconds: float | None) -> dict[str, Any]:
    """Return what is planted in a kernel and seen, in the form that is shown.

    Raises:
        CheckError: What was asked for is not there, or the kernel breaks a law unplanted.
    """
    if kernels_apart.possible():
        told = kernels_apart.told_apart(planted.records, planted.impl, seconds)
    else:
        told = list(planted.records({}))
    faults = [record["outcome"] for record in told if record.get("found")]
    if not faults:
        raise CheckError(f"no fault goes around {planted.impl}: try it without --impl")
    return {
        "operations": list(dict.fromkeys(one["operation"] for one in faults)),
        "faults": faults,
        "variants": [],
        "rules": [],
    }
