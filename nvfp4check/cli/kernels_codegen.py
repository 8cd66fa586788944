"""`nvfp4check kernels codegen`: compile kernels for a GPU that is not here, and check them."""

import ast
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

import nvfp4check
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import OutputOption, PlainFormatOption, prepared_format, write
from nvfp4check.findings import CheckError
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.kernels.arch import Architecture
    from nvfp4check.kernels.codegen import KernelSource
    from nvfp4check.kernels.codegen_checks import CodegenResult, Needs

    Work = tuple[KernelSource, Architecture, Needs]

EXAMPLES = (
    "nvfp4check kernels codegen",
    "nvfp4check kernels codegen --arch sm100 --kernel quantize",
    "nvfp4check kernels codegen --kernel my_kernels:_scale_kernel --need load-width=16 "
    "--signature 'x_ptr=*bf16:16, out_ptr=*bf16:16, n=i32, BLOCK=1024'",
)


def codegen(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ARCH", help="sm90, sm100, sm103, sm120 or all; repeatable. [default: sm100]"
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="Kernels of this project whose name begins so, or MODULE:FUNCTION of any "
            "function under @triton.jit. [default: all of this project]"
        ),
    ] = None,
    signature: Annotated[
        str | None,
        typer.Option(
            help="For MODULE:FUNCTION: each argument as name=TYPE, name=TYPE:16 if a multiple of "
            "16, or name=VALUE if a constant; TYPE as Triton writes it (*bf16, i32, fp32)."
        ),
    ] = None,
    need: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FACT",
            help="For MODULE:FUNCTION, repeatable: nvfp4-matrix, matrix, tma-loads, e2m1-encodes, "
            "e2m1-decodes, load-width=BYTES, store-width=BYTES.",
        ),
    ] = None,
    warps: Annotated[int, typer.Option(help="For MODULE:FUNCTION: num_warps.")] = 4,
    stages: Annotated[int, typer.Option(help="For MODULE:FUNCTION: num_stages.")] = 3,
    format: PlainFormatOption = None,
    output: OutputOption = None,
) -> int:
    """Compile kernels with no GPU, read the PTX and the SASS, and check what came out.

    Every kernel must store something, spill nothing and fit the chip. A kernel of this project
    must have its native instructions and vector accesses too.
    """
    into = prepared_format(format, output)
    if find_spec("triton") is None:
        raise CheckError("codegen compiles with triton, which is not installed: pip install triton")
    from nvfp4check.kernels.codegen_checks import check_kernel

    archs = chosen_architectures(arch or ["sm100"])
    if kernel is not None and ":" in kernel:
        work = list(_foreign(kernel, signature, need or [], warps, stages, archs))
    elif signature or need:
        raise CheckError("--signature and --need go with --kernel MODULE:FUNCTION")
    else:
        work = list(own_work(kernel, archs))
    results = [check_kernel(source, architecture, needs) for source, architecture, needs in work]
    document = codegen_document(results)
    write(render(document, into), output)
    return ExitCode.HOLDS if document["verdict"] == "pass" else ExitCode.DOES_NOT_HOLD


def codegen_document(results: "Iterable[CodegenResult]") -> dict[str, Any]:
    """Return results as a JSON document."""
    import triton

    records = [result.to_json() for result in results]
    failed = any(record["verdict"] == "fail" for record in records)
    return {
        "schema": "nvfp4check/codegen/1",
        "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
        "triton": triton.__version__,
        "verdict": "fail" if failed else "pass",
        "results": records,
    }


def chosen_architectures(names: Iterable[str]) -> "list[Architecture]":
    """Return the architectures of these names.

    Raises:
        CheckError: One is not known.
    """
    from nvfp4check.kernels.arch import ARCHITECTURES

    wanted = list(names)
    if "all" in wanted:
        return list(ARCHITECTURES.values())
    for name in wanted:
        if name not in ARCHITECTURES:
            raise CheckError(
                f"unknown architecture {name!r}: choose among {', '.join(ARCHITECTURES)}, all"
            )
    return [ARCHITECTURES[name] for name in dict.fromkeys(wanted)]


