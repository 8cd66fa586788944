"""What a checkpoint declares about its quantisation: hf_quant_config.json and config.json.

    modelopt            hf_quant_config.json {producer, quantization}, or config.json's
                        quantization_config with quant_algo (newer exports write both)
    compressed-tensors  quantization_config {config_groups, ignore, format}
    deepseek-fp8        quantization_config {quant_method fp8, weight_block_size, scale_fmt}

Another method is named and not understood. The values are untrusted: one of the wrong type is a
problem with its place, and counts as absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from nvfp4check.checkpoint.excludes import PatternSet
from nvfp4check.checkpoint.fields import Fields

#: Algorithm names this module gives to schemes that carry none.
NVFP4 = "NVFP4"
NVFP4_WEIGHT_ONLY = "W4A16_NVFP4"
FP8 = "FP8"
FP8_BLOCK = "FP8_BLOCK"
#: ModelOpt's FP8 with one scale for each row, and scales by token made at run time.
FP8_BY_ROW = "FP8_PER_CHANNEL_PER_TOKEN"
#: ModelOpt's names of FP8_BLOCK, some written in small letters. Engines make the input's scales at
#: run time, as for DeepSeek's.
_MODELOPT_FP8_BLOCK = ("FP8_PB_WO", "FP8_PB_REAL", "FP8_BLOCK_SCALES")
MIXED = "MIXED_PRECISION"

HF_QUANT_CONFIG = "hf_quant_config.json"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class QuantGroup:
    """One scheme and the modules it is for: names, `re:` patterns, or a class such as Linear."""

    algo: str
    targets: tuple[str, ...]
    group_size: int | None
    #: True, False, or None where nothing is said.
    quantizes_activations: bool | None
    #: Whether the activations' scale is stored, not computed at run time.
    static_input_scale: bool
    #: What one scale of the activations is for: tensor, token, group …; None where nothing is said.
    activation_strategy: str | None = None
    #: The same of the weights, and the rows and columns of a block.
    weight_strategy: str | None = None
    block: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """The declared quantisation. `producer` is None where nothing is declared."""

    producer: str | None = None
    understood: bool = True
    producer_name: str | None = None
    producer_version: str | None = None
    algo: str | None = None
    group_size: int | None = None
    kv_cache_algo: str | None = None
    exclude: tuple[str, ...] = ()
    quantized_layers: Mapping[str, str] | None = None
    groups: tuple[QuantGroup, ...] = ()
    quantizes_activations: bool | None = None
    static_input_scale: bool = False
    weight_block_size: tuple[int, int] | None = None
    scale_fmt: str | None = None
    source_files: tuple[str, ...] = ()
    #: What could not be used: where in the file, and why.
    problems: tuple[str, ...] = field(default=())

    @cached_property
    def _patterns(self) -> PatternSet:
        return PatternSet(self.exclude)

    @cached_property
    def _listed(self) -> PatternSet:
        return PatternSet(self.quantized_layers or ())

    @cached_property
    def _targets(self) -> tuple[PatternSet, ...]:
        return tuple(PatternSet(group.targets) for group in self.groups)

    @cached_property
    def _algos(self) -> dict[str, str | None]:
        return {}

    @property
    def is_nvfp4(self) -> bool:
        """Whether any module is declared to be NVFP4."""
        algos = {self.algo, *(group.algo for group in self.groups)}
        algos |= set((self.quantized_layers or {}).values())
        return any(algo is not None and "NVFP4" in algo for algo in algos)

    def excludes(self, module: str) -> bool:
        """Whether a pattern leaves this linear module unquantised."""
        return self._patterns.covers(module)

    def algo_of(self, module: str) -> str | None:
        """Name the algorithm that a linear module is declared to be stored with, None for none."""
        if module not in self._algos:
            self._algos[module] = self._find_algo(module)
        return self._algos[module]

    def _find_algo(self, module: str) -> str | None:
        if self.producer is None or self.excludes(module):
            return None
        if self.quantized_layers is not None:
            return self._layer_algo(module)
        if self.producer == "compressed-tensors":
            group = self.group_of(module)
            return group.algo if group else None
        return self.algo

    def _layer_algo(self, module: str) -> str | None:
        layers = self.quantized_layers or {}
        name = module
        while name not in layers:
            name, dot, _ = name.rpartition(".")
            if not dot:
                return None
        return layers[name]

    def group_of(self, module: str) -> QuantGroup | None:
        """Find the scheme of a linear module: one that names it, else one for all linears."""
        for group, targets in zip(self.groups, self._targets, strict=True):
            if targets.covers(module):
                return group
        return next((group for group in self.groups if "Linear" in group.targets), None)

    def stores_input_scale(self, module: str) -> bool:
        """Whether a quantised linear module stores a scale for its activations."""
        if self.producer == "compressed-tensors":
            group = self.group_of(module)
            return group is not None and group.static_input_scale
        algo = self.algo_of(module)
        if algo is not None and ("A16" in algo or algo in (FP8_BLOCK, FP8_BY_ROW)):
            return False
        return self.static_input_scale


def from_hf_quant_config(document: Mapping[str, object]) -> QuantConfig:
    """Read ModelOpt's hf_quant_config.json."""
    reader = Fields(HF_QUANT_CONFIG, "", document)
    return _modelopt(reader.below("producer"), reader.below("quantization"), "exclude_modules")


