"""NV620: a card that the files contradict, and one that they do not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.card.parse import parse_card
from nvfp4check.checkpoint.card.review import review
from nvfp4check.checkpoint.editing import CheckpointEditor
from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.quant_config import from_hf_quant_config
from nvfp4check.checkpoint.rules.base import RuleLevel
from nvfp4check.checkpoint.synth import synthesize
from nvfp4check.checkpoint.validation import ValidationOptions, ValidationResult, validate
from nvfp4check.findings import CheckError, Severity, Verdict

TRUE = """---
license: mit
tags:
- NVFP4
---
# A card
**Network Architecture:** DeepseekV3ForCausalLM
The model is quantized with nvidia-modelopt **v0.39.0**
"""


def run(path: Path, card: Path | None = None, base: Path | None = None) -> ValidationResult:
    options = ValidationOptions(
        level=RuleLevel.HEADERS,
        card=card,
        base=None if base is None else open_checkpoint(base),
        ignore=("NV7",),
    )
    return validate(open_checkpoint(path), options)


def test_a_readme_that_tells_the_truth_is_reviewed_and_gives_no_finding(
    clone: CheckpointEditor,
) -> None:
    clone.write_file("README.md", TRUE)
    result = run(clone.path)

    assert result.findings == ()
    assert "NV620" in result.coverage.rules
    assert result.card is not None
    answers = {claim.topic: claim.answer.value for claim in result.card.claims}
    assert answers["producer version"] == answers["architecture"] == "confirmed"


def test_without_a_card_nothing_is_reviewed(golden: SimpleNamespace) -> None:
    result = run(golden.nvfp4)

    assert "card" not in result.to_json()
    assert "NV620" not in result.coverage.rules
    assert result.verdict is Verdict.PASS


def test_every_contradicted_statement_is_one_warning(clone: CheckpointEditor) -> None:
    wrong = TRUE.replace("0.39.0", "0.40.0").replace("DeepseekV3For", "LlamaFor")
    clone.write_file("README.md", wrong)
    result = run(clone.path)

    assert [(f.rule, f.severity) for f in result.findings] == [("NV620", Severity.WARNING)] * 2
    assert [f.message.partition(":")[0] for f in result.findings] == [
        "architecture", "producer version",
    ]  # fmt: skip


def test_the_card_that_is_named_goes_before_the_readme(
    clone: CheckpointEditor, tmp_path: Path
) -> None:
    clone.write_file("README.md", TRUE)
    other = tmp_path / "card.md"
    other.write_text(TRUE.replace("0.39.0", "0.40.0"))
    [finding] = run(clone.path, other).findings

    assert str(other) in finding.message


def test_a_card_that_cannot_be_read_is_an_error(golden: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="model card cannot be read"):
        run(golden.nvfp4, tmp_path / "absent.md")


@pytest.mark.parametrize("front", ["a: [", "a: &a [x]\nb: *a"])
def test_a_front_matter_that_cannot_be_read_is_a_finding(
    clone: CheckpointEditor, front: str
) -> None:
    clone.write_file("README.md", f"---\n{front}\n---\n# A card\n")
    [finding] = run(clone.path).findings

    assert (finding.rule, "YAML" in finding.message) == ("NV620", True)


def test_the_published_card_is_held_against_the_layout_of_the_published_model(
    goldens: Path, tmp_path: Path
) -> None:
    name = "nvidia--DeepSeek-V3.1-NVFP4"
    config, quantization = (
        json.loads((goldens / "configs" / f"{name}_{kind}.json").read_text())
        for kind in ("config", "hf_quant_config")
    )
    synthesize(config, quantization, from_hf_quant_config(quantization), tmp_path / "full")
    card = parse_card((goldens / "model_card.md").read_text(encoding="utf-8"), "README.md")
    found = {
        claim.topic: claim for claim in review(card, open_checkpoint(tmp_path / "full")).claims
    }

    assert found["size ratio"].answer.value == "confirmed"
    assert "= 1.666 " in found["size ratio"].evidence
    assert found["producer version"].answer.value == "contradicted"
    assert "0.22.1.dev750" in found["producer version"].evidence
    assert found["operators"].answer.value == "qualified"
