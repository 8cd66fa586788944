"""The fixture for an engine's own tests, in a project of its own, and what its failures say."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import Run
from nvfp4check.agreement import assert_agrees
from nvfp4check.agreement.agree import AgreeOptions, Judge, agree
from nvfp4check.agreement.statistics import Decision

Change = Callable[[torch.Tensor], torch.Tensor]

pytest_plugins = ("pytester",)

GOLDEN = (
    Path(__file__).parents[2]
    / "goldens"
    / "tiny-deepseek-v3"
    / "activations"
    / "reference-nvfp4-stored"
)


def test_an_engine_s_test_holds_its_run_to_a_golden(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        f"""
        import shutil
        from safetensors.torch import load_file, save_file

        GOLDEN = {str(GOLDEN)!r}

        def test_equal(nvfp4_agrees):
            nvfp4_agrees(GOLDEN, GOLDEN)

        def test_layer_3_is_wrong(nvfp4_agrees, tmp_path):
            shutil.copytree(GOLDEN, tmp_path / "run")
            file = tmp_path / "run" / "layers" / "003.safetensors"
            tensors = load_file(file)
            name = next(name for name in sorted(tensors) if name.endswith("hidden"))
            tensors[name][-1] *= 1.5
            save_file(tensors, file)
            nvfp4_agrees(tmp_path / "run", GOLDEN)
        """
    )

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["E*AssertionError: *: *", "E*part at layer 3, hidden, *"])


def changed(run: Path, folder: Path, layer: int, point: str, change: Change) -> Path:
    """Copy a run with a point of a layer changed for every prompt."""
    shutil.copytree(run, folder)
    file = folder / "layers" / f"{layer:03d}.safetensors"
    tensors = load_file(file)
    kept = {name: change(t) if name.endswith(point) else t for name, t in tensors.items()}
    save_file({name: tensor for name, tensor in kept.items() if tensor.numel()}, file)
    return folder


def test_the_message_names_the_worst_token_and_how_far_it_is_off(tmp_path: Path) -> None:
    run = changed(GOLDEN, tmp_path / "run", 2, "hidden", lambda tensor: tensor * 1.5)

    with pytest.raises(AssertionError) as caught:
        assert_agrees(run, GOLDEN)

    message = str(caught.value)
    assert "they part at layer 2, hidden, prompt" in message
    assert "its relative error there is 0.5, at worst 0.5 at prompt" in message
    assert "held against the nothing" not in message
    assert "logits: mean KL 0, top-1 agreement 100.00% over" in message


def test_the_message_names_the_token_that_is_not_finite(tmp_path: Path) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[4, 0] = torch.nan
        return tensor

    run = changed(GOLDEN, tmp_path / "run", 2, "hidden", spoil)

    with pytest.raises(AssertionError, match=r"layer 2, hidden, .*, token 4, held against the"):
        assert_agrees(run, GOLDEN)


def test_the_message_says_that_not_all_was_recorded(tmp_path: Path) -> None:
    run = changed(GOLDEN, tmp_path / "run", 2, "hidden", lambda tensor: tensor[:0])

    with pytest.raises(AssertionError) as caught:
        assert_agrees(run, GOLDEN)

    message = str(caught.value)
    assert message.splitlines()[0].endswith(": not all of it was recorded")
    assert message.count("candidate: hidden of layer 2, prompt") == 3
    assert "candidate: … and 1 more (missing)" in message
    assert "give allow_skips=True" in message
    assert assert_agrees(run, GOLDEN, allow_skips=True).verdict is Decision.PASS


def test_the_message_of_an_undecided_limit_says_what_the_positions_tell(tmp_path: Path) -> None:
    run = shutil.copytree(GOLDEN, tmp_path / "run")
    logits = load_file(run / "logits.safetensors")
    save_file({name: rows * 1.5 for name, rows in logits.items()}, run / "logits.safetensors")
    found = agree(Run.open(GOLDEN), Run.open(run), AgreeOptions(judge=Judge.NONE))
    assert found.logits is not None

    with pytest.raises(AssertionError, match=r"undecided, found .*; these positions tell no more"):
        assert_agrees(run, GOLDEN, max_kl=found.logits.kl.mean * 1.01)


def test_several_noise_runs_may_be_given() -> None:
    result = assert_agrees(GOLDEN, GOLDEN, noise=[GOLDEN, str(GOLDEN)])

    assert len(result.options.noise) == 2
