"""NV606 to NV608: what else an engine needs beside the weights."""

from collections.abc import Iterator

from nvfp4check.checkpoint.documents import read_json
from nvfp4check.checkpoint.opening import GENERATION_CONFIG, Checkpoint
from nvfp4check.checkpoint.quant_config import CONFIG
from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, printable, rule
from nvfp4check.findings import Severity

_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
#: Files that hold a vocabulary, any one of which will do.
_VOCABULARIES = (
    _TOKENIZER,
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
#: Architectures that the model card's advice on sampling is about, and the advice.
_ADVISED_ARCHITECTURES = frozenset(("DeepseekV3ForCausalLM",))
_LEAST_TEMPERATURE, _LARGEST_TEMPERATURE = 0.5, 0.7
#: What transformers and vLLM take when sampling is on and no temperature is given.
_DEFAULT_TEMPERATURE = 1.0


@rule(
    "NV606",
    "architecture-unknown",
    Severity.WARNING,
    fires_when="there is no map of expected tensors for the architecture, or config.json names "
    "none",
    why="Without the map nobody can say which tensors are missing, superfluous or of the wrong "
    "shape: NV101, NV102, NV103 and NV109 are skipped and the run is incomplete. All rules that "
    "need no map have run.",
    repair="Correct `architectures` in config.json if it is wrong. Otherwise accept the gap with "
    "--allow-skips, or --ignore the skipped rules.",
)
def architecture_unknown(context: RuleContext) -> Iterator[Problem]:
    """Report that the structure could not be held against an architecture."""
    if context.expected is None:
        yield Problem(
            f"{context.why_nothing_is_expected}: structure rules were skipped",
            shard=CONFIG,
            observed=context.checkpoint.architecture,
        )


@rule(
    "NV607",
    "tokenizer-mismatch",
    Severity.WARNING,
    fires_when="tokenizer files are missing, or the vocabulary has an id beyond the embedding's "
    "last row",
    why="Without its tokenizer a checkpoint serves no text; with another model's, an id beyond "
    "the embedding reads outside it.",
    repair="Copy the tokenizer files of the base model. If ids are too large, the tokenizer is "
    "another model's, or the embedding was not resized with it.",
)
def tokenizer_mismatch(context: RuleContext) -> Iterator[Problem]:
    """Look for tokenizer files and compare the largest id with the embedding."""
    checkpoint = context.checkpoint
    if not any(name in checkpoint.files for name in _VOCABULARIES):
        yield Problem(f"no tokenizer: none of {', '.join(_VOCABULARIES)}", expected=_TOKENIZER)
        return
    if _TOKENIZER_CONFIG not in checkpoint.files:
        yield Problem(f"no {_TOKENIZER_CONFIG} beside the vocabulary", expected=_TOKENIZER_CONFIG)
    if _TOKENIZER not in checkpoint.files:
        return
    document, flaws = read_json(checkpoint.storage, _TOKENIZER)
    if document is None:
        yield Problem(f"{_TOKENIZER}: {printable(flaws[0])}", shard=_TOKENIZER)
        return
    largest = _largest_id(document)
    place, rows = _embedding_rows(checkpoint)
    if largest is not None and rows is not None and largest >= rows:
        yield Problem(
            f"{_TOKENIZER} has id {largest:,}, but {printable(place)} has {rows:,} rows",
            tensor=place if place in checkpoint.weights else None,
            shard=_TOKENIZER,
            observed=largest,
            expected=f"at most {rows - 1}",
        )


def _largest_id(document: dict[str, object]) -> int | None:
    """Find the largest token id of a tokenizer.json, None where none is found."""
    ids: list[int] = []
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids += [value for value in vocabulary.values() if type(value) is int]
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        ids.append(len(vocabulary) - 1)
    added = document.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        identifier = token.get("id") if isinstance(token, dict) else None
        if type(identifier) is int:
            ids.append(identifier)
    return max(ids, default=None)


def _embedding_rows(checkpoint: Checkpoint) -> tuple[str, int | None]:
    """Find the rows of the trunk's embedding, else config.json's vocab_size."""
    names = [name for name in checkpoint.weights if name.endswith("embed_tokens.weight")]
    for name in sorted(names, key=len):  # the trunk's name is shorter than an MTP layer's
        shape = checkpoint.weights[name].shape
        if len(shape) == 2:
            return name, shape[0]
    size = (checkpoint.config or {}).get("vocab_size")
    return f"vocab_size of {CONFIG}", size if type(size) is int else None


@rule(
    "NV608",
    "generation-config",
    Severity.WARNING,
    fires_when="generation_config.json samples at a temperature outside 0.5 to 0.7, which "
    "DeepSeek advises for its V3.1 series",
    why="Engines take their defaults from this file. Outside that range DeepSeek warns of endless "
    "repetition and incoherent output, and evaluations do not reproduce. Only checkpoints of "
    "DeepseekV3ForCausalLM are looked at, for the advice is about them.",
    repair='Set "temperature": 0.6 in generation_config.json, or say in the model card why '
    "another value is meant.",
)
def generation_config(context: RuleContext) -> Iterator[Problem]:
    """Compare the default temperature with the advice."""
    checkpoint = context.checkpoint
    document = checkpoint.generation_config
    if document is None or checkpoint.architecture not in _ADVISED_ARCHITECTURES:
        return
    given = document.get("temperature")
    if given is None and document.get("do_sample") is not True:
        return
    temperature = _DEFAULT_TEMPERATURE if given is None else given
    advised = f"{_LEAST_TEMPERATURE} to {_LARGEST_TEMPERATURE}"
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        yield Problem(
            f"temperature is {printable(repr(temperature), 60)}, expected a number from {advised}",
            shard=GENERATION_CONFIG,
            expected=advised,
        )
    elif not _LEAST_TEMPERATURE <= temperature <= _LARGEST_TEMPERATURE:
        said = "is not given, which means" if given is None else "is"
        yield Problem(
            f"temperature {said} {printable(repr(temperature), 40)}, the advice is {advised}",
            shard=GENERATION_CONFIG,
            observed=temperature if abs(temperature) <= 1e300 else str(temperature),
            expected=advised,
        )


RULES: tuple[Rule, ...] = (architecture_unknown, tokenizer_mismatch, generation_config)
