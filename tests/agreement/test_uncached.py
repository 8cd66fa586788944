"""An engine that keeps values where the reference has an FP8 cache: its error points there."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from nvfp4check.activations import RUN_FILE, UNCACHED, Run, bounds_file, write_info, write_tensors
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.document import agree_document
from nvfp4check.agreement.statistics import Decision
from nvfp4check.agreement.uncached import Group, cache_share
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions, KvCache
from nvfp4check.forward.streaming import run_forward
from nvfp4check.report.agree_html import agree_html
from nvfp4check.report.agree_text import agree_text
from nvfp4check.tokens import Prompt
from nvfp4ref import e4m3
from nvfp4ref.deepseek_v3.cache import LatentCache

NVFP4 = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3" / "nvfp4"
PROMPTS = [
    Prompt(id=f"p{i}", tokens=tuple((37 * t * t + 5 * t + 101 * i) % 1024 for t in range(40)))
    for i in range(3)
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    options = ForwardOptions(activations=Activations.ALL, bounds=("float32", "bfloat16"))
    return run_forward(NVFP4, PROMPTS, tmp_path_factory.mktemp("cache") / "reference", options).run


def engine(reference: Run, out: Path, arithmetic: Arithmetic, cache: KvCache) -> Run:
    """Compute the prompts, each layer with the reference's states; the run tells of no cache."""
    options = ForwardOptions(
        activations=Activations.ALL, arithmetic=arithmetic, inputs=reference.path, kv_cache=cache
    )
    run = run_forward(NVFP4, PROMPTS, out, options).run
    write_info(run.path, replace(run.info, kv_cache=None))
    return Run.open(run.path)


def held(result: AgreeResult) -> float:
    """The largest error over its bound at attn_output."""
    return max(
        h.bound.ratio for h in result.layers if h.bound and h.agreement.point == "attn_output"
    )


@pytest.mark.parametrize("arithmetic", [Arithmetic.FLOAT64, Arithmetic.BFLOAT16])
def test_a_cache_of_codes_has_no_part_in_the_direction_of_values(
    reference: Run, arithmetic: Arithmetic, tmp_path: Path
) -> None:
    result = agree(reference, engine(reference, tmp_path / "run", arithmetic, KvCache.STORED))

    assert result.verdict is Decision.PASS
    cache = result.bounds.cache
    assert cache is not None
    assert cache.interval is not None
    low, high = cache.interval
    assert abs(cache.share) < 0.2
    assert low < high < 0.5
    assert cache.groups == 5 * len(PROMPTS)
    document = agree_document(result)
    assert document["bounds"]["cache"] == {"share": cache.share, "low": low, "high": high}
    for page in (agree_text(document), agree_html(document)):
        assert "KV cache: FP8 as in the reference" in page


def test_a_cache_of_values_lies_within_the_bounds_of_bfloat16_and_is_named_all_the_same(
    reference: Run, tmp_path: Path
) -> None:
    wrong = engine(reference, tmp_path / "run", Arithmetic.BFLOAT16, KvCache.NONE)

    result = agree(reference, wrong)

    assert held(result) < 1  # no norm tells it
    assert result.verdict is Decision.FAIL
    (problem,) = (p for p in result.problems if p.kind == "cache")
    assert problem.fatal
    assert "its KV cache is not the FP8 that the reference has" in problem.message
    cache = result.bounds.cache
    assert cache is not None
    assert cache.interval is not None
    assert cache.interval[0] > 0.5
    assert 0.7 < cache.share < 1.3
    assert problem.message in agree_text(agree_document(result))


def test_in_float32_the_bound_tells_as_well(reference: Run, tmp_path: Path) -> None:
    wrong = engine(reference, tmp_path / "run", Arithmetic.FLOAT64, KvCache.NONE)

    result = agree(reference, wrong)

    assert held(result) > 1
    assert any(p.kind == "cache" for p in result.problems)
    assert result.divergence is not None
    assert result.divergence.point == "attn_output"


def test_codes_under_another_scale_are_not_the_reference_s(reference: Run, tmp_path: Path) -> None:
    def store(self: LatentCache, values: torch.Tensor) -> torch.Tensor:
        return e4m3.encode(values.float() / (1.3 * self.scale))

    def load(self: LatentCache, stored: torch.Tensor) -> torch.Tensor:
        return (e4m3.decode(stored) * (1.3 * self.scale)).to(self.dtype)

    with patch.object(LatentCache, "_store", store), patch.object(LatentCache, "_load", load):
        wrong = engine(reference, tmp_path / "run", Arithmetic.BFLOAT16, KvCache.STORED)

    result = agree(reference, wrong)

    assert held(result) < 1
    assert [p.kind for p in result.problems if p.fatal] == ["cache"]


def test_noise_is_no_cache_of_values(reference: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(reference.path, tmp_path / "noisy")
    generator = torch.Generator().manual_seed(0)
    for layer in reference.layers:
        file = folder / reference.layer_file(layer).relative_to(reference.path)
        tensors = load_file(file)
        for prompt in reference.prompts:
            bound = reference.bound(layer, prompt, "attn_output", "bfloat16")
            value = tensors[f"{prompt}/attn_output"]
            noise = torch.randn(value.shape, generator=generator)
            noise = noise / noise.norm(dim=-1, keepdim=True) * bound.float().unsqueeze(-1)
            tensors[f"{prompt}/attn_output"] = value + noise
        write_tensors(file, tensors)
    write_info(folder, replace(reference.info, dtype="bfloat16"))

    cache = agree(reference, Run.open(folder), AgreeOptions(bounds="bfloat16")).bounds.cache

    assert cache is not None
    assert not cache.kept_values


def group(layer: int, along: float) -> Group:
    return Group(layer=layer, tokens=10, along=along, length=1.0)


@pytest.mark.parametrize(
    ("shares", "fault"),
    [
        ([1.0], False),  # one group tells nothing
        ([1.0, 1.01, 0.99], True),
        ([0.3, 0.31, 0.29], False),
        ([3.0, -1.0, 1.0], False),
    ],
)
def test_several_groups_must_agree(shares: list[float], fault: bool) -> None:
    found = cache_share([group(layer, share) for layer, share in enumerate(shares)])

    assert found is not None
    assert found.share == pytest.approx(sum(shares) / len(shares))
    assert found.kept_values is fault
    assert cache_share([]) is None


def test_a_direction_of_other_rows_is_refused(reference: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(reference.path, tmp_path / "cut")
    file = bounds_file(folder, 0)
    tensors = load_file(file)
    name = f"p0/{UNCACHED}/bfloat16"
    tensors[name] = tensors[name][1:].clone()
    write_tensors(file, tensors)

    assert (folder / RUN_FILE).is_file()
    with pytest.raises(CheckError, match="expected a row for each of 40 tokens"):
        agree(Run.open(folder), reference, AgreeOptions(bounds="bfloat16"))


def test_a_cache_of_values_in_the_reference_has_no_such_direction(tmp_path: Path) -> None:
    options = ForwardOptions(
        activations=Activations.ALL, bounds=("bfloat16",), kv_cache=KvCache.NONE
    )
    run = run_forward(NVFP4, PROMPTS[:1], tmp_path / "plain", options).run

    assert not any(UNCACHED in name for layer in run.layers for name in run.bounded(layer))
    assert agree(run, run).bounds.cache is None
