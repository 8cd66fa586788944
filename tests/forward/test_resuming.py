"""A run that stopped, was killed or was stopped by a limit goes on to the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvfp4check.activations import Run
from nvfp4check.findings import CheckError
from nvfp4check.forward.journal import Journal
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    KvCache,
    LayerRange,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.linear import LinearMode


def test_a_run_killed_in_the_middle_continues_to_the_same_bytes(
    tiny: Path,
    stored_tensors: Callable[[Path], dict[str, torch.Tensor]],
    bytes_of: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    checkpoint = slowed_copy(tmp_path, tiny / "nvfp4", stored_tensors(tiny / "nvfp4"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def command(out: Path, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "nvfp4check", "forward", str(checkpoint)),
            *("--mode", "weight-only", "--activations", "all", "--out", str(out), *more),
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(whole), check=True, env=environment, stdout=subprocess.DEVNULL)

    process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed / "state").is_dir() or not any((killed / "state").glob("*.safetensors")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "logits.safetensors").exists()

    subprocess.run(
        command(killed, "--resume"), check=True, env=environment, stdout=subprocess.DEVNULL
    )
    assert bytes_of(killed) == bytes_of(whole)


def slowed_copy(tmp_path: Path, origin: Path, source: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of 24 layers, the tiny model's repeated, so that a kill hits the middle."""
    config = json.loads((origin / "config.json").read_text())
    config["num_hidden_layers"] = 24
    config["num_nextn_predict_layers"] = 0
    tensors = {name: t for name, t in source.items() if not name.startswith("model.layers.")}
    for layer in range(24):
        of = 0 if layer == 0 else 1 + layer % 4
        for name, tensor in source.items():
            if name.startswith(f"model.layers.{of}."):
                tensors[name.replace(f"layers.{of}.", f"layers.{layer}.", 1)] = tensor.clone()
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config))
    for name in ("hf_quant_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_bytes((origin / name).read_bytes())
    return copy


@pytest.mark.parametrize("layers_before", [1, 3, 5])
def test_a_run_stopped_after_some_layers_continues_to_the_same_bytes(
    tiny: Path,
    prompts: list[Prompt],
    keep_all: ForwardOptions,
    bytes_of: Callable[[Path], dict[str, str]],
    layers_before: int,
    tmp_path: Path,
) -> None:
    run_forward(tiny / "nvfp4", prompts, tmp_path / "whole", keep_all)

    some = ForwardOptions(
        activations=Activations.ALL, kv_cache=KvCache.NONE, layers=LayerRange(0, layers_before)
    )
    run_forward(tiny / "nvfp4", prompts, tmp_path / "parts", some)
    rest = ForwardOptions(
        activations=Activations.ALL,
        kv_cache=KvCache.NONE,
        layers=LayerRange(layers_before) if layers_before < 5 else LayerRange(),
        resume=True,
    )
    result = run_forward(tiny / "nvfp4", prompts, tmp_path / "parts", rest)

    assert result.layers == 5 - layers_before
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("layers", "message"), [(LayerRange(3, 5), "go on at layer 3"), (LayerRange(0, 1), "already")]
)
def test_a_run_goes_on_only_where_it_stands(
    tiny: Path, prompts: list[Prompt], layers: LayerRange, message: str, tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(layers=LayerRange(0, 2)))

    with pytest.raises(CheckError, match=message):
        run_forward(
            tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(layers=layers, resume=True)
        )


def test_resuming_a_complete_run_computes_nothing(
    tiny: Path, prompts: list[Prompt], bytes_of: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "run")
    before = bytes_of(tmp_path / "run")

    result = run_forward(tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(resume=True))

    assert result.layers == 0
    assert bytes_of(tmp_path / "run") == before


def test_a_run_made_differently_is_not_continued_and_the_difference_is_named(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(layers=LayerRange(0, 2)))

    double = ForwardOptions(arithmetic=Arithmetic.FLOAT64, resume=True)
    with pytest.raises(CheckError, match="dtype 'float32' then, 'float64' now"):
        run_forward(tiny / "bf16", prompts, tmp_path / "run", double)
    with pytest.raises(CheckError, match="another checkpoint"):
        run_forward(
            tiny / "nvfp4",
            prompts,
            tmp_path / "run",
            ForwardOptions(mode=LinearMode.WEIGHT_ONLY, resume=True),
        )
    with pytest.raises(CheckError, match="--resume"):
        run_forward(tiny / "bf16", prompts, tmp_path / "run")


