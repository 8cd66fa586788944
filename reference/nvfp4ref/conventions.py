"""The named conventions: how each producer of NVFP4 orders its arithmetic and treats edges.

Contract:
    Every step is one IEEE float32 operation rounded to nearest even, in the order of its source.
    With D the global decode scale, E the global encode scale (its reciprocal), A the largest
    magnitude of a block of 16, S its block scale as E4M3 holds it, x an element in float32:

    convention          block scale before E4M3      element before E2M1      block of zeros
    modelopt            A / (6 D), in [2**-9, 448]   x / (S D)                1.0
    modelopt-0.39       A / (6 D)                    x / (S D)                1.0
    compressed-tensors  E (A / 6), up to 448         x / (S / E)              0.125
    torchao             (A / 6) / D, in [2**-6, 448] x ((1 / D) / S)          2**-6
    transformer-engine  A (E (1 / 6)), up to 448     x min(1 / (S (1 / E)))   0
    engine              E (A (1 / 6)), up to 448     x (1 / (S (1 / E)))      0
    engine-vllm         as engine                    as engine                0
    vllm-reference      as engine                    as engine                0

    lost    a block whose scale E4M3 rounds to zero though the block is not zero (A <= D 6 2**-10):
            modelopt-0.39, engine and transformer-engine keep scale 0, and dividing by it makes
            every code +-6; engine-vllm and vllm-reference make the codes 0; compressed-tensors
            puts 0.125; the lower limits of modelopt and torchao keep the scale from zero
    -0.0    keeps its sign (code 8) in torchao and engines, is code 0 in ModelOpt,
            compressed-tensors and the Python references of TransformerEngine and vLLM;
            a negative that rounds to zero is code 8 everywhere
    NaN     makes the block scale 0x7F, whatever sign the platform gives to 0/0, and every code
            `Rules.nan_code`; engines leave NaN out of A, and only its own code is `nan_code`
    inf     makes the block scale 448 and its own code +-6
    zero tensor  D = 0 in ModelOpt and torchao: block scales are NaN; E is capped in
            TransformerEngine and 1 in compressed-tensors: block scales are those of zero blocks

Correct producers differ from one another only at ties and within the error of their roundings:
`nvfp4ref.ties` decides which.
"""

from dataclasses import dataclass
from enum import StrEnum

from nvfp4ref.formats import E4M3


class Convention(StrEnum):
    """A producer's way to quantise."""

    MODELOPT = "modelopt"
    MODELOPT_0_39 = "modelopt-0.39"
    COMPRESSED_TENSORS = "compressed-tensors"
    TORCHAO = "torchao"
    #: It also packed the first code of a pair into the high nibble.
    TORCHAO_0_14 = "torchao-0.14"
    TRANSFORMER_ENGINE = "transformer-engine"
    #: TensorRT-LLM and FlashInfer.
    ENGINE = "engine"
    #: vLLM's own kernel: it asks whether the scale is zero, where `ENGINE` asks for the block.
    ENGINE_VLLM = "engine-vllm"
    #: vLLM's emulation in Python.
    VLLM_REFERENCE = "vllm-reference"


class GlobalScale(StrEnum):
    """How the global scale follows from the largest magnitude of the tensor.

    One line of Python has two results: on a GPU torch divides by a number by multiplying with its
    rounded reciprocal (div_true_kernel_cuda in BinaryDivTrueKernel.cu).
    """

    DIVIDE = "D = amax / 2688"
    #: One ulp from `DIVIDE` for a quarter of the bfloat16 values.
    DIVIDE_TWICE = "D = (amax / 6) / 448"
    #: `DIVIDE` as torch computes it on a GPU.
    MULTIPLY = "D = amax * (1 / 2688)"
    #: `DIVIDE_TWICE` as torch computes it on a GPU.
    MULTIPLY_TWICE = "D = (amax * (1 / 6)) * (1 / 448)"
    #: At most the largest float32, and 1 where it would be 0.
    ENCODE = "E = 2688 / amax, D = 1 / E"
    #: In the dtype of the weight, with amax at least its smallest normal; 1 where not finite.
    ENCODE_IN_WEIGHT_DTYPE = "E = (1 / amax) * 2688, D = 1 / E"


class IdealScale(StrEnum):
    """How the block scale is formed before it is rounded to E4M3."""

    DIVIDE_BY_PRODUCT = "A / (6 * D)"
    DIVIDE_TWICE = "(A / 6) / D"
    #: A / 6 in the dtype of the weight.
    MULTIPLY_QUOTIENT = "E * (A / 6)"
    MULTIPLY_BY_PRODUCT = "A * (E * (1 / 6))"
    MULTIPLY_PRODUCT = "E * (A * (1 / 6))"


