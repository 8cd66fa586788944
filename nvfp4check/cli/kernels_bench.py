"""`nvfp4check kernels bench`: time kernels against what the GPU can do, or predict the limits."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import OutputOption, PlainFormatOption, prepared_format, write
from nvfp4check.findings import CheckError
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.kernels.bench import MeasuredRates, Timing

EXAMPLES = (
    "nvfp4check kernels bench",
    "nvfp4check kernels bench --op quantize --format markdown",
    "nvfp4check kernels bench --predict --chip B200 --chip H100",
)

#: Examples that a law draws while kernels are timed: enough to see a wrong one.
_EXAMPLES_OF_A_LAW = 5


def bench(
    op: Annotated[str | None, typer.Option("--op", metavar="OP", help="One operation.")] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Print the limits by data sheets; needs no GPU.")
    ] = False,
    chip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHIP",
            help="With --predict, repeatable: H100, H200, B200, GB200, RTX-PRO-6000.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Choose the tiles of matmul by time first, and keep them."),
    ] = False,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Time kernels and those of other libraries on this GPU, and check them in the same run.

    Times stand beside the copy bandwidth and the matrix rate measured in the same run. Exit 1 if
    a kernel that was timed breaks a law of its operation; exit 2 if one refused a workload, or
    without a GPU.
    """
    into = prepared_format(format, output)
    if chip and not predict:
        raise CheckError("--chip goes with --predict: a bench is of the GPU at hand")
    if tune and predict:
        raise CheckError("--tune times on a GPU, and --predict needs none: give one of them")
    document = predict_document(op, chip or []) if predict else bench_document(op, tune)
    write(render(document, into), output)
    if "fail" in document.get("correct", {}).values():
        return ExitCode.DOES_NOT_HOLD
    return ExitCode.COULD_NOT_CHECK if document.get("refused") else ExitCode.HOLDS


def predict_document(op: str | None, names: list[str]) -> dict[str, Any]:
    """Return the least times of every workload on chips, as a JSON document.

    Raises:
        CheckError: A chip or the operation is not known.
    """
    from nvfp4check.kernels.bench import workloads
    from nvfp4check.kernels.cost import CHIPS, chip_limit

    for name in names:
        if name not in CHIPS:
            raise CheckError(f"unknown chip {name!r}: choose among {', '.join(CHIPS)}")
    chips = [CHIPS[name] for name in dict.fromkeys(names)] or list(CHIPS.values())
    return {
        **_head(predicted=True),
        "chips": [asdict(chip) for chip in chips],
        "workloads": [
            {
                "operation": work.operation,
                "sizes": work.label,
                "bytes": work.cost.bytes,
                "operations": work.cost.operations,
                "limits": {chip.name: asdict(chip_limit(work.cost, chip)) for chip in chips},
            }
            for work in workloads(op)
        ],
    }


def bench_document(op: str | None, tune: bool = False) -> dict[str, Any]:
    """Return times and verdicts of the kernels on this GPU, as a JSON document.

    Raises:
        CheckError: There is no GPU, or no such operation.
    """
    from nvfp4check.kernels.bench import Timing, measure_rates, require_gpu
    from nvfp4check.kernels.bench import bench as timings

    rates = measure_rates(require_gpu())
    found = list(timings(op, _kernels, rates))
    timed = [asdict(one) for one in found if isinstance(one, Timing)]
    names = {(one["implementation"], one["operation"]) for one in timed}
    correct = {f"{impl} {name}": _verdict(impl, name) for impl, name in sorted(names)}
    if tune and op in (None, "matmul"):
        for timing, verdict in _tuned_matmuls(rates):
            timed.append(asdict(timing))
            correct[f"{timing.implementation} matmul"] = verdict
    return {
        **_head(predicted=False),
        "rates": asdict(rates),
        "timings": timed,
        "refused": [asdict(one) for one in found if not isinstance(one, Timing)],
        "correct": correct,
    }


def _tuned_matmuls(rates: "MeasuredRates") -> "Iterator[tuple[Timing, str]]":
    """Yield the timing of `matmul` with tuned tiles, and whether its laws hold with them."""
    from nvfp4check.kernels.arch import architecture_of
    from nvfp4check.kernels.bench import make_inputs, require_gpu, seconds, time_kernel, workloads
    from nvfp4check.kernels.matmul import matmul
    from nvfp4check.kernels.tuning import TuningCache, default_cache, tuned_config
    from nvfp4check.properties import properties_of
    from nvfp4check.properties.law import Setting, Verdict

    setting = Setting(device="cuda", max_examples=_EXAMPLES_OF_A_LAW)
    for workload in workloads("matmul"):
        *operands, alpha, dtype = make_inputs(workload, require_gpu())
        a_codes, a_scales, b_codes, b_scales = operands
        if not architecture_of(a_codes).multiplies_nvfp4:
            raise CheckError("--tune: this GPU does not multiply NVFP4 natively, nothing to tune")
        config = tuned_config(
            (a_codes, a_scales, b_codes, b_scales),
            alpha,
            dtype,
            TuningCache(default_cache()),
            seconds=seconds,
        )
        kernel = partial(matmul, config=config)
        name = f"triton, tuned for {workload.label}"
        timing = time_kernel(workload, name, kernel, [*operands, alpha, dtype], rates)
        verdicts = {law.run(kernel, setting).verdict for law in properties_of("matmul")}
        yield timing, "fail" if Verdict.FAIL in verdicts else "pass"


def _head(*, predicted: bool) -> dict[str, Any]:
    return {
        "schema": "nvfp4check/bench/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "predicted": predicted,
    }


def _kernels(operation: str) -> Iterator[tuple[str, Any]]:
    """Yield our own kernel of an operation, then those of other libraries that run here."""
    from nvfp4check.cli.kernels_found import found
    from nvfp4check.ops import OPERATIONS

    for one in found("cuda"):
        usable = one.unavailable is None and one.device == "cuda" and one.operation == operation
        if usable and one.name != "reference":
            kernel = one.kernel()
            if one.name == "triton" and OPERATIONS[operation].has_convention:
                kernel = partial(kernel, convention=one.convention)
            yield one.name, kernel


def _verdict(implementation: str, operation: str) -> str:
    """Return whether the laws of the operation hold for the kernel on this GPU."""
    from nvfp4check.cli.kernels import outcome_document

    document = outcome_document(
        operation, implementation, device="cuda", max_examples=_EXAMPLES_OF_A_LAW
    )
    return str(document["verdict"])