def from_config(config: Mapping[str, object]) -> QuantConfig:
    """Read config.json's `quantization_config`, which may stand in its `text_config`."""
    place, where = config, ""
    if config.get("quantization_config") is None:
        text_config = config.get("text_config")
        if isinstance(text_config, dict):
            place, where = text_config, "text_config."
    top = Fields(CONFIG, where, place)
    if not top.object("quantization_config"):
        return QuantConfig(problems=tuple(top.problems))
    reader = top.below("quantization_config")
    method = reader.text("quant_method")
    producer = reader.below("producer")
    if method == "modelopt" or producer.text("name") == "modelopt":
        return _modelopt(producer, reader, "ignore")
    if method == "compressed-tensors":
        return _compressed_tensors(reader)
    if method == "fp8":
        return _deepseek_fp8(reader)
    return QuantConfig(
        producer=method or "unnamed",
        understood=False,
        source_files=(CONFIG,),
        problems=tuple(reader.problems),
    )


def effective(hf: QuantConfig | None, config: QuantConfig | None) -> QuantConfig:
    """Choose what the checkpoint was made with: hf_quant_config.json where it says anything.

    Engines read config.json first; where the two disagree a rule says so.
    """
    for candidate in (hf, config):
        if candidate is not None and candidate.producer is not None:
            return candidate
    return QuantConfig(problems=(hf.problems if hf else ()) + (config.problems if config else ()))


def _modelopt(producer: Fields, fields: Fields, exclude_key: str) -> QuantConfig:
    algo = modelopt_algo(fields.text("quant_algo"))
    exclude = fields.texts(exclude_key)
    if exclude is None and exclude_key != "exclude_modules":
        exclude = fields.texts("exclude_modules")
    groups = _modelopt_groups(fields)
    group_size = fields.size("group_size")
    sizes = {group.group_size for group in groups if group.group_size is not None}
    if group_size is None and len(sizes) == 1:
        group_size = sizes.pop()
    activations = _activations(algo)
    declared = {group.quantizes_activations for group in groups}
    if algo is not None and algo != MIXED and declared == {False}:
        activations = False
    kv_cache_algo = _kv_algo(fields)
    quantized_layers = _quantized_layers(fields)
    name, version = producer.text("name"), producer.text("version")
    return QuantConfig(
        producer="modelopt" if fields.fields else None,
        producer_name=name,
        producer_version=version,
        algo=algo,
        group_size=group_size,
        kv_cache_algo=kv_cache_algo,
        exclude=exclude or (),
        quantized_layers=quantized_layers,
        groups=groups,
        quantizes_activations=activations,
        static_input_scale=activations is not False,
        source_files=(fields.file,),
        problems=tuple(dict.fromkeys((*fields.problems, *producer.problems))),
    )


def modelopt_algo(name: str | None) -> str | None:
    """Name an algorithm that ModelOpt declares as this module does."""
    return FP8_BLOCK if name is not None and name.upper() in _MODELOPT_FP8_BLOCK else name


def _activations(algo: str | None) -> bool | None:
    if algo is None or algo == MIXED:
        return None
    return "A16" not in algo


def _kv_algo(fields: Fields) -> str | None:
    if "kv_cache_quant_algo" in fields.fields:
        return fields.text("kv_cache_quant_algo")
    scheme = fields.fields.get("kv_cache_scheme")
    if isinstance(scheme, str):
        return scheme
    if isinstance(scheme, dict) and scheme.get("type") == "float":
        return {8: "FP8", 4: "NVFP4"}.get(scheme.get("num_bits", 0))
    return None