def own_work(prefix: str | None, archs: "list[Architecture]") -> "Iterator[Work]":
    """Yield the project's kernels whose names begin so, where they run.

    Raises:
        CheckError: None begins so, or none of them runs there.
    """
    from nvfp4check.kernels.codegen_cases import CASES

    chosen = [case for case in CASES.values() if case.name.startswith(prefix or "")]
    if not chosen:
        raise CheckError(f"no kernel begins with {prefix!r}: choose among {', '.join(CASES)}")
    pairs = [(case, arch) for case in chosen for arch in archs if case.runs_on(arch)]
    if not pairs:
        raise CheckError(
            f"{', '.join(case.name for case in chosen)}: not launched on "
            f"{', '.join(arch.name for arch in archs)}"
        )
    for case, arch in pairs:
        yield case.source(arch), arch, case.needs(arch)


def _foreign(
    path: str,
    signature: str | None,
    needs: list[str],
    warps: int,
    stages: int,
    archs: "list[Architecture]",
) -> "Iterator[Work]":
    from nvfp4check.kernels.codegen import KernelSource
    from nvfp4check.ops import resolve

    if signature is None:
        raise CheckError(
            f"{path}: say how it is specialised, for example --signature "
            "'x_ptr=*bf16:16, n=i32, BLOCK=1024'"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    types, constants, aligned = parse_signature(signature)
    source = KernelSource(
        name=path,
        function=resolve(path),
        signature=types,
        constants=constants,
        aligned=aligned,
        warps=warps,
        stages=stages,
    )
    for arch in archs:
        yield source, arch, parse_needs(needs)


def parse_signature(text: str) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """Return the Triton types, the constants and the aligned arguments of a written signature.

    Raises:
        CheckError: It cannot be read.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = set()
    for part in _split_outside_brackets(text):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise CheckError(f"signature: {part.strip()!r} is not name=TYPE or name=VALUE")
        kind, colon, multiple = value.partition(":")
        if colon and multiple.strip() != "16":
            raise CheckError(f"signature: {part.strip()!r}: only a multiple of 16 means something")
        if _is_type(kind.strip()):
            types[name] = kind.strip()
            if colon:
                aligned.add(name)
        else:
            types[name] = "constexpr"
            constants[name] = _constant(value)
    return types, constants, frozenset(aligned)


def _split_outside_brackets(text: str) -> Iterator[str]:
    depth, part = 0, ""
    for character in text:
        depth += (character in "[<(") - (character in "]>)")
        if character == "," and depth == 0:
            yield part
            part = ""
        else:
            part += character
    if part.strip():
        yield part


_SCALARS = {"i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "fp16", "bf16", "fp32"}
_SCALARS |= {"fp64", "fp8e4nv", "fp8e5"}


def _is_type(text: str) -> bool:
    return text.removeprefix("*") in _SCALARS or text.startswith("tensordesc<")


def _constant(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise CheckError(
            f"signature: {text!r} is neither a Triton type nor a Python literal"
        ) from None


def parse_needs(texts: Iterable[str]) -> "Needs":
    """Return the needs that were written.

    Raises:
        CheckError: One is not known.
    """
    from nvfp4check.kernels.codegen_checks import Needs

    known = {field.name.replace("_", "-"): field for field in fields(Needs)}
    chosen: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        takes_number = name in known and known[name].type in (int, "int")
        if name not in known or takes_number != bool(equals) or (equals and not value.isdigit()):
            choices = (f"{n}=BYTES" if n.endswith("width") else n for n in known)
            raise CheckError(f"unknown need {text!r}: choose among {', '.join(choices)}")
        chosen[known[name].name] = int(value) if equals else True
    return Needs(**chosen)
