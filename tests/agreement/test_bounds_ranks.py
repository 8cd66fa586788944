"""Engines of several ranks, simulated: within the bounds of their ranks, and beyond if wrong."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nvfp4check.activations import PromptInfo, Run, RunInfo
from nvfp4check.agreement.agree import AgreeOptions, agree
from nvfp4check.agreement.declared import declared
from nvfp4check.agreement.layers import VALUE_POINTS
from nvfp4check.agreement.statistics import Decision
from nvfp4check.capture import Tap, capture, first_output
from nvfp4check.findings import CheckError
from nvfp4check.forward import layers as forward_layers
from nvfp4check.forward.options import Activations, Arithmetic, ForwardOptions
from nvfp4check.forward.streaming import run_forward
from nvfp4check.tokens import Prompt
from nvfp4ref.deepseek_v3 import model, routing
from nvfp4ref.deepseek_v3.config import DeepseekV3Config
from nvfp4ref.deepseek_v3.model import DecoderLayerWeights, decoder_layer
from nvfp4ref.deepseek_v3.moe import MlpWeights, MoeWeights
from nvfp4ref.deepseek_v3.mtp import mtp_layer

TINY = Path(__file__).parents[2] / "goldens" / "tiny-deepseek-v3"
PROMPTS = [
    Prompt(id=f"p{n}", tokens=tuple((37 * i * i + 5 * i + n) % 1024 for i in range(n)))
    for n in (24, 13)
]
BOUNDS = ("bfloat16", "bfloat16/tp2", "bfloat16/tp4")

#: How a fault changes the shares that are added up.
Fault = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def ring(parts: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    columns = torch.arange(parts[0].shape[-1]).chunk(len(parts))
    return torch.cat(
        [chain([*parts[at:], *parts[:at]], generator)[:, c] for at, c in enumerate(columns)], dim=-1
    )


def chain(parts: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def tree(parts: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    left = list(parts)
    while len(left) > 1:
        one, other = sorted(torch.randperm(len(left), generator=generator)[:2].tolist())
        left.append(left.pop(other) + left.pop(one))
    return left[0]


def one_shot(parts: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    return torch.stack(parts).float().sum(0).to(parts[0].dtype)


ORDERS = {"ring": ring, "chain": chain, "tree": tree, "one-shot": one_shot}


@dataclass(frozen=True)
class Engine:
    """So many ranks, how their shares are added up, and what they have of the experts."""

    ranks: int
    order: str
    #: split: a share of each. whole: some experts each. apart: split, and the shared expert's
    #: output added up on its own.
    experts: str
    seed: int = 0
    fault: Fault = list

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def sum(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return ORDERS[self.order](self.fault(parts), self.generator)

    def shares(self, linear: Any, x: torch.Tensor) -> list[torch.Tensor]:
        """Return each rank's product, rounded to the dtype of x."""
        parts = []
        with linear.held():
            for columns in torch.arange(x.shape[-1]).chunk(self.ranks):
                own = torch.zeros_like(x)
                own[:, columns] = x[:, columns]
                parts.append(linear(own))
        return parts

    def parallel(self, linear: Any) -> Any:
        return lambda x: self.sum(self.shares(linear, x))

    def layer(self, *args: Any, **more: Any) -> Any:
        weights: DecoderLayerWeights = args[3]
        o_proj = self.parallel(weights.self_attn.o_proj)
        mlp = weights.mlp
        if isinstance(mlp, MlpWeights):
            mlp = replace(mlp, down_proj=self.parallel(mlp.down_proj))
        weights = replace(weights, self_attn=replace(weights.self_attn, o_proj=o_proj), mlp=mlp)
        return decoder_layer(*args[:3], weights, *args[4:], **more)

    def predictor(self, *args: Any, **more: Any) -> Any:
        weights = replace(args[4], eh_proj=self.parallel(args[4].eh_proj))
        with patch("nvfp4ref.deepseek_v3.mtp.decoder_layer", self.layer):
            return mtp_layer(*args[:4], weights, *args[5:], **more)

    def moe(
        self,
        x: torch.Tensor,
        weights: MoeWeights,
        config: DeepseekV3Config,
        forced: torch.Tensor | None,
        record: Callable[[str, torch.Tensor], None],
    ) -> torch.Tensor:
        """Compute the experts as an engine does: the sum of a rank in bfloat16, then scaled."""
        logits = x.float() @ weights.gate.weight.float().T
        scores = routing.choice_scores(logits, weights.gate.e_score_correction_bias)
        experts = routing.choose(
            scores, config.n_group, config.topk_group, config.num_experts_per_tok
        )
        scaling = config.routed_scaling_factor
        record("router_scores", scores)
        record("router_experts", experts)
        record("router_weights", routing.weigh(logits, experts, scaling))
        unscaled = routing.weigh(logits, experts, 1.0)
        routed = [torch.zeros(x.shape) for _ in range(self.ranks)]
        chosen = sorted(set(experts.flatten().tolist()))
        for expert, its_weights in zip(chosen, weights.experts(chosen), strict=True):
            token, slot = (experts == expert).nonzero(as_tuple=True)
            h, weight = gated(x[token], its_weights), unscaled[token, slot].unsqueeze(1)
            if self.experts == "whole":
                outputs = {expert * 5 % self.ranks: its_weights.down_proj(h)}
            else:
                outputs = dict(enumerate(self.shares(its_weights.down_proj, h)))
            for rank, output in outputs.items():
                routed[rank][token] += (output.float() * weight).to(x.dtype).float()
        scaled = [total.to(x.dtype) * scaling for total in routed]
        assert weights.shared_experts is not None
        h = gated(x, weights.shared_experts)
        shared = self.shares(weights.shared_experts.down_proj, h)
        if self.experts == "apart":
            return self.sum(scaled) + self.sum(shared)
        return self.sum([one + other for one, other in zip(scaled, shared, strict=True)])

    @contextmanager
    def computes(self) -> Iterator[None]:
        with (
            patch.object(forward_layers, "decoder_layer", self.layer),
            patch.object(forward_layers, "mtp_layer", self.predictor),
            patch.object(model, "moe", self.moe),
        ):
            yield


