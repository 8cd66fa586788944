"""One tensor of a sparse layout removed, reshaped or retyped: that finding, and no other."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.editing import CheckpointEditor, link_checkpoint
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.synth import synthesize
from nvfp4check.checkpoint.synth_config import SynthFormat, make_config
from nvfp4check.checkpoint.validation import ValidationOptions, validate

NORM = "model.layers.3.post_attention_layernorm.weight"
CODES = "model.layers.2.mlp.experts.7.up_proj.weight"
SCALES = f"{CODES}_scale"
HEAD = "lm_head.weight"

Change = Callable[[CheckpointEditor, str], None]


def remove(editor: CheckpointEditor, name: str) -> None:
    editor.drop(name)


def reshape(editor: CheckpointEditor, name: str) -> None:
    shape = editor.entry(name).shape
    editor.reshape(name, (2 * shape[0], *shape[1:-1], shape[-1] // 2) if shape[1:] else (1, *shape))


def retype(editor: CheckpointEditor, name: str) -> None:
    entry = editor.entry(name)
    other = {"BF16": "F16", "U8": "I8", "F8_E4M3": "F8_E5M2", "F32": "I32"}[entry.dtype]
    editor.replace(name, editor.read(name), dtype=other)


@pytest.fixture(scope="session")
def layout(golden: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = open_checkpoint(golden.nvfp4)
    assert checkpoint.config is not None
    made = make_config(checkpoint.config, None, format=SynthFormat.NVFP4)
    target = tmp_path_factory.mktemp("layout") / "sparse"
    synthesize(
        made.config,
        made.hf_quant_config,
        made.quantization,
        target,
        5,
        generation_config=made.generation_config,
    )
    return target


@pytest.mark.parametrize(
    ("change", "name", "rule"),
    [
        (remove, NORM, "NV101"),
        (remove, HEAD, "NV101"),
        (remove, SCALES, "NV107"),
        (remove, f"{SCALES}_2", "NV107"),
        (remove, "model.layers.5.eh_proj.weight", "NV109"),
        (reshape, NORM, "NV103"),
        (reshape, HEAD, "NV103"),
        (reshape, SCALES, "NV108"),
        (retype, NORM, "NV104"),
        (retype, HEAD, "NV104"),
        (retype, SCALES, "NV104"),
        (retype, "model.layers.1.mlp.gate.e_score_correction_bias", "NV104"),
    ],
)
def test_that_finding_and_no_other(
    layout: Path, tmp_path: Path, change: Change, name: str, rule: str
) -> None:
    editor = link_checkpoint(layout, tmp_path / "copy")
    change(editor, name)
    options = ValidationOptions(level=RuleLevel.HEADERS, ignore=("NV607",))  # it has no tokenizer
    (finding,) = validate(open_checkpoint(tmp_path / "copy"), options).findings
    assert finding.rule == rule
    assert name.removesuffix("_scale").removesuffix("_scale_2") in f"{finding.tensor}"
    assert sum(path.stat().st_blocks for path in (tmp_path / "copy").iterdir()) * 512 < 1_000_000
