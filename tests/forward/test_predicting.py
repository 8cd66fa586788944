"""Multi-token prediction in the streamed forward: the reference's values, resumed and refused."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, agree
from nvfp4check.engine.local import LocalEngine
from nvfp4check.findings import CheckError
from nvfp4check.forward.journal import Journal
from nvfp4check.forward.options import (
    Arithmetic,
    ForwardOptions,
    KvCache,
    LayerRange,
    Logits,
    Perturbation,
)
from nvfp4check.forward.predicting import rows_at, shortened
from nvfp4check.forward.streaming import run_forward
from nvfp4check.goldens import Closeness, record, verify
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.linear import LinearMode
from nvfp4ref.deepseek_v3.model import empty_caches, forward
from nvfp4ref.deepseek_v3.mtp import mtp
from nvfp4ref.deepseek_v3.norm import rms_norm
from nvfp4ref.deepseek_v3.weights import StateDict, model_weights, mtp_weights

Tensors = dict[str, torch.Tensor]
Bytes = Callable[[Path], dict[str, str]]


@pytest.fixture
def with_mtp(keep_all: ForwardOptions) -> ForwardOptions:
    return replace(keep_all, mtp=True)


@pytest.fixture
def two_layers(
    tiny: Path, stored_tensors: Callable[[Path], Tensors], tmp_path: Path
) -> tuple[Path, Tensors]:
    """A checkpoint with a second MTP layer: the first with its block's weights another's."""
    tensors = stored_tensors(tiny / "bf16")
    for name in [name for name in tensors if name.startswith("model.layers.5.")]:
        other = name.replace("layers.5.", "layers.4.")
        tensors[name.replace("layers.5.", "layers.6.")] = tensors.get(other, tensors[name]).clone()
    config = json.loads((tiny / "bf16" / "config.json").read_text())
    copy = tmp_path / "two"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 2}))
    save_file(tensors, copy / "model.safetensors")
    return copy, tensors


@pytest.mark.parametrize(
    ("checkpoint", "mode", "dtype"),
    [
        ("bf16", LinearMode.UNQUANTIZED, Arithmetic.FLOAT64),
        ("bf16", LinearMode.UNQUANTIZED, Arithmetic.FLOAT32),
        ("bf16", LinearMode.UNQUANTIZED, Arithmetic.BFLOAT16),
        ("fp8", LinearMode.STORED, Arithmetic.FLOAT32),
        ("nvfp4", LinearMode.STORED, Arithmetic.FLOAT32),
    ],
)
def test_the_mtp_layer_has_the_values_of_the_reference(
    checkpoint: str,
    mode: LinearMode,
    dtype: Arithmetic,
    tiny: Path,
    prompts: list[Prompt],
    stored_tensors: Callable[[Path], Tensors],
    with_mtp: ForwardOptions,
    tmp_path: Path,
) -> None:
    source = StateDict(stored_tensors(tiny / checkpoint), mode)
    config = DeepseekV3Config.from_dict(json.loads((tiny / checkpoint / "config.json").read_text()))
    tokens = [torch.tensor(prompts[i].tokens) for i in (0, 2)]  # the other has one token
    _, hidden, _ = forward(tokens, model_weights(source, config), config, dtype.dtype)
    rows = [len(of_prompt) - 1 for of_prompt in tokens]
    points: dict[str, torch.Tensor] = {}
    expected, _ = mtp(
        torch.cat([state[:-1] for state in hidden]),
        torch.cat([of_prompt[1:] for of_prompt in tokens]),
        empty_caches(2, config, dtype.dtype),
        rows,
        mtp_weights(source, 5, config),
        config,
        record=points.__setitem__,
    )

    options = replace(with_mtp, mode=mode, arithmetic=dtype)
    run = run_forward(tiny / checkpoint, prompts, tmp_path / "run", options).run

    assert run.info.mtp == 1
    assert run.layers == (0, 1, 2, 3, 4, 5)
    assert set(run.points(5)) == set(points)
    for prompt, i in (("a", 0), ("c", 1)):
        logits = run.mtp_logits(5, prompt)
        assert torch.equal(logits, torch.split(expected, rows)[i].to(logits.dtype))
        for point, value in points.items():
            assert torch.equal(run.point(5, prompt, point), torch.split(value, rows)[i])
    assert set(load_file(run.path / "mtp" / "005" / "logits.safetensors")) == {"a", "c"}


def test_the_mtp_layer_agrees_with_the_code_that_trained_it(
    tiny: Path, with_mtp: ForwardOptions, tmp_path: Path
) -> None:
    recorded = load_file(tiny / "activations" / "mtp-trainer-float32.safetensors")
    tokens = load_file(tiny / "activations" / "transformers-float32" / "tokens.safetensors")
    prompts = [Prompt(id=f"prompt{i}", tokens=tuple(tokens[f"prompt{i}"].tolist())) for i in (0, 1)]

    run = run_forward(tiny / "bf16", prompts, tmp_path / "run", with_mtp).run

    for prompt in run.prompts:
        expected = recorded[f"{prompt}.mtp.logits"].reshape(run.mtp_logits(5, prompt).shape)
        distance = (run.mtp_logits(5, prompt) - expected).norm() / expected.norm()
        assert float(distance) < 2e-5  # sums of float32 in another order, as for goldens


def test_the_trunk_is_what_it_is_without_mtp(
    tiny: Path, prompts: list[Prompt], with_mtp: ForwardOptions, bytes_of: Bytes, tmp_path: Path
) -> None:
    run_forward(tiny / "nvfp4", prompts, tmp_path / "plain", replace(with_mtp, mtp=False))
    run_forward(tiny / "nvfp4", prompts, tmp_path / "more", with_mtp)

    plain, more = bytes_of(tmp_path / "plain"), bytes_of(tmp_path / "more")
    assert more.keys() - plain.keys() == {"layers/005.safetensors", "mtp/005/logits.safetensors"}
    assert [name for name in plain if plain[name] != more[name]] == ["run.json"]


def test_a_second_layer_takes_the_normed_state_of_the_first_and_the_token_after(
    two_layers: tuple[Path, Tensors],
    prompts: list[Prompt],
    with_mtp: ForwardOptions,
    tmp_path: Path,
) -> None:
    checkpoint, tensors = two_layers
    source = StateDict(tensors)
    config = DeepseekV3Config.from_dict(json.loads((checkpoint / "config.json").read_text()))
    run = run_forward(checkpoint, prompts, tmp_path / "run", with_mtp).run
    tokens, weights = torch.tensor(prompts[0].tokens), mtp_weights(source, 6, config)
    first = rms_norm(
        run.point(5, "a", "hidden"), mtp_weights(source, 5, config).norm, config.rms_norm_eps
    )

    expected, _ = mtp(
        first[:-1],
        tokens[2:],
        empty_caches(1, config, torch.float32),
        [len(tokens) - 2],
        weights,
        config,
    )

    # Packed with another prompt the products are summed in another order.
    assert run.mtp_logits(6, "a").shape == (len(tokens) - 2, 1024)
    assert float((run.mtp_logits(6, "a") - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.parametrize("layer", [4, 5, 6])
def test_a_run_stopped_after_any_layer_continues_to_the_same_bytes(
    layer: int,
    two_layers: tuple[Path, Tensors],
    prompts: list[Prompt],
    with_mtp: ForwardOptions,
    bytes_of: Bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_forward(two_layers[0], prompts, tmp_path / "whole", with_mtp)
    layer_done = Journal.layer_done

    def stop(journal: Journal, done: int, *state: object) -> None:
        layer_done(journal, done, *state)  # type: ignore[arg-type]
        if done == layer:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "layer_done", stop)
        with pytest.raises(KeyboardInterrupt):
            run_forward(two_layers[0], prompts, tmp_path / "parts", with_mtp)
    rest = run_forward(two_layers[0], prompts, tmp_path / "parts", replace(with_mtp, resume=True))

    assert rest.layers == 6 - layer
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_mtp_asked_for_with_some_layers_comes_when_the_last_are_there(
    tiny: Path, prompts: list[Prompt], with_mtp: ForwardOptions, bytes_of: Bytes, tmp_path: Path
) -> None:
    run_forward(tiny / "bf16", prompts, tmp_path / "whole", with_mtp)

    out = tmp_path / "parts"
    run_forward(tiny / "bf16", prompts, out, replace(with_mtp, layers=LayerRange(0, 3)))
    assert not (out / "mtp").exists()
    run_forward(tiny / "bf16", prompts, out, replace(with_mtp, layers=LayerRange(3), resume=True))

    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_work_items_of_an_engine_give_the_same_bytes(
    tiny: Path, prompts: list[Prompt], with_mtp: ForwardOptions, bytes_of: Bytes, tmp_path: Path
) -> None:
    run_forward(tiny / "nvfp4", prompts, tmp_path / "plain", with_mtp)
    engine = replace(with_mtp, engine=LocalEngine())
    run_forward(tiny / "nvfp4", prompts, tmp_path / "items", engine)

    assert bytes_of(tmp_path / "items") == bytes_of(tmp_path / "plain")


def test_noise_and_routes_reach_the_mtp_layer(
    tiny: Path, prompts: list[Prompt], with_mtp: ForwardOptions, tmp_path: Path
) -> None:
    quantized = run_forward(tiny / "nvfp4", prompts, tmp_path / "nvfp4", with_mtp).run
    plain = run_forward(tiny / "bf16", prompts, tmp_path / "plain", with_mtp).run

    forced = replace(with_mtp, routing=quantized.path)
    routed = run_forward(tiny / "bf16", prompts, tmp_path / "routed", forced).run
    noisy = replace(with_mtp, perturbation=Perturbation("bfloat16"), routing=plain.path)
    moved = run_forward(tiny / "bf16", prompts, tmp_path / "moved", noisy).run

    def experts(run: Run) -> torch.Tensor:
        return run.point(5, "a", "router_experts")

    assert not torch.equal(experts(plain), experts(quantized))
    assert torch.equal(experts(routed), experts(quantized))
    difference = (moved.point(5, "a", "hidden") - plain.point(5, "a", "hidden")).norm()
    assert 0 < float(difference / plain.point(5, "a", "hidden").norm()) < 2**-4


def test_what_is_kept_of_mtp_logits_is_what_is_kept_of_the_others(
    tiny: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    full = run_forward(tiny / "bf16", prompts, tmp_path / "full", ForwardOptions(mtp=True)).run
    best = ForwardOptions(mtp=True, logits=Logits("topk", 3))
    few = run_forward(tiny / "bf16", prompts, tmp_path / "few", best).run
    state = ForwardOptions(mtp=True, logits=Logits("hidden"))
    states = run_forward(tiny / "bf16", prompts, tmp_path / "states", state).run

    kept = load_file(few.path / "mtp" / "005" / "logits.safetensors")
    assert torch.equal(
        kept["a/values"], full.mtp_logits(5, "a").sort(descending=True).values[:, :3]
    )
    final = load_file(states.path / "mtp" / "005" / "final_hidden.safetensors")
    assert {name: len(rows) for name, rows in final.items()} == {"a": 26, "c": 13}


def test_a_golden_holds_mtp_as_well(tiny: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    options = ForwardOptions(mtp=True, kv_cache=KvCache.NONE)
    run = run_forward(tiny / "bf16", prompts, tmp_path / "run", options).run
    record(run.path, tmp_path / "golden", "a test")
    logits = tmp_path / "golden" / "mtp" / "005" / "logits.safetensors"

    assert verify(tmp_path / "golden", checkpoint=tiny / "bf16", closeness=Closeness.BITS).holds
    os.unlink(run.path / "mtp" / "005" / "logits.safetensors")
    missing = verify(tmp_path / "golden", run.path).differences
    assert [difference.file for difference in missing] == [
        str(logits.relative_to(tmp_path / "golden"))
    ]


def test_runs_are_held_against_one_another_by_the_models_own_layers(
    tiny: Path, prompts: list[Prompt], with_mtp: ForwardOptions, tmp_path: Path
) -> None:
    runs = [
        run_forward(tiny / name, prompts, tmp_path / name, with_mtp).run for name in ("bf16", "fp8")
    ]

    result = agree(*runs, AgreeOptions())

    assert {held.agreement.layer for held in result.layers} == {0, 1, 2, 3, 4}
    assert [layer.layer for layer in result.routing] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, c: c.update(num_nextn_predict_layers=0), "no layer to compute"),
        (lambda t, c: t.pop("model.layers.5.hnorm.weight"), r"first model\.layers\.5\.hnorm"),
        (lambda t, c: t.pop("model.layers.5.shared_head.head.weight"), r"5\.shared_head\.head"),
        (
            lambda t, c: t.update(
                {"model.layers.5.eh_proj.weight": t["model.layers.5.eh_proj.weight"][:, :256]}
            ),
            r"eh_proj\.weight: shape \[256, 256\], expected \[256, 512\]",
        ),
    ],
)
def test_a_checkpoint_without_a_whole_mtp_layer_is_refused_only_where_it_is_asked_for(
    edit: Callable[[Tensors, dict[str, object]], object],
    message: str,
    edited: Callable[..., Path],
    prompts: list[Prompt],
    tmp_path: Path,
) -> None:
    checkpoint = edited(edit, "bf16")

    run_forward(checkpoint, prompts, tmp_path / "run")
    with pytest.raises(CheckError, match=message):
        run_forward(checkpoint, prompts, tmp_path / "mtp", ForwardOptions(mtp=True))
    assert not (tmp_path / "mtp").exists()


def test_prompts_of_one_token_leave_nothing_to_predict_from(
    tiny: Path, prompts: list[Prompt], with_mtp: ForwardOptions, tmp_path: Path
) -> None:
    with pytest.raises(CheckError, match="take 2 or more"):
        run_forward(tiny / "bf16", prompts[1:2], tmp_path / "run", with_mtp)


def test_layers_of_prediction_begin_with_the_given_states(
    two_layers: tuple[Path, Tensors],
    prompts: list[Prompt],
    with_mtp: ForwardOptions,
    bytes_of: Bytes,
    tmp_path: Path,
) -> None:
    checkpoint, tensors = two_layers
    own = run_forward(checkpoint, prompts, tmp_path / "own", with_mtp).run
    again = run_forward(checkpoint, prompts, tmp_path / "again", replace(with_mtp, inputs=own.path))
    narrow = replace(with_mtp, inputs=own.path, arithmetic=Arithmetic.BFLOAT16)
    given = run_forward(checkpoint, prompts, tmp_path / "given", narrow).run

    ours, theirs = bytes_of(own.path), bytes_of(again.run.path)
    assert [name for name in ours if ours[name] != theirs[name]] == ["run.json"]
    weights = mtp_weights(StateDict(tensors), 6, DeepseekV3Config.from_dict(given.info.config))
    before = own.point(5, "a", "hidden")[:-1].bfloat16()
    state = rms_norm(before, tensors["model.layers.5.shared_head.norm.weight"], 1e-6)
    tokens = tensors["model.layers.6.embed_tokens.weight"][torch.tensor(prompts[0].tokens[2:])]
    halves = [
        rms_norm(x, weight, 1e-6)
        for x, weight in ((tokens, weights.layer.enorm), (state, weights.layer.hnorm))
    ]
    assert torch.equal(
        given.point(6, "a", "eh_proj"), weights.layer.eh_proj(torch.cat(halves, dim=-1))
    )


def test_rows_get_fewer_with_each_layer() -> None:
    lengths = {"a": 4, "b": 1, "c": 2}

    assert rows_at(-1, lengths) == lengths
    assert rows_at(0, lengths) == {"a": 3, "c": 1}
    assert rows_at(1, lengths) == {"a": 2}
    packed = torch.arange(7)
    assert shortened(packed, lengths, rows_at(0, lengths)).tolist() == [0, 1, 2, 5]
