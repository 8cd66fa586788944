"""The memory of a run: what is planned stays below what was allowed."""

import json
from pathlib import Path

import pytest

from nvfp4check.findings import CheckError
from nvfp4check.forward.budget import PROCESS_BYTES, plan
from nvfp4ref.deepseek_v3.config import DeepseekV3Config

PUBLISHED = (
    Path(__file__).parents[2] / "goldens" / "configs" / "nvidia--DeepSeek-V3.1-NVFP4_config.json"
)
GIB = 2**30
#: gate_proj of a dense layer in BF16.
LARGEST = 2 * 7168 * 18432


@pytest.fixture
def config() -> DeepseekV3Config:
    return DeepseekV3Config.from_dict(json.loads(PUBLISHED.read_text()))


@pytest.mark.parametrize("limit", [3 * GIB, 4 * GIB, 16 * GIB])
def test_what_is_read_ahead_and_dequantised_fits_beside_the_rest(
    limit: int, config: DeepseekV3Config
) -> None:
    budget = plan(limit, [16, 48], config, 8, LARGEST)

    assert budget.ahead >= LARGEST
    assert PROCESS_BYTES + budget.ahead + 2 * budget.chunk < limit


def test_the_published_model_runs_over_64_tokens_in_4_gib(config: DeepseekV3Config) -> None:
    assert plan(4 * GIB, [64], config, 8, LARGEST).ahead <= GIB


def test_a_prompt_needs_more_memory_alone_than_in_parts(config: DeepseekV3Config) -> None:
    plan(5 * GIB, [512] * 8, config, 4, LARGEST)

    with pytest.raises(CheckError, match="4,096 tokens of 7168"):
        plan(5 * GIB, [4096], config, 4, LARGEST)
