"""NV601 to NV605: what the configuration says about the quantisation.

hf_quant_config.json and config.json are read apart here, for engines differ in which one they
believe: vLLM takes config.json's `quantization_config` when there is one, TensorRT-LLM looks into
hf_quant_config.json.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from nvfp4check.checkpoint.excludes import ModuleTable, PatternSet, Reading
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.quant_config import CONFIG, HF_QUANT_CONFIG, QuantConfig, modelopt_algo
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, counted, printable, rule
from nvfp4check.checkpoint.rules.shared import nvfp4_weights, quantization_document
from nvfp4check.findings import JsonValue, Severity
from nvfp4ref.formats import BLOCK_SIZE

#: Names shown of a longer list.
_SHOWN = 3


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


def _mentions_nvfp4(declared: QuantConfig, document: Mapping[str, object]) -> bool:
    """Whether a declaration is about NVFP4 at all, in one key or another.

    DeepSeek-V4's NVFP4 checkpoints keep quant_method fp8 and say moe_quant_algo NVFP4 beside it.
    """
    return declared.is_nvfp4 or any(
        isinstance(value, str) and "NVFP4" in value.upper() for value in document.values()
    )


@rule(
    "NV601",
    "quant-config-missing",
    Severity.ERROR,
    fires_when="there are NVFP4 tensors, and neither hf_quant_config.json nor a "
    "quantization_config in config.json",
    why="Without either, an engine builds the model unquantised and then meets packed codes where "
    "it expects BF16 weights.",
    repair="Put back the hf_quant_config.json that the exporter wrote beside the shards, with "
    "quant_algo, group_size and exclude_modules.",
    incidents=("https://github.com/NVIDIA-NeMo/RL/pull/3615",),
)
def quant_config_missing(context: RuleContext) -> Iterator[Problem]:
    """Report NVFP4 weights that no configuration speaks of."""
    checkpoint = context.checkpoint
    if checkpoint.hf_quantization is not None or checkpoint.config_quantization is not None:
        return
    documents = {CONFIG: checkpoint.config, HF_QUANT_CONFIG: checkpoint.hf_quant_config}
    if any(name in checkpoint.files and documents[name] is None for name in documents):
        return  # it is there and cannot be read: NV010
    weights = nvfp4_weights(checkpoint)
    if weights:
        yield Problem(
            f"{counted(len(weights), 'weight')} of NVFP4 are stored, but there is no "
            f"{HF_QUANT_CONFIG} and no quantization_config in {CONFIG}",
            shard=CONFIG,
            count=len(weights),
            expected=HF_QUANT_CONFIG,
        )


@rule(
    "NV602",
    "quant-config-stale",
    Severity.ERROR,
    fires_when="config.json still carries the quantization_config of another method (FP8 of the "
    "source model), which engines read first",
    why="nvidia/DeepSeek-V3-0324-FP4 loaded as FP8 for this reason: ModelOpt's DeepSeek script "
    "copied config.json from the FP8 source and left its quantization_config in, until January "
    "2026.",
    repair="Delete quantization_config from config.json; hf_quant_config.json then counts. Or "
    "replace it by the one that describes the NVFP4 weights.",
    incidents=(
        "https://github.com/sgl-project/sglang/issues/7593",
        "https://github.com/NVIDIA/Model-Optimizer/pull/753",
    ),
)
def quant_config_stale(context: RuleContext) -> Iterator[Problem]:
    """Report a quantization_config that speaks of another method than the tensors bear."""
    checkpoint = context.checkpoint
    hf, config = checkpoint.hf_quantization, checkpoint.config_quantization
    document = quantization_document(checkpoint)
    if config is None or document is None or _mentions_nvfp4(config, document):
        return
    weights = nvfp4_weights(checkpoint)
    if not weights and (hf is None or not hf.is_nvfp4):
        return
    held = (
        f"{counted(len(weights), 'weight')} of NVFP4 are stored"
        if weights
        else f"{HF_QUANT_CONFIG} declares NVFP4"
    )
    method = document.get("quant_method")
    method = method if isinstance(method, str) else None
    yield Problem(
        f"{CONFIG} carries quantization_config with quant_method {printable(method or 'unnamed')}, "
        f"but {held}; vLLM reads it before {HF_QUANT_CONFIG}",
        shard=CONFIG,
        count=len(weights) or None,
        observed=method,
        expected="modelopt, or no quantization_config",
    )


@rule(
    "NV603",
    "quant-config-contradicts",
    Severity.ERROR,
    fires_when="hf_quant_config.json and config.json's quantization_config differ in algorithm, "
    "group size, KV cache, quantised layers, or in the modules that their exclude lists cover",
    why="Engines differ in the file they believe, so the same checkpoint is served in two ways. "
    "Versions of the producer and other spellings of one meaning are not compared.",
    repair="Write both files from one export. If only one is right, delete the other.",
    incidents=(
        "https://github.com/NVIDIA/TensorRT-LLM/pull/3167",
        "https://github.com/sgl-project/sglang/issues/7593",
    ),
)
def quant_config_contradicts(context: RuleContext) -> Iterator[Problem]:
    """Compare the two declarations field by field."""
    checkpoint = context.checkpoint
    hf, config = checkpoint.hf_quantization, checkpoint.config_quantization
    document = quantization_document(checkpoint)
    if hf is None or config is None or document is None or not _mentions_nvfp4(config, document):
        return
    algo = document.get("quant_algo")
    fields: list[tuple[str, JsonValue, JsonValue]] = [
        ("quant_algo", modelopt_algo(algo) if isinstance(algo, str) else config.algo, hf.algo),
        ("kv_cache_quant_algo", config.kv_cache_algo, hf.kv_cache_algo),
    ]
    if config.group_size is not None and hf.group_size is not None:
        fields.append(("group_size", config.group_size, hf.group_size))
    for field, found, other in fields:
        if found != other:
            yield Problem(
                f"{field}: {CONFIG} says {found!r}, {HF_QUANT_CONFIG} says {other!r}",
                shard=CONFIG,
                observed=found,
                expected=other,
            )
    yield from _contradicting_layers(config, hf)
    yield from _contradicting_excludes(checkpoint, document, hf)


def _contradicting_layers(config: QuantConfig, hf: QuantConfig) -> Iterator[Problem]:
    if config.quantized_layers is None or hf.quantized_layers is None:
        return
    names = {*config.quantized_layers, *hf.quantized_layers}
    differing = sorted(
        name for name in names if config.quantized_layers.get(name) != hf.quantized_layers.get(name)
    )
    if differing:
        yield Problem(
            f"quantized_layers differ for {counted(len(differing), 'module')}: {_some(differing)}",
            shard=CONFIG,
            count=len(differing),
            observed=config.quantized_layers.get(differing[0]),
            expected=hf.quantized_layers.get(differing[0]),
        )


def _contradicting_excludes(
    checkpoint: Checkpoint, document: Mapping[str, object], hf: QuantConfig
) -> Iterator[Problem]:
    keys = ("ignore", "exclude_modules", "modules_to_not_convert")
    lists = [value for key in keys if isinstance(value := document.get(key), list)]
    patterns = [pattern for pattern in (lists[0] if lists else []) if isinstance(pattern, str)]
    if set(patterns) == set(hf.exclude):
        return
    ours, theirs = PatternSet(patterns), PatternSet(hf.exclude)
    modules = sorted({weight.module for weight in checkpoint.weights.values()})
    differing = [name for name in modules if ours.covers(name) != theirs.covers(name)]
    if differing:
        covered = ours.covers(differing[0])
        yield Problem(
            f"the exclude lists differ for {counted(len(differing), 'module')}: "
            f"{_some(differing)}; the first is excluded by "
            f"{CONFIG if covered else HF_QUANT_CONFIG} only",
            tensor=f"{differing[0]}.weight",
            shard=CONFIG,
            count=len(differing),
            observed="excluded" if covered else "quantised",
            expected="quantised" if covered else "excluded",
        )


@rule(
    "NV604",
    "group-size",
    Severity.ERROR,
    fires_when="the declared group size of NVFP4 is not 16, or is missing",
    why="NVFP4 has one scale for 16 elements, and no other size. An engine that believes 32 takes "
    "every second scale for its neighbour's. ModelOpt 0.47 leaves group_size out of exports with "
    "AWQ, whose blocks are of 16 like all; readers then refuse the file (vLLM, of "
    "hf_quant_config.json) or choose a number: mostly 16, ModelOpt's own converter 128 for a layer "
    "of NVFP4_AWQ among others.",
    repair='Set "group_size": 16 beside quant_algo, or where it is declared. If the scales really '
    "have another block size (NV108, NV207), the weights must be quantised again.",
)
def group_size(context: RuleContext) -> Iterator[Problem]:
    """Check every place that declares a group size for NVFP4."""
    for file, declared, document in _nvfp4_documents(context.checkpoint):
        sizes = Counter(_declared_sizes(declared, document))
        for (where, size), count in sizes.items():
            if type(size) is int and size == BLOCK_SIZE:
                continue
            found = "is missing" if size is None else f"is {printable(repr(size), 60)}"
            places = f" ({count:,} times)" if count > 1 else ""
            refused = size is None and file == HF_QUANT_CONFIG
            advice = "; vLLM refuses the file without it" if refused else ""
            yield Problem(
                f"{file}: {where} {found}{places}, expected {BLOCK_SIZE}{advice}",
                shard=file,
                count=count,
                observed=size if isinstance(size, (int, float, str)) else None,
                expected=BLOCK_SIZE,
            )


def _nvfp4_documents(
    checkpoint: Checkpoint,
) -> Iterator[tuple[str, QuantConfig, Mapping[str, object]]]:
    hf, config = checkpoint.hf_quantization, checkpoint.config_quantization
    if hf is not None and hf.is_nvfp4 and checkpoint.hf_quant_config is not None:
        inner = checkpoint.hf_quant_config.get("quantization")
        if isinstance(inner, dict):
            yield HF_QUANT_CONFIG, hf, inner
    document = quantization_document(checkpoint)
    if config is not None and config.is_nvfp4 and document is not None:
        yield CONFIG, config, document


def _declared_sizes(
    declared: QuantConfig, document: Mapping[str, object]
) -> Iterator[tuple[str, object]]:
    """Name each place that declares, or should declare, a group size for NVFP4."""
    found = False
    if "group_size" in document:
        found = True
        yield "group_size", _hashable(document["group_size"])
    layers = document.get("quantized_layers")
    if isinstance(layers, dict):
        for scheme in layers.values():
            algo = scheme.get("quant_algo") if isinstance(scheme, dict) else None
            if isinstance(algo, str) and "NVFP4" in algo:
                found = True
                size = scheme.get("group_size", document.get("group_size"))
                yield "group_size of quantized_layers", _hashable(size)
    for group in declared.groups:
        if "NVFP4" in group.algo:
            found = True
            yield "group_size of config_groups", group.group_size
    if not found:
        yield "group_size", None


def _hashable(value: object) -> object:
    return value if isinstance(value, (int, float, str, type(None))) else repr(value)


@rule(
    "NV605",
    "exclude-matches-nothing",
    Severity.WARNING,
    fires_when="an exclude pattern covers no module, or engines read it differently: vLLM also as "
    "a substring of the name, SGLang as a regular expression on single components, both on the "
    "names of the modules they build, fused linears and the experts of a layer as one",
    why="A pattern that covers nothing is mostly a misspelt one, and what it was to protect is "
    "then built quantised. `model.layers.1` without a wildcard is one layer to one engine and "
    "layers 1, 10 to 19 to another. One expert's name stands for all of its layer in vLLM and for "
    "none in SGLang, where q_b_proj of one layer stands for that of all.",
    repair="Write full module names, or a prefix that ends in `.*` or `*` at a dot; delete "
    "patterns for modules that the model does not have.",
    incidents=(
        "https://github.com/sgl-project/sglang/pull/39317",
        "https://github.com/sgl-project/sglang/pull/9712",
        "https://github.com/vllm-project/vllm-omni/pull/4528",
    ),
)
def exclude_matches_nothing(context: RuleContext) -> Iterator[Problem]:
    """Expand every pattern over all module names, in each engine's reading."""
    declared = context.checkpoint.quantization
    if not declared.exclude:
        return
    patterns = tuple(dict.fromkeys(declared.exclude))
    file = declared.source_files[0] if declared.source_files else CONFIG
    everything = ModuleTable((*_known_modules(context), "lm_head"))
    for pattern in patterns:
        if not everything.matched(pattern):
            yield Problem(
                f"{file}: exclude pattern {printable(pattern)!r} covers no module",
                shard=file,
                observed=pattern,
            )
    if declared.producer == "modelopt":
        yield from _read_differently(context.checkpoint, patterns, file)


