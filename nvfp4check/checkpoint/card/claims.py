"""The statements of a model card that files can answer, one function a statement.

Each finds its words in the card and holds them against the facts of the checkpoint (and of the
base, where one is given). A statement is confirmed, contradicted, true but easily misread
(qualified), or not answerable by the files at hand.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from nvfp4check.checkpoint.card.parse import Card


class Answer(StrEnum):
    """What the files say to a statement."""

    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"
    #: True to the letter, and easily taken for more.
    QUALIFIED = "qualified"
    UNANSWERED = "unanswered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement of a card and the files' answer to it."""

    topic: str
    statement: str
    answer: Answer
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the files say, as far as a card may speak of it."""

    architecture: str | None
    producer: str | None
    producer_version: str | None
    #: Linear weights in the trunk's blocks by kind (such as `self_attn.q_a_proj`): how many of
    #: each are in NVFP4, and how many are not.
    quantized_linears: Mapping[str, int]
    other_linears: Mapping[str, int]
    #: Weights in NVFP4 that are in no transformer block.
    quantized_elsewhere: tuple[str, ...]
    quantizes_activations: bool | None
    kv_cache_algo: str | None
    bytes: int
    #: Bytes of the base checkpoint, and where that number comes from.
    base_bytes: int | None
    base_bytes_source: str
    #: First line of a licence file, where there is one.
    license_line: str | None
    temperature: float | None
    #: Linear weights of the multi-token prediction layers in NVFP4, and the others.
    mtp_quantized: int
    mtp_other: int


_OPERATORS = re.compile(
    r"(only the )?weights( and activations)? of the linear operators within transformers? blocks",
    re.IGNORECASE,
)
_PRODUCERS = {
    "modelopt": r"model[\s-]*opt(imizer)?\b",
    "compressed-tensors": r"compressed[\s-]tensors|llm[\s-]?compressor",
}

Check = Callable[[Card, CardFacts], Iterator[Claim]]


def claims(card: Card, facts: CardFacts) -> tuple[Claim, ...]:
    """Return every statement that was found, with its answer."""
    return tuple(claim for check in _CHECKS for claim in check(card, facts))


def _architecture(card: Card, facts: CardFacts) -> Iterator[Claim]:
    for match in re.finditer(r"Network Architecture\W{1,8}([A-Za-z]\w+)", card.prose):
        stated = match.group(1)
        if facts.architecture is None:
            answer, evidence = Answer.UNANSWERED, "config.json names no architecture"
        else:
            same = stated == facts.architecture
            answer = Answer.CONFIRMED if same else Answer.CONTRADICTED
            evidence = f"config.json: {facts.architecture}"
        yield Claim(
            topic="architecture",
            statement=card.sentence(*match.span()),
            answer=answer,
            evidence=evidence,
        )


def _producer(card: Card, facts: CardFacts) -> Iterator[Claim]:
    if facts.producer is None:
        return
    for name, pattern in _PRODUCERS.items():
        for match in re.finditer(
            rf"quantized with [^.\n]{{0,40}}?(?:{pattern})", card.prose, re.IGNORECASE
        ):
            yield Claim(
                topic="producer",
                statement=card.sentence(*match.span()),
                answer=Answer.CONFIRMED if name == facts.producer else Answer.CONTRADICTED,
                evidence=f"the quantisation config says {facts.producer}",
            )


def _version(card: Card, facts: CardFacts) -> Iterator[Claim]:
    names = "|".join(_PRODUCERS.values())
    for match in re.finditer(rf"(?:{names})[\s*]*v?(\d+\.\d+[\w.+]*)", card.prose, re.I):
        stated = match.group(match.lastindex or 0).rstrip(".")
        if facts.producer_version is None:
            answer, evidence = Answer.UNANSWERED, "the quantisation config gives no version"
        else:
            same = stated == facts.producer_version
            answer = Answer.CONFIRMED if same else Answer.CONTRADICTED
            evidence = f"the quantisation config says {facts.producer_version}, the card {stated}"
        yield Claim(
            topic="producer version",
            statement=card.sentence(*match.span()),
            answer=answer,
            evidence=evidence,
        )


def _operators(card: Card, facts: CardFacts) -> Iterator[Claim]:
    for match in _OPERATORS.finditer(card.prose):
        others = dict(sorted(facts.other_linears.items()))
        if facts.mtp_other:
            others["of the multi-token prediction layer"] = facts.mtp_other
        left = ", ".join(f"{count} {kind}" for kind, count in others.items())
        if facts.quantized_elsewhere:
            answer = Answer.CONTRADICTED
            evidence = f"quantised outside the blocks: {', '.join(facts.quantized_elsewhere[:4])}"
        elif match.group(2) and facts.quantizes_activations is False:
            answer, evidence = Answer.CONTRADICTED, "activations are not quantised"
        elif others:
            not_quantized = sum(others.values())
            total = not_quantized + sum(facts.quantized_linears.values()) + facts.mtp_quantized
            answer = Answer.QUALIFIED
            evidence = (
                f"{not_quantized} of {total} linear weights within the blocks "
                f"are not quantised: {left}"
            )
        else:
            answer = Answer.CONFIRMED
            evidence = f"all {sum(facts.quantized_linears.values())} linear weights are NVFP4"
        yield Claim(
            topic="operators",
            statement=card.sentence(*match.span()),
            answer=answer,
            evidence=evidence,
        )


def _size_ratio(card: Card, facts: CardFacts) -> Iterator[Claim]:
    for match in re.finditer(
        r"(?:approximately|about|by|~)\s*(\d+(?:\.\d+)?)\s*[x\u00d7]", card.prose
    ):
        stated = float(match.group(1))
        digit = 10.0 ** -len(match.group(1).partition(".")[2])
        if facts.base_bytes is None or not facts.bytes:
            answer = Answer.UNANSWERED
            evidence = f"{facts.bytes:,} bytes; the base's size is not known: give --base"
        else:
            ratio = facts.base_bytes / facts.bytes
            # neither rounding nor cutting to the card's digits moves a number by a whole digit
            answer = Answer.CONFIRMED if abs(ratio - stated) < digit else Answer.CONTRADICTED
            evidence = (
                f"{facts.base_bytes:,} / {facts.bytes:,} bytes = {ratio:.3f} "
                f"({facts.base_bytes_source})"
            )
        yield Claim(
            topic="size ratio",
            statement=card.sentence(*match.span()),
            answer=answer,
            evidence=evidence,
        )


def _license(card: Card, facts: CardFacts) -> Iterator[Claim]:
    declared = card.strings("license")
    if not declared:
        return
    named = re.search(r"License[^\n]{0,30}?:\s*\[?([A-Za-z][\w.-]*)", card.prose)
    words = [("the card's text", named.group(1))] if named else []
    if facts.license_line:
        words.append(("the licence file", facts.license_line))
    key = declared[0].lower()
    against = [f"{where}: {text}" for where, text in words if key not in text.lower()]
    yield Claim(
        topic="licence",
        statement=f"license: {declared[0]}",
        answer=Answer.CONTRADICTED
        if against
        else (Answer.CONFIRMED if words else Answer.UNANSWERED),
        evidence="; ".join(against or [f"{where}: {text}" for where, text in words])
        or "no licence file and no licence in the text",
    )


def _base_model(card: Card, facts: CardFacts) -> Iterator[Claim]:
    for declared in card.strings("base_model"):
        short = declared.rpartition("/")[2]
        mentioned = short.lower().replace(" ", "-") in card.prose.lower().replace(" ", "-")
        yield Claim(
            topic="base model",
            statement=f"base_model: {declared}",
            answer=Answer.UNANSWERED if mentioned else Answer.CONTRADICTED,
            evidence="the text names it too; only an audit against it (--base) can confirm it"
            if mentioned
            else "the text of the card never names it",
        )


def _tags(card: Card, facts: CardFacts) -> Iterator[Claim]:
    tags = [tag.lower() for tag in card.strings("tags")]
    others = {"gptq", "awq", "int4", "int8", "gguf", "mxfp4", "exl2", "exl3"}
    if not tags:
        return
    wrong = sorted(others.intersection(tags)) if facts.quantized_linears else []
    named = [tag for tag in tags if tag in ("nvfp4", "fp4")]
    if wrong:
        answer, evidence = Answer.CONTRADICTED, f"the weights are NVFP4, not {', '.join(wrong)}"
    elif named and not facts.quantized_linears:
        answer, evidence = Answer.CONTRADICTED, "no weight is NVFP4"
    else:
        answer = Answer.CONFIRMED if named else Answer.UNANSWERED
        evidence = f"{sum(facts.quantized_linears.values())} weights are NVFP4"
    yield Claim(
        topic="tags", statement=f"tags: {', '.join(tags)}", answer=answer, evidence=evidence
    )


def _sampling(card: Card, facts: CardFacts) -> Iterator[Claim]:
    pattern = r"temperature within the range of (\d?\.\d+)\s*[-\u2013]\s*(\d?\.\d+)"
    for match in re.finditer(pattern, card.prose, re.I):
        low, high = float(match.group(1)), float(match.group(2))
        if facts.temperature is None:
            answer, evidence = Answer.UNANSWERED, "generation_config.json sets no temperature"
        else:
            inside = low <= facts.temperature <= high
            answer = Answer.CONFIRMED if inside else Answer.CONTRADICTED
            evidence = f"generation_config.json: temperature {facts.temperature}"
        yield Claim(
            topic="sampling",
            statement=card.sentence(*match.span()),
            answer=answer,
            evidence=evidence,
        )


def _names(card: Card, facts: CardFacts) -> Iterator[Claim]:
    """Compare the repository that the usage loads with the one the release names."""
    released = re.findall(r"https://huggingface\.co/([\w.-]+/[\w.-]*NVFP4[\w.-]*)", card.prose)
    for match in re.finditer(r"model\s*=\s*[\"']([\w.-]+/[\w.-]+)[\"']", card.prose):
        name = match.group(1)
        owners = Counter(entry.partition("/")[0] for entry in released)
        if released and name not in released and name.partition("/")[0] in owners:
            yield Claim(
                topic="repository",
                statement=card.sentence(*match.span()),
                answer=Answer.CONTRADICTED,
                evidence=f"the card gives the release as {released[0]}",
            )


_CHECKS: tuple[Check, ...] = (
    _architecture,
    _producer,
    _version,
    _operators,
    _size_ratio,
    _license,
    _base_model,
    _tags,
    _sampling,
    _names,
)


def unsaid(card: Card, facts: CardFacts) -> tuple[str, ...]:
    """List what a reader needs to know to serve the model and the card does not say."""
    text = card.prose.lower()
    found = []
    attention_said = re.search(r"\battention\b", text) is not None
    kv_said = re.search(r"kv[\s-]*cache", text)
    if facts.kv_cache_algo and not kv_said:
        found.append(f"the KV cache is meant to be stored in {facts.kv_cache_algo}")
    for kind, count in sorted(facts.other_linears.items()):
        leaf = kind.rpartition(".")[2]
        if leaf.lower() not in text and not (leaf in _ATTENTION and attention_said):
            found.append(f"{count} {kind} are not quantised")
    if facts.mtp_quantized + facts.mtp_other and not re.search(r"\bmtp\b|multi-token|nextn", text):
        form = "unquantised" if not facts.mtp_quantized else "in NVFP4"
        found.append(f"a multi-token prediction layer is included, its linears {form}")
    if facts.quantizes_activations is False and "weight-only" not in text and "w4a16" not in text:
        found.append("only weights are quantised, activations are not")
    if "calibrat" not in text:
        found.append("what the input scales were calibrated on")
    return tuple(found)


_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
