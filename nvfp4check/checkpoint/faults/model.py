"""F14, F18 and F20 in tensors that are not quantised: router bias, absorbed weights, MTP."""

import math

import torch

from nvfp4check.checkpoint.faults.base import Planting, fault, leaf
from nvfp4check.checkpoint.naming import LogicalWeight, WeightFormat

_BIAS = "e_score_correction_bias"
_PLAIN = (WeightFormat.BF16, WeightFormat.F16, WeightFormat.F32)


def _bias(p: Planting) -> LogicalWeight:
    return p.weight(
        lambda w: w.name.endswith(_BIAS) and w.format is WeightFormat.F32, "router bias in F32"
    )


@fault(
    "F14c",
    "router-bias-rounded",
    does="The router's bias went through BF16: its values are rounded, though stored as F32.",
    threads=("sgl-project/sglang/pull/31213", "sgl-project/sglang/issues/34857"),
    found_with_base=("NV704",),
)
def _rounded_bias(p: Planting) -> None:
    weight = _bias(p)
    values = p.tensor(weight.name)
    p.overwrite(weight.name, values.to(torch.bfloat16).float(), "values rounded to BF16")


@fault(
    "F14h",
    "router-bias-not-finite",
    does="The router's bias of one expert is not finite.",
    threads=("NVIDIA/TensorRT-Model-Connect/pull/669",),
    found_with_base=("NV704",),
)
def _bias_not_finite(p: Planting) -> None:
    weight = _bias(p)
    values = p.tensor(weight.name).clone()
    expert = int(p.rng.integers(values.numel()))
    values[expert] = (math.nan, math.inf, -math.inf)[int(p.rng.integers(3))]
    p.overwrite(weight.name, values, f"bias of expert {expert} becomes {values[expert]:g}")


@fault(
    "F18f",
    "kv-b-proj-without-scale",
    does="kv_b_proj was taken from the base model's FP8 bytes without their scale.",
    threads=("vllm-project/vllm/issues/38439", "NVIDIA/TensorRT-LLM/pull/14793"),
    found_with_base=("NV704",),
    also=("NV703",),
)
def _unscaled(p: Planting) -> None:
    weight = p.weight(
        lambda w: leaf(w) == "kv_b_proj" and w.format in _PLAIN, "kv_b_proj that is not quantised"
    )
    values = p.tensor(weight.name)
    factor = 448 / float(values.abs().max())
    power = 2.0 ** math.floor(math.log2(factor))
    p.overwrite(weight.name, values * power, f"values times {power:g}, to the range of FP8")


@fault(
    "F20f3",
    "mtp-halves-swapped",
    does="The halves of eh_proj, for the embedding and the hidden state, are swapped.",
    threads=("ml-explore/mlx-lm/pull/1469", "deepseek-ai/DeepSeek-V3/issues/712"),
    found_with_base=("NV704",),
    also=("NV703",),
)
def _halves(p: Planting) -> None:
    weight = p.weight(
        lambda w: leaf(w) == "eh_proj" and w.format in _PLAIN, "eh_proj that is not quantised"
    )
    values = p.tensor(weight.name)
    first, second = values.chunk(2, 1)
    p.overwrite(weight.name, torch.cat((second, first), 1), "column halves change places")


@fault(
    "F20f4",
    "mtp-norms-swapped",
    does="The norms of embedding and hidden state, enorm and hnorm, are swapped.",
    threads=("ml-explore/mlx-lm/pull/1469",),
    found_with_base=("NV704",),
)
def _norms(p: Planting) -> None:
    weight = p.weight(lambda w: leaf(w) == "enorm", "enorm")
    other = p.sibling(weight, "hnorm")
    if other is None:
        other = p.weight(lambda w: leaf(w) == "hnorm", "hnorm")
    mine, theirs = p.tensor(weight.name), p.tensor(other.name)
    p.overwrite(weight.name, theirs, f"values of {other.name}")
    p.overwrite(other.name, mine, f"values of {weight.name}")


FAULTS = (_rounded_bias, _bias_not_finite, _unscaled, _halves, _norms)
