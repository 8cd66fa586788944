"""FP8, NVFP4 and BF16 of the tiny trained model held against one another."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, Judge, agree
from nvfp4check.agreement.document import agree_document, logits_numbers
from nvfp4check.agreement.statistics import Decision
from nvfp4check.agreement.words import Words
from nvfp4check.findings import CheckError
from nvfp4check.forward.options import ForwardOptions, KvCache
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

TinyRun = Callable[..., Run]
TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"


def plain_numpy(reference: Path, candidate: Path) -> dict[str, float]:
    """The same figures from the files alone: no code of the package, numpy's own functions."""
    sides = [load_file(run / "logits.safetensors") for run in (reference, candidate)]
    tokens = load_file(reference / "tokens.safetensors")
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(float(value))

    for prompt in tokens:
        for t, (a, b) in enumerate(zip(sides[0][prompt], sides[1][prompt], strict=True)):
            p, q = (np.exp(x.astype(np.float64) - np.max(x)) for x in (a, b))
            p, q = p / p.sum(), q / q.sum()
            m = (p + q) / 2
            add("kl", np.sum(p * np.log(p / q)))
            add("kl_reverse_mean", np.sum(q * np.log(q / p)))
            add("jsd_mean", (np.sum(p * np.log(p / m)) + np.sum(q * np.log(q / m))) / 2)
            best, other = (np.argsort(-x, kind="stable") for x in (a, b))
            add("top1", best[0] == other[0])
            add("top5_overlap", len(set(best[:5]) & set(other[:5])) / 5)
            add("top10_overlap", len(set(best[:10]) & set(other[:10])) / 10)
            if t + 1 < len(tokens[prompt]):
                follows = tokens[prompt][t + 1]
                add("nll_reference", -np.log(p[follows]))
                add("nll_candidate", -np.log(q[follows]))
                add("delta_p", q[follows] - p[follows])
    kl = np.array(rows["kl"])
    found = {name: float(np.mean(values)) for name, values in rows.items() if name != "kl"}
    return {
        **{name: v for name, v in found.items() if not name.startswith(("nll", "delta"))},
        "positions": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p95": float(np.quantile(kl, 0.95)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_p999": float(np.quantile(kl, 0.999)),
        "kl_max": float(kl.max()),
        "ppl_reference": float(np.exp(found["nll_reference"])),
        "ppl_candidate": float(np.exp(found["nll_candidate"])),
        "ppl_log_ratio": found["nll_candidate"] - found["nll_reference"],
        "delta_p_rms": float(np.sqrt(np.mean(np.square(rows["delta_p"])))),
    }


@pytest.mark.parametrize("candidate", ["fp8", "nvfp4"])
def test_every_number_is_that_of_a_plain_numpy_script(tiny_run: TinyRun, candidate: str) -> None:
    reference, other = tiny_run("bf16"), tiny_run(candidate)

    result = agree(reference, other, AgreeOptions(judge=Judge.NONE))

    assert result.logits is not None
    found = logits_numbers(result.logits)
    expected = plain_numpy(reference.path, other.path)
    assert expected.keys() <= found.keys()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_fp8_is_nearer_to_bf16_than_nvfp4_and_the_other_way_round(tiny_run: TinyRun) -> None:
    # Without the passage: it would be two thirds of all positions, and a single prompt.
    short = [p for p in tiny_run("bf16").info.prompts if p.id.startswith("prompt")]
    reference, fp8, nvfp4 = (narrowed(tiny_run(name), short) for name in ("bf16", "fp8", "nvfp4"))

    one = agree(reference, fp8, AgreeOptions(versus=nvfp4, judge=Judge.NONE)).versus
    other = agree(reference, nvfp4, AgreeOptions(versus=fp8, judge=Judge.NONE)).versus

    assert one is not None
    assert other is not None
    assert (one.nearer, other.nearer) == ("candidate", "versus")


def test_two_runs_that_are_only_noise_are_not_ranked(tiny_run: TinyRun) -> None:
    options = AgreeOptions(versus=tiny_run("bf16", 2), judge=Judge.NONE)

    versus = agree(tiny_run("bf16"), tiny_run("bf16", 1), options).versus

    assert versus is not None
    assert versus.nearer is None


def test_noise_stays_within_the_floor_of_other_noise(tiny_run: TinyRun) -> None:
    noise = (tiny_run("bf16", 1), tiny_run("bf16", 2))

    result = agree(tiny_run("bf16"), tiny_run("bf16", 3), AgreeOptions(noise=noise))

    assert result.divergence is None
    assert result.verdict is Decision.PASS