class ElementScaling(StrEnum):
    """How an element is brought into the range of E2M1."""

    DIVIDE_BY_PRODUCT = "x / (S * D)"
    DIVIDE_BY_QUOTIENT = "x / (S / E)"
    MULTIPLY_BY_QUOTIENT = "x * ((1 / D) / S)"
    MULTIPLY_BY_RECIPROCAL = "x * (1 / (S * (1 / E)))"
    #: The reciprocal is at most the largest float32.
    MULTIPLY_BY_CAPPED_RECIPROCAL = "x * min(1 / (S * (1 / E)), max)"


class ZeroScale(StrEnum):
    """What a block scale of zero becomes."""

    #: 1.0 where it is zero before rounding; one that rounds to zero stays.
    ONE_BEFORE_ROUNDING = "one-before-rounding"
    #: 0.125 where it is zero after rounding.
    EIGHTH_AFTER_ROUNDING = "eighth-after-rounding"
    STAYS = "stays"


class ReciprocalOfZero(StrEnum):
    """What the elements of a block are multiplied by when its scale is zero."""

    #: Infinity, as IEEE 754 divides.
    INFINITY = "infinity"
    #: Zero if the whole block is zero, else infinity.
    ZERO_IF_BLOCK_IS_ZERO = "zero-if-block-is-zero"
    ZERO = "zero"
    TINY = "1e-8"


class NegativeZero(StrEnum):
    """Code of an element that is -0.0 after scaling."""

    KEEPS_SIGN = "code-8"
    LOSES_SIGN = "code-0"


class NaNElements(StrEnum):
    """What a NaN does to the largest magnitude of its block."""

    POISON_BLOCK = "poison-block"
    LEFT_OUT = "left-out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The choices that make a convention."""

    #: Project, version and file that the formula was read from.
    source: str
    global_scale: GlobalScale
    #: Other formulas that released versions of the producer use for the global scale.
    other_global_scales: tuple[GlobalScale, ...] = ()
    ideal_scale: IdealScale
    #: Least block scale before rounding; None leaves it as it comes.
    least_scale: float | None = None
    zero_scale: ZeroScale = ZeroScale.STAYS
    element_scaling: ElementScaling
    reciprocal_of_zero: ReciprocalOfZero = ReciprocalOfZero.INFINITY
    negative_zero: NegativeZero
    #: Code of an element that is NaN after scaling.
    nan_code: int
    nan_elements: NaNElements = NaNElements.POISON_BLOCK


