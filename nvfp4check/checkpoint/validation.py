"""validate: all rules over one checkpoint, what they covered, and the verdict.

What a run was asked to check follows from its options. At level headers nobody asked for bytes, so
the rules that read them are no gap, unless they were selected by name; a sampled run was asked for
a sample, and says how likely it missed a defect. Everything else that a chosen rule could not look
at is in `coverage.skipped`, and makes the run incomplete: no map for the architecture, a shard that
could not be read, a weight whose bytes no rule can interpret, or that has no counterpart in the
base it is to be held against.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvfp4check.checkpoint.byte_pass import Sample, draw, read_bytes, scannable_weights
from nvfp4check.checkpoint.card.parse import MAX_CHARACTERS, parse_card
from nvfp4check.checkpoint.card.review import CardReview, review
from nvfp4check.checkpoint.expected import Expected, expected_tensors
from nvfp4check.checkpoint.journal import Journal, default_path, fingerprint
from nvfp4check.checkpoint.opening import Checkpoint
from nvfp4check.checkpoint.quant_config import CONFIG, QuantConfig
from nvfp4check.checkpoint.rules import select_rules
from nvfp4check.checkpoint.rules.base import (
    Rule,
    RuleContext,
    RuleLevel,
    counted,
    printable,
)
from nvfp4check.checkpoint.rules.blocks import tp_misaligned
from nvfp4check.checkpoint.storage import StorageError
from nvfp4check.checkpoint.summary import summary_of
from nvfp4check.checkpoint.validation_result import ValidationResult, verdict_of
from nvfp4check.checkpoint.validation_result import exit_code as exit_code
from nvfp4check.engine import Engine
from nvfp4check.engine.local import LocalEngine
from nvfp4check.findings import CheckError, Coverage, Finding, Severity

#: The model card of a checkpoint.
CARD = "README.md"

_AUDIT = "NV70"
_CARD_RULE = "NV620"

#: Hears of progress: the stage ("bytes", "audit" or "rules"), how much is done, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    """What a run is asked to check, and how it works.

    `base` is the checkpoint that this one should have been made from, `card` a model card other
    than the checkpoint's README.md. `journal` is where finished work is written; the default lies
    in the user's cache. With `resume` the run goes on where an interrupted one stopped.
    """

    level: RuleLevel = RuleLevel.BYTES
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    fail_on: Severity = Severity.ERROR
    tp: int | None = None
    base: Checkpoint | None = None
    card: Path | None = None
    sample: float = 1.0
    seed: int = 0
    jobs: int = 1
    engine: Engine | None = None
    device: str = "cpu"
    journal: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sample <= 1:
            raise CheckError(f"sample {self.sample} is no fraction; give 0 < fraction <= 1")
        if self.tp is not None and self.tp < 1:
            raise CheckError(f"cannot check {self.tp}-way tensor parallelism; give --tp 1 or more")
        if self.device != "cpu":
            raise CheckError(
                f"validate reads bytes on the CPU and has no way to do it on {self.device!r}; "
                "leave --device out"
            )


def validate(
    checkpoint: Checkpoint,
    options: ValidationOptions | None = None,
    progress: Progress | None = None,
) -> ValidationResult:
    """Apply the chosen rules to a checkpoint.

    Raises:
        CheckError: The options make no sense, or bytes could not be read.
    """
    options = options or ValidationOptions()
    _require_another_base(checkpoint, options.base)
    begun = time.perf_counter()
    chosen = select_rules(options.select, options.ignore)
    card = _card(checkpoint, options)
    rules = tuple(rule for rule in chosen if _why_not(rule, options, card) is None)
    expected, why = _expected(checkpoint)
    context = RuleContext(
        checkpoint, expected, why, level=options.level, tp=options.tp, base=options.base, card=card
    )
    for rule in chosen:
        why_not = _why_not(rule, options, card)
        if why_not is not None and (options.select or _asked_for(rule, options)):
            context.skip(f"{rule.id} {rule.name}", why_not)
    sample = None
    if any(rule.level is RuleLevel.BYTES for rule in rules):
        sample = _read(context, rules, options, progress)
    findings: list[Finding] = []
    for position, rule in enumerate(rules):
        findings += rule.findings(context)
        if progress is not None:
            progress("rules", position + 1, len(rules))
    findings.sort(key=lambda finding: finding.sort_key)
    coverage = _coverage(context, rules)
    return ValidationResult(
        checkpoint=summary_of(checkpoint),
        findings=tuple(findings),
        coverage=coverage,
        verdict=verdict_of(tuple(findings), coverage, options.fail_on),
        level=options.level,
        sample=sample,
        seconds=time.perf_counter() - begun,
        audit=context.audit,
        card=card,
    )


def _require_another_base(checkpoint: Checkpoint, base: Checkpoint | None) -> None:
    """Refuse to hold a checkpoint against itself: that it equals itself says nothing.

    Raises:
        CheckError: The base is the checkpoint.
    """
    if base is not None and checkpoint.shards and fingerprint(base) == fingerprint(checkpoint):
        raise CheckError(
            f"{printable(base.location)}: the base is the checkpoint itself, of which every weight "
            "is a copy; give --base the FP8 or BF16 checkpoint that this one was made from"
        )


def _why_not(rule: Rule, options: ValidationOptions, card: CardReview | None) -> str | None:
    """Say why the options leave a rule out, or None when it runs."""
    if rule.id.startswith(_AUDIT) and options.base is None:
        return "it needs --base, the checkpoint that this one was made from"
    if rule.id == _CARD_RULE and card is None:
        return f"there is no {CARD}, and no --card"
    if rule.level is RuleLevel.BYTES and options.level is RuleLevel.HEADERS:
        return "it reads bytes, and the level is headers"
    if rule.id == tp_misaligned.id and options.tp is None:
        return "it needs --tp, the number of tensor parallel shards"
    return None


def _asked_for(rule: Rule, options: ValidationOptions) -> bool:
    """Whether a rule that does not run was asked for by an option of its own."""
    return rule.id.startswith(_AUDIT) and options.base is not None


def _card(checkpoint: Checkpoint, options: ValidationOptions) -> CardReview | None:
    """Review the model card, where there is one.

    Raises:
        CheckError: The card that was asked for cannot be read.
    """
    if options.card is not None:
        source = str(options.card)
        try:
            data = options.card.read_bytes()
        except OSError as error:
            raise CheckError(
                f"{source}: the model card cannot be read: {error.strerror}"
            ) from error
    elif 0 < checkpoint.files.get(CARD, 0) <= 4 * MAX_CHARACTERS:
        source = CARD
        try:
            data = bytes(checkpoint.storage.read(CARD, 0, checkpoint.files[CARD]))
        except StorageError:
            return None
    else:
        return None
    card = parse_card(data.decode("utf-8", "replace"), source)
    return review(card, checkpoint, options.base)


def _expected(checkpoint: Checkpoint) -> tuple[Expected | None, str]:
    """Map the unquantised model: each logical weight has its place there, however stored."""
    if checkpoint.config is None:
        there = "cannot be read" if CONFIG in checkpoint.files else "is missing"
        return None, f"{CONFIG} {there}, so the architecture is unknown"
    if checkpoint.architecture is None:
        return None, f"{CONFIG} names no architecture"
    expected = expected_tensors(checkpoint.config, QuantConfig())
    if expected.problems:
        return None, printable("; ".join(expected.problems), 400)
    return expected, ""


def _read(
    context: RuleContext,
    rules: tuple[Rule, ...],
    options: ValidationOptions,
    progress: Progress | None,
) -> Sample | None:
    """Read the bytes of all NVFP4 weights, or of a sample of them; then hold them to the base."""
    weights, hindered = scannable_weights(context.checkpoint)
    if hindered:
        name, why = next(iter(hindered.items()))
        context.skip(
            f"bytes of {counted(len(hindered), 'weight')}, the first {printable(name)}",
            f"{printable(why)}",
        )
    sample = None
    if options.sample < 1 and weights:
        weights, sample = draw(weights, options.sample, options.seed)
    engine = options.engine or LocalEngine(options.jobs)
    with _journal(context.checkpoint, options) as journal:
        context.scans = read_bytes(
            context.checkpoint, weights, engine, journal, _stage(progress, "bytes")
        )
        if options.base is not None and any(rule.id.startswith(_AUDIT) for rule in rules):
            _audit(context, options, engine, journal, _stage(progress, "audit"))
        if journal is not None:
            journal.remove()
    return sample


def _stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(stage, done, total)


def _audit(
    context: RuleContext,
    options: ValidationOptions,
    engine: Engine,
    journal: Journal | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Hold the weights to the base; of a sampled run, the sampled groups."""
    # Imported here: a run without a base needs no numba, which takes a second to load.
    from nvfp4check.checkpoint.audit.whole import run_audit

    assert options.base is not None
    context.audit, gaps = run_audit(
        context.checkpoint,
        options.base,
        engine,
        sample=(options.sample, options.seed),
        journal=journal,
        progress=progress,
    )
    for what, why in gaps:
        context.skip(what, why)


@contextmanager
def _journal(checkpoint: Checkpoint, options: ValidationOptions) -> Iterator[Journal | None]:
    """Open the journal. Only who asks for one, or for its content, must be able to have it."""
    path = options.journal or default_path(checkpoint)
    try:
        journal = Journal(path, fingerprint(checkpoint), resume=options.resume)
    except CheckError:
        if options.resume or options.journal is not None:
            raise
        yield None
        return
    with journal:
        yield journal


def _coverage(context: RuleContext, rules: tuple[Rule, ...]) -> Coverage:
    """Count what was looked at: tensors whose bytes were read, else those whose headers were."""
    checkpoint = context.checkpoint
    if any(rule.level is RuleLevel.BYTES for rule in rules):
        scanned = [checkpoint.weights[name] for name in context.scans]
        read = sum(len(weight.parts) for weight in scanned)
        size = sum(weight.nbytes for weight in scanned)
    else:
        read, size = len(checkpoint.tensors), 0
    return Coverage(
        tensors=len(checkpoint.tensors),
        tensors_checked=read,
        bytes_checked=size,
        rules=tuple(rule.id for rule in rules),
        skipped=tuple(context.skipped),
    )
