"""The streamed forward: equal to the reference, each weight read once, continued after a kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import POINTS, Run
from nvfp4check.checkpoint.opening import Checkpoint, open_checkpoint
from nvfp4check.checkpoint.storage import LocalStorage
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import (
    Activations,
    Arithmetic,
    ForwardOptions,
    KvCache,
    LayerRange,
    Logits,
    Perturbation,
)
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import LinearMode
from nvfp4ref.deepseek_v3.model import forward
from nvfp4ref.deepseek_v3.weights import StateDict, model_weights

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = GOLDENS / "tiny-deepseek-v3"

PROMPTS = [
    Prompt(id="a", tokens=tuple(range(3, 30))),
    Prompt(id="b/slash", tokens=(5,)),
    Prompt(id="c", tokens=tuple(range(900, 940, 3))),
]

ALL = ForwardOptions(activations=Activations.ALL, kv_cache=KvCache.NONE)


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def reference(
    directory: Path, mode: LinearMode, dtype: torch.dtype
) -> tuple[list[torch.Tensor], dict[tuple[int, str], torch.Tensor]]:
    """Logits of each prompt, and the packed value of every layer and point."""
    config = DeepseekV3Config.from_dict(json.loads((directory / "config.json").read_text()))
    weights = model_weights(StateDict(stored_tensors(directory), mode), config)
    tokens = [torch.tensor(prompt.tokens) for prompt in PROMPTS]
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def record(layer: int, point: str, value: torch.Tensor) -> None:
        seen[layer, point] = value

    logits, _, _ = forward(tokens, weights, config, dtype, record=record)
    return logits, seen


def bytes_of(run: Path) -> dict[str, str]:
    """Digest of every file of a run."""
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(run.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("dtype", Arithmetic)
@pytest.mark.parametrize(
    ("checkpoint", "mode"),
    [
        ("bf16", LinearMode.UNQUANTIZED),
        ("fp8", LinearMode.WEIGHT_ONLY),
        ("fp8", LinearMode.STORED),
        ("nvfp4", LinearMode.WEIGHT_ONLY),
        ("nvfp4", LinearMode.STORED),
    ],
)
def test_a_streamed_run_has_the_values_of_the_reference(
    checkpoint: str, mode: LinearMode, dtype: Arithmetic, tmp_path: Path
) -> None:
    expected, points = reference(TINY / checkpoint, mode, dtype.dtype)

    options = ForwardOptions(
        mode=mode, arithmetic=dtype, activations=Activations.ALL, kv_cache=KvCache.NONE
    )
    run = run_forward(TINY / checkpoint, PROMPTS, tmp_path / "run", options).run

    for prompt, logits in zip(run.prompts, expected, strict=True):
        assert torch.equal(run.logits(prompt), logits.to(run.logits(prompt).dtype))
    lengths = [len(prompt.tokens or ()) for prompt in PROMPTS]
    for layer in range(5):
        assert run.points(layer) == (POINTS[:5] if layer == 0 else POINTS)
        for point in run.points(layer):
            for prompt, part in zip(
                run.prompts, torch.split(points[layer, point], lengths), strict=True
            ):
                assert torch.equal(run.point(layer, prompt, point), part)


def test_compressed_tensors_decode_with_the_reciprocal_of_their_scale(tmp_path: Path) -> None:
    directory = GOLDENS / "small-deepseek-v3" / "compressed-tensors"
    prompts = [Prompt(id="a", tokens=tuple(range(40)))]
    config = DeepseekV3Config.from_dict(json.loads((directory / "config.json").read_text()))
    source = StateDict(stored_tensors(directory), LinearMode.STORED)
    expected, _, _ = forward([torch.arange(40)], model_weights(source, config), config)

    run = run_forward(directory, prompts, tmp_path / "run", ForwardOptions()).run

    assert run.info.mode == "stored"
    assert torch.equal(run.logits("a"), expected[0])


class CountingStorage(LocalStorage):
    """Counts how often each byte range is read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: Counter[tuple[str, int, int]] = Counter()

    def read(self, name: str, start: int, stop: int) -> bytes:
        self.reads[name, start, stop] += 1
        return super().read(name, start, stop)


