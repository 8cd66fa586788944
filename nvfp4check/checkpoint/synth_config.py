"""The configuration of a synthetic checkpoint: another size, another format, the same family.

Three formats of one configuration and one seed hold the same weights: fp8 is DeepSeek's own form,
bf16 what dequantising it gives, nvfp4 what quantising that gives. Which linears nvfp4 leaves in
BF16 follows the published DeepSeek-V3.1-NVFP4: all of attention but o_proj, the output head, and
the layers of multi-token prediction.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nvfp4check.checkpoint.expected import expected_tensors
from nvfp4check.checkpoint.opening import GENERATION_CONFIG
from nvfp4check.checkpoint.quant_config import (
    CONFIG,
    HF_QUANT_CONFIG,
    QuantConfig,
    effective,
    from_config,
    from_hf_quant_config,
)
from nvfp4check.findings import CheckError
from nvfp4ref.formats import BLOCK_SIZE, FP8_BLOCK

#: Attention projections that stay in BF16, the indexer's of DeepSeek-V3.2 among them.
_UNQUANTISED = (
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "indexer.wq_b",
    "indexer.wk",
    "indexer.weights_proj",
)
_LAYERS, _FIRST_DENSE = "num_hidden_layers", "first_k_dense_replace"
_EXPERTS, _GROUPS, _TOP_GROUPS = "n_routed_experts", "n_group", "topk_group"
_TOP_EXPERTS, _MTP = "num_experts_per_tok", "num_nextn_predict_layers"


class SynthFormat(StrEnum):
    """In which form the weights are stored."""

    NVFP4 = "nvfp4"
    FP8 = "fp8"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class SynthConfig:
    """The JSON files of a checkpoint, and the quantisation they declare."""

    config: dict[str, Any]
    hf_quant_config: dict[str, Any] | None
    generation_config: dict[str, Any]

    @property
    def quantization(self) -> QuantConfig:
        """What the files declare."""
        declared = from_config(self.config)
        hf = None if self.hf_quant_config is None else from_hf_quant_config(self.hf_quant_config)
        return effective(hf, declared if declared.producer is not None else None)


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read a config.json, and the hf_quant_config.json beside it.

    Raises:
        CheckError: There is no such file, or it holds no JSON object.
    """
    file = path / CONFIG if path.is_dir() else path
    beside = file.with_name(HF_QUANT_CONFIG)
    hf = _object(beside) if file.name == CONFIG and beside.is_file() else None
    return _object(file), hf


def _object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckError(f"{path}: cannot be read: {error.strerror}; give a config.json") from error
    except (ValueError, RecursionError) as error:
        raise CheckError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckError(f"{path}: holds a {type(document).__name__}, expected an object")
    return document


def make_config(
    config: Mapping[str, Any],
    hf_quant_config: Mapping[str, Any] | None,
    *,
    layers: int | None = None,
    experts: int | None = None,
    format: SynthFormat | None = None,
) -> SynthConfig:
    """Change size and format of a configuration; nothing asked leaves the files as they are.

    Raises:
        CheckError: The configuration is not usable, or the size makes no sense in it.
    """
    made = copy.deepcopy(dict(config))
    hf = None if hf_quant_config is None else copy.deepcopy(dict(hf_quant_config))
    declared = SynthConfig(made, hf, {}).quantization
    if format is None and (layers is not None or experts is not None):
        format = _format_of(declared)
    if layers is not None:
        _set_layers(made, layers)
    if experts is not None:
        _set_experts(made, experts)
    if format is not None:
        made.pop("quantization_config", None)
        hf = None
    if format is SynthFormat.FP8:
        made["quantization_config"] = _fp8_config()
    if format is SynthFormat.NVFP4:
        hf = _nvfp4_config(made)
    return SynthConfig(made, hf, _generation_config(made))


def _format_of(declared: QuantConfig) -> SynthFormat:
    if declared.is_nvfp4:
        return SynthFormat.NVFP4
    if declared.producer == "deepseek-fp8":
        return SynthFormat.FP8
    if declared.producer is None:
        return SynthFormat.BF16
    raise CheckError(
        f"cannot change the size of a configuration quantised by {declared.producer} as "
        f"{declared.algo}; give --format nvfp4, fp8 or bf16"
    )


def _set_layers(config: dict[str, Any], layers: int) -> None:
    if layers < 1:
        raise CheckError(f"cannot make {layers} layers; give --layers 1 or more")
    config[_LAYERS] = layers
    if isinstance(config.get(_FIRST_DENSE), int):
        config[_FIRST_DENSE] = min(config[_FIRST_DENSE], layers - 1)


def _set_experts(config: dict[str, Any], experts: int) -> None:
    """Set the number of experts, with no more groups or chosen experts than there are."""
    if experts < 1 or not isinstance(config.get(_EXPERTS), int):
        raise CheckError(
            f"cannot make {experts} experts; give --experts 1 or more, for a configuration with "
            f"{_EXPERTS}"
        )
    config[_EXPERTS] = experts
    if isinstance(config.get(_GROUPS), int) and config[_GROUPS] > 0:
        config[_GROUPS] = math.gcd(config[_GROUPS], experts)
        config[_TOP_GROUPS] = min(config.get(_TOP_GROUPS) or 1, config[_GROUPS])
        within = config[_TOP_GROUPS] * (experts // config[_GROUPS])
    else:
        within = experts
    config[_TOP_EXPERTS] = min(config.get(_TOP_EXPERTS) or 1, within)


def _fp8_config() -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [*FP8_BLOCK.block_shape],
    }


def _nvfp4_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Declare NVFP4 for what the published checkpoint quantises, in ModelOpt's words."""
    plain = expected_tensors(config, QuantConfig())
    if plain.problems:
        raise CheckError("no checkpoint can be made: " + "; ".join(plain.problems))
    mtp = tuple(f"model.layers.{layer}." for layer in plain.mtp_layers)
    exclude = []
    for module, (_, columns) in plain.linears.items():
        if mtp and module.startswith(mtp):
            continue
        leaf = module.rpartition(".self_attn.")[2]
        if module == "lm_head" or leaf in _UNQUANTISED:
            exclude.append(module)
        elif columns % BLOCK_SIZE:
            raise CheckError(
                f"{module}: its {columns} columns are no multiple of {BLOCK_SIZE}, so it cannot be "
                "NVFP4; change config.json"
            )
    exclude += [f"{prefix.removesuffix('.')}*" for prefix in mtp]
    return {
        "producer": {"name": "modelopt", "version": "0.39.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": BLOCK_SIZE,
            "exclude_modules": sorted(exclude),
        },
    }


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }


__all__ = ["GENERATION_CONFIG", "SynthConfig", "SynthFormat", "make_config", "read_config"]
