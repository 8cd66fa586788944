"""Goldens: shipped ones are met, and none passes that is missing, changed or just recorded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import Run
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import Activations, ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.goldens import Closeness, record, verify
from nvfp4check.tokens import Prompt

TINY = Path(__file__).parents[1] / "goldens" / "tiny-deepseek-v3"
SHIPPED = TINY / "activations"

PROMPTS = [Prompt(id="a", tokens=(1, 2, 3, 4)), Prompt(id="b", tokens=(700, 8))]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    options = ForwardOptions(activations=Activations.ALL)
    return run_forward(TINY / "bf16", PROMPTS, tmp_path / "run", options).run.path


@pytest.mark.parametrize(
    ("golden", "checkpoint"),
    [
        ("transformers-float32", "bf16"),
        ("reference-float32", "bf16"),
        ("reference-nvfp4-stored", "nvfp4"),
    ],
)
def test_a_shipped_golden_is_met_by_a_fresh_run(golden: str, checkpoint: str) -> None:
    found = verify(SHIPPED / golden, checkpoint=TINY / checkpoint, closeness=Closeness.FLOAT32)

    assert found.differences == ()
    assert found.compared > 70


def test_the_golden_of_one_checkpoint_is_not_met_by_another() -> None:
    found = verify(
        SHIPPED / "reference-nvfp4-stored", checkpoint=TINY / "fp8", closeness=Closeness.FLOAT32
    )

    assert any("relative distance" in difference.message for difference in found.differences)


def test_recording_does_not_pass_and_the_next_verification_does(run: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden"

    recorded = record(run, golden, "a test")
    again = record(run, golden, "a test")

    assert not recorded.holds
    assert {difference.message for difference in recorded.differences} == {"recorded: was missing"}
    assert again.holds
    assert verify(golden, run).holds
    entry = json.loads((golden / "MANIFEST.json").read_text())["files"]["run.json"]
    assert entry["origin"] == "a test"
    assert entry["dtype"] == "float32"
    assert entry["versions"]["torch"] == torch.__version__


def test_another_run_takes_a_goldens_place_only_when_told_and_does_not_pass_then(
    run: Path, tmp_path: Path
) -> None:
    golden = tmp_path / "golden"
    record(run, golden, "a test")
    other = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "other").run.path

    with pytest.raises(CheckError, match="--replace"):
        record(other, golden, "a test")
    replaced = record(other, golden, "a test", replace=True)

    messages = {difference.message for difference in replaced.differences}
    assert messages == {
        "recorded: replaces other bytes",
        "removed: the run has no such file",
    }
    assert verify(golden, other).holds


def test_a_golden_of_given_inputs_is_met_by_a_fresh_run_of_the_same_inputs(
    run: Path, tmp_path: Path
) -> None:
    options = ForwardOptions(activations=Activations.ALL, inputs=run)
    single = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "single", options).run.path
    golden, model = tmp_path / "golden", TINY / "nvfp4"
    record(single, golden, "a test")

    assert verify(golden, checkpoint=model, inputs=run).differences == ()
    with pytest.raises(CheckError, match=r"began with the states of another run .* with --inputs"):
        verify(golden, checkpoint=model)
    with pytest.raises(CheckError, match=r"its states differ .* first for prompt 'a'"):
        verify(golden, checkpoint=model, inputs=single)
    with pytest.raises(CheckError, match="goes with --checkpoint"):
        verify(golden, inputs=run)


def test_inputs_are_refused_for_a_golden_that_had_none(run: Path, tmp_path: Path) -> None:
    record(run, tmp_path / "golden", "a test")

    with pytest.raises(CheckError, match="was computed without; leave the option out"):
        verify(tmp_path / "golden", checkpoint=TINY / "bf16", inputs=run)


@pytest.mark.parametrize("kept", [Activations.HIDDEN, Activations.NONE])
def test_a_golden_of_forced_experts_is_met_with_the_experts_it_recorded(
    kept: Activations, run: Path, tmp_path: Path
) -> None:
    options = ForwardOptions(activations=kept, routing=run)
    forced = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "forced", options).run.path
    golden = tmp_path / "golden"
    record(forced, golden, "a test")

    if kept is Activations.NONE:
        with pytest.raises(CheckError, match=r"recorded none of them .* give one with --run"):
            verify(golden, checkpoint=TINY / "nvfp4")
    else:
        assert verify(golden, checkpoint=TINY / "nvfp4").differences == ()
        free = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "free").run.path
        assert not verify(golden, free).holds  # the experts matter


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mode", "served", "what a server answered"),
        ("dtype", "float16", "dtype 'float16'; a fresh run has one of float32"),
        ("kv_cache", "fp4", "kv_cache 'fp4'; a fresh run has one of stored"),
    ],
)
def test_a_golden_that_forward_does_not_make_is_not_computed_anew(
    field: str, value: str, message: str, run: Path, tmp_path: Path
) -> None:
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, field: value}))
    record(run, tmp_path / "golden", "a test")

    with pytest.raises(CheckError, match=message):
        verify(tmp_path / "golden", checkpoint=TINY / "bf16")


def test_where_no_golden_is_recorded_nothing_can_be_verified(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckError, match=r"nowhere: is no golden: nothing is there; .* record RUN"):
        verify(tmp_path / "nowhere", run)
    with pytest.raises(CheckError, match="holds a run, but no manifest lists it"):
        verify(run, run)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{",
        '{"schema": "nvfp4check/goldens/1"}',
        '{"schema": "nvfp4check/goldens/1", "files": {"run.json": 7}}',
        '{"schema": "nvfp4check/goldens/2", "files": {}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text(manifest)

    with pytest.raises(CheckError, match=r"MANIFEST\.json: (is no manifest|cannot be read)"):
        verify(tmp_path)


def test_a_golden_that_lacks_a_file_fails(tmp_path: Path, run: Path) -> None:
    golden = tmp_path / "golden"
    record(run, golden, "a test")
    (golden / "logits.safetensors").unlink()
    found = verify(golden, run)

    assert [d.message for d in found.differences] == ["missing, though MANIFEST.json lists it"]

    shutil.copy(golden / "MANIFEST.json", tmp_path)
    shutil.rmtree(golden)
    golden.mkdir()
    shutil.move(tmp_path / "MANIFEST.json", golden)
    assert len(verify(golden, run).differences) == verify(golden, run).compared


def test_a_changed_byte_and_an_unlisted_file_fail(tmp_path: Path, run: Path) -> None:
    golden = tmp_path / "golden"
    record(run, golden, "a test")
    file = golden / "layers" / "002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    shutil.copy(file, golden / "layers" / "009.safetensors")

    found = verify(golden)

    assert [d.file for d in found.differences] == [
        "layers/002.safetensors",
        "layers/009.safetensors",
    ]


@pytest.mark.parametrize("broken", ["golden", "run"])
def test_a_file_that_holds_no_tensors_is_a_difference(
    tmp_path: Path, run: Path, broken: str
) -> None:
    record(run, tmp_path / "golden", "a test")
    assert run == tmp_path / "run"
    (tmp_path / broken / "layers/001.safetensors").write_bytes(b"no tensors")

    found = verify(tmp_path / "golden", tmp_path / "run")

    assert {d.file for d in found.differences} == {"layers/001.safetensors"}
    assert any("cannot be read as part of a run" in d.message for d in found.differences)


def test_a_golden_without_origin_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckError, match="origin"):
        record(run, tmp_path / "golden", " ")


def changed(run: Path, tmp_path: Path, tensor: str, change: float) -> Path:
    """A copy of a run whose one tensor is multiplied."""
    copy = tmp_path / "changed"
    shutil.copytree(run, copy)
    file = copy / "layers" / "001.safetensors"
    tensors = load_file(file)
    tensors[tensor] = tensors[tensor] * change
    save_file(tensors, file)
    return copy


@pytest.mark.parametrize(
    ("change", "closeness", "holds"),
    [
        (1.0, Closeness.BITS, True),
        (1 + 2**-22, Closeness.BITS, False),
        (1 + 2**-22, Closeness.FLOAT32, True),
        (1 + 1e-5, Closeness.FLOAT32, True),
        (1 + 3e-5, Closeness.FLOAT32, False),
        (float("nan"), Closeness.FLOAT32, False),
    ],
)
def test_a_run_is_as_close_as_it_was_asked_to_be(
    change: float, closeness: Closeness, holds: bool, run: Path, tmp_path: Path
) -> None:
    golden = tmp_path / "golden"
    record(run, golden, "a test")

    found = verify(golden, changed(run, tmp_path, "a/hidden", change), closeness=closeness)

    assert found.holds == holds
    if not holds:
        assert [(d.file, d.tensor) for d in found.differences] == [
            ("layers/001.safetensors", "a/hidden")
        ]


@pytest.mark.parametrize("swap", [True, False], ids=["other-order", "other-expert"])
def test_experts_are_compared_as_sets(swap: bool, run: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    record(run, golden, "a test")
    file = run / "layers" / "003.safetensors"
    tensors = load_file(file)
    experts = tensors["a/router_experts"]
    tensors["a/router_experts"] = experts.flip(1) if swap else (experts + 1) % 16
    save_file(tensors, file)

    assert verify(golden, run, closeness=Closeness.FLOAT32).holds == swap


def test_a_point_that_the_run_lacks_is_a_difference_and_one_more_is_not(
    run: Path, tmp_path: Path
) -> None:
    few = run_forward(
        TINY / "bf16", PROMPTS, tmp_path / "few", ForwardOptions(activations=Activations.HIDDEN)
    ).run.path
    record(few, tmp_path / "golden-few", "a test")
    record(run, tmp_path / "golden-all", "a test")

    assert verify(tmp_path / "golden-few", run).holds
    found = verify(tmp_path / "golden-all", few)
    assert {d.message for d in found.differences} == {"the run has no such tensor"}


def test_the_reference_and_transformers_tell_the_same_story() -> None:
    witness, ours = (
        Run.open(SHIPPED / "transformers-float32"),
        Run.open(SHIPPED / "reference-float32"),
    )

    for prompt in witness.prompts:
        assert torch.equal(witness.tokens(prompt), ours.tokens(prompt))
        for layer in range(1, 5):
            assert torch.equal(
                witness.point(layer, prompt, "router_experts").sort(dim=1).values,
                ours.point(layer, prompt, "router_experts").sort(dim=1).values,
            )


def test_bounds_are_kept_with_a_golden_and_no_run_needs_any_to_meet_it(
    run: Path, tmp_path: Path
) -> None:
    options = ForwardOptions(activations=Activations.ALL, bounds=("bfloat16",))
    bounded = run_forward(TINY / "bf16", PROMPTS, tmp_path / "bounded", options).run.path
    golden = tmp_path / "golden"

    record(bounded, golden, "a test")

    assert Run.open(golden).bounded(0) == Run.open(bounded).bounded(0) != frozenset()
    assert verify(golden, run).holds
    file = golden / "bounds" / "000.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file)
    assert [Path(found.file).name for found in verify(golden, run).differences] == [file.name]