def test_only_experts_that_were_chosen_are_read_and_every_weight_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = CountingStorage(TINY / "nvfp4")

    def opened(location: Path) -> Checkpoint:
        checkpoint = open_checkpoint(location)
        checkpoint.storage = storage
        return checkpoint

    monkeypatch.setattr("nvfp4check.forward.streaming.open_checkpoint", opened)
    prompt = Prompt(id="one", tokens=(17,))
    run = run_forward(TINY / "nvfp4", [prompt], tmp_path / "run", ALL).run

    checkpoint = open_checkpoint(TINY / "nvfp4")
    for name, entry in checkpoint.tensors.items():
        if ".mlp.experts." in name and not name.startswith("model.layers.5."):
            layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
            chosen = run.point(layer, "one", "router_experts").flatten().tolist()
            assert storage.reads[entry.shard, entry.start, entry.stop] == (expert in chosen)
        elif name.startswith("model.layers.5."):
            assert storage.reads[entry.shard, entry.start, entry.stop] == 0
    assert max(storage.reads.values()) == 1


def test_a_run_killed_in_the_middle_continues_to_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = slowed_copy(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def command(out: Path, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "nvfp4check", "forward", str(checkpoint)),
            *("--mode", "weight-only", "--activations", "all", "--out", str(out), *more),
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(whole), check=True, env=environment, stdout=subprocess.DEVNULL)

    process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (killed / "state").is_dir() or not any((killed / "state").glob("*.safetensors")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "logits.safetensors").exists()

    subprocess.run(
        command(killed, "--resume"), check=True, env=environment, stdout=subprocess.DEVNULL
    )
    assert bytes_of(killed) == bytes_of(whole)


def slowed_copy(tmp_path: Path) -> Path:
    """A checkpoint of 24 layers, the tiny model's repeated, so that a kill hits the middle."""
    source = stored_tensors(TINY / "nvfp4")
    config = json.loads((TINY / "nvfp4" / "config.json").read_text())
    config["num_hidden_layers"] = 24
    config["num_nextn_predict_layers"] = 0
    tensors = {name: t for name, t in source.items() if not name.startswith("model.layers.")}
    for layer in range(24):
        origin = 0 if layer == 0 else 1 + layer % 4
        for name, tensor in source.items():
            if name.startswith(f"model.layers.{origin}."):
                tensors[name.replace(f"layers.{origin}.", f"layers.{layer}.", 1)] = tensor.clone()
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config))
    for name in ("hf_quant_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_bytes((TINY / "nvfp4" / name).read_bytes())
    return copy


@pytest.mark.parametrize("layers_before", [1, 3, 5])
def test_a_run_stopped_after_some_layers_continues_to_the_same_bytes(
    layers_before: int, tmp_path: Path
) -> None:
    run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "whole", ALL)

    some = ForwardOptions(
        activations=Activations.ALL, kv_cache=KvCache.NONE, layers=LayerRange(0, layers_before)
    )
    run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "parts", some)
    rest = ForwardOptions(
        activations=Activations.ALL,
        kv_cache=KvCache.NONE,
        layers=LayerRange(layers_before) if layers_before < 5 else LayerRange(),
        resume=True,
    )
    result = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "parts", rest)

    assert result.layers == 5 - layers_before
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("layers", "message"), [(LayerRange(3, 5), "go on at layer 3"), (LayerRange(0, 1), "already")]
)
def test_a_run_goes_on_only_where_it_stands(
    layers: LayerRange, message: str, tmp_path: Path
) -> None:
    run_forward(TINY / "bf16", PROMPTS, tmp_path / "run", ForwardOptions(layers=LayerRange(0, 2)))

    with pytest.raises(CheckError, match=message):
        run_forward(
            TINY / "bf16", PROMPTS, tmp_path / "run", ForwardOptions(layers=layers, resume=True)
        )


def test_resuming_a_complete_run_computes_nothing(tmp_path: Path) -> None:
    run_forward(TINY / "bf16", PROMPTS, tmp_path / "run")
    before = bytes_of(tmp_path / "run")

    result = run_forward(TINY / "bf16", PROMPTS, tmp_path / "run", ForwardOptions(resume=True))

    assert result.layers == 0
    assert bytes_of(tmp_path / "run") == before


def test_a_run_made_differently_is_not_continued_and_the_difference_is_named(
    tmp_path: Path,
) -> None:
    run_forward(TINY / "bf16", PROMPTS, tmp_path / "run", ForwardOptions(layers=LayerRange(0, 2)))

    double = ForwardOptions(arithmetic=Arithmetic.FLOAT64, resume=True)
    with pytest.raises(CheckError, match="dtype 'float32' then, 'float64' now"):
        run_forward(TINY / "bf16", PROMPTS, tmp_path / "run", double)
    with pytest.raises(CheckError, match="another checkpoint"):
        run_forward(
            TINY / "nvfp4",
            PROMPTS,
            tmp_path / "run",
            ForwardOptions(mode=LinearMode.WEIGHT_ONLY, resume=True),
        )
    with pytest.raises(CheckError, match="--resume"):
        run_forward(TINY / "bf16", PROMPTS, tmp_path / "run")


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")

    with pytest.raises(CheckError, match="holds no run"):
        run_forward(TINY / "bf16", PROMPTS, tmp_path)


