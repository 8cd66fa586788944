"""Two versions of transformers, recorded on a router of negative bias, through `agree` itself.

Where every score is below 0, an expert of a closed group that is masked with 0.0, as transformers
4.57.6 does, is taken before any of an open group; 5.23.0 masks with -inf. Both ran in float32 on
the same weights. The reference is the forward in float64, and the noise the same forward in
float32: what the rounding of float32 alone makes.
"""

import json
from pathlib import Path

import pytest
import torch

from nvfp4check.activations import Run
from nvfp4check.agreement.agree import AgreeOptions, AgreeResult, agree
from nvfp4check.agreement.assertion import assert_agrees
from nvfp4check.agreement.divergence import SCORE_ERROR
from nvfp4check.agreement.statistics import Decision
from nvfp4check.cli.main import main
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions, KvCache
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt

NEGATIVE = Path(__file__).parents[2] / "goldens" / "negative-bias-deepseek-v3"
OLD, NEW = NEGATIVE / "transformers-4.57.6", NEGATIVE / "transformers-5.23.0"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The forward in float64 and in float32, on the prompts that were recorded."""
    golden = Run.open(NEW)
    prompts = [Prompt(id=p, tokens=tuple(golden.tokens(p).tolist())) for p in golden.prompts]
    folder = tmp_path_factory.mktemp("own")
    runs = {}
    for arithmetic in (Arithmetic.FLOAT64, Arithmetic.FLOAT32):
        options = ForwardOptions(
            activations=Activations.ALL, kv_cache=KvCache.NONE, arithmetic=arithmetic
        )
        out = folder / arithmetic.value
        runs[arithmetic.value] = run_forward(NEGATIVE / "float32", prompts, out, options).run
    return runs


def against(own: dict[str, Run], recorded: Path) -> AgreeResult:
    return agree(own["float64"], Run.open(recorded), AgreeOptions(noise=(own["float32"],)))


def test_the_version_that_masks_with_minus_infinity_agrees_at_every_point(
    own: dict[str, Run],
) -> None:
    result = against(own, NEW)

    assert (result.verdict, result.divergence) == (Decision.PASS, None)
    assert len(result.layers) == 19  # five points of three layers, and two of two routers
    assert [point.agreement.key for point in result.layers if point.diverges is not False] == []
    assert [layer.flips for layer in result.routing] == [(), ()]
    assert result.skipped == ()


def test_the_version_that_masks_with_zero_is_caught_at_its_first_router(
    own: dict[str, Run],
) -> None:
    result = against(own, OLD)

    assert result.verdict is Decision.FAIL
    divergence = result.divergence
    assert divergence is not None
    assert (divergence.layer, divergence.point) == (1, "router_experts")
    assert (divergence.place.prompt, divergence.place.token) == ("long", 0)
    assert divergence.held_against == SCORE_ERROR
    # Everything up to the choice agrees, its scores among it; every token is routed elsewhere.
    before = [point for point in result.layers if point.agreement.layer == 0]
    scores = [p for p in result.layers if p.agreement.key == (1, "router_scores")]
    assert [point.diverges for point in (*before, *scores)] == [False] * 6
    first = result.routing[0]
    assert len(first.flips) == first.tokens == 29
    assert all(flip.legal is False for flip in first.flips)


def test_what_it_takes_instead_is_of_groups_that_are_closed(own: dict[str, Run]) -> None:
    result = against(own, OLD)
    scores = own["float64"].point(1, "long", "router_scores")
    assert (scores < 0).all()
    opened = scores.view(len(scores), 4, 2).sum(-1).topk(2).indices

    for flip in result.routing[0].flips:
        if flip.place.prompt == "long":
            groups = {expert // 2 for expert in flip.taken}
            assert groups.isdisjoint(opened[flip.place.token].tolist())


def test_its_own_weights_and_experts_forced_show_no_other_difference(
    own: dict[str, Run], tmp_path: Path
) -> None:
    # Given its choices, the forward agrees with it: the mask is all that is wrong.
    prompts = [
        Prompt(id=p, tokens=tuple(own["float64"].tokens(p).tolist()))
        for p in own["float64"].prompts
    ]
    options = ForwardOptions(activations=Activations.ALL, kv_cache=KvCache.NONE, routing=OLD)
    forced = run_forward(NEGATIVE / "float32", prompts, tmp_path / "forced", options).run
    wide = ForwardOptions(
        activations=Activations.ALL,
        kv_cache=KvCache.NONE,
        routing=OLD,
        arithmetic=Arithmetic.FLOAT64,
    )
    exact = run_forward(NEGATIVE / "float32", prompts, tmp_path / "exact", wide).run

    assert_agrees(OLD, exact, noise=forced)


def test_the_command_names_layer_point_and_reason_in_every_format(
    own: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["agree", str(own["float64"].path), str(OLD), "--noise", str(own["float32"].path)]

    assert main([*call]) == 1
    text = capsys.readouterr().out
    for format in ("json", "html", "markdown", "junit"):
        assert main([*call, "--format", format, "--output", str(tmp_path / format)]) == 1

    where = "layer 1, router_experts, prompt long, token 0; held against the error of the scores"
    why = "58 of 58 choices of experts differ, 42 of them by more than the error of the scores"
    assert where in text
    assert why in text
    for format in ("html", "markdown"):
        page = (tmp_path / format).read_text().replace("\\_", "_")
        assert where in page
        assert why in page
    assert f'message="First divergence: {where}.' in (tmp_path / "junit").read_text()
    document = json.loads((tmp_path / "json").read_text())
    assert document["verdict"] == "fail"
    assert document["first_divergence"] == {
        "layer": 1,
        "point": "router_experts",
        "prompt": "long",
        "token": 0,
        "text": None,
        "held_against": "error of the scores",
    }
    assert (document["routing"]["flips"], document["routing"]["unexplained"]) == (58, 42)


def test_the_recorded_runs_differ_in_nothing_before_the_choice() -> None:
    old, new = Run.open(OLD), Run.open(NEW)

    for prompt in new.prompts:
        for point in ("attn_input", "attn_output", "mlp_input", "mlp_output", "hidden"):
            assert torch.equal(old.point(0, prompt, point), new.point(0, prompt, point))
        assert torch.equal(
            old.point(1, prompt, "router_scores"), new.point(1, prompt, "router_scores")
        )
        assert not torch.equal(
            old.point(1, prompt, "router_experts"), new.point(1, prompt, "router_experts")
        )
