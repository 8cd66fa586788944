import json
from pathlib import Path

import pytest

from nvfp4check.checkpoint.synth import synthesize
from nvfp4check.checkpoint.synth_config import SynthFormat, make_config
from nvfp4check.checkpoint.synth_values import Values
from nvfp4ref.conventions import Convention

CONFIG = Path(__file__).parents[3] / "goldens/tiny-deepseek-v3/nvfp4/config.json"


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts are 48 wide, three scale columns; its base is beside it."""
    config = {**json.loads(CONFIG.read_text()), "moe_intermediate_size": 48}
    target = tmp_path_factory.mktemp("narrow")
    values = Values(0, Convention.MODELOPT)
    for format in (SynthFormat.NVFP4, SynthFormat.FP8):
        made = make_config(config, None, layers=2, experts=4, format=format)
        synthesize(
            made.config,
            made.hf_quant_config,
            made.quantization,
            target / format.value,
            2,
            values=values,
        )
    return target / "nvfp4"
