"""F16 and F17: the scale of YaRN, and the pairs of the rotary embedding.

Contract:
    m          YaRN's 0.1 ln(40) + 1 of DeepSeek-V3
    planted around a kernel: another scale, configuration or order of elements goes in or comes out
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.ops import Kernel

Tensor = torch.Tensor

#: Of DeepSeek-V3: factor 40, mscale 1.
M = 0.1 * math.log(40.0) + 1.0

#: Widths of a head: with its rotary part, without it, and of the latent with the rotary part.
HEAD, NOPE, LATENT = 192, 128, 576


def _softmax_scale(factor: float, kernel: Kernel, *arguments: Any) -> Any:
    *tensors, scale = arguments
    return kernel(*tensors, scale * factor)


def _scaled_in_bfloat16(kernel: Kernel, *arguments: Any) -> Any:
    """Leave m**2 out on one path only, that of bfloat16."""
    *tensors, scale = arguments
    return kernel(*tensors, scale / M**2 if tensors[0].dtype == torch.bfloat16 else scale)


def _scaled_rotation(kernel: Kernel, *arguments: Any) -> Any:
    rotated = kernel(*arguments)
    return (rotated.float() * M).to(rotated.dtype)


def _configured(
    change: Callable[[dict[str, Any]], dict[str, Any]], kernel: Kernel, *arguments: Any
) -> Any:
    x, positions, config = arguments
    return kernel(x, positions, change(dict(config)))


def _one_mscale(config: dict[str, Any]) -> dict[str, Any]:
    yarn = config.get("rope_scaling")
    if not yarn:
        return config
    return {**config, "rope_scaling": {**yarn, "mscale_all_dim": yarn.get("mscale")}}


def _no_interpolation(config: dict[str, Any]) -> dict[str, Any]:
    """Keep the factor on cosine and sine, and stretch no frequency."""
    yarn = config.get("rope_scaling")
    if not yarn:
        return config
    # A ramp that begins behind the last pair leaves every frequency as it is.
    return {**config, "rope_scaling": {**yarn, "beta_fast": 1e-9, "beta_slow": 1e-9}}


def _other_borders(config: dict[str, Any]) -> dict[str, Any]:
    yarn = config.get("rope_scaling")
    if not yarn:
        return config
    return {**config, "rope_scaling": {**yarn, "beta_fast": 16.0, "beta_slow": 2.0}}


def to_halves(x: Tensor) -> Tensor:
    """Return interleaved pairs with all first elements before all second ones."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def from_halves(x: Tensor) -> Tensor:
    """Return halves as interleaved pairs."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def _half_split(kernel: Kernel, x: Tensor, positions: Tensor, config: Any) -> Any:
    return to_halves(kernel(from_halves(x), positions, config))


def _left_in_halves(kernel: Kernel, *arguments: Any) -> Any:
    return to_halves(kernel(*arguments))


def _next_position(kernel: Kernel, x: Tensor, positions: Tensor, config: Any) -> Any:
    return kernel(x, positions + 1, config)


def _one_side(place: int, kernel: Kernel, *arguments: Any) -> Any:
    taken = list(arguments)
    taken[place] = to_halves(taken[place])
    return kernel(*taken)


def _wrong_dims(kernel: Kernel, *arguments: Any) -> Any:
    q_latent, q_rope, *rest = arguments
    return kernel(q_latent, q_latent[..., : q_rope.shape[-1]].contiguous(), *rest)


def _mla(factor: float, label: str = "") -> Form:
    wrong = partial(_softmax_scale, factor)
    return Form(operation="mla_decode", wrong=wrong, label=label, around=True)


def _rope(wrong: Callable[..., Any], label: str = "") -> Form:
    return Form(operation="rope", wrong=wrong, label=label, around=True)


FAULTS = (
    KernelFault(
        id="F16a",
        name="softmax scale without YaRN's factor",
        does="scores times 192**-0.5: m**2 is missing",
        needs="more than one token",
        threads=("huggingface/transformers/pull/47435", "onnxruntime/mobius/pull/548"),
        forms=(_mla(M**-2),),
    ),
    KernelFault(
        id="F16b",
        name="softmax scale with m",
        does="m in place of m**2",
        needs="more than one token",
        threads=(),
        forms=(_mla(1 / M),),
    ),
    KernelFault(
        id="F16c",
        name="rotation scaled by m",
        does="cosine and sine times m",
        needs="any values",
        threads=(
            "kekzl/imp/pull/880",
            "Avarok-Cybersecurity/atlas/pull/342",
            "ggml-org/llama.cpp/pull/17945",
        ),
        forms=(_rope(_scaled_rotation),),
    ),
    KernelFault(
        id="F16d",
        name="mscale for mscale_all_dim",
        does="one of the two fields read for both",
        needs="a configuration in which they differ",
        threads=("NVIDIA/Megatron-LM/issues/1429",),
        forms=(_rope(partial(_configured, _one_mscale)),),
    ),
    KernelFault(
        id="F16e",
        name="softmax scale wrong on one path",
        does="m**2 missing for bfloat16 only",
        needs="every dtype that has a path",
        threads=("NVIDIA/TensorRT-LLM/pull/3675",),
        forms=(Form(operation="mla_decode", wrong=_scaled_in_bfloat16, around=True),),
    ),
    KernelFault(
        id="F16f",
        name="softmax scale of another width",
        does="128**-0.5 or 576**-0.5 in place of 192**-0.5",
        needs="more than one token",
        threads=(),
        forms=(
            _mla((HEAD / NOPE) ** 0.5, "of 128"),
            _mla((HEAD / LATENT) ** 0.5, "of 576"),
        ),
    ),
    KernelFault(
        id="F16g",
        name="frequencies interpolated wrongly",
        does="frequencies not stretched, or the ramp between other borders",
        needs="large positions",
        threads=(),
        forms=(
            _rope(partial(_configured, _no_interpolation), "not stretched"),
            _rope(partial(_configured, _other_borders), "other borders"),
        ),
    ),
    KernelFault(
        id="F17a",
        name="halves for pairs",
        does="element i turned with element i + 32 instead of 2i with 2i + 1",
        needs="positions other than 0",
        threads=(
            "huggingface/transformers/issues/39687",
            "deepseek-ai/DeepSeek-V3/issues/938",
            "huggingface/optimum-intel/pull/1877",
        ),
        forms=(_rope(_half_split),),
    ),
    KernelFault(
        id="F17b",
        name="one of query and key permuted",
        does="pairs put in halves in the query, or in the cache, and not in the other",
        needs="more than one token",
        threads=(),
        forms=(
            Form(
                operation="mla_decode", wrong=partial(_one_side, 1), label="the query", around=True
            ),
            Form(
                operation="mla_decode", wrong=partial(_one_side, 3), label="the cache", around=True
            ),
        ),
    ),
    KernelFault(
        id="F17c",
        name="rotated pairs left in halves",
        does="the result written with all first elements before all second ones",
        needs="any values",
        threads=(),
        forms=(_rope(_left_in_halves),),
    ),
    KernelFault(
        id="F17d",
        name="the wrong 64 dimensions",
        does="the first of the latent query used for its rotary part",
        needs="more than one token",
        threads=(),
        forms=(Form(operation="mla_decode", wrong=_wrong_dims, around=True),),
    ),
    KernelFault(
        id="F17e",
        name="position off by one",
        does="every position one too large",
        needs="any values",
        threads=(),
        forms=(_rope(_next_position),),
    ),
)
