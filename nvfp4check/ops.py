"""The operations that a kernel may implement: their names, signatures and reference.

Shapes: M rows, K contracted, N output features, C = K/16, E experts, T tokens, H heads,
R rotary width, B sequences, L latent width (512 in DeepSeek-V3), P pages of S positions.

A kernel is a plain function that takes an operation's arguments by position and returns its
outputs. The reference of an operation has the same form, so that whatever checks a kernel can be
tried on the reference, and on a wrong computation made from it.

Nothing here imports torch before a reference is called.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nvfp4check.findings import CheckError

#: A kernel: arguments by position as its operation says.
Kernel = Callable[..., Any]

#: The arguments of one call by name, in the order of the signature.
Inputs = Mapping[str, Any]


class UnsupportedError(Exception):
    """A kernel says that it does not take this shape, dtype or device: skipped and counted."""


@dataclass(frozen=True, slots=True)
class Value:
    """One argument or output of an operation."""

    name: str
    #: Dtype and shape, in the words of the signature.
    form: str
    #: Left out when it is the last and absent.
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What a kernel of this name takes, returns and computes."""

    name: str
    purpose: str
    arguments: tuple[Value, ...]
    outputs: tuple[Value, ...]
    #: `module:function` of the reference, imported when it is first called.
    reference_path: str
    #: Whether the result depends on a named quantisation convention.
    has_convention: bool = False

    @property
    def signature(self) -> str:
        """The form of a kernel in one line."""
        taken = ", ".join(
            f"{value.name}=None" if value.optional else value.name for value in self.arguments
        )
        return f"{self.name}({taken}) -> {', '.join(value.name for value in self.outputs)}"

    def reference(self, convention: str | None = None) -> Kernel:
        """Return the reference as a kernel, with the convention bound where there is one.

        Raises:
            CheckError: The operation needs a convention and none is given, or it is not known.
        """
        function: Kernel = resolve(self.reference_path)
        if not self.has_convention:
            return function
        return partial(function, convention=_convention(self.name, convention))

    def arguments_of(self, inputs: Inputs) -> list[Any]:
        """Return the arguments of one call by position.

        Raises:
            CheckError: An argument is missing, or one is not of this operation.
        """
        names = [value.name for value in self.arguments]
        unknown = [name for name in inputs if name not in names]
        missing = [v.name for v in self.arguments if v.name not in inputs and not v.optional]
        if unknown or missing:
            raise CheckError(
                f"{self.name}: arguments {', '.join(names)}; "
                f"missing {missing or 'none'}, unknown {unknown or 'none'}"
            )
        return [inputs[name] for name in names if name in inputs]

    def call(self, kernel: Kernel, inputs: Inputs) -> tuple[Any, ...]:
        """Return the outputs of one call of a kernel, always as a tuple.

        Raises:
            WrongOutputsError: The kernel returned another number of outputs.
        """
        returned = kernel(*self.arguments_of(inputs))
        outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
        required = sum(not value.optional for value in self.outputs)
        if not required <= len(outputs) <= len(self.outputs):
            names = ", ".join(value.name for value in self.outputs)
            raise WrongOutputsError(
                f"{self.name} returned {len(outputs)} outputs, expected {names}"
            )
        return outputs


class WrongOutputsError(Exception):
    """A kernel returned something that has not the form of the operation's outputs."""


