"""The whole gate of a release as a list of steps, each a command that also runs alone.

    validate           structure, bytes, audit against the base, model card
    forward-base       what the base computes
    noise-1 …          the same with noise on it: the floor under any difference
    forward-candidate  what the candidate computes
    forced             the candidate with the base's experts, if KL is to be split
    agree              the candidate's run against the base's
    report             one page of all results

A step that is done is not done again: DIR/release.json says which command ended how, on which
checkpoints, and for which bytes of the prompts and the card. What rests on a step that was done
again is done again, too. The page is written anew each time, and holds that file as it stands. A
step whose input did not come about is not run. The worst of the steps decides: one that does not
hold, then one that could not be checked or has not been run yet, then one that is undecided.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nvfp4check
from nvfp4check.activations import write_bytes
from nvfp4check.checkpoint import journal
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.findings import CheckError
from nvfp4check.forward.setup import fingerprint

SCHEMA = "nvfp4check/release/1"
STATE_FILE = "release.json"
PAGE_FILE = "report.html"

#: What is kept of a step, beside its name.
STEP_FIELDS = ("command", "inputs", "code", "verdict", "seconds", "output", "why")

#: Exit codes from best to worst, and the verdict each stands for.
VERDICTS = {0: "pass", 3: "undecided", 2: "incomplete", 1: "fail"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseOptions:
    """What the gate is given."""

    checkpoint: str
    base: str
    out: Path
    prompts: Path | None = None
    card: Path | None = None
    activations: str = "hidden"
    logits: str = "full"
    max_kl: float | None = None
    min_top1: float | None = None
    #: KL of a position too rare to be among the prompts'; None: as bad as a guess.
    rare_kl: float = 0.0
    #: Runs of the base with noise.
    noise: int = 2
    #: Whether KL is split by a further run with the base's experts.
    split: bool = False
    jobs: int = 1
    max_memory: float = 4.0
    device: str = "cpu"
    allow_skips: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of the plan."""

    name: str
    argv: tuple[str, ...]
    #: The file it writes its result to.
    output: Path
    #: Steps whose result it reads.
    needs: tuple[str, ...] = ()
    #: The run directory it fills, which it can go on with.
    run: Path | None = None
    #: Whether it keeps a journal of its own, which it can go on from.
    journal: bool = False
    #: Files beside the checkpoints that it reads.
    reads: tuple[Path, ...] = ()

    @property
    def command(self) -> str:
        """The command line as it would be typed."""
        return shlex.join(("nvfp4check", *self.argv))

    @property
    def inputs(self) -> dict[str, str]:
        """The sha256 of each file it reads, as it is; one that is not there is left out."""
        return {
            str(file): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in self.reads
            if file.is_file()
        }


@dataclass
class State:
    """How each step of a plan ended, kept in the release's directory."""

    path: Path
    of: Mapping[str, str]
    planned: Sequence[Step]
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def known(self, step: Step) -> dict[str, Any] | None:
        """Return how a step ended; None if it has not, or ended when it was another command."""
        found = self.steps.get(step.name)
        same = found and (found["command"], found["inputs"]) == (step.command, step.inputs)
        return found if same else None

    def done(self, step: Step) -> bool:
        """Whether a step was done before, to the end, and on what there is."""
        known = self.known(step)
        return known is not None and known["code"] in (0, 1, 3) and step.output.is_file()

    def lacking(self, step: Step) -> str | None:
        """Return the first step that has not given what this one needs."""
        planned = {other.name: other for other in self.planned}
        for name in step.needs:
            known = self.known(planned[name])
            if known is None or known["code"] != 0:
                return name
        return None

    def record(self, step: Step, code: int | None, seconds: float, why: str | None = None) -> None:
        """Keep how a step ended, and forget what rests on it; without a code it was not run."""
        for other in self.planned:
            if step.name in other.needs:
                self.steps.pop(other.name, None)
        self.steps[step.name] = {
            "command": step.command,
            "inputs": step.inputs,
            "code": code,
            "verdict": "not run" if code is None else VERDICTS.get(code, "incomplete"),
            "seconds": round(seconds, 1),
            "output": str(step.output),
            "why": why,
        }
        self.write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Each step of the plan, whether it has ended or not."""
        return [
            {
                "name": step.name,
                **(
                    self.known(step)
                    or {
                        "command": step.command,
                        "inputs": step.inputs,
                        "code": None,
                        "verdict": "not run",
                        "seconds": 0.0,
                        "output": str(step.output),
                        "why": "not yet",
                    }
                ),
            }
            for step in self.planned
        ]

    @property
    def code(self) -> int:
        """The worst exit code of the plan; a step that was not run could not be checked."""
        order = list(VERDICTS)
        codes = [2 if row["code"] is None else row["code"] for row in self.rows]
        return max((code if code in order else 2 for code in codes), key=order.index, default=2)

    def document(self) -> dict[str, Any]:
        """Return the state as a JSON document."""
        return {
            "schema": SCHEMA,
            "tool": {"name": "nvfp4check", "version": nvfp4check.__version__},
            "verdict": VERDICTS[self.code],
            **self.of,
            "page": str(self.path.parent / PAGE_FILE),
            "steps": self.rows,
        }

    def write(self) -> None:
        """Write the state, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.document(), indent=1) + "\n"
        write_bytes(self.path, text.encode("utf-8"))


