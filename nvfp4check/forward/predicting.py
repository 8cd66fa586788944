"""The rows of multi-token prediction.

Row i of the layer at depth d has seen tokens up to i, is given token i + 1 + d, and predicts token
i + 2 + d; of a prompt of T tokens it has T - 1 - d rows. Depth -1 is the trunk, with T rows.
"""

from collections.abc import Mapping

import torch

from nvfp4check.findings import CheckError
from nvfp4ref.deepseek_v3.config import DeepseekV3Config


def rows_at(depth: int, lengths: Mapping[str, int]) -> dict[str, int]:
    """Return how many rows each prompt has at a depth; those without any are left out."""
    return {prompt: n - 1 - depth for prompt, n in lengths.items() if n > depth + 1}


def shortened(
    hidden: torch.Tensor, before: Mapping[str, int], after: Mapping[str, int]
) -> torch.Tensor:
    """Return the first rows of each prompt's packed states, as many as it has after."""
    parts = dict(zip(before, torch.split(hidden, list(before.values())), strict=True))
    return torch.cat([parts[prompt][:rows] for prompt, rows in after.items()])


def predictors_of(config: DeepseekV3Config, longest: int) -> range:
    """Return the layers of multi-token prediction; `longest` is that of the prompts.

    Raises:
        CheckError: The model has none, or no prompt is long enough for all of them.
    """
    count = config.num_nextn_predict_layers
    if not count:
        raise CheckError("--mtp: config.json has num_nextn_predict_layers 0: no layer to compute")
    if longest <= count:
        raise CheckError(
            f"--mtp: the longest prompt has {longest} tokens; {count} layers of multi-token "
            f"prediction take {count + 1} or more"
        )
    return range(config.num_hidden_layers, config.num_hidden_layers + count)
