import hashlib
import json
from pathlib import Path


def test_every_golden_is_listed_with_its_origin_and_its_sha256(goldens: Path) -> None:
    manifest = json.loads((goldens / "MANIFEST.json").read_text())
    assert manifest["schema"] == "nvfp4check/goldens/1"
    found = {
        path.relative_to(goldens).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in goldens.rglob("*")
        if path.is_file() and path != goldens / "MANIFEST.json"
    }
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == found
    assert all(entry["origin"].strip() for entry in manifest["files"].values())
    assert list(manifest["files"]) == sorted(manifest["files"])


def test_the_raw_export_shares_its_shards_with_the_published_form(goldens: Path) -> None:
    tiny = goldens / "tiny-deepseek-v3"
    assert sorted(path.name for path in (tiny / "nvfp4-raw").iterdir()) == [
        "config.json",
        "hf_quant_config.json",
        "model.safetensors.index.json",
    ]
    raw = json.loads((tiny / "nvfp4-raw" / "model.safetensors.index.json").read_text())
    published = json.loads((tiny / "nvfp4" / "model.safetensors.index.json").read_text())
    assert raw["weight_map"].items() <= published["weight_map"].items()