def test_the_best_logits_are_those_of_the_whole_vocabulary(tmp_path: Path) -> None:
    full = run_forward(TINY / "bf16", PROMPTS, tmp_path / "full").run
    best = run_forward(
        TINY / "bf16", PROMPTS, tmp_path / "best", ForwardOptions(logits=Logits("topk", 7))
    ).run

    assert not best.has_logits
    for prompt in full.prompts:
        logits = full.logits(prompt)
        values, tokens, total = best.top_logits(prompt)
        expected = logits.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :7])
        assert torch.equal(tokens.long(), expected.indices[:, :7])
        # 1024 positive terms in float64: relative error of the sum below 1024 * 2**-53
        assert ((total - logits.double().logsumexp(1)).abs() < 1e-12).all()


def test_the_kept_state_gives_the_logits_when_it_meets_the_head(tmp_path: Path) -> None:
    full = run_forward(TINY / "bf16", PROMPTS, tmp_path / "full").run
    state = run_forward(
        TINY / "bf16", PROMPTS, tmp_path / "state", ForwardOptions(logits=Logits("hidden"))
    ).run

    head = stored_tensors(TINY / "bf16")["lm_head.weight"].double()
    for prompt in full.prompts:
        x = state.final_hidden(prompt).double()
        bound = 258 * 2.0**-24 * (x.abs() @ head.abs().T)  # a float32 sum of 256 products
        assert ((full.logits(prompt) - x @ head.T).abs() <= bound).all()


def test_hidden_keeps_the_residual_stream_and_the_routes(tmp_path: Path) -> None:
    run = run_forward(
        TINY / "bf16", PROMPTS, tmp_path / "run", ForwardOptions(activations=Activations.HIDDEN)
    ).run

    assert run.points(0) == ("hidden",)
    assert run.points(1) == ("hidden", "router_scores", "router_experts", "router_weights")


def perturbed_hidden(tmp_path: Path, name: str, seed: int, prompts: list[Prompt]) -> Run:
    options = ForwardOptions(
        activations=Activations.HIDDEN, perturbation=Perturbation("bfloat16"), seed=seed
    )
    return run_forward(TINY / "bf16", prompts, tmp_path / name, options).run


def test_noise_is_of_the_size_of_a_rounding_and_follows_from_the_seed(tmp_path: Path) -> None:
    plain = run_forward(
        TINY / "bf16", PROMPTS, tmp_path / "plain", ForwardOptions(activations=Activations.HIDDEN)
    ).run
    noisy = perturbed_hidden(tmp_path, "noisy", 1, PROMPTS)
    again = perturbed_hidden(tmp_path, "again", 1, PROMPTS[::-1])
    other = perturbed_hidden(tmp_path, "other", 2, PROMPTS)

    for prompt in plain.prompts:
        before, after = plain.point(0, prompt, "hidden"), noisy.point(0, prompt, "hidden")
        moved = ((after - before) / before).abs()
        # Uniform up to 2**-8, so 2**-9 in the mean; five standard deviations of 256 draws are 18 %.
        assert 0.8 < float(moved.mean()) * 2**9 < 1.2
        assert float(moved.max()) <= 2**-8 * 1.0001
        assert torch.equal(again.point(0, prompt, "hidden"), after)
        assert not torch.equal(other.point(0, prompt, "hidden"), after)


def test_the_routes_of_another_run_are_taken(tmp_path: Path) -> None:
    quantized = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "quantized", ALL).run

    forced = ForwardOptions(activations=Activations.ALL, routing=tmp_path / "quantized")
    base = run_forward(TINY / "bf16", PROMPTS, tmp_path / "forced", forced).run

    for layer in range(1, 5):
        for prompt in base.prompts:
            assert torch.equal(
                base.point(layer, prompt, "router_experts"),
                quantized.point(layer, prompt, "router_experts"),
            )


