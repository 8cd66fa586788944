"""Recorded results of other people's quantisers, met bit for bit or explained.

Every producer in goldens/vectors is in one of the tables below: met under a convention, or with
the causes of its differences counted, or with the reason why it is neither.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvfp4ref import layout, nvfp4, packing, ties
from nvfp4ref.conventions import Convention
from nvfp4ref.formats import BLOCK_SIZE
from nvfp4ref.ties import Cause

GOLDENS = Path(__file__).parents[2] / "goldens"
VECTORS = GOLDENS / "vectors"
SETS = ("gauss", "ties", "special", "zero", "naninf", "clip", "tiny")

#: Producers met bit for bit, with the convention that meets them.
CONVENTIONS = {
    "modelopt-0.39": Convention.MODELOPT_0_39,
    "modelopt-0.39-deepseek-example": Convention.MODELOPT_0_39,
    "modelopt-0.47": Convention.MODELOPT,
    "compressed-tensors-bf16": Convention.COMPRESSED_TENSORS,
    "compressed-tensors-fp32": Convention.COMPRESSED_TENSORS,
    "torchao-0.18": Convention.TORCHAO,
    "torchao-0.18-no-global-scale": Convention.TORCHAO,
    "torchao-0.14": Convention.TORCHAO_0_14,
    "transformer-engine": Convention.TRANSFORMER_ENGINE,
    "vllm-reference": Convention.VLLM_REFERENCE,
}

#: What a producer puts in a block whose scale is NaN, where the bits of a NaN decide: torchao takes
#: the code from the payload, compressed-tensors the sign from the sign.
CODES_UNDER_NAN = {
    "torchao-0.18": {3, 4, 12},
    "torchao-0.18-no-global-scale": {3, 4},
    "torchao-0.14": {3, 4, 12},
    "compressed-tensors-bf16": {0, 8},
    "compressed-tensors-fp32": {0, 8},
}

#: Producers that no convention meets: (set, producer) -> differences by cause, codes then scales.
COUNTED = {
    ("gauss", "jax"): ({Cause.EXACT_TIE: 72}, {}),
    ("tiny", "jax"): ({Cause.EXACT_TIE: 30}, {}),
    ("ties", "jax"): ({}, {}),
    ("clip", "jax"): ({}, {}),
    ("gauss", "qwix"): ({Cause.EXACT_TIE: 1}, {}),
    ("tiny", "qwix"): ({}, {}),
    ("ties", "qwix"): ({}, {}),
    ("clip", "qwix"): ({}, {}),
    ("gauss", "fouroversix-static-6"): ({}, {}),
    ("tiny", "fouroversix-static-6"): ({}, {}),
    ("ties", "fouroversix-static-6"): ({}, {}),
    ("special", "fouroversix-static-6"): ({}, {}),
    ("zero", "fouroversix-static-6"): ({}, {}),
    ("clip", "fouroversix-static-6"): ({Cause.REAL: 2}, {}),  # -9.1 becomes -0, 10.1 becomes -0
}

#: Why the sets that `COUNTED` leaves out are not compared for these producers.
OWN_WAYS = {
    "jax": "0/0 gives code 8, zero blocks and zero tensors scale 0; NaN stays out of amax",
    "qwix": "one level of scales; -0.0 and NaN give code 8",
    "fouroversix-static-6": "infinity and NaN give code 11",
}


def vectors(name: str) -> dict[str, torch.Tensor]:
    return load_file(VECTORS / f"quantizers_{name}.safetensors")


def global_scales(
    producer: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decode and the encode scale that a producer used."""
    recorded, amax = tensors[f"{producer}.global_scale"][0], tensors["tensor_amax"][0]
    if producer in ("transformer-engine", "fouroversix-static-6"):
        return (  # its quantiser takes the amax
            nvfp4.global_decode_scale(amax, Convention.TRANSFORMER_ENGINE),
            nvfp4.global_encode_scale(amax, Convention.TRANSFORMER_ENGINE),
        )
    if producer.startswith(("compressed-tensors", "vllm")):
        return recorded.reciprocal(), recorded
    return recorded, recorded.reciprocal()


