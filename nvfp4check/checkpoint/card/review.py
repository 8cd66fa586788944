"""A card held against a checkpoint: claims answered, scores judged, gaps listed."""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass

from nvfp4check.checkpoint.card.claims import Answer, CardFacts, Claim, claims, unsaid
from nvfp4check.checkpoint.card.evaluation import ScoreComparison, evaluations
from nvfp4check.checkpoint.card.parse import Card
from nvfp4check.checkpoint.expected import expected_tensors
from nvfp4check.checkpoint.naming import LogicalWeight, WeightFormat
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.quant_config import FP8_BLOCK, QuantConfig

#: The layout of the base models that DeepSeek publishes.
DEEPSEEK_FP8 = QuantConfig(producer="deepseek-fp8", algo=FP8_BLOCK, weight_block_size=(128, 128))

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReview:
    """What a review of a model card found."""

    source: str
    claims: tuple[Claim, ...]
    evaluation: tuple[ScoreComparison, ...]
    unsaid: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def contradicted(self) -> tuple[Claim, ...]:
        """The claims that the files contradict."""
        return tuple(claim for claim in self.claims if claim.answer is Answer.CONTRADICTED)

    def to_json(self) -> dict[str, object]:
        """Return the review as plain JSON."""
        document = asdict(self)
        for entry, score in zip(document["evaluation"], self.evaluation, strict=True):
            entry["difference"] = score.difference
        return document


def review(card: Card, checkpoint: Checkpoint, base: Checkpoint | None = None) -> CardReview:
    """Hold a card against a checkpoint, and against its base where there is one."""
    facts = card_facts(checkpoint, base)
    return CardReview(
        source=card.source,
        claims=claims(card, facts),
        evaluation=evaluations(card),
        unsaid=unsaid(card, facts),
        problems=card.problems,
    )


def card_facts(checkpoint: Checkpoint, base: Checkpoint | None = None) -> CardFacts:
    """Gather what a card may speak of from the files."""
    quantized: Counter[str] = Counter()
    other: Counter[str] = Counter()
    elsewhere = []
    mtp_quantized = mtp_other = 0
    config, quantization = checkpoint.config or {}, checkpoint.quantization
    trunk = config.get("num_hidden_layers")
    for weight in checkpoint.weights.values():
        block = _BLOCK.search(weight.name)
        if block is None:
            if weight.format is WeightFormat.NVFP4:
                elsewhere.append(weight.name)
        elif not _is_linear(weight):
            continue
        elif isinstance(trunk, int) and int(block.group(1)) >= trunk:
            mtp_quantized += weight.format is WeightFormat.NVFP4
            mtp_other += weight.format is not WeightFormat.NVFP4
        else:
            counter = quantized if weight.format is WeightFormat.NVFP4 else other
            counter[linear_kind(weight)] += 1
    base_bytes, source = _base_bytes(checkpoint, base)
    temperature = (checkpoint.generation_config or {}).get("temperature")
    return CardFacts(
        architecture=checkpoint.architecture,
        producer=quantization.producer,
        producer_version=quantization.producer_version,
        quantized_linears=quantized,
        other_linears=other,
        quantized_elsewhere=tuple(elsewhere),
        quantizes_activations=quantization.quantizes_activations,
        kv_cache_algo=quantization.kv_cache_algo,
        bytes=checkpoint.nbytes,
        base_bytes=base_bytes,
        base_bytes_source=source,
        license_line=_license_line(checkpoint),
        temperature=float(temperature)
        if isinstance(temperature, (int, float)) and math.isfinite(temperature)
        else None,
        mtp_quantized=mtp_quantized,
        mtp_other=mtp_other,
    )


def _base_bytes(checkpoint: Checkpoint, base: Checkpoint | None) -> tuple[int | None, str]:
    """Return the base's bytes: counted, or those of the same model in DeepSeek's FP8."""
    if base is not None:
        return base.nbytes, f"base {base.location}"
    fp8 = expected_tensors(checkpoint.config or {}, DEEPSEEK_FP8)
    if not fp8.tensors:
        return None, "no base given"
    return fp8.nbytes, "the same model in DeepSeek's FP8 128x128 layout"


def linear_kind(weight: LogicalWeight) -> str:
    """Name what a linear is within its block: `mlp.experts.*.down_proj`, `self_attn.o_proj`."""
    block = _BLOCK.search(weight.module)
    below = weight.module[block.end() :] if block else weight.module
    return _EXPERT.sub("experts.*.", below)


def _is_linear(weight: LogicalWeight) -> bool:
    leaf = weight.module.rpartition(".")[2]
    return len(weight.shape) == 2 and (leaf.endswith("proj") or leaf in ("w1", "w2", "w3"))


def _license_line(checkpoint: Checkpoint) -> str | None:
    for name in _LICENSE_FILES:
        size = checkpoint.files.get(name)
        if size:
            head = checkpoint.storage.read(name, 0, min(size, 400)).decode("utf-8", "replace")
            lines = [line.strip() for line in head.splitlines() if line.strip()]
            if lines:
                return lines[0]
    return None