def resolve(path: str) -> Any:
    """Return the object that `module:attribute` names.

    Raises:
        CheckError: The path has another form, or the module or the attribute is not there.
    """
    module_name, separator, attribute = path.partition(":")
    if not separator or not module_name or not attribute:
        raise CheckError(f"{path!r} is not MODULE:FUNCTION, for example my_kernels.fp4:quantize")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the border to code that is not ours: it may raise anything
        reason = str(error) if isinstance(error, ImportError) else repr(error)
        raise CheckError(f"cannot import {module_name!r} for {path!r}: {reason}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CheckError(f"module {module_name!r} has no {attribute!r}, needed for {path!r}")
        found = getattr(found, part)
    return found


def _convention(operation: str, name: str | None) -> Any:
    conventions = resolve("nvfp4ref.conventions:Convention")
    choices = ", ".join(sorted(str(choice) for choice in conventions))
    if name is None:
        raise CheckError(f"{operation} depends on a convention: name one of {choices}")
    try:
        return conventions(name)
    except ValueError:
        raise CheckError(f"unknown convention {name!r}: choose one of {choices}") from None


_CODES = Value("packed_codes", "u8[M,K/2], even element in the low nibble")
_SCALES = Value("block_scales", "e4m3[M,K/16], row-major")
_GLOBAL = Value("global_decode_scale", "f32[], the multiplier that decodes")
_DTYPE = Value("dtype", "bfloat16, float16 or float32")

_OPERATIONS = (
    Operation(
        name="quantize",
        purpose="16-blocks to packed codes and block scales, with a static global scale",
        arguments=(Value("x", "bf16/fp16/fp32[M,K]"), _GLOBAL),
        outputs=(_CODES, _SCALES),
        reference_path="nvfp4ref.nvfp4:quantize",
        has_convention=True,
    ),
    Operation(
        name="dequantize",
        purpose="packed codes and scales back to values",
        arguments=(_CODES, _SCALES, _GLOBAL, _DTYPE),
        outputs=(Value("values", "dtype[M,K]"),),
        reference_path="nvfp4ref.nvfp4:dequantize",
    ),
    Operation(
        name="swizzle",
        purpose="row-major block scales to 128x4 tiles, zero padded",
        arguments=(Value("block_scales", "e4m3[M,C]"),),
        outputs=(Value("flat", "e4m3[pad128(M) * pad4(C)]"),),
        reference_path="nvfp4ref.layout:swizzle",
    ),
    Operation(
        name="unswizzle",
        purpose="128x4 tiles back to row-major block scales",
        arguments=(
            Value("flat", "e4m3[pad128(M) * pad4(C)]"),
            Value("rows", "M"),
            Value("columns", "C"),
        ),
        outputs=(Value("block_scales", "e4m3[M,C]"),),
        reference_path="nvfp4ref.layout:unswizzle",
    ),
    Operation(
        name="matmul",
        purpose="alpha times A times B transposed, both operands in NVFP4",
        arguments=(
            Value("a_codes", "u8[M,K/2]"),
            Value("a_scales", "e4m3[M,C]"),
            Value("b_codes", "u8[N,K/2]"),
            Value("b_scales", "e4m3[N,C]"),
            Value("alpha", "f32[]"),
            _DTYPE,
        ),
        outputs=(Value("product", "dtype[M,N]"),),
        reference_path="nvfp4ref.matmul:matmul",
    ),
    Operation(
        name="grouped_matmul",
        purpose="rows of group e times expert e, for a mixture of experts",
        arguments=(
            Value("a_codes", "u8[M,K/2]"),
            Value("a_scales", "e4m3[M,C]"),
            Value("b_codes", "u8[E,N,K/2]"),
            Value("b_scales", "e4m3[E,N,C]"),
            Value("alpha", "f32[E]"),
            Value("expert_offsets", "i32[E+1], first row of each group, then M"),
            _DTYPE,
        ),
        outputs=(Value("product", "dtype[M,N]"),),
        reference_path="nvfp4ref.matmul:grouped_matmul",
    ),
    Operation(
        name="silu_mul_quantize",
        purpose="quantize silu(gate) * up",
        arguments=(Value("gate", "bf16/fp16/fp32[M,K]"), Value("up", "as gate"), _GLOBAL),
        outputs=(_CODES, _SCALES),
        reference_path="nvfp4ref.fused:silu_mul_quantize",
        has_convention=True,
    ),
    Operation(
        name="rms_norm_quantize",
        purpose="quantize the RMS norm of x, or of x + residual",
        arguments=(
            Value("x", "bf16/fp16/fp32[M,K]"),
            Value("weight", "as x[K]"),
            Value("eps", "float"),
            _GLOBAL,
            Value("residual", "as x", optional=True),
        ),
        outputs=(_CODES, _SCALES, Value("residual", "as x: x + residual", optional=True)),
        reference_path="nvfp4ref.fused:rms_norm_quantize",
        has_convention=True,
    ),
    Operation(
        name="rope",
        purpose="rotary embedding of DeepSeek's interleaved pairs, with YaRN",
        arguments=(
            Value("x", "[T,H,R]"),
            Value("positions", "i64[T]"),
            Value("config", "DeepseekV3 config object, or a dict of its rotary fields"),
        ),
        outputs=(Value("rotated", "[T,H,R]"),),
        reference_path="nvfp4ref.deepseek_v3.rotary:rope",
    ),
    Operation(
        name="route",
        purpose="group-limited choice of experts by sigmoid score plus bias",
        arguments=(
            Value("logits", "f32[T,E]"),
            Value("bias", "f32[E]"),
            Value("n_group", "int"),
            Value("topk_group", "int"),
            Value("top_k", "int"),
            Value("scaling", "float"),
        ),
        outputs=(Value("experts", "i32[T,k], any order"), Value("weights", "f32[T,k]")),
        reference_path="nvfp4ref.deepseek_v3.routing:route",
    ),
    Operation(
        name="mla_decode",
        purpose="absorbed latent attention of one query a sequence over a paged cache",
        arguments=(
            Value("q_latent", "[B,H,L]"),
            Value("q_rope", "[B,H,R]"),
            Value("latent_pages", "[P,S,L]"),
            Value("rope_pages", "[P,S,R]"),
            Value("page_table", "i32[B,pages a sequence]"),
            Value("lengths", "i32[B]"),
            Value("scale", "float"),
        ),
        outputs=(Value("attended", "[B,H,L]"),),
        reference_path="nvfp4ref.deepseek_v3.attention:mla_decode",
    ),
    Operation(
        name="dequantize_fp8_block",
        purpose="E4M3 weights with one float32 scale a 128 x 128 tile, back to values",
        arguments=(
            Value("w", "e4m3[N,K]"),
            Value("scale_inv", "f32[ceil(N/128),ceil(K/128)], a multiplier in spite of its name"),
            _DTYPE,
        ),
        outputs=(Value("values", "dtype[N,K]"),),
        reference_path="nvfp4ref.fp8_block:dequantize",
    ),
)

#: Every operation by name.
OPERATIONS: Mapping[str, Operation] = {operation.name: operation for operation in _OPERATIONS}


def operation(name: str) -> Operation:
    """Return the operation of this name.

    Raises:
        CheckError: There is none.
    """
    if name not in OPERATIONS:
        raise CheckError(f"unknown operation {name!r}: choose one of {', '.join(OPERATIONS)}")
    return OPERATIONS[name]
