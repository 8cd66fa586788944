"""A run computed again, in the way in which it says that it was made."""

from pathlib import Path

from nvfp4check.activations import RUN_FILE, Run
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    KvCache,
    LayerRange,
    Logits,
    Perturbation,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.layer_inputs import LayerInputs
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.linear import LinearMode


def computed_again(
    golden: Run, checkpoint: str | Path, out: Path, inputs: Path | None = None
) -> Run:
    """Compute a run of a checkpoint in the way in which a golden was made.

    `inputs` is the run whose states each layer began with, where it did; forced experts are those
    that the golden recorded.

    Raises:
        CheckError: It was made in no way that is computed here, or of other states than `inputs`
            holds.
    """
    options = _as_made(golden, inputs)
    return run_forward(checkpoint, _prompts(golden), out, options).run


def _prompts(golden: Run) -> list[Prompt]:
    return [
        Prompt(id=prompt.id, text=prompt.text, tokens=tuple(golden.tokens(prompt.id).tolist()))
        for prompt in golden.info.prompts
    ]


def _as_made(golden: Run, inputs: Path | None) -> ForwardOptions:
    info = golden.info
    if info.mode == "served":
        raise CheckError(
            f"{golden.path}: holds what a server answered, which no fresh run computes; hold the "
            "two against one another with `nvfp4check agree`"
        )
    if info.routing is not None and not golden.layers:
        raise CheckError(
            f"{golden.path}: was computed with the experts of {info.routing} and recorded none of "
            "them (--activations hidden does), so that no fresh run can be given them; give one "
            "with --run"
        )
    _require_inputs(golden, inputs)
    modes = {str(mode): mode for mode in LinearMode}
    cache, dtype = info.kv_cache or "none", info.dtype or "float32"
    for name, value, kinds in (("kv_cache", cache, KvCache), ("dtype", dtype, Arithmetic)):
        if value not in set(kinds):
            raise CheckError(
                f"{golden.path / RUN_FILE}: {name} {value!r}; a fresh run has one of "
                f"{', '.join(kinds)}: give one with --run"
            )
    return ForwardOptions(
        mode=modes.get(info.mode or ""),
        kv_cache=KvCache(cache),
        arithmetic=Arithmetic(dtype),
        activations=Activations.ALL if golden.layers else Activations.NONE,
        logits=Logits.parse(info.logits or "full"),
        layers=LayerRange(0, info.layers[1] if info.layers else None),
        mtp=info.mtp > 0,
        perturbation=Perturbation.parse(info.perturb) if info.perturb else None,
        seed=info.seed or 0,
        routing=golden.path if info.routing is not None else None,
        inputs=inputs,
    )


def _require_inputs(golden: Run, inputs: Path | None) -> None:
    """Check that a fresh run's layers will begin with what the golden's began with.

    A golden keeps digests of those states, not the states.

    Raises:
        CheckError: They would not.
    """
    expected = golden.info.inputs
    if expected is None and inputs is not None:
        raise CheckError(
            f"--inputs {inputs}: {golden.path} was computed without; leave the option out"
        )
    if expected is not None and inputs is None:
        raise CheckError(
            f"{golden.path}: each of its layers began with the states of another run (forward "
            "--inputs), which a golden does not hold; give that run with --inputs"
        )
    if expected is not None and inputs is not None:
        given = LayerInputs.open(inputs).digests
        other = [prompt for prompt in golden.prompts if given.get(prompt) != expected.get(prompt)]
        if other:
            raise CheckError(
                f"--inputs {inputs}: its states differ from those that the layers of {golden.path} "
                f"began with, first for prompt {other[0]!r}; give the run that the golden was "
                "made with"
            )