def gated(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    gate, up = weights.gate_proj(x), weights.up_proj(x)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Compute the tiny model with the bounds of several ranks, once a checkpoint."""
    done: dict[str, Run] = {}
    torch.set_num_threads(1)

    def run(checkpoint: str) -> Run:
        if checkpoint not in done:
            options = ForwardOptions(activations=Activations.ALL, mtp=True, bounds=BOUNDS)
            out = tmp_path_factory.mktemp("golden") / checkpoint
            done[checkpoint] = run_forward(TINY / checkpoint, PROMPTS, out, options).run
        return done[checkpoint]

    return run


def candidate(checkpoint: str, golden: Run, engine: Engine, folder: Path) -> Run:
    options = ForwardOptions(
        activations=Activations.ALL,
        mtp=True,
        arithmetic=Arithmetic.BFLOAT16,
        inputs=golden.path,
    )
    with engine.computes():
        return run_forward(TINY / checkpoint, PROMPTS, folder, options).run


@pytest.mark.parametrize(
    ("checkpoint", "engine"),
    [
        *(
            ("bf16", Engine(4, order, experts, seed))
            for seed, order in enumerate(ORDERS)
            for experts in ("split", "whole", "apart")
        ),
        ("bf16", Engine(2, "chain", "split")),
        ("nvfp4", Engine(4, "ring", "split")),
        ("nvfp4", Engine(4, "tree", "whole", 1)),
        ("nvfp4", Engine(2, "one-shot", "apart")),
    ],
)
def test_an_engine_of_several_ranks_stays_within_the_bounds_of_its_ranks(
    checkpoint: str, engine: Engine, golden: Callable[[str], Run], tmp_path: Path
) -> None:
    reference = golden(checkpoint)
    run = candidate(checkpoint, reference, engine, tmp_path / "run")

    result = agree(reference, run, AgreeOptions(bounds=f"bfloat16/tp{engine.ranks}"))

    assert result.verdict is Decision.PASS
    found = {h.agreement.key: h.bound.ratio for h in result.layers if h.bound is not None}
    assert {layer for layer, _ in found} == set(range(6))
    assert {point for _, point in found} == {*VALUE_POINTS, "eh_proj", "logits"}
    assert max(found.values()) < 1
    plain = agree(reference, run, AgreeOptions(bounds="bfloat16"))
    wider = {h.agreement.key: h.bound.relative for h in result.layers if h.bound is not None}
    narrow = {h.agreement.key: h.bound.relative for h in plain.layers if h.bound is not None}
    assert all(0.98 < wider[key] / narrow[key] < 1.65 for key in wider)
    assert all(wider[layer, "attn_output"] > narrow[layer, "attn_output"] for layer in range(5))


def lost(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The last rank's share never arrives."""
    return parts[:-1]


def read_twice(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """A rank reads its neighbour's buffer before that is written."""
    return [parts[0], parts[0], *parts[2:]]


@pytest.mark.parametrize("fault", [lost, read_twice])
def test_a_share_that_is_lost_or_read_twice_is_beyond_the_bounds_of_ranks(
    fault: Fault, golden: Callable[[str], Run], tmp_path: Path
) -> None:
    engine = Engine(4, "ring", "split", fault=fault)
    run = candidate("bf16", golden("bf16"), engine, tmp_path / "run")

    result = agree(golden("bf16"), run, AgreeOptions(bounds="bfloat16/tp4"))

    assert result.verdict is Decision.FAIL
    assert result.divergence is not None
    assert (result.divergence.layer, result.divergence.point) == (0, "attn_output")
    beyond = {h.agreement.key for h in result.layers if h.bound is not None and h.bound.exceeding}
    assert {(layer, "attn_output") for layer in range(6)} <= beyond
    assert {(layer, "mlp_output") for layer in range(6)} <= beyond
    assert (5, "eh_proj") in beyond


def info(dtype: str | None, ranks: int | None = None, bounds: tuple[str, ...] = ()) -> RunInfo:
    prompts = (PromptInfo(id="p", tokens=1),)
    return RunInfo(prompts=prompts, dtype=dtype, ranks=ranks, bounds=bounds)


@pytest.mark.parametrize(
    ("dtype", "ranks", "bounds", "expected"),
    [
        ("bfloat16", 1, ("float32", "bfloat16", "bfloat16/tp8"), "bfloat16"),
        ("bfloat16", None, ("float32", "bfloat16", "bfloat16/tp8"), "bfloat16/tp8"),
        ("bfloat16", None, ("bfloat16",), "bfloat16"),
        ("bfloat16", 6, ("bfloat16", "bfloat16/tp16", "bfloat16/tp8"), "bfloat16/tp8"),
        ("bfloat16", 8, ("bfloat16", "bfloat16/tp4"), None),
        ("float32", 1, ("bfloat16", "float32/tp2"), "float32/tp2"),
        ("float32", 4, ("float32", "bfloat16/tp4"), "bfloat16/tp4"),
        ("float64", 1, ("bfloat16",), "bfloat16"),
        ("bfloat16", 1, ("float32",), None),
        ("int8", None, ("float32",), None),
        (None, None, ("float32",), None),
    ],
)
def test_a_run_is_held_by_its_dtype_and_ranks_or_by_the_most_ranks_if_it_does_not_say(
    dtype: str | None, ranks: int | None, bounds: tuple[str, ...], expected: str | None
) -> None:
    assert declared(info("float32", 1, bounds), info(dtype, ranks)) == expected


def test_bounds_that_are_asked_for_are_taken_and_others_refused() -> None:
    reference = info("float32", 1, ("bfloat16", "bfloat16/tp8"))

    assert declared(reference, info("bfloat16", 1), "bfloat16/tp8") == "bfloat16/tp8"
    with pytest.raises(CheckError, match="'bfloat16/tp4': the reference's bounds are for bfloat16"):
        declared(reference, info("bfloat16"), "bfloat16/tp4")
    with pytest.raises(CheckError, match="the reference's bounds are for none"):
        declared(info("float32"), info("bfloat16"), "bfloat16")


@pytest.mark.parametrize("ranks", [0, -1, True, "8", 1.5])
def test_ranks_that_are_no_number_of_processes_are_no_run(ranks: object) -> None:
    document = {**json.loads(json.dumps(info("bfloat16").to_json())), "ranks": ranks}

    with pytest.raises(ValueError, match="ranks is no number of processes"):
        RunInfo.from_json(document)


def test_a_captured_run_says_among_how_many_processes_its_model_may_be_split(
    tmp_path: Path,
) -> None:
    linear = torch.nn.Linear(4, 4)

    def captured(name: str) -> int | None:
        taps = [Tap("", first_output("logits"))]
        with capture(linear, tmp_path / name, taps) as session, session.prompt("p", [1, 2]):
            linear(torch.eye(4)[:2])
        return Run.open(tmp_path / name).info.ranks

    assert captured("alone") == 1
    with (
        patch("torch.distributed.is_initialized", return_value=True),
        patch("torch.distributed.get_world_size", return_value=8),
    ):
        assert captured("together") == 8
