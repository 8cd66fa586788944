"""vLLM's own DeepseekV3, layer by layer on the golden's states, where vLLM is installed.

It runs in a process of its own, as in the CI of an engine, and writes a run by hooks; recorded runs
of vLLM 0.32.0 are held to the same bounds wherever the tests run.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import agree
from nvfp4check.agreement.assertion import assert_agrees
from nvfp4check.forward.options import Activations, ForwardOptions, KvCache
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

GOLDENS = Path(__file__).parents[2] / "goldens"
MODEL = GOLDENS / "tiny-deepseek-v3" / "bf16"

#: What an engine's CI would run; FAULT is done to the model before.
CAPTURE = """
import sys
from vllm import LLM, SamplingParams
from nvfp4check.activations import Run
from nvfp4check.capture import VLLM, VLLM_GATE, capture

model, golden, out, fault = sys.argv[1], Run.open(sys.argv[2]), sys.argv[3], sys.argv[4]
llm = LLM(model, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False,
          max_model_len=512)
(module,) = llm.apply_model(lambda module: module)
exec(fault, {"layers": module.model.layers})
one = SamplingParams(max_tokens=1, temperature=0)
with capture(module, out, (*VLLM, VLLM_GATE), inputs=golden, engine="vllm") as session:
    for name in golden.prompts:
        tokens = golden.tokens(name).tolist()
        with session.prompt(name, tokens):
            llm.generate({"prompt_token_ids": tokens}, one, use_tqdm=False)
"""
NO_BIAS = "layers[3].mlp.gate.e_score_correction_bias.data.zero_()"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference with its bounds, on a prompt of 40 tokens and one of 5."""
    prompts = [
        Prompt(id="long", tokens=tuple((7 * i * i + 3 * i) % 1024 for i in range(40))),
        Prompt(id="short", tokens=(3, 1, 4, 1, 5)),
    ]
    options = ForwardOptions(
        activations=Activations.ALL, kv_cache=KvCache.NONE, bounds=("bfloat16",)
    )
    out = tmp_path_factory.mktemp("golden") / "run"
    return run_forward(MODEL, prompts, out, options).run.path


def captured(golden: Path, out: Path, fault: str = "") -> Path:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model lives in that process
        "VLLM_MLA_DISABLE": "1",  # no CPU kernels for it
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    call = [sys.executable, "-c", CAPTURE, str(MODEL), str(golden), str(out), fault]
    ran = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return out


def test_vllm_is_within_the_bound_at_every_layer(golden: Path, tmp_path: Path) -> None:
    run = captured(golden, tmp_path / "run")

    result = assert_agrees(run, golden, allow_skips=True)

    assert [c.what for c in result.criteria] == ["layers within their derived bounds"]
    assert len(result.layers) == 29


def test_a_router_bias_dropped_in_vllm_is_named(golden: Path, tmp_path: Path) -> None:
    run = captured(golden, tmp_path / "run", NO_BIAS)

    divergence = agree(Run.open(golden), Run.open(run)).divergence

    assert divergence is not None
    assert (divergence.layer, divergence.point) == (3, "router_scores")