def _known_modules(context: RuleContext) -> Iterator[str]:
    """Name all modules: those stored, those indexed though lost, those expected though absent."""
    checkpoint = context.checkpoint
    for weight in checkpoint.weights.values():
        yield weight.module
    names = [] if checkpoint.index is None else list(checkpoint.index.weight_map)
    wanted = () if context.expected is None else context.expected.tensors
    for name in (*names, *wanted):
        yield name.rpartition(".")[0]


def _read_differently(
    checkpoint: Checkpoint, patterns: tuple[str, ...], file: str
) -> Iterator[Problem]:
    """Find the patterns whose reading decides whether a linear is excluded."""
    linears = ModuleTable(
        weight.module for weight in checkpoint.weights.values() if len(weight.shape) >= 2
    )
    ours = {pattern: linears.matched(pattern) for pattern in patterns}
    covered = frozenset().union(*ours.values())
    for reading in (Reading.VLLM, Reading.SGLANG, Reading.TENSORRT_LLM):
        theirs = {pattern: linears.matched(pattern, reading) for pattern in patterns}
        covered_there = frozenset().union(*theirs.values())
        for pattern in patterns:
            more = sorted(theirs[pattern] - covered)
            fewer = sorted(ours[pattern] - covered_there)
            for modules, verb in ((more, "also excludes"), (fewer, "does not exclude")):
                if modules:
                    yield Problem(
                        f"{file}: by pattern {printable(pattern)!r} {reading.value} {verb} "
                        f"{counted(len(modules), 'module')}: {_some(modules)}",
                        shard=file,
                        count=len(modules),
                        observed=pattern,
                    )


RULES: tuple[Rule, ...] = (
    quant_config_missing,
    quant_config_stale,
    quant_config_contradicts,
    group_size,
    exclude_matches_nothing,
)
