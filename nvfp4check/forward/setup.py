"""What a run has to know of its checkpoint and its options before the first layer."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from nvfp4check.activations import Run
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.findings import CheckError
from nvfp4check.forward.inventory import QUANTIZED_FORMATS, needed
from nvfp4check.forward.options import ForwardOptions, KvCache
from nvfp4check.layer_inputs import LayerInputs
from nvfp4ref.deepseek_v3.cache import CacheFormat
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import LinearMode

ARCHITECTURE = "DeepseekV3ForCausalLM"


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a sha256 over the configuration and the headers: names, dtypes, shapes, places."""
    digest = hashlib.sha256()
    documents = (checkpoint.config, checkpoint.hf_quant_config)
    digest.update(json.dumps(documents, sort_keys=True).encode())
    for name, entry in sorted(checkpoint.tensors.items()):
        line = (name, entry.dtype, entry.shape, entry.shard, entry.start, entry.stop)
        digest.update(repr(line).encode())
    return f"headers-sha256:{digest.hexdigest()}"


def config_of(checkpoint: Checkpoint) -> DeepseekV3Config:
    """Return the configuration of a checkpoint of this architecture.

    Raises:
        CheckError: It is of another, or its config.json asks for what is not computed.
    """
    if checkpoint.architecture != ARCHITECTURE:
        raise CheckError(
            f"{checkpoint.location}: architecture {checkpoint.architecture!r}; this forward "
            f"computes {ARCHITECTURE}"
        )
    try:
        return DeepseekV3Config.from_dict(checkpoint.config or {})
    except (ValueError, TypeError) as error:
        raise CheckError(f"{checkpoint.location}: {error}") from error


def mode_of(
    checkpoint: Checkpoint, config: DeepseekV3Config, asked: LinearMode | None
) -> LinearMode:
    """Return the mode that is computed.

    Raises:
        CheckError: Unquantized is asked for, and weights are quantised.
    """
    names = needed(config, range(config.num_hidden_layers))
    quantized = [
        name
        for name in names
        if name in checkpoint.weights and checkpoint.weights[name].format in QUANTIZED_FORMATS
    ]
    if asked is LinearMode.UNQUANTIZED and quantized:
        raise CheckError(
            f"--mode unquantized: {len(quantized):,} weights are quantised, first {quantized[0]}; "
            "take weight-only or stored"
        )
    if asked is not None:
        return asked
    return LinearMode.STORED if quantized else LinearMode.UNQUANTIZED


def cache_format_of(checkpoint: Checkpoint, asked: KvCache) -> CacheFormat:
    """Return the format that keys and values pass through.

    Raises:
        CheckError: The checkpoint declares one that is not computed.
    """
    algo = checkpoint.quantization.kv_cache_algo
    if asked is KvCache.NONE or algo is None:
        return CacheFormat.COMPUTED
    if algo == "FP8":
        return CacheFormat.FP8
    why = ""
    if algo.startswith("NVFP4"):
        # vLLM 0.32: `nvfp4` for keys and values of heads, `nvfp4_ds_mla` for V3.2's sparse form.
        why = ", which engines have for other attention than this"
    raise CheckError(
        f"{checkpoint.location}: kv_cache_quant_algo {algo!r}{why}; FP8 is computed, so give "
        "--kv-cache none"
    )


def device_of(name: str) -> torch.device:
    """Return the device, after having used it once.

    Raises:
        CheckError: There is none of this name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def forced_run(routing: Path | None, tokens: Mapping[str, torch.Tensor]) -> Run | None:
    """Open the run whose experts are forced, after checking that it has the same tokens.

    Raises:
        CheckError: It is no run, or has not.
    """
    if routing is None:
        return None
    run = Run.open(routing)
    for prompt, expected in tokens.items():
        if prompt not in run.prompts or not torch.equal(run.tokens(prompt), expected):
            raise CheckError(f"{routing}: has not the same tokens for prompt {prompt!r}")
    if not run.layers:
        raise CheckError(
            f"{routing}: recorded no layers, so no experts; make it with --activations hidden"
        )
    return run


def given_inputs(inputs: Path | None, tokens: Mapping[str, torch.Tensor]) -> LayerInputs | None:
    """Open the run whose states each layer begins with.

    Raises:
        CheckError: It is no run, or has not the same tokens.
    """
    if inputs is None:
        return None
    run = LayerInputs.open(inputs)
    for prompt, expected in tokens.items():
        run.require(prompt, expected)
    return run


def refuse_bounds(options: ForwardOptions) -> None:
    """Refuse bounds where they would not be those of the run.

    Raises:
        CheckError: So it is.
    """
    if options.bounds and options.perturbation is not None:
        raise CheckError("--bounds: a run with --perturb is no reference; leave one of them out")
    if options.bounds and options.engine is not None:
        raise CheckError("--bounds: needs the weights at hand; give --engine local")
