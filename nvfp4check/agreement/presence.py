"""What of one run is there in the other too, and what is missing to hold them together."""

from collections.abc import Iterator, Sequence

import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.criteria import AgreeOptions, Judge
from nvfp4check.agreement.divergence import HeldPoint
from nvfp4check.agreement.integrity import Problem
from nvfp4check.agreement.sources import holds_logits
from nvfp4check.agreement.summary import Summary
from nvfp4check.findings import CheckError


def common_prompts(reference: Run, candidate: Run) -> tuple[tuple[str, ...], list[Problem]]:
    """Return the prompts of both runs, and a problem for each that only one has.

    Raises:
        CheckError: There are none, none has a token, or a prompt has other tokens.
    """
    both = tuple(prompt for prompt in reference.prompts if prompt in candidate.prompts)
    if not both:
        raise CheckError(
            f"{reference.path} and {candidate.path} have no prompt in common: "
            f"{', '.join(reference.prompts[:3])} … and {', '.join(candidate.prompts[:3])} …; "
            "run both with the same --prompts"
        )
    if not any(info.tokens for info in reference.info.prompts if info.id in both):
        raise CheckError(
            f"{reference.path}: none of the prompts that both runs have has a token, so that there "
            "is nothing to compare"
        )
    for prompt in both:
        left, right = reference.tokens(prompt), candidate.tokens(prompt)
        if not torch.equal(left, right):
            raise CheckError(
                f"prompt {prompt!r}: {reference.path} and {candidate.path} were given other "
                f"tokens: {_tokens_message(left, right)}; give both the same tokens"
            )
    problems = [
        Problem(
            kind="missing",
            run=lacking,
            prompt=prompt,
            message=f"prompt {prompt!r} is not in this run",
            fatal=False,
        )
        for lacking, run, other in (
            ("candidate", reference, candidate),
            ("reference", candidate, reference),
        )
        for prompt in run.prompts
        if prompt not in other.prompts
    ]
    return both, problems


def without_layers(reference: Run, candidate: Run, options: AgreeOptions) -> Iterator[Problem]:
    """Find that no layer can be compared, where the verdict would rest on layers."""
    asked = options.judge is Judge.AUTO and not options.limited
    if asked and reference.own_layers and not candidate.own_layers:
        yield Problem(
            kind="missing",
            run="candidate",
            message=f"no layer was recorded, and the reference has {len(reference.own_layers)}; "
            "with limits (--max-kl, --min-top1) logits are judged alone",
            fatal=False,
        )


def without_logits(reference: Run, candidate: Run, options: AgreeOptions) -> Iterator[Problem]:
    """Find that logits cannot be compared, which the reference has or which are to be judged.

    Raises:
        CheckError: They are to be judged.
    """
    lacking = [run for run in (reference, candidate) if not holds_logits(run)]
    if options.judge is Judge.AUTO and options.limited and lacking:
        raise CheckError(
            f"--max-kl and --min-top1 judge logits, and {lacking[0].path} holds none; record them "
            "with `nvfp4check forward --logits full`, or leave the limits out"
        )
    if lacking == [candidate]:
        yield Problem(
            kind="missing",
            run="candidate",
            message="no logits were recorded, and the reference has them: they are not compared",
            fatal=False,
        )


def partial_floor(
    noise: Sequence[Run], held: Sequence[HeldPoint], logits: Summary | None
) -> Iterator[Problem]:
    """Find what of a comparison has no noise floor, though runs were given to have one."""
    for run in noise:
        for lacking, what in (
            (bool(held) and not run.own_layers, "layers"),
            (logits is not None and not holds_logits(run), "logits"),
        ):
            if lacking:
                yield Problem(
                    kind="noise",
                    run="noise",
                    message=f"{run.path} lacks {what}, so that they have no floor by it",
                    fatal=False,
                )


def require_fit(option: str, run: Run, prompts: tuple[str, ...], whose: str, other: Run) -> None:
    """Refuse a floor or a split of fewer prompts, or that is another model's.

    A run need not say of what checkpoint it is.

    Raises:
        CheckError: A prompt is not there, or both say of what they are, and differ.
    """
    absent = [prompt for prompt in prompts if prompt not in run.prompts]
    if absent:
        raise CheckError(
            f"{option} {run.path}: lacks {len(absent)} of the {len(prompts)} prompts that are "
            f"compared, first {absent[0]!r}; run it with the same --prompts"
        )
    made, meant = (side.info.checkpoint.get("fingerprint") for side in (run, other))
    if made is not None and meant is not None and made != meant:
        raise CheckError(
            f"{option} {run.path}: is a run of {run.info.checkpoint.get('location')}, expected one "
            f"of {other.info.checkpoint.get('location')}, as {whose} {other.path} is"
        )


def _tokens_message(left: torch.Tensor, right: torch.Tensor) -> str:
    if torch.equal(left[1:], right) or torch.equal(left, right[1:]):
        return f"one begins with token {int((left if len(left) > len(right) else right)[0])} more"
    if len(left) != len(right):
        return f"{len(left)} and {len(right)} of them"
    place = int((left != right).nonzero()[0])
    return f"{int(left[place])} and {int(right[place])} at position {place}"