def _quantized_layers(fields: Fields) -> dict[str, str] | None:
    layers = fields.object("quantized_layers")
    if layers is None:
        return None
    result = {}
    for name, scheme in layers.items():
        algo = scheme.get("quant_algo") if isinstance(scheme, dict) else None
        if isinstance(algo, str):
            result[name] = modelopt_algo(algo) or algo
        else:
            fields.problems.append(
                f"{fields.file}: {fields.where}quantized_layers[{name!r}] has no quant_algo"
            )
    return result


def _modelopt_groups(fields: Fields) -> tuple[QuantGroup, ...]:
    groups = []
    for name in fields.object("config_groups") or {}:
        group = fields.below("config_groups").below(name)
        weights, inputs = group.below("weights"), group.object("input_activations")
        algo = {4: NVFP4, 8: FP8}.get(weights.size("num_bits") or 0, "unknown")
        if algo == NVFP4 and inputs is None:
            algo = NVFP4_WEIGHT_ONLY
        groups.append(
            QuantGroup(
                algo=algo,
                targets=group.texts("targets") or (),
                group_size=weights.size("group_size"),
                quantizes_activations=inputs is not None,
                static_input_scale=inputs is not None,
            )
        )
    return tuple(groups)


def _compressed_tensors(fields: Fields) -> QuantConfig:
    default_format = fields.text("format")
    groups = []
    for name in fields.object("config_groups") or {}:
        group = fields.below("config_groups").below(name)
        groups.append(_compressed_tensors_group(group, default_format))
    algos = {group.algo for group in groups}
    activations = {group.quantizes_activations for group in groups}
    sizes = {group.group_size for group in groups if "NVFP4" in group.algo}
    blocks = {group.block for group in groups if group.algo == FP8_BLOCK}
    return QuantConfig(
        producer="compressed-tensors",
        producer_name="compressed-tensors",
        producer_version=fields.text("version"),
        algo=algos.pop() if len(algos) == 1 else MIXED if algos else None,
        group_size=sizes.pop() if len(sizes) == 1 else None,
        kv_cache_algo=_kv_algo(fields),
        exclude=fields.texts("ignore") or (),
        groups=tuple(groups),
        quantizes_activations=activations.pop() if len(activations) == 1 else None,
        static_input_scale=any(group.static_input_scale for group in groups),
        weight_block_size=blocks.pop() if len(blocks) == 1 else None,
        source_files=(fields.file,),
        # Arguments are evaluated in order: every field above has been read.
        problems=tuple(dict.fromkeys(fields.problems)),
    )


def _compressed_tensors_group(group: Fields, default_format: str | None) -> QuantGroup:
    weights, inputs = group.below("weights"), group.object("input_activations")
    form = group.text("format") or default_format
    dynamic, strategy = ((inputs or {}).get(key) for key in ("dynamic", "strategy"))
    weight_strategy = weights.text("strategy")
    algo = form or "unknown"
    if form == "nvfp4-pack-quantized":
        algo = NVFP4 if inputs is not None else NVFP4_WEIGHT_ONLY
    elif (
        form in ("float-quantized", "naive-quantized", "mixed-precision")
        and weights.text("type") == "float"
        and weights.size("num_bits") == 8
    ):
        algo = FP8_BLOCK if weight_strategy == "block" else FP8
    return QuantGroup(
        algo=algo,
        targets=group.texts("targets") or (),
        group_size=weights.size("group_size"),
        quantizes_activations=inputs is not None,
        # "local": block scales at run time under a stored global scale.
        static_input_scale=inputs is not None and dynamic is not True,
        activation_strategy=strategy if isinstance(strategy, str) else None,
        weight_strategy=weight_strategy,
        block=weights.block("block_structure"),
    )


def _deepseek_fp8(fields: Fields) -> QuantConfig:
    size = fields.block("weight_block_size")
    return QuantConfig(
        producer="deepseek-fp8",
        producer_name="deepseek",
        algo=FP8_BLOCK if size else FP8,
        exclude=fields.texts("modules_to_not_convert") or (),
        quantizes_activations=True,
        static_input_scale=fields.text("activation_scheme") == "static",
        weight_block_size=size,
        scale_fmt=fields.text("scale_fmt"),
        source_files=(fields.file,),
        # Arguments are evaluated in order: every field above has been read.
        problems=tuple(fields.problems),
    )
