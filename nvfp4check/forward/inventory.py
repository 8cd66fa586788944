"""Which weights a forward pass needs, and whether the checkpoint has them in a usable form.

Everything is read from headers, before the first layer: a run of hours does not end at a tensor
that was missing from the start.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from nvfp4check.checkpoint.header import TensorEntry
from nvfp4check.checkpoint.naming import LogicalWeight, Part, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.findings import CheckError
from nvfp4check.forward.reading import TORCH_DTYPES
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import Linear, PlainLinear
from nvfp4ref.deepseek_v3.moe import Experts
from nvfp4ref.deepseek_v3.weights import layer_weights, mtp_layer_weights
from nvfp4ref.formats import BLOCK_SIZE
from nvfp4ref.fp8_block import scale_shape

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


class Ends(NamedTuple):
    """Names of the weights between tokens and states: the model's, or an MTP layer's own."""

    embedding: str = EMBEDDING
    norm: str = FINAL_NORM
    head: str = HEAD

    @classmethod
    def of_mtp(cls, layer: int) -> "Ends":
        """Return those of an MTP layer."""
        prefix = f"model.layers.{layer}"
        return cls(
            f"{prefix}.embed_tokens.weight",
            f"{prefix}.shared_head.norm.weight",
            f"{prefix}.shared_head.head.weight",
        )


#: The linears of an expert, in the order of their use.
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")

PLAIN_FORMATS = (WeightFormat.BF16, WeightFormat.F16, WeightFormat.F32)
QUANTIZED_FORMATS = (WeightFormat.NVFP4, WeightFormat.FP8_BLOCK, WeightFormat.FP8)
LINEAR_FORMATS = (*PLAIN_FORMATS, *QUANTIZED_FORMATS)


class Inventory:
    """The weights of one layer by name, learnt by asking the reference for them.

    Those at the ends of an MTP layer are not among them.
    """

    def __init__(self, layer: int, config: DeepseekV3Config) -> None:
        #: Weights outside the experts, in the order of their use.
        self.names: list[str] = []
        self.expert_prefix: str | None = None
        if layer < config.num_hidden_layers:
            layer_weights(self, layer, config)
        else:
            mtp_layer_weights(self, layer, config)

    def tensor(self, name: str) -> torch.Tensor:
        """Note a tensor."""
        self.names.append(name)
        return torch.empty(0)

    def linear(self, module: str) -> Linear:
        """Note a linear layer."""
        self.names.append(f"{module}.weight")
        return PlainLinear(torch.empty(0))

    def experts(self, prefix: str) -> Experts:
        """Note the experts."""
        self.expert_prefix = prefix
        return lambda chosen: []

    def all_names(self, experts: int) -> list[str]:
        """Return the weights of the layer with all its experts."""
        if self.expert_prefix is None:
            return self.names
        prefix = self.expert_prefix
        return self.names + [
            f"{prefix}.{expert}.{part}.weight" for expert in range(experts) for part in EXPERT_PARTS
        ]


def needed(config: DeepseekV3Config, layers: Iterable[int]) -> list[str]:
    """Return the names of all weights that these layers and both ends of the model need.

    Layers from num_hidden_layers on are those of multi-token prediction.
    """
    names = list(Ends())
    for layer in layers:
        names += Inventory(layer, config).all_names(config.n_routed_experts)
        if layer >= config.num_hidden_layers:
            names += Ends.of_mtp(layer)
    return names


def check_weights(checkpoint: Checkpoint, config: DeepseekV3Config, layers: range) -> None:
    """Refuse a checkpoint that lacks a weight, or has one that cannot be computed with.

    Raises:
        CheckError: So it is; the message names the first of them.
    """
    if checkpoint.unreadable or not checkpoint.weights:
        named = next(iter(checkpoint.unreadable.items()), None)
        what = f"{named[0]}: {named[1]}" if named else "holds no shard that can be read"
        raise CheckError(
            f"{checkpoint.location}: {what}; `nvfp4check validate` says more, and what to do"
        )
    most = max(layers.stop, config.n_routed_experts)
    if most > len(checkpoint.weights):
        raise CheckError(
            f"{checkpoint.location}: config.json promises {most:,} layers or experts, and there "
            f"are {len(checkpoint.weights):,} weights in all"
        )
    names = needed(config, layers)
    missing = [name for name in names if name not in checkpoint.weights]
    if missing:
        raise CheckError(
            f"{checkpoint.location}: lacks {len(missing):,} of the {len(names):,} weights that "
            f"layers {layers.start} to {layers.stop - 1} need, first {missing[0]}; "
            "`nvfp4check validate` says more"
        )
    for name in names:
        _check_weight(checkpoint.weights[name], _shape(name, config))


def _check_weight(weight: LogicalWeight, shape: tuple[int, ...]) -> None:
    is_linear = len(shape) == 2 and not weight.name.endswith(
        (".embed_tokens.weight", ".mlp.gate.weight")
    )
    formats = LINEAR_FORMATS if is_linear else PLAIN_FORMATS
    if weight.format not in formats:
        raise CheckError(
            f"{weight.name}: stored as {weight.format}, which this forward does not compute; "
            f"it takes {', '.join(formats)}"
        )
    if weight.shape != shape:
        raise CheckError(
            f"{weight.name}: shape {list(weight.shape)}, expected {list(shape)} by config.json"
        )
    for entry in weight.entries:
        if entry.dtype not in TORCH_DTYPES:
            raise CheckError(
                f"{entry.name}: stored as {entry.dtype}; this forward takes "
                f"{', '.join(TORCH_DTYPES)}"
            )
    if weight.format is WeightFormat.NVFP4:
        rows, columns = shape
        _check_part(weight, Part.CODES, "U8", (rows, columns // 2))
        _check_part(weight, Part.BLOCK_SCALES, "F8_E4M3", (rows, columns // BLOCK_SIZE))
        _part(weight, Part.GLOBAL_SCALE)
    if weight.format is WeightFormat.FP8_BLOCK:
        rows, columns = shape
        _check_part(weight, Part.CODES, "F8_E4M3", shape)
        scale = _part(weight, Part.SCALE_INV)
        dtype = scale.dtype if scale.dtype in ("BF16", "F16") else "F32"
        _check_part(weight, Part.SCALE_INV, dtype, scale_shape(rows, columns))
    if weight.format is WeightFormat.FP8:
        _check_part(weight, Part.CODES, "F8_E4M3", shape)
        scale = _part(weight, Part.SCALE)
        if scale.shape not in ((), (1,), shape[:1], (shape[0], 1)):
            raise CheckError(
                f"{scale.name}: shape {list(scale.shape)}, expected one scale, or one for each of "
                f"the {shape[0]} rows"
            )


def _check_part(weight: LogicalWeight, part: Part, dtype: str, shape: tuple[int, ...]) -> None:
    entry = _part(weight, part)
    if (entry.dtype, entry.shape) != (dtype, shape):
        raise CheckError(
            f"{entry.name}: {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)}; "
            "`nvfp4check validate` says more"
        )


def _part(weight: LogicalWeight, part: Part) -> TensorEntry:
    if part not in weight.parts:
        raise CheckError(f"{weight.name}: lacks its {part}; `nvfp4check validate` says more")
    return weight.parts[part]


def _shape(name: str, config: DeepseekV3Config) -> tuple[int, ...]:
    """Return the shape that a weight of this name has in this model."""
    width, heads = config.hidden_size, config.num_attention_heads
    shared = config.moe_intermediate_size * config.n_shared_experts
    if ".experts." in name:
        inner = config.moe_intermediate_size
    else:
        inner = shared if ".shared_experts." in name else config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config.vocab_size, width),
        "lm_head": (config.vocab_size, width),
        "head": (config.vocab_size, width),
        "eh_proj": (width, 2 * width),
        "q_proj": (heads * config.qk_head_dim, width),
        "q_a_proj": (config.q_lora_rank or 0, width),
        "q_a_layernorm": (config.q_lora_rank or 0,),
        "q_b_proj": (heads * config.qk_head_dim, config.q_lora_rank or 0),
        "kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, width),
        "kv_a_layernorm": (config.kv_lora_rank,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (width, heads * config.v_head_dim),
        "gate": (config.n_routed_experts, width),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    if name.endswith(".e_score_correction_bias"):
        return (config.n_routed_experts,)
    module = name.removesuffix(".weight").rpartition(".")[2]
    return shapes.get(module, (width,))  # the rest are norms
