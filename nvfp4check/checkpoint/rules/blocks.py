"""NV108 and NV110: block scales against the blocks, blocks against the borders of shards.

One defect, one rule. Block scales that fit the architecture's shape, beside codes that do not, are
left to NV103.
"""

from collections.abc import Iterator
from math import prod

from nvfp4check.checkpoint.naming import Part, WeightFormat
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, rule
from nvfp4check.checkpoint.rules.shared import at, is_nvfp4, usable_declaration
from nvfp4check.findings import Severity
from nvfp4ref.formats import BLOCK_SIZE, FP8_BLOCK, SCALE_TILE_COLUMNS, SCALE_TILE_ROWS

#: Linears whose input dimension tensor parallelism splits.
_ROW_PARALLEL = frozenset(("o_proj", "down_proj", "w2", "wo", "out_proj", "fc2", "linear_fc2"))
#: Linears whose output dimension it splits.
_COLUMN_PARALLEL = frozenset(
    ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "linear_fc1")
).union(("q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"))


@rule(
    "NV108",
    "scale-shape",
    Severity.ERROR,
    fires_when="the block scales of an NVFP4 weight are not [N, K/16]: padded, transposed, one for "
    "32 elements, or tiled",
    why="A scale of another shape is read by the wrong row stride: every block gets another "
    "block's scale. Engines tile the scales themselves when they load, and do it twice with "
    "scales that come tiled.",
    repair="Store the scales row-major and unpadded, one E4M3 byte for 16 elements along K.",
    incidents=(
        "https://github.com/NVIDIA/Model-Optimizer/pull/2038",
        "https://github.com/modular/modular/issues/6600",
        "https://github.com/unslothai/unsloth-zoo/pull/1114",
    ),
)
def scale_shape(context: RuleContext) -> Iterator[Problem]:
    """Compare the block scales' shape with the codes', and name what it looks like."""
    declared = usable_declaration(context.checkpoint)
    for weight in context.checkpoint.weights.values():
        scales = weight.parts.get(Part.BLOCK_SCALES)
        if scales is None or Part.CODES not in weight.parts or not is_nvfp4(weight, declared):
            continue
        fitting = _scale_shape_of(weight.shape)
        if scales.shape == fitting or not weight.shape:
            continue
        tensor = context.expected.tensors.get(weight.name) if context.expected else None
        if tensor is not None and scales.shape == _scale_shape_of(tensor.shape):
            continue  # the codes have the wrong shape: NV103
        yield at(
            scales,
            f"block scales of shape {list(scales.shape)}, expected {list(fitting)} for a weight "
            f"of {list(weight.shape)}{_scale_shape_hint(scales.shape, fitting)}",
            observed=[*scales.shape],
            expected=[*fitting],
        )


def _scale_shape_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // BLOCK_SIZE)) if shape else ()


def _scale_shape_hint(found: tuple[int, ...], fitting: tuple[int, ...]) -> str:
    """Say what a wrong shape looks like."""
    *lead, rows, columns = (1, 1, *fitting)
    padded_rows = -(-rows // SCALE_TILE_ROWS) * SCALE_TILE_ROWS
    padded_columns = -(-columns // SCALE_TILE_COLUMNS) * SCALE_TILE_COLUMNS
    height, width = FP8_BLOCK.block_shape
    looks = {
        (*fitting[:-2], columns, rows): "transposed",
        (*fitting[:-2], rows, columns // 2): "half as many as there are blocks: one for 32",
        (*fitting[:-2], rows, 2 * columns): "twice as many as there are blocks: one for 8",
        (*fitting[:-2], rows, 1): "one for a row",
        (*fitting[:-2], -(-rows // height), -(-columns * BLOCK_SIZE // width)): (
            "one for a tile of 128 x 128: the scales of an FP8 weight"
        ),
        (*fitting[:-2], padded_rows, padded_columns): (
            "padded as for the 128x4 layout, and probably tiled"
        ),
    }
    if found in looks:
        return f"; {looks[found]}"
    elements = prod(found)
    if elements == prod(fitting):
        return "; as many as there are blocks, in another shape"
    if elements == prod(lead) * padded_rows * padded_columns:
        return "; as many as the 128x4 layout takes with its padding: tiled"
    return "; one for the whole tensor" if elements == 1 else ""


@rule(
    "NV110",
    "tp-misaligned",
    Severity.INFO,
    fires_when="with --tp N: N-way tensor parallelism would cut a weight inside a block of 16 "
    "(NVFP4) or 128 (FP8), or does not divide its dimension",
    why="A block has one scale, and the half that another GPU holds needs it too. vLLM was "
    "reported to split blocks so (1856 / 8 = 232, no multiple of 16).",
    repair="Serve with a number of GPUs that divides the dimension into whole blocks, or with "
    "expert parallelism, which does not cut experts.",
    incidents=(
        "https://github.com/vllm-project/vllm/issues/49949",
        "https://github.com/vllm-project/vllm/issues/41511",
    ),
)
def tp_misaligned(context: RuleContext) -> Iterator[Problem]:
    """Cut every linear that tensor parallelism cuts, and look where the borders fall."""
    if context.tp is None or context.tp < 2:
        return
    for weight in context.checkpoint.weights.values():
        entry = weight.parts.get(Part.CODES)
        if entry is None or len(weight.shape) != 2:
            continue
        leaf = weight.module.rpartition(".")[2]
        if weight.format is WeightFormat.NVFP4 and leaf in _ROW_PARALLEL:
            size, block, side = weight.shape[1], BLOCK_SIZE, "K"
        elif weight.format is WeightFormat.FP8_BLOCK and leaf in _ROW_PARALLEL:
            size, block, side = weight.shape[1], FP8_BLOCK.block_shape[1], "K"
        elif weight.format is WeightFormat.FP8_BLOCK and leaf in _COLUMN_PARALLEL:
            size, block, side = weight.shape[0], FP8_BLOCK.block_shape[0], "N"
        else:
            continue
        if size % context.tp:
            how = f"{context.tp} does not divide it"
        elif (size // context.tp) % block:
            how = f"{size // context.tp} a shard is no multiple of {block}"
        else:
            continue
        yield at(
            entry,
            f"{side} = {size} over {context.tp} shards: {how}",
            observed=size / context.tp,
            expected=f"a multiple of {block}",
        )


RULES: tuple[Rule, ...] = (scale_shape, tp_misaligned)