def plan(options: ReleaseOptions) -> list[Step]:
    """Return the steps in their order."""
    out = options.out
    runs = out / "runs"
    steps = [
        Step(
            name="validate",
            argv=(
                "validate",
                options.checkpoint,
                *("--base", options.base),
                *_given("--card", options.card),
                *("--jobs", str(options.jobs)),
                *_flag("--allow-skips", options.allow_skips),
                *("--output", str(out / "validate.json")),
            ),
            output=out / "validate.json",
            journal=True,
            reads=(options.card or Path(options.checkpoint) / "README.md",),
        ),
        _forward("forward-base", options.base, runs / "base", options),
        *(
            _forward(
                f"noise-{seed}",
                options.base,
                runs / f"noise-{seed}",
                options,
                ("--perturb", "ulp:bfloat16", "--seed", str(seed)),
            )
            for seed in range(1, options.noise + 1)
        ),
        _forward("forward-candidate", options.checkpoint, runs / "candidate", options),
    ]
    if options.split:
        routing = ("--routing", str(runs / "base"))
        forced = _forward("forced", options.checkpoint, runs / "forced", options, routing)
        steps.append(replace(forced, needs=("forward-base",)))
    steps.append(_agree(options, runs))
    # What was judged stands before what it was computed from.
    documents = [step.output for step in sorted(steps, key=lambda step: step.run is not None)]
    steps.append(
        Step(
            name="report",
            argv=("report", *map(str, documents), "--output", str(out / PAGE_FILE)),
            output=out / PAGE_FILE,
        )
    )
    return steps


def _forward(
    name: str, checkpoint: str, run: Path, options: ReleaseOptions, more: Iterable[str] = ()
) -> Step:
    output = options.out / f"{name}.json"
    return Step(
        name=name,
        argv=(
            "forward",
            checkpoint,
            *_given("--prompts", options.prompts),
            *("--activations", options.activations),
            *("--logits", options.logits),
            *("--max-memory", f"{options.max_memory:g}"),
            *("--device", options.device),
            *more,
            *("--out", str(run)),
            *("--output", str(output)),
        ),
        output=output,
        run=run,
        reads=(options.prompts,) if options.prompts is not None else (),
    )


def _agree(options: ReleaseOptions, runs: Path) -> Step:
    limits = (*_given("--max-kl", options.max_kl), *_given("--min-top1", options.min_top1))
    noise = [f"noise-{seed}" for seed in range(1, options.noise + 1)]
    output = options.out / "agree.json"
    return Step(
        name="agree",
        argv=(
            "agree",
            str(runs / "base"),
            str(runs / "candidate"),
            *(part for name in noise for part in ("--noise", str(runs / name))),
            *(("--forced", str(runs / "forced")) if options.split else ()),
            # A candidate of fewer bits is never within the noise of its base.
            *(limits or ("--judge", "none")),
            *_given("--rare-kl", options.rare_kl or None),
            *_flag("--allow-skips", options.allow_skips),
            *("--output", str(output)),
        ),
        output=output,
        needs=(
            "forward-base",
            "forward-candidate",
            *noise,
            *(("forced",) if options.split else ()),
        ),
    )


def _given(name: str, value: object | None) -> tuple[str, ...]:
    return () if value is None else (name, str(value))


def _flag(name: str, given: bool) -> tuple[str, ...]:
    return (name,) if given else ()


def begin(options: ReleaseOptions, *, resume: bool) -> State:
    """Return the state of a release's directory, new or as it was left.

    Raises:
        CheckError: It is a file, the directory holds something and `resume` is not given, or it
            holds the gate of other checkpoints, or of what these were.
    """
    path = options.out / STATE_FILE
    of: dict[str, str] = {
        "checkpoint": options.checkpoint,
        "base": options.base,
        "checkpoint_fingerprint": _identity(options.checkpoint),
        "base_fingerprint": _identity(options.base),
    }
    *planned, _ = plan(options)
    if options.out.exists() and not options.out.is_dir():
        raise CheckError(f"{options.out}: is a file; give --out a new directory")
    if not resume:
        if options.out.exists() and any(options.out.iterdir()):
            raise CheckError(f"{options.out}: is not empty; give a new directory, or --resume")
        options.out.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return State(path, of, planned)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        known = {name: document[name] for name in of}
        steps = {
            step["name"]: {name: step[name] for name in STEP_FIELDS} for step in document["steps"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckError(f"{path}: cannot be read: {error!r}; give a new directory") from error
    for name in ("checkpoint", "base"):
        if known[name] != of[name]:
            raise CheckError(
                f"{path}: is the gate of another {name} ({known[name]}); give a new directory"
            )
        if known[f"{name}_fingerprint"] != of[f"{name}_fingerprint"]:
            raise CheckError(
                f"{path}: the files of the {name} {of[name]} have changed since this gate began; "
                "give a new directory"
            )
    return State(path, of, planned, steps)


def _identity(location: str) -> str:
    """Name what a checkpoint holds: its headers and configuration, and the state of its files."""
    checkpoint = open_checkpoint(location)
    return f"{fingerprint(checkpoint)}, files {journal.fingerprint(checkpoint)}"
