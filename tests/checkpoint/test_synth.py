import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nvfp4check.checkpoint.opening import open_checkpoint
from nvfp4check.checkpoint.quant_config import QuantConfig
from nvfp4check.checkpoint.synth import synthesize
from nvfp4check.findings import CheckError


def of_golden(directory: Path, target: Path, shards: int) -> None:
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config is not None
    synthesize(
        checkpoint.config, checkpoint.hf_quant_config, checkpoint.quantization, target, shards
    )


@pytest.mark.parametrize("which", ["bf16", "fp8", "nvfp4"])
def test_the_synthetic_checkpoint_has_the_tensors_of_the_real_one(
    golden: SimpleNamespace, tmp_path: Path, which: str
) -> None:
    of_golden(getattr(golden, which), tmp_path / "out", 7)
    real, synthetic = open_checkpoint(getattr(golden, which)), open_checkpoint(tmp_path / "out")
    assert len(synthetic.shards) == 7
    assert {(e.name, e.dtype, e.shape) for e in synthetic.tensors.values()} == {
        (e.name, e.dtype, e.shape) for e in real.tensors.values()
    }
    assert synthetic.quantization == real.quantization


def test_the_index_is_complete_and_names_every_shard(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    of_golden(golden.nvfp4, tmp_path / "out", 7)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.index is not None
    assert checkpoint.index.weight_map == {e.name: e.shard for e in checkpoint.tensors.values()}
    assert checkpoint.index.total_size == checkpoint.nbytes
    assert checkpoint.json_problems == []
    assert checkpoint.stray_shards == checkpoint.missing_shards == ()


def test_the_data_is_a_hole_that_takes_no_space(golden: SimpleNamespace, tmp_path: Path) -> None:
    of_golden(golden.bf16, tmp_path / "out", 1)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    status = shard.stat()
    assert status.st_size > 12_000_000
    assert status.st_blocks * 512 < 200_000


def test_a_directory_with_something_in_it_is_refused(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("keep")
    with pytest.raises(CheckError, match="not an empty directory"):
        of_golden(golden.nvfp4, tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_configuration_without_a_map_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="no map of tensors for architecture 'Llama'"):
        synthesize({"architectures": ["Llama"]}, None, QuantConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_hold_whole_tensors_in_the_order_of_the_layers(
    golden: SimpleNamespace, tmp_path: Path
) -> None:
    of_golden(golden.bf16, tmp_path / "out", 5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = list(dict.fromkeys(index["weight_map"].values()))
    assert shards == sorted(shards)
    assert next(iter(index["weight_map"])) == "model.embed_tokens.weight"
