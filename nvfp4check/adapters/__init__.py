"""Other people's kernels in the form of our operations, found where they are importable.

An adapter module imports its library at the top and holds nothing but the calls, so it is imported
only when one of its kernels is asked for.
"""

from nvfp4check.adapters.implementation import Implementation, Library

__all__ = ["LIBRARIES", "Implementation", "Library", "implementations"]

_BLACKWELL = (10, 0)


def _paths(module: str, *operations: str) -> dict[str, str]:
    return {name: f"nvfp4check.adapters.{module}:{name}" for name in operations}


LIBRARIES = (
    Library(
        name="torchao",
        module="torchao",
        install="pip install torchao",
        operations=_paths("torchao", "quantize", "dequantize", "swizzle", "unswizzle"),
        convention="torchao",
        device="cpu",
    ),
    Library(
        name="compressed-tensors",
        module="compressed_tensors",
        install="pip install compressed-tensors",
        operations=_paths("compressed_tensors", "quantize", "dequantize"),
        convention="compressed-tensors",
        device="cpu",
    ),
    Library(
        name="modelopt",
        module="modelopt",
        install="pip install nvidia-modelopt",
        operations=_paths("modelopt", "quantize", "dequantize"),
        convention="modelopt",
        device="cpu",
    ),
    Library(
        name="flashinfer",
        module="flashinfer",
        install="pip install flashinfer-python",
        operations=_paths("flashinfer", "quantize", "swizzle", "matmul"),
        convention="engine",
        device="cuda",
        capability=_BLACKWELL,
    ),
    Library(
        name="vllm",
        module="vllm",
        install="pip install vllm",
        operations=_paths("vllm", "quantize", "matmul"),
        convention="engine-vllm",
        device="cuda",
        capability=_BLACKWELL,
    ),
    Library(
        name="vllm-emulation",
        module="vllm",
        install="pip install vllm",
        operations=_paths("vllm_emulation", "quantize", "dequantize", "unswizzle"),
        convention="vllm-reference",
        device="cpu",
    ),
    Library(
        name="transformer-engine",
        module="transformer_engine",
        install="pip install transformer-engine[pytorch]",
        operations=_paths("transformer_engine", "quantize"),
        convention="transformer-engine",
        device="cuda",
        capability=_BLACKWELL,
    ),
)


def implementations() -> list[Implementation]:
    """Return what every known library implements, available or not."""
    return [found for library in LIBRARIES for found in library.implementations()]
