"""`nvfp4check agree REFERENCE_RUN CANDIDATE_RUN`: where two runs part, and whether it matters."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvfp4check.cli.command import command, make_app
from nvfp4check.cli.exit_codes import ExitCode
from nvfp4check.cli.options import (
    MaxKlOption,
    MinTop1Option,
    OutputOption,
    RareKlOption,
    prepared_format,
    require_limits,
    require_rare_kl,
    seed_option,
    write,
)
from nvfp4check.findings import CheckError
from nvfp4check.report.render import render

if TYPE_CHECKING:
    from nvfp4check.activations import Run

app = make_app()


class JudgeBy(StrEnum):
    """What the verdict rests on."""

    AUTO = "auto"
    NONE = "none"


class AgreeFormat(StrEnum):
    """The formats of an agreement."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"
    HTML = "html"
    JUNIT = "junit"


@command(
    app,
    examples=(
        "nvfp4check agree reference candidate",
        "nvfp4check agree reference candidate --noise noise1 --noise noise2 --output report.html",
        "nvfp4check agree reference candidate --max-kl 0.02 --min-top1 0.95",
        "nvfp4check agree reference new --versus old",
    ),
)
def agree(
    reference: Annotated[
        Path,
        typer.Argument(metavar="REFERENCE_RUN", help="The believed run.", show_default=False),
    ],
    candidate: Annotated[
        Path,
        typer.Argument(metavar="CANDIDATE_RUN", help="The run under test.", show_default=False),
    ],
    noise: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="The reference with noise on it (forward --perturb); may be repeated.",
            show_default=False,
        ),
    ] = None,
    forced: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="The candidate with the reference's experts (forward --routing): splits KL.",
            show_default=False,
        ),
    ] = None,
    versus: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Another candidate: which is nearer to the reference?",
            show_default=False,
        ),
    ] = None,
    max_kl: MaxKlOption = None,
    min_top1: MinTop1Option = None,
    alpha: Annotated[
        float, typer.Option(metavar="P", help="Probability of a wrong PASS, or a wrong FAIL.")
    ] = 0.05,
    power: Annotated[
        float, typer.Option(metavar="P", help="Probability with which an effect would be seen.")
    ] = 0.8,
    rare_kl: RareKlOption = 0.0,
    judge: Annotated[
        JudgeBy,
        typer.Option(
            help="auto: limits, else bounds and noise floor, else equality. none: report only."
        ),
    ] = JudgeBy.AUTO,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Checkpoint whose head makes logits of final states. [default: the run's own]",
            show_default=False,
        ),
    ] = None,
    bounds: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE[/tpN][/direct]",
            help="Which of the reference's bounds. [default: by the candidate's dtype and ranks]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, seed_option("Which resamples of the positions are drawn.")] = 0,
    allow_skips: Annotated[
        bool,
        typer.Option("--allow-skips", help="Exit with 0 though something was not recorded."),
    ] = False,
    format: Annotated[
        AgreeFormat | None,
        typer.Option(
            "--format",
            help="How to write the result. [default: by the suffix of --output, else text]",
            case_sensitive=False,
            show_default=False,
        ),
    ] = None,
    output: OutputOption = None,
) -> int:
    """Compare two runs: layer by layer, expert by expert, and by what they would say next.

    PASS, FAIL and UNDECIDED give the exit codes 0, 1 and 3. A limit is kept or broken only if a
    one-sided interval at --alpha lies wholly on one side of it, for positions like these. That
    --max-kl is kept even if positions too rare to be among them are bad takes --rare-kl.
    """
    if not 0 < alpha < 0.5:
        raise CheckError(f"--alpha {alpha}: give a probability above 0 and below 0.5, such as 0.05")
    if not 0.5 <= power < 1:
        raise CheckError(f"--power {power}: give a probability from 0.5 to below 1, such as 0.8")
    require_limits(max_kl, min_top1)
    require_rare_kl(rare_kl)
    into = prepared_format(format, output, AgreeFormat)

    from nvfp4check.activations import Run
    from nvfp4check.agreement.agree import AgreeOptions, Judge
    from nvfp4check.agreement.agree import agree as compare
    from nvfp4check.agreement.document import agree_document
    from nvfp4check.agreement.statistics import Decision
    from nvfp4check.agreement.words import Words

    options = AgreeOptions(
        noise=tuple(Run.open(path) for path in noise or ()),
        forced=Run.open(forced) if forced else None,
        versus=Run.open(versus) if versus else None,
        max_kl=max_kl,
        min_top1=min_top1,
        alpha=alpha,
        power=power,
        rare_kl=rare_kl,
        judge=Judge(judge.value),
        head=head,
        seed=seed,
        bounds=bounds,
    )
    opened = Run.open(reference), Run.open(candidate)
    others = (*options.noise, options.forced, options.versus)
    _require_use(head, [*opened, *(run for run in others if run is not None)])
    result = compare(*opened, options)
    document = agree_document(result, Words.of(result.reference, result.candidate))
    write(render(document, into), output)
    codes = {
        Decision.PASS: ExitCode.HOLDS,
        Decision.FAIL: ExitCode.DOES_NOT_HOLD,
        Decision.UNDECIDED: ExitCode.UNDECIDED,
    }
    if result.verdict is Decision.PASS and result.skipped and not allow_skips:
        return ExitCode.COULD_NOT_CHECK
    return codes[result.verdict]


def _require_use(head: str | None, runs: "list[Run]") -> None:
    """Refuse a head that would make no logits, as all runs hold them.

    Raises:
        CheckError: No run holds final states and no logits.
    """
    from nvfp4check.activations import FINAL_HIDDEN_FILE, LOGITS_FILE

    def needs_it(run: "Run") -> bool:
        return (run.path / FINAL_HIDDEN_FILE).is_file() and not (run.path / LOGITS_FILE).is_file()

    if head is not None and not any(needs_it(run) for run in runs):
        raise CheckError(
            f"--head {head}: no run needs it; it makes logits of final states, which `forward "
            "--logits hidden` keeps. Leave it out"
        )
