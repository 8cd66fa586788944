"""`nvfp4check diff` as people and scripts call it."""

import json
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.checkpoint.editing import copy_checkpoint
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4ref import e2m1, e4m3, packing

TINY = Path(__file__).parents[2] / "goldens/tiny-deepseek-v3"
NVFP4, FP8 = str(TINY / "nvfp4"), str(TINY / "fp8")
ONE = ("--only", "model.layers.1.mlp.experts.0.*")


@pytest.fixture
def faulty(tmp_path):
    """The golden with one expert's global scale as its reciprocal."""
    editor = copy_checkpoint(TINY / "nvfp4", tmp_path / "faulty")
    name = "model.layers.1.mlp.experts.0.down_proj.weight_scale_2"
    editor.set_scalar(name, 1 / editor.scalar(name))
    return str(editor.path)


def test_equal_checkpoints_are_the_same(run):
    ran = run("diff", NVFP4, NVFP4, "--fail-on", "bytes")

    assert ran.code == 0
    assert ran.out.startswith("SAME: 331 weights")
    assert ran.err == ""


def test_the_document_is_that_of_the_contract(run, faulty):
    ran = run("diff", NVFP4, faulty, "--format", "json")
    document = json.loads(ran.out)

    assert ran.code == 1
    assert document["schema"] == "nvfp4check/diff/1"
    assert document["summary"] == {"identical": 330, "scales-only": 1}
    assert document["config"] == []
    asked = {
        "name",
        "class",
        "sqnr_db",
        "max_abs",
        "max_ulp",
        "changed_codes",
        "changed_scales",
        "diagnosis",
    }
    assert all(asked <= weight.keys() for weight in document["weights"])
    (changed,) = [w for w in document["weights"] if w["class"] != "identical"]
    assert changed["changed_codes"] == changed["changed_scales"] == 0
    assert changed["diagnosis"].endswith("is the reciprocal of a's")


@pytest.mark.parametrize(("fail_on", "code"), [("different", 0), ("requantized", 1), ("bytes", 1)])
def test_what_fails_is_chosen(run, fail_on, code):
    assert run("diff", NVFP4, FP8, *ONE, "--fail-on", fail_on).code == code


def test_level_headers_compares_no_bytes(run, faulty):
    ran = run("diff", NVFP4, faulty, "--level", "headers")

    assert ran.code == 0
    assert "no byte of a weight was compared" in ran.out


@pytest.mark.parametrize("format", ["text", "markdown", "html", "json"])
def test_every_format_names_the_fault(run, faulty, format):
    ran = run("diff", NVFP4, faulty, "--format", format)

    assert ran.code == 1
    said = ran.out.replace("&#39;", "'").replace("\\_", "_").replace("\\.", ".")
    assert "model.layers.1.mlp.experts.0.down_proj" in said
    assert "the reciprocal of" in said


def test_a_whole_comparison_fits_a_screen(run):
    ran = run("diff", NVFP4, str(TINY / "bf16"))

    lines = ran.out.splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("DIFFERENT: 3 settings") or lines[0].startswith("WITHIN ROUNDING")


@pytest.mark.parametrize(
    ("module", "point"),
    [
        ("model.layers.1.mlp.experts.0.gate_proj", "mlp_input"),
        ("model.layers.2.self_attn.q_a_proj", "attn_input"),
    ],
)
def test_recorded_activations_weigh_the_error_of_the_output(run, tmp_path, module, point):
    made = str(tmp_path / "run")
    run("forward", FP8, "--activations", "all", "--out", made)

    ran = run("diff", FP8, NVFP4, "--activations", made, "--only", module, "--format", "json")
    plain = run("diff", FP8, NVFP4, "--only", module, "--format", "json")

    (found,) = json.loads(ran.out)["weights"]
    (unweighted,) = json.loads(plain.out)["weights"]
    assert found["weighted"]
    assert found["relative_error"] != unweighted["relative_error"]
    expected = _relative_output_error(module, Run.open(made), point)
    terms = found["elements"]
    assert found["relative_error"] == pytest.approx(expected, rel=terms * 2**-52)  # sums of float64


def _relative_output_error(module: str, recorded: Run, point: str) -> float:
    """Compute it from the files, tensor by tensor."""
    layer = int(module.split(".")[2])
    inputs = torch.cat([recorded.point(layer, p, point).double() for p in recorded.prompts])
    moments = inputs.square().mean(0)
    base, made = open_checkpoint(FP8), open_checkpoint(NVFP4)

    def load(checkpoint: Checkpoint, leaf: str) -> torch.Tensor:
        return checkpoint.torch(checkpoint.tensors[f"{module}.{leaf}"])

    elements = e4m3.decode(load(base, "weight")).double()
    tiles = load(base, "weight_scale_inv").double().repeat_interleave(128, 0)
    rows, columns = elements.shape
    before = elements * tiles.repeat_interleave(128, 1)[:rows, :columns]
    after = load(made, "weight").double()
    if f"{module}.weight_scale_2" in made.tensors:
        scales = e4m3.decode(load(made, "weight_scale")).double().repeat_interleave(16, 1)
        codes = e2m1.decode(packing.unpack(load(made, "weight"))).double()
        after = codes * scales * load(made, "weight_scale_2").double()  # exact in float64
    noise = ((after - before).square() * moments).sum()
    return float((noise / (before.square() * moments).sum()).sqrt())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sample", "0"), "no fraction"),
        (("--only", "nothing"), "fits no weight"),
        (("--device", "cuda"), "leave --device out"),
        (("--activations", "/nonexistent"), "no run.json"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_remedy(run, options, said):
    ran = run("diff", NVFP4, FP8, *options)

    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_what_was_not_compared_is_not_passed_over(run, tmp_path):
    broken = copy_checkpoint(TINY / "nvfp4", tmp_path / "broken")
    broken.truncate("model-00002-of-000002.safetensors", -100)
    only = ("--only", "lm_head*")

    ran = run("diff", NVFP4, str(broken.path), *only)

    assert ran.code in (1, 2)
    assert "model-00002-of-000002.safetensors" in ran.out
