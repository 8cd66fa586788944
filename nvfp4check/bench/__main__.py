"""`python -m nvfp4check.bench NAME [options]`: find the module of a measurement and run it.

A module of the table has `main(argv) -> int`, and is imported only when it is named.
"""

import importlib
import sys
from collections.abc import Sequence

#: Name to (module, one line of help).
BENCHES: dict[str, tuple[str, str]] = {
    "agree": (
        "nvfp4check.bench.agree",
        "two runs of full logits compared, beside merely reading them",
    ),
    "audit": (
        "nvfp4check.bench.audit",
        "the audit against an FP8 base, beside others' dequantisation of the same weights",
    ),
    "bounds": (
        "nvfp4check.bench.bounds",
        "derived bounds over the errors of a correct candidate, by point and dtype",
    ),
    "bytepass": (
        "nvfp4check.bench.bytepass",
        "the byte pass against the speed at which the same files are merely read",
    ),
    "coverage": (
        "nvfp4check.bench.coverage",
        "how often the intervals of agree miss the true mean, by heavy tails and few prompts",
    ),
    "dequantize": (
        "nvfp4check.bench.dequantize",
        "NVFP4 and FP8 to BF16, beside ModelOpt, torchao and compressed-tensors",
    ),
    "diff": (
        "nvfp4check.bench.diff",
        "equal and different checkpoints compared, against merely reading them",
    ),
    "exhaustive": (
        "nvfp4check.bench.exhaustive",
        "all 2**32 float32 values through E2M1 and E4M3, against independent casts",
    ),
    "fuzz": (
        "nvfp4check.bench.fuzz",
        "hostile checkpoints through validate: no traceback, no hang, bounded memory",
    ),
    "forward": (
        "nvfp4check.bench.forward",
        "one full-size layer with experts, streamed: memory, bytes a second, shares",
    ),
}


def usage() -> str:
    """Return the list of measurements."""
    width = max(len(name) for name in BENCHES)
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in BENCHES.items()]
    return "\n".join(
        [
            "usage: python -m nvfp4check.bench NAME [options]",
            "",
            *lines,
            "",
            "example: python -m nvfp4check.bench exhaustive --stride 4097",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Run the measurement that the first argument names, and return its exit code."""
    if not argv or argv[0] not in BENCHES:
        asked_for_help = bool(argv) and argv[0] in ("-h", "--help")
        print(usage(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    module, _ = BENCHES[argv[0]]
    exit_code: int = importlib.import_module(module).main(argv[1:])
    return exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
