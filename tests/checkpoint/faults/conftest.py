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
    """A checkpoint whose experts are 48 wide: three scale columns in down_proj."""
    config = {**json.loads(CONFIG.read_text()), "moe_intermediate_size": 48}
    made = make_config(config, None, layers=2, experts=4, format=SynthFormat.NVFP4)
    target = tmp_path_factory.mktemp("narrow") / "nvfp4"
    values = Values(0, Convention.MODELOPT)
    synthesize(made.config, made.hf_quant_config, made.quantization, target, 2, values=values)
    return target
