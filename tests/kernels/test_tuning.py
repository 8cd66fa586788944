import json
from dataclasses import replace

import pytest
import torch

from nvfp4check.kernels import tuning
from nvfp4check.kernels.arch import SM100, SM120
from nvfp4check.kernels.matmul import SPECIALIZED_CONFIG, TMA_CONFIG, TMA_CONFIG_SM120, matmul
from nvfp4ref import matmul as reference

NARROW = replace(TMA_CONFIG, block_k=128, stages=2)


@pytest.fixture
def operands(generator):
    def one(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (rows, 96), generator=generator).to(torch.uint8)
        return codes, torch.ones(rows, 12).to(torch.float8_e4m3fn)

    return *one(70), *one(40)


@pytest.fixture
def few_candidates(monkeypatch):
    wide = replace(TMA_CONFIG, block_n=256)
    monkeypatch.setattr(tuning, "candidates", lambda arch: [TMA_CONFIG, wide, NARROW])


def test_the_default_is_the_first_candidate_and_none_comes_twice():
    for arch, default in ((SM100, TMA_CONFIG), (SM120, TMA_CONFIG_SM120)):
        tried = tuning.candidates(arch)
        assert tried[0] == default
        assert len(tried) == len(set(tried))
    assert SPECIALIZED_CONFIG in tuning.candidates(SM100)
    assert not any(config.specialize for config in tuning.candidates(SM120))


def test_what_the_compiler_cannot_fit_is_not_legal():
    wide = replace(TMA_CONFIG, block_n=256)  # beyond tensor memory
    deep = replace(TMA_CONFIG, stages=8)  # beyond shared memory

    assert tuning.legal(SM100, [wide, TMA_CONFIG, deep]) == [TMA_CONFIG]


@pytest.mark.usefixtures("few_candidates")
def test_the_fastest_legal_configuration_wins_and_is_kept(operands, tmp_path):
    cache = tuning.TuningCache(tmp_path / "deep" / "tuning.json")
    alpha = torch.tensor(1.0)
    ran = []
    times = iter([2.0, 1.0])

    def seconds(call):
        ran.append(call())
        return next(times)

    best = tuning.tuned_config(operands, alpha, torch.float32, cache, arch=SM100, seconds=seconds)

    assert best == NARROW
    expected = reference.matmul(*operands, alpha, torch.float32)
    assert [torch.equal(product, expected) for product in ran] == [True, True]

    def never(call):
        raise AssertionError("a cached configuration was timed")

    again = tuning.tuned_config(operands, alpha, torch.float32, cache, arch=SM100, seconds=never)
    assert again == best


@pytest.mark.usefixtures("few_candidates")
def test_no_legal_configuration_is_an_error_in_words(operands, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "legal", lambda arch, configs: [])
    cache = tuning.TuningCache(tmp_path / "tuning.json")

    with pytest.raises(ValueError, match="no tiles of matmul are legal on sm100"):
        tuning.tuned_config(
            operands, torch.tensor(1.0), torch.float32, cache, arch=SM100, seconds=lambda call: 1.0
        )


@pytest.mark.parametrize("text", ["", "not json", "[1]", '{"key": 3}', '{"key": {"warp": 1}}'])
def test_a_cache_that_cannot_be_read_is_as_good_as_none(text, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(text)
    cache = tuning.TuningCache(path)

    assert cache.get("key") is None
    cache.put("key", NARROW)
    assert cache.get("key") == NARROW
    assert json.loads(path.read_text())["key"]["block_k"] == 128


def test_rows_share_a_key_up_to_a_power_of_two_and_releases_do_not():
    assert tuning.key_of("B200", 65, 8, 64) == tuning.key_of("B200", 128, 8, 64)
    assert tuning.key_of("B200", 128, 8, 64) != tuning.key_of("B200", 129, 8, 64)
    assert tuning.key_of("B200", 128, 8, 64) != tuning.key_of("H100", 128, 8, 64)


@pytest.mark.parametrize("config", [NARROW, replace(NARROW, group=1), SPECIALIZED_CONFIG])
def test_every_configuration_gives_the_same_product(config, operands):
    alpha = torch.tensor(1.0)

    found = matmul(*operands, alpha, torch.float32, config=config)

    assert torch.equal(found, reference.matmul(*operands, alpha, torch.float32))