def test_nvfp4_leaves_the_floor_at_the_first_quantised_linear(tiny_run: TinyRun) -> None:
    noise = (tiny_run("bf16", 1), tiny_run("bf16", 2))

    result = agree(tiny_run("bf16"), tiny_run("nvfp4"), AgreeOptions(noise=noise))

    assert result.verdict is Decision.FAIL
    assert result.divergence is not None
    # o_proj of the first layer is the first linear in NVFP4.
    assert (result.divergence.layer, result.divergence.point) == (0, "attn_output")
    assert all(flip.legal for layer in result.routing for flip in layer.flips)
    assert result.logits is not None
    assert result.logits.kl.mean > 10 * result.noise_logits[0].kl.mean


@pytest.mark.parametrize(
    ("max_kl", "decision"),
    [(4.0, Decision.PASS), (0.005, Decision.FAIL), (None, Decision.UNDECIDED)],
)
def test_a_limit_decides(tiny_run: TinyRun, max_kl: float | None, decision: Decision) -> None:
    reference, candidate = tiny_run("bf16"), tiny_run("nvfp4")
    if max_kl is None:  # at the mean itself no sample decides
        plain = agree(reference, candidate, AgreeOptions(judge=Judge.NONE))
        assert plain.logits is not None
        max_kl = plain.logits.kl.mean

    result = agree(reference, candidate, AgreeOptions(max_kl=max_kl, min_top1=0.3))

    assert result.verdict is decision


def test_without_limits_or_noise_only_equal_runs_pass(tiny_run: TinyRun) -> None:
    reference = tiny_run("bf16")

    same = agree(reference, reference)
    other = agree(reference, tiny_run("nvfp4"))

    assert (same.verdict, same.divergence) == (Decision.PASS, None)
    assert (other.verdict, other.criteria) == (Decision.UNDECIDED, ())
    assert other.divergence is not None
    assert other.divergence.held_against == "nothing"


def test_kl_splits_into_arithmetic_and_other_experts(
    tiny_run: TinyRun, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    reference = tiny_run("bf16")
    options = ForwardOptions(kv_cache=KvCache.NONE, routing=reference.path)
    forced = run_forward(TINY / "nvfp4", tiny_prompts, tmp_path / "forced", options).run

    split = agree(reference, tiny_run("nvfp4"), AgreeOptions(forced=forced, judge=Judge.NONE)).split

    assert split is not None
    assert split.total.mean == pytest.approx(split.arithmetic.mean + split.flips.mean, rel=1e-9)
    assert split.flips.mean > 0


def test_transformers_on_the_same_weights_agrees(tiny_run: TinyRun) -> None:
    golden = Run.open(TINY / "activations" / "transformers-float32")
    noise = tiny_run("bf16", 1)
    mine = tiny_run("bf16")
    shared = [p for p in mine.info.prompts if p.id.startswith("prompt")]

    options = AgreeOptions(max_kl=1e-9, noise=(narrowed(noise, shared),))
    result = agree(golden, narrowed(mine, shared), options)

    assert result.verdict is Decision.PASS
    assert result.divergence is None
    assert not any(layer.flips for layer in result.routing)


def narrowed(run: Run, prompts: Sequence[Any]) -> Run:
    return Run(run.path, replace(run.info, prompts=tuple(prompts)))


def test_prompts_with_other_tokens_are_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    prompts = [Prompt(id="prompt0", tokens=(1, 2, 3))]
    other = run_forward(TINY / "bf16", prompts, tmp_path / "run").run

    with pytest.raises(CheckError, match=r"prompt 'prompt0'.*were given other tokens: 8 and 3"):
        agree(tiny_run("bf16"), other)


def test_the_document_is_plain_json_with_the_text_of_the_worst_tokens(tiny_run: TinyRun) -> None:
    reference = tiny_run("bf16")
    result = agree(reference, tiny_run("nvfp4"), AgreeOptions(noise=(tiny_run("bf16", 1),)))

    document = agree_document(result, Words.of(reference))

    again = json.loads(json.dumps(document, allow_nan=False))
    assert again["schema"] == "nvfp4check/agree/1"
    assert set(again["first_divergence"]) >= {"layer", "point", "prompt", "token"}
    worst = again["logits"]["worst"][0]
    assert isinstance(worst["reference"]["text"], str)
    assert worst["kl"] == again["logits"]["kl_max"]
    assert (
        sum(count for _, count in again["logits"]["kl_histogram"]) == again["logits"]["positions"]
    )
    buckets = again["logits"]["by_confidence"]
    assert sum(bucket["positions"] for bucket in buckets) == again["logits"]["positions"]
