"""How the input of an FP8 weight is quantised: what is stored beside it, and what is declared.

an input scale beside the weight               STATIC
FP8_PER_CHANNEL_PER_TOKEN (ModelOpt), dynamic
scales by token (compressed-tensors)           PER_TOKEN
activations declared as not quantised          NONE
anything else, such as one scale for all tokens
of a batch: depends on the batch, and is refused
"""

from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.quant_config import FP8_BY_ROW, QuantConfig
from nvfp4check.findings import CheckError
from nvfp4check.forward.inventory import needed
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.fp8 import Fp8Activations


def fp8_activations(weight: LogicalWeight, quantization: QuantConfig) -> Fp8Activations:
    """Return how the input of an FP8 weight is quantised.

    Raises:
        CheckError: At run time, in a way that is not computed here.
    """
    if Part.INPUT_SCALE in weight.parts:
        return Fp8Activations.STATIC
    algo, group = quantization.algo_of(weight.module), quantization.group_of(weight.module)
    if algo == FP8_BY_ROW:
        return Fp8Activations.PER_TOKEN
    if quantization.producer == "compressed-tensors" and group is not None:
        if not group.quantizes_activations:
            return Fp8Activations.NONE
        if not group.static_input_scale and group.activation_strategy == "token":
            return Fp8Activations.PER_TOKEN
    elif quantization.quantizes_activations is False:
        return Fp8Activations.NONE
    said = f"{algo}, activations by {group.activation_strategy}" if group else f"{algo}"
    raise CheckError(
        f"{weight.name}: FP8 without an input scale ({said}); what is computed is a stored "
        "input_scale, or scales by token, so give --mode weight-only"
    )


def quantizes_tile_inputs(weight: LogicalWeight, quantization: QuantConfig) -> bool:
    """Whether the input of FP8 in tiles is quantised, by groups of 128 of each token.

    Raises:
        CheckError: In another way than by such groups, at run time.
    """
    group = quantization.group_of(weight.module)
    if quantization.producer != "compressed-tensors" or group is None:
        return True
    by_groups = group.activation_strategy == "group" and not group.static_input_scale
    if group.quantizes_activations and not by_groups:
        raise CheckError(
            f"{weight.name}: FP8 in tiles, activations by {group.activation_strategy}; what is "
            "computed is scales by groups made at run time, so give --mode weight-only"
        )
    return group.quantizes_activations is True


def check_fp8_inputs(checkpoint: Checkpoint, config: DeepseekV3Config, layers: range) -> None:
    """Refuse a checkpoint with FP8 inputs that are not computed.

    Raises:
        CheckError: So it is.
    """
    for name in needed(config, layers):
        if checkpoint.weights[name].format is WeightFormat.FP8:
            fp8_activations(checkpoint.weights[name], checkpoint.quantization)
        if checkpoint.weights[name].format is WeightFormat.FP8_BLOCK:
            quantizes_tile_inputs(checkpoint.weights[name], checkpoint.quantization)
