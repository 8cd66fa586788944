"""NV620: what the model card says, against what the files are."""

from collections.abc import Iterator

from nvfp4check.checkpoint.rules.base import Problem, Rule, RuleContext, printable, rule
from nvfp4check.findings import Severity


@rule(
    "NV620",
    "card-claim",
    Severity.WARNING,
    fires_when="a statement of the model card (README.md, or --card) is contradicted by the files: "
    "base model, architecture, producer and version, what is quantised, size ratio, licence, tags, "
    "sampling advice, the repository that the usage loads",
    why="People choose engines, memory and settings by the card. A published one named modelopt "
    "0.39.0 for files that say another version, and loads a repository of another name.",
    repair="Correct the card, or the files. Each finding shows the statement and what the files "
    "say; `--format json` has the whole review under `card`.",
)
def card_claim(context: RuleContext) -> Iterator[Problem]:
    """Report every contradicted statement."""
    if context.card is None:
        return
    for problem in context.card.problems:
        if problem != "no front matter":
            yield Problem(f"{printable(context.card.source)}: {printable(problem)}")
    for claim in context.card.contradicted:
        yield Problem(
            f'{claim.topic}: {printable(context.card.source)} says "'
            f'{printable(claim.statement, 300)}"; {printable(claim.evidence, 300)}'
        )


RULES: tuple[Rule, ...] = (card_claim,)
