from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
NVFP4 = str(Path(__file__).parents[2] / "goldens/tiny-deepseek-v3/nvfp4")
SMALL = ("--layers", "2", "--experts", "4")


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "bf16"])
def test_what_is_made_passes_validation(run: Run, tmp_path: Path, format: str) -> None:
    out = str(tmp_path / "out")
    ran = run("synth", NVFP4, out, *SMALL, "--format", format, "--shards", "2")
    assert ran.code == 0
    assert "tensors in 2 shards" in ran.out
    assert run("validate", out).code == 0


def test_a_sparse_checkpoint_takes_no_space_and_passes_by_its_headers(
    run: Run, tmp_path: Path
) -> None:
    ran = run("synth", f"{NVFP4}/config.json", str(tmp_path / "out"), "--sparse", "--format", "fp8")
    assert ran.code == 0
    assert "in 1 shard, 7,561,712 bytes of data, all of it holes" in ran.out
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert shard.stat().st_blocks * 512 < 200_000
    assert run("validate", str(tmp_path / "out"), "--level", "headers").code == 0


def test_the_files_of_a_checkpoint_are_there(run: Run, tmp_path: Path) -> None:
    run("synth", NVFP4, str(tmp_path / "out"), *SMALL)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model-00001-of-000001.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "hf_quant_config.json",
    }


def test_the_seed_and_the_convention_decide_the_bytes(run: Run, tmp_path: Path) -> None:
    def make(*options: str) -> bytes:
        out = tmp_path / "-".join(options or ("plain",))
        assert run("synth", NVFP4, str(out), *SMALL, *options).code == 0
        (shard,) = out.glob("*.safetensors")
        return shard.read_bytes()

    plain = make()
    assert make("--seed", "0") == plain
    assert make("--seed", "1") != plain
    assert make("--convention", "torchao") != plain


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--convention", "none"), "no convention 'none'; choose among modelopt"),
        (("--layers", "0"), "give --layers 1 or more"),
    ],
)
def test_bad_usage_is_explained(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], why: str
) -> None:
    ran = run("synth", NVFP4, str(tmp_path / "out"), *arguments)
    assert ran.code == 2
    assert why in ran.err
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_in_it_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    ran = run("synth", NVFP4, str(tmp_path))
    assert ran.code == 2
    assert "not an empty directory" in ran.err


def test_a_missing_configuration_is_named(run: Run, tmp_path: Path) -> None:
    ran = run("synth", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert ran.code == 2
    assert "cannot be read" in ran.err