def quantised_as(
    producer: str, tensors: Mapping[str, torch.Tensor], convention: Convention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the recorded scale bytes and codes, and ours of the same input under those scales."""
    x = tensors["x"].float() if producer.endswith("fp32") else tensors["x"]
    decode, encode = global_scales(producer, tensors)
    recorded = tensors[f"{producer}.block_scales"]
    codes = packing.unpack(tensors[f"{producer}.packed_codes"])
    ours = nvfp4.quantize_block_scales(x, decode, convention, global_encode_scale=encode)
    our_codes = nvfp4.quantize_elements(
        x, recorded.view(torch.float8_e4m3fn), decode, convention, global_encode_scale=encode
    )
    return recorded, codes, ours.view(torch.uint8), our_codes


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("producer", CONVENTIONS)
def test_a_producer_is_met_bit_for_bit_under_its_convention(producer: str, name: str) -> None:
    recorded, codes, scales, our_codes = quantised_as(
        producer, vectors(name), CONVENTIONS[producer]
    )
    nan = (recorded & 0x7F) == 0x7F  # the sign of a NaN is the platform's
    under_nan = nan.repeat_interleave(BLOCK_SIZE, -1)

    assert torch.equal(torch.where(nan, 0x7F, recorded), scales)
    assert torch.equal(codes[~under_nan], our_codes[~under_nan])
    if producer in CODES_UNDER_NAN:
        assert set(codes[under_nan].tolist()) <= CODES_UNDER_NAN[producer]
    else:
        assert torch.equal(codes[under_nan], our_codes[under_nan])


def test_only_the_sets_of_zeros_and_of_nan_hold_nan_scales() -> None:
    """Else the test above would compare less than it seems."""
    for name in SETS:
        tensors = vectors(name)
        for producer in CONVENTIONS:
            nan = (tensors[f"{producer}.block_scales"] & 0x7F) == 0x7F
            if name == "zero":
                assert nan.all() or not nan.any()
            else:
                assert int(nan.sum()) <= (name == "naninf")


@pytest.mark.parametrize(("name", "producer"), COUNTED)
def test_where_a_producer_cannot_be_met_each_difference_has_its_cause(
    name: str, producer: str
) -> None:
    tensors = vectors(name)
    convention = (
        Convention.TRANSFORMER_ENGINE
        if producer.startswith("fouroversix")
        else Convention.MODELOPT_0_39
    )
    decode, _ = global_scales(producer, tensors)
    amax = None if producer == "qwix" else tensors["tensor_amax"][0]
    recorded, codes, scales, our_codes = quantised_as(producer, tensors, convention)
    block_amax = tensors["x"].float().abs().view(*scales.shape, BLOCK_SIZE).amax(-1)

    causes = ties.explain_codes(
        codes,
        our_codes,
        tensors["x"],
        recorded.view(torch.float8_e4m3fn),
        decode,
        ties.element_error(Convention.TRANSFORMER_ENGINE),
        amax,
    )
    scale_causes = ties.explain_block_scales(
        recorded.view(torch.float8_e4m3fn),
        scales.view(torch.float8_e4m3fn),
        block_amax,
        decode,
        ties.scale_error(Convention.TRANSFORMER_ENGINE),
        amax,
    )

    assert (counted(causes), counted(scale_causes)) == COUNTED[name, producer]


def counted(causes: torch.Tensor) -> dict[Cause, int]:
    """Return how often each cause other than equality occurs."""
    numbers = torch.bincount(causes.flatten().int(), minlength=len(Cause)).tolist()
    return {cause: numbers[cause] for cause in Cause if cause and numbers[cause]}


@pytest.mark.parametrize("name", ["gauss", "ties", "tiny", "clip"])
def test_between_producers_every_differing_code_is_an_exact_tie(name: str) -> None:
    """One global scale, bfloat16 weights: no two of these differ anywhere else."""
    tensors = vectors(name)
    same_scales = ("modelopt-0.47", "torchao-0.18", "torchao-0.14", "transformer-engine", "jax")
    decode = tensors["modelopt-0.47.global_scale"][0]
    scales = tensors["modelopt-0.47.block_scales"]
    codes = {p: packing.unpack(tensors[f"{p}.packed_codes"]) for p in same_scales}
    differing = 0
    for producer in same_scales[1:]:
        assert torch.equal(tensors[f"{producer}.block_scales"], scales)
        causes = ties.explain_codes(
            codes[producer],
            codes["modelopt-0.47"],
            tensors["x"],
            scales.view(torch.float8_e4m3fn),
            decode,
            ties.element_error(Convention.TRANSFORMER_ENGINE),
            tensors["tensor_amax"][0],
        )
        assert set(counted(causes)) <= {Cause.EXACT_TIE}
        differing += int(causes.ne(Cause.EQUAL).sum())

    assert (differing > 0) == (name in ("gauss", "tiny"))


@pytest.mark.parametrize("name", SETS)
def test_every_recorded_quantiser_is_accounted_for(name: str) -> None:
    producers = {key.rpartition(".")[0] for key in vectors(name) if key.endswith(".block_scales")}

    assert producers == set(CONVENTIONS) | set(OWN_WAYS)


def test_every_producer_with_ways_of_its_own_is_still_compared_somewhere() -> None:
    assert {producer for _, producer in COUNTED} == set(OWN_WAYS)


def test_torchao_0_14_packed_the_first_code_into_the_high_nibble() -> None:
    tensors = vectors("gauss")
    low, high = (
        tensors["torchao-0.14.packed_codes"],
        tensors["torchao-0.14.packed_codes_as_produced"],
    )

    assert not torch.equal(low, high)
    assert torch.equal((high << 4) | (high >> 4), low)


@pytest.mark.parametrize("producer", ["modelopt-0.39", "modelopt-0.39-deepseek-example"])
def test_recorded_global_scales_of_modelopt_are_legal(producer: str) -> None:
    for name in SETS:
        tensors = vectors(name)
        legal = nvfp4.legal_global_decode_scales(
            tensors["tensor_amax"][0], Convention.MODELOPT_0_39
        )
        assert tensors[f"{producer}.global_scale"][0] in torch.stack(legal)


@pytest.mark.parametrize(
    ("producer", "dtype"),
    [("compressed-tensors-bf16", torch.bfloat16), ("compressed-tensors-fp32", torch.float32)],
)
def test_recorded_global_scales_of_compressed_tensors_are_met(
    producer: str, dtype: torch.dtype
) -> None:
    for name in SETS:
        tensors = vectors(name)
        amax = tensors["tensor_amax"][0].to(dtype)
        encode = nvfp4.global_encode_scale(amax, Convention.COMPRESSED_TENSORS)
        assert encode == tensors[f"{producer}.global_scale"][0]


@pytest.mark.parametrize("shape", ["1x1", "100x3", "128x4", "128x8", "129x5", "256x12", "384x20"])
def test_torchaos_blocked_scales_are_met(shape: str) -> None:
    tensors = load_file(VECTORS / "swizzle.safetensors")
    linear, swizzled = tensors[f"linear_{shape}"], tensors[f"swizzled_{shape}"]

    assert torch.equal(layout.swizzle(linear), swizzled)
    assert torch.equal(layout.unswizzle(swizzled, *linear.shape), linear)


def test_every_vector_file_is_the_one_the_manifest_names() -> None:
    files = json.loads((GOLDENS / "MANIFEST.json").read_text())["files"]
    listed = {name: entry for name, entry in files.items() if name.startswith("vectors/")}

    assert {f"vectors/{path.name}" for path in VECTORS.iterdir()} == set(listed)
    for name, entry in listed.items():
        assert entry["origin"]
        assert hashlib.sha256((GOLDENS / name).read_bytes()).hexdigest() == entry["sha256"]