def test_routes_of_other_tokens_are_refused(tmp_path: Path) -> None:
    run_forward(TINY / "bf16", PROMPTS, tmp_path / "run", ALL)
    others = [Prompt(id="a", tokens=(1, 2, 3))]

    with pytest.raises(CheckError, match="not the same tokens for prompt 'a'"):
        run_forward(
            TINY / "bf16", others, tmp_path / "forced", ForwardOptions(routing=tmp_path / "run")
        )


def test_an_fp8_cache_changes_what_attention_sees(tmp_path: Path) -> None:
    without = run_forward(TINY / "nvfp4", PROMPTS, tmp_path / "without", ALL).run
    through = run_forward(
        TINY / "nvfp4", PROMPTS, tmp_path / "through", ForwardOptions(activations=Activations.ALL)
    ).run

    a, b = without.point(0, "a", "attn_output"), through.point(0, "a", "attn_output")
    difference = float((a - b).norm() / a.norm())
    assert 0 < difference < 2**-4  # E4M3 rounds a value by at most 2**-4 of it
    assert torch.equal(without.point(0, "a", "attn_input"), through.point(0, "a", "attn_input"))


Edit = Callable[[dict[str, torch.Tensor], dict[str, object]], None]


def edited(tmp_path: Path, edit: Edit, source: str = "nvfp4") -> Path:
    """A copy of a tiny checkpoint with its tensors or its configuration changed."""
    tensors = stored_tensors(TINY / source)
    config = json.loads((TINY / source / "config.json").read_text())
    edit(tensors, config)
    copy = tmp_path / "edited"
    copy.mkdir()
    save_file(tensors, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config))
    return copy


EXPERT = "model.layers.2.mlp.experts.7.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, c: t.pop(f"{EXPERT}.weight"), rf"{EXPERT}\.weight"),
        (lambda t, c: t.pop(f"{EXPERT}.weight_scale_2"), "lacks its global-scale"),
        (
            lambda t, c: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, 1:]}),
            r"expected F8_E4M3 \[64, 16\]",
        ),
        (
            lambda t, c: t.update({"model.norm.weight": torch.ones(7)}),
            r"model\.norm\.weight: shape \[7\], expected \[256\]",
        ),
        (lambda t, c: c.update(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
        (lambda t, c: c.pop("kv_lora_rank"), "lacks kv_lora_rank"),
        (lambda t, c: c.update(scoring_func="softmax"), "softmax"),
        (lambda t, c: c.update(hidden_size="256"), "hidden_size '256', expected a whole number"),
        (lambda t, c: c.update(num_hidden_layers=10**9), "promises 1,000,000,000 layers"),
        (lambda t, c: c.update(n_group=0), "n_group 0"),
        (lambda t, c: c.update(rope_theta=-1), "rope_theta -1"),
        (lambda t, c: c["rope_scaling"].update(factor="40"), r"rope_scaling\.factor '40'"),
        (lambda t, c: c.update(qk_rope_head_dim=15), "expected an even number"),
    ],
    ids=[
        "expert",
        "global-scale",
        "scale-shape",
        "norm",
        "architecture",
        "config",
        "scoring",
        "string",
        "layers",
        "groups",
        "theta",
        "factor",
        "odd",
    ],
)
def test_a_checkpoint_that_cannot_be_computed_is_refused_before_the_first_layer(
    edit: Edit, message: str, tmp_path: Path
) -> None:
    checkpoint = edited(tmp_path, lambda t, c: (edit(t, c), _contiguous(t))[1])

    with pytest.raises(CheckError, match=message):
        run_forward(checkpoint, PROMPTS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _contiguous(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.contiguous()


def test_a_value_that_is_not_finite_is_reported_with_layer_and_token(tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> None:
        tensors["model.layers.3.self_attn.o_proj.weight_scale"].view(torch.uint8)[4, 2] = 0x7F

    checkpoint = edited(tmp_path, poison)

    with pytest.raises(CheckError, match="layer 3: the state of 42 of 42 tokens is not finite"):
        run_forward(checkpoint, PROMPTS, tmp_path / "run")


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckError, match="cannot be written: Not a directory"):
        run_forward(TINY / "bf16", PROMPTS, tmp_path / "file" / "run")


def test_too_little_memory_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"--max-memory is 0\.10"):
        run_forward(
            TINY / "bf16", PROMPTS, tmp_path / "run", ForwardOptions(max_memory=int(0.1 * 2**30))
        )
    assert not (tmp_path / "run").exists()


def test_unquantized_is_refused_for_a_quantised_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="weights are quantised, first"):
        run_forward(
            TINY / "fp8", PROMPTS, tmp_path / "run", ForwardOptions(mode=LinearMode.UNQUANTIZED)
        )
