"""How a run keeps within its memory: what activations take, and what is left for weights.

T tokens, S tokens of the longest prompt. The estimate counts the largest step of a layer, with
every intermediate that is alive at once, and takes the rest for weights read ahead and for rows of
dequantised weights.
"""

from dataclasses import dataclass

import torch

from nvfp4check.findings import CheckError
from nvfp4check.forward.bounds.arithmetic import KINDS
from nvfp4ref.deepseek_v3.attention import SCORES_AT_ONCE
from nvfp4ref.deepseek_v3.config import DeepseekV3Config

#: Interpreter, torch and numba, as measured after their import.
PROCESS_BYTES = 450 * 2**20

#: Weights read ahead beyond this gain nothing.
_MOST_AHEAD = 2**30

#: Dequantised rows beyond this leave the cache of the processor.
_MOST_CHUNK = 16 * 2**20

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many bytes may wait read ahead, and be dequantised, at one time."""

    ahead: int
    chunk: int


def plan(
    max_memory: int,
    lengths: list[int],
    config: DeepseekV3Config,
    itemsize: int,
    largest: int,
    arithmetics: int = 0,
) -> Budget:
    """Return the budget of a run over prompts of these lengths.

    `itemsize` is that of the arithmetic, `largest` the bytes of the largest stored weight,
    `arithmetics` the number of those that bounds are derived for.

    Raises:
        CheckError: The activations alone leave no room for a weight.
    """
    fixed = PROCESS_BYTES + _activations(lengths, config, itemsize)
    fixed += _bounds(lengths, config, arithmetics)
    least = fixed + largest + 2 * _MOST_CHUNK
    if least > max_memory:
        raise CheckError(
            f"{sum(lengths):,} tokens of {config.hidden_size} and weights of up to "
            f"{largest / _GIB:.2f} GiB need {least / _GIB:.2f} GiB, and --max-memory is "
            f"{max_memory / _GIB:.2f}; give more, or fewer prompts at a time"
        )
    room = max_memory - fixed - 2 * _MOST_CHUNK
    return Budget(ahead=min(_MOST_AHEAD, max(room // 2, largest)), chunk=_MOST_CHUNK)


def _bounds(lengths: list[int], config: DeepseekV3Config, arithmetics: int) -> int:
    """Return what the errors take that are carried beside the values, in float64."""
    if not arithmetics:
        return 0
    tokens, heads = sum(lengths), config.num_attention_heads
    inner = max(config.intermediate_size, config.moe_intermediate_size)
    # The stream, both norms and the experts' sums; queries and their rotation; heads; an MLP.
    stream = 10 * config.hidden_size
    attention = heads * (3 * config.qk_head_dim + 2 * config.v_head_dim)
    errors = tokens * (stream + attention + 4 * inner)
    # kv_b_proj as it is folded into queries and outputs, its squares, and what it is made from.
    folded = 3 * heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    return torch.float64.itemsize * (errors * (1 + KINDS * arithmetics) + folded + SCORES_AT_ONCE)


def _activations(lengths: list[int], config: DeepseekV3Config, itemsize: int) -> int:
    tokens, longest = sum(lengths), max(lengths)
    heads = config.num_attention_heads
    residual = 6 * tokens * config.hidden_size
    # Queries, their float64 rotation, and one prompt's keys, values and scores.
    queries = 4 * tokens * heads * config.qk_head_dim
    keys = 4 * longest * heads * (config.qk_head_dim + config.v_head_dim)
    scores = 3 * min(SCORES_AT_ONCE, heads * longest * longest)
    attention = queries + keys + scores
    # An expert may be chosen by every token; float64 operands count double.
    inner = max(config.intermediate_size, config.moe_intermediate_size)
    feed_forward = tokens * (6 * config.hidden_size + 6 * inner)
    return itemsize * (residual + max(attention, feed_forward))
