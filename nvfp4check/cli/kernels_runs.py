"""The properties asked of kernels, one record at a time: what is begun, and what came of it.

A record is plain JSON, so that it can come from another process:
    {"run": header}                  an implementation is taken up: its document so far
    {"begun": name, "if_ended": ...} a property is begun, and its outcome if the process ends
    {"found": name, "outcome": ...}  what it found
    {"unusable": device}             nothing more can be asked on the device in this process
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nvfp4check

Record = dict[str, Any]

#: Why a property is not asked in a process whose context of the GPU is lost.
UNUSABLE = "an error before it left the GPU unusable for this process"

#: Operation, implementation and property.
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a user wants to know of which kernels."""

    op: str | None
    impl: str | None
    convention: str | None = None
    device: str = "cpu"
    seed: int = 0
    max_examples: int | None = None


def asked(
    question: Question,
    known: Mapping[Key, Record] | None = None,
    lost: Collection[tuple[str, str]] = (),
) -> Iterator[Record]:
    """Ask every property of every kernel that is meant, but those whose outcome is known.

    Of an operation's implementation that is `lost`, nothing more is asked.

    Raises:
        CheckError: What was asked for is not there, or several were meant and none is available.
    """
    from nvfp4check.cli.kernels_found import bound, chosen
    from nvfp4check.faults.diagnosis import with_diagnosis
    from nvfp4check.findings import CheckError
    from nvfp4check.properties import properties_of
    from nvfp4check.properties.law import DEFAULT_EXAMPLES, Setting, context_lost

    op, impl = question.op, question.impl
    if op is None and impl is None:
        raise CheckError("say which kernel: --impl NAME or MODULE:FUNCTION, or --op OP")
    implementations = chosen(impl, op, question.convention, question.device)
    if not implementations:
        raise CheckError(
            f"no implementation of {op} is available on {question.device}: "
            f"`nvfp4check kernels list` says why"
        )
    examples = question.max_examples
    unusable = False
    for one in implementations:
        kernel, facts = bound(one)
        setting = Setting(
            convention=one.convention,
            facts=facts,
            device=question.device,
            seed=question.seed,
            max_examples=DEFAULT_EXAMPLES if examples is None else examples,
        )
        yield {"run": _header(one.operation, one.name, one.convention, question)}
        for law in properties_of(one.operation):
            outcome = (known or {}).get((one.operation, one.name, law.name))
            if outcome is None and (one.operation, one.name) in lost:
                outcome = ended(law.name, law.law, "skip", "not asked: the kernel ended too often")
            if outcome is None and unusable:
                outcome = ended(law.name, law.law, "skip", f"not asked: {UNUSABLE}")
            if outcome is None:
                yield {"begun": law.name, "if_ended": ended(law.name, law.law, "fail", "")}
                found = law.run(kernel, setting)
                if not context_lost(question.device):
                    found = with_diagnosis(found, kernel, setting)
                outcome = found.to_json()
                unusable = context_lost(question.device)
            yield {"found": law.name, "outcome": outcome}
            if unusable:
                yield {"unusable": question.device}


def ended(name: str, words: str, verdict: str, message: str) -> Record:
    """Return the outcome of a property that a kernel gave no answer to."""
    return {
        "name": name,
        "law": words,
        "verdict": verdict,
        "cases": 0,
        "unsupported": 0,
        "message": message,
        "worst": None,
        "diagnosis": None,
    }


def _header(op: str, impl: str, convention: str | None, question: Question) -> Record:
    return {
        "schema": "nvfp4check/kernels/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "op": op,
        "impl": impl,
        "convention": convention,
        "device": question.device,
        "seed": question.seed,
    }


def document(question: Question, records: Iterable[Record]) -> Record:
    """Return what records say as a JSON document: one run, or several in `runs`."""
    runs: list[Record] = []
    for record in records:
        if "run" in record:
            runs.append({**record["run"], "verdict": "pass", "properties": []})
        elif "outcome" in record:
            runs[-1]["properties"].append(record["outcome"])
    for run in runs:
        run["verdict"] = _verdict(outcome["verdict"] for outcome in run["properties"])
    if len(runs) == 1:
        return runs[0]
    return {
        **runs[0],
        "op": question.op,
        "impl": question.impl,
        "convention": question.convention,
        "verdict": _verdict(run["verdict"] for run in runs),
        "properties": [],
        "runs": runs,
    }


def _verdict(parts: Iterable[str]) -> str:
    verdicts = set(parts)
    return "fail" if "fail" in verdicts else "skip" if "skip" in verdicts else "pass"