RULES: dict[Convention, Rules] = {
    Convention.MODELOPT: Rules(
        source="nvidia-modelopt 0.47.0, modelopt/torch/quantization/qtensor/nvfp4_tensor.py",
        global_scale=GlobalScale.DIVIDE,
        other_global_scales=(GlobalScale.MULTIPLY,),
        ideal_scale=IdealScale.DIVIDE_BY_PRODUCT,
        least_scale=E4M3.smallest_subnormal,
        zero_scale=ZeroScale.ONE_BEFORE_ROUNDING,
        element_scaling=ElementScaling.DIVIDE_BY_PRODUCT,
        negative_zero=NegativeZero.LOSES_SIGN,
        nan_code=7,
    ),
    # It leaves overflow to torch's cast: NaN above 464 up to torch 2.12, 448 since. 448 here.
    Convention.MODELOPT_0_39: Rules(
        source="nvidia-modelopt 0.39.0, modelopt/torch/quantization/qtensor/nvfp4_tensor.py; "
        "in two steps: examples/deepseek/quantize_to_nvfp4.py at tag 0.39.0, on a GPU",
        global_scale=GlobalScale.DIVIDE,
        other_global_scales=(
            GlobalScale.DIVIDE_TWICE,
            GlobalScale.MULTIPLY,
            GlobalScale.MULTIPLY_TWICE,
        ),
        ideal_scale=IdealScale.DIVIDE_BY_PRODUCT,
        zero_scale=ZeroScale.ONE_BEFORE_ROUNDING,
        element_scaling=ElementScaling.DIVIDE_BY_PRODUCT,
        negative_zero=NegativeZero.LOSES_SIGN,
        nan_code=7,
    ),
    Convention.COMPRESSED_TENSORS: Rules(
        source="compressed-tensors 0.19.0, compressed_tensors/quantization/utils/helpers.py "
        "(generate_gparam, calculate_qparams), lifecycle/forward_helpers.py (_quantize)",
        global_scale=GlobalScale.ENCODE_IN_WEIGHT_DTYPE,
        ideal_scale=IdealScale.MULTIPLY_QUOTIENT,
        zero_scale=ZeroScale.EIGHTH_AFTER_ROUNDING,
        element_scaling=ElementScaling.DIVIDE_BY_QUOTIENT,
        negative_zero=NegativeZero.LOSES_SIGN,
        nan_code=0,
    ),
    Convention.TORCHAO: Rules(
        source="torchao 0.18.0, torchao/prototype/mx_formats/nvfp4_tensor.py (nvfp4_quantize)",
        global_scale=GlobalScale.DIVIDE,
        ideal_scale=IdealScale.DIVIDE_TWICE,
        least_scale=E4M3.smallest_normal,
        element_scaling=ElementScaling.MULTIPLY_BY_QUOTIENT,
        negative_zero=NegativeZero.KEEPS_SIGN,
        nan_code=3,  # of the quiet NaN 0x7FC00000: a payload decides there, and gives 2, 4, 10 too
    ),
    Convention.TORCHAO_0_14: Rules(
        source="torchao 0.14.1, torchao/prototype/mx_formats/nvfp4_tensor.py (nvfp4_quantize)",
        global_scale=GlobalScale.DIVIDE,
        ideal_scale=IdealScale.DIVIDE_TWICE,
        least_scale=E4M3.smallest_normal,
        element_scaling=ElementScaling.DIVIDE_BY_PRODUCT,
        negative_zero=NegativeZero.KEEPS_SIGN,
        nan_code=3,
    ),
    Convention.TRANSFORMER_ENGINE: Rules(
        source="TransformerEngine d0067d0d, transformer_engine/pytorch/custom_recipes/"
        "reference_nvfp4.py",
        global_scale=GlobalScale.ENCODE,
        ideal_scale=IdealScale.MULTIPLY_BY_PRODUCT,
        element_scaling=ElementScaling.MULTIPLY_BY_CAPPED_RECIPROCAL,
        negative_zero=NegativeZero.LOSES_SIGN,
        nan_code=0,
    ),
    # On the GPU both reciprocals are rcp.approx.ftz.f32, here they are IEEE divisions.
    Convention.ENGINE: Rules(
        source="TensorRT-LLM 9cdbae60, tensorrt_llm/_torch/_experimental/modeling_v2/catalog/"
        "quantization/fp4_quantize.md; FlashInfer fb28d724, "
        "csrc/nv_internal/tensorrt_llm/kernels/quantization_utils.cuh",
        global_scale=GlobalScale.DIVIDE,
        ideal_scale=IdealScale.MULTIPLY_PRODUCT,
        element_scaling=ElementScaling.MULTIPLY_BY_RECIPROCAL,
        reciprocal_of_zero=ReciprocalOfZero.ZERO_IF_BLOCK_IS_ZERO,
        negative_zero=NegativeZero.KEEPS_SIGN,
        nan_code=7,
        nan_elements=NaNElements.LEFT_OUT,
    ),
    Convention.ENGINE_VLLM: Rules(
        source="vLLM 07c13c7b, csrc/quantization/fp4/nvfp4_utils.cuh (cvt_warp_fp16_to_fp4)",
        global_scale=GlobalScale.DIVIDE,
        ideal_scale=IdealScale.MULTIPLY_PRODUCT,
        element_scaling=ElementScaling.MULTIPLY_BY_RECIPROCAL,
        reciprocal_of_zero=ReciprocalOfZero.ZERO,
        negative_zero=NegativeZero.KEEPS_SIGN,
        nan_code=7,
        nan_elements=NaNElements.LEFT_OUT,
    ),
    Convention.VLLM_REFERENCE: Rules(
        source="vLLM 0.33.0, vllm/model_executor/layers/quantization/utils/"
        "nvfp4_emulation_utils.py (ref_nvfp4_quant)",
        global_scale=GlobalScale.DIVIDE,
        ideal_scale=IdealScale.MULTIPLY_PRODUCT,
        element_scaling=ElementScaling.MULTIPLY_BY_RECIPROCAL,
        reciprocal_of_zero=ReciprocalOfZero.TINY,
        negative_zero=NegativeZero.LOSES_SIGN,
        nan_code=0,
    ),
}