def test_a_directory_that_holds_something_else_is_left_alone(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("…")

    with pytest.raises(CheckError, match="holds no run"):
        run_forward(tiny / "bf16", prompts, tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([Prompt(id="a", tokens=(1, 3))], "prompt 'a' has other tokens"),
        ([Prompt(id="a", tokens=(1, 2), text="x")], "prompt 'a' is another text"),
        ([Prompt(id="a", tokens=(1, 2, 3))], "prompt 'a' is another text"),
        ([Prompt(id="b", tokens=(1, 2))], "prompts 'a' then, 'b' now"),
        (
            [Prompt(id=str(i), tokens=(1, 2)) for i in range(5)],
            "prompts 'a' then, '0', '1', '2' and 2 more now",
        ),
    ],
)
def test_a_run_is_continued_with_its_own_prompts_only(
    asked: list[Prompt], message: str, tiny: Path, tmp_path: Path
) -> None:
    first = ForwardOptions(layers=LayerRange(0, 2))
    run_forward(tiny / "bf16", [Prompt(id="a", tokens=(1, 2))], tmp_path / "run", first)

    with pytest.raises(CheckError, match=f"run: cannot be continued: {message}"):
        run_forward(tiny / "bf16", asked, tmp_path / "run", ForwardOptions(resume=True))


def test_a_run_stopped_before_it_wrote_its_tokens_begins_anew(
    tiny: Path, prompts: list[Prompt], bytes_of: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "whole")
    run_forward(tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(layers=LayerRange(0, 1)))
    shutil.rmtree(tmp_path / "run" / "state")
    (tmp_path / "run" / "tokens.safetensors").unlink()

    rest = run_forward(tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(resume=True))

    assert rest.layers == 5
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "whole")


def test_a_state_that_cannot_be_read_and_one_that_is_none_are_no_crash(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    run, state = tmp_path / "run", tmp_path / "run" / "state" / "001.safetensors"
    run_forward(tiny / "bf16", prompts, run, ForwardOptions(layers=LayerRange(0, 2)))
    whole = state.read_bytes()
    (state.parent / "notes.safetensors").write_text("mine")

    state.write_bytes(whole[:-7])
    with pytest.raises(CheckError, match=r"001\.safetensors: cannot be read"):
        run_forward(tiny / "bf16", prompts, run, ForwardOptions(resume=True))
    state.unlink()
    later = ForwardOptions(layers=LayerRange(2), resume=True)
    with pytest.raises(CheckError, match="no state to go on from at layer 2; begin at layer 0"):
        run_forward(tiny / "bf16", prompts, run, later)
    (run / "state" / "001.safetensors").write_bytes(whole)
    assert run_forward(tiny / "bf16", prompts, run, ForwardOptions(resume=True)).layers == 3


def test_a_complete_run_is_not_made_shorter(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "run")

    shorter = ForwardOptions(layers=LayerRange(0, 2), resume=True)
    with pytest.raises(CheckError, match="has layers 0 to 4 already"):
        run_forward(tiny / "bf16", prompts, tmp_path / "run", shorter)


@pytest.mark.parametrize(
    ("kept", "layers", "added"),
    [
        (Activations.ALL, LayerRange(), 1),
        (Activations.HIDDEN, LayerRange(), 1),
        (Activations.NONE, LayerRange(0, 3), 3),
    ],
)
def test_mtp_is_added_to_a_run_that_was_made_without_it(
    kept: Activations,
    layers: LayerRange,
    added: int,
    tiny: Path,
    prompts: list[Prompt],
    bytes_of: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    asked, out = ForwardOptions(activations=kept, mtp=True), tmp_path / "later"
    run_forward(tiny / "bf16", prompts, tmp_path / "whole", asked)

    run_forward(tiny / "bf16", prompts, out, replace(asked, mtp=False, layers=layers))
    assert not (out / "mtp").exists()
    later = run_forward(tiny / "bf16", prompts, out, replace(asked, resume=True))

    assert later.layers == added
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert run_forward(tiny / "bf16", prompts, out, replace(asked, resume=True)).layers == 0


def test_an_addition_of_mtp_that_was_killed_goes_on(
    tiny: Path,
    prompts: list[Prompt],
    bytes_of: Callable[[Path], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_mtp = ForwardOptions(activations=Activations.HIDDEN, mtp=True)
    run_forward(tiny / "bf16", prompts, tmp_path / "whole", with_mtp)
    out, again = tmp_path / "later", replace(with_mtp, resume=True)
    run_forward(tiny / "bf16", prompts, out, replace(with_mtp, mtp=False))

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "layer_done", die)
        with pytest.raises(KeyboardInterrupt):
            run_forward(tiny / "bf16", prompts, out, again)
    assert not Run.open(out, incomplete=True).info.complete

    assert run_forward(tiny / "bf16", prompts, out, again).layers == 1
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_mtp_is_not_added_where_no_state_was_kept(
    tiny: Path, prompts: list[Prompt], bytes_of: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "run")
    before = bytes_of(tmp_path / "run")

    with pytest.raises(CheckError, match="kept no state to go on from, as --activations hidden"):
        run_forward(tiny / "bf16", prompts, tmp_path / "run", ForwardOptions(mtp=True, resume=True))
    assert bytes_of(tmp_path / "run") == before
