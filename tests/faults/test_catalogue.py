"""The catalogue of kernel faults: complete, seen by the suites, and blind where it says so."""

import re
import subprocess
import sys

import pytest
import torch

from nvfp4check import inputs
from nvfp4check.faults import elsewhere, fault, faults_of, kernel_faults
from nvfp4check.faults.power import accept, sight
from nvfp4check.faults.variants import correct_variants
from nvfp4check.findings import CheckError
from nvfp4check.ops import OPERATIONS
from nvfp4check.properties.rope import CONFIGS

#: The last letter of each class.
CLASSES = {1: "d", 2: "f", 3: "g", 4: "g", 5: "f", 6: "f", 7: "h", 8: "e", 9: "g", 10: "d"}
CLASSES |= {11: "d", 12: "f", 13: "g", 14: "g", 15: "g", 16: "g", 17: "f"}


def test_every_letter_of_the_catalogue_is_planted_or_said_to_be_caught_elsewhere():
    letters = {
        f"F{number}{chr(letter)}"
        for number, last in CLASSES.items()
        for letter in range(ord("a"), ord(last) + 1)
    }
    planted = [one.id for one in kernel_faults()]
    others = [one.id for one in elsewhere()]

    assert len(set(planted + others)) == len(planted) + len(others)
    assert set(planted) | set(others) == letters | {"F18", "F19", "F20"}


@pytest.mark.parametrize("one", kernel_faults(), ids=lambda one: one.id)
def test_a_fault_names_its_threads_its_data_and_forms_with_labels_of_their_own(one):
    assert one.forms
    assert all((one.name, one.does, one.needs))
    for url in one.urls:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(pull|issues)/\d+", url)
    keys = [(form.operation, form.label) for form in one.forms]
    assert len(set(keys)) == len(keys)
    assert set(one.operations) <= set(OPERATIONS)


def test_importing_the_catalogue_loads_no_torch():
    code = "import nvfp4check.faults, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_suite_of_an_operation_sees_every_fault(operation):
    sightings = list(sight(operation))

    missed = [one.planting.name for one in sightings if one.seen_by is None]
    assert len(sightings) == len(faults_of(operation)) > 0
    assert not missed


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_suite_of_an_operation_rejects_no_correct_variant(operation, monkeypatch):
    # The reference under each convention is tried by the tests of the properties.
    own = [one for one in correct_variants(operation) if "the reference under" not in one.name]
    monkeypatch.setattr("nvfp4check.faults.power.correct_variants", lambda named: own)
    acceptances = list(accept(operation))

    assert acceptances
    for one in acceptances:
        assert one.rejected_by is None, f"{one.variant.name}: {one.message}"


def test_a_fault_that_goes_around_a_kernel_goes_into_one_that_is_given():
    seen = []

    def kernel(*arguments):
        seen.append(arguments[2])
        return OPERATIONS["dequantize"].reference()(*arguments)

    wrong = fault("F7b").forms_of("dequantize")[0].apply(kernel=kernel)
    codes, scales = torch.zeros(1, 8, dtype=torch.uint8), inputs.random_scales(_seeded(), 1, 1)
    wrong(codes, scales, torch.tensor(0.25), torch.float32)

    assert seen == [torch.tensor(1.0)]


def test_a_fault_that_replaces_a_kernel_goes_into_none():
    with pytest.raises(CheckError, match="goes into no kernel"):
        fault("F3a").forms[0].apply(kernel=print)


def test_a_fault_of_no_operation_says_who_catches_it():
    with pytest.raises(CheckError, match=r"caught by .*validate"):
        fault("F8a")


def test_an_unknown_fault_is_refused():
    with pytest.raises(CheckError, match="unknown fault 'F99z'"):
        fault("F99z")


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _gaussian():
    x = torch.randn(64, 256, generator=_seeded()).to(torch.bfloat16)
    return {"x": x, "global_decode_scale": x.abs().max().float() / 2688}


def _weights(lowest: int = 8, rows: int = 8, blocks: int = 8):
    return {
        "packed_codes": inputs.random_codes(_seeded(), rows, blocks * 8),
        "block_scales": inputs.random_scales(_seeded(), rows, blocks, lowest=lowest),
        "global_decode_scale": torch.tensor(1.0),
        "dtype": torch.float32,
    }


def _constant():
    scales = inputs.scales_from_bytes(torch.full((128, 8), 0x38))
    return {**_weights(rows=128), "block_scales": scales}


def _product(blocks: int = 16):
    codes = inputs.random_codes(_seeded(), 8, blocks * 8)
    scales = inputs.random_scales(_seeded(), 8, blocks)
    return {
        "a_codes": codes,
        "a_scales": scales,
        "b_codes": codes,
        "b_scales": scales,
        "alpha": torch.tensor(1.0),
        "dtype": torch.float32,
    }


def _positive_bias():
    return {
        "logits": torch.randn(32, 256, generator=_seeded()),
        "bias": torch.rand(256, generator=_seeded()),
        "n_group": 8,
        "topk_group": 4,
        "top_k": 8,
        "scaling": 2.5,
    }


def _one_token():
    return {
        "q_latent": torch.randn(1, 2, 512, generator=_seeded()),
        "q_rope": torch.randn(1, 2, 64, generator=_seeded()),
        "latent_pages": torch.randn(1, 16, 512, generator=_seeded()),
        "rope_pages": torch.randn(1, 16, 64, generator=_seeded()),
        "page_table": torch.zeros(1, 1, dtype=torch.int32),
        "lengths": torch.ones(1, dtype=torch.int32),
        "scale": 0.135,
    }


def _start():
    return {
        "x": torch.randn(3, 2, 64, generator=_seeded()),
        "positions": torch.zeros(3, dtype=torch.long),
        "config": CONFIGS["DeepSeek-V3"],
    }


def _equal_mscales():
    return {**_start(), "positions": torch.tensor([1, 40, 5000])}


BLIND = {
    "F2a on Gaussian values": ("F2a", "quantize", _gaussian),
    "F2d on finite values": ("F2d", "quantize", _gaussian),
    "F3a on scale bytes from 8": ("F3a", "dequantize", _weights),
    "F3c without a NaN scale": ("F3c", "dequantize", _weights),
    "F1c on a matrix that is not square": ("F1c", "dequantize", _weights),
    "F3b on powers of two": ("F3b", "dequantize", _constant),
    "F6b on one scale": ("F6b", "dequantize", _constant),
    "F9a on one scale": ("F9a", "dequantize", _constant),
    "F9e in one tile of rows": ("F9e", "dequantize", _weights),
    "F7a at a global scale of 1": ("F7a", "dequantize", _constant),
    "F10a with nothing behind": ("F10a", "matmul", _product),
    "F12c at K of whole tiles": ("F12c", "matmul", _product),
    "F12e in one tile of rows": ("F12e", "matmul", _product),
    "F14a under a positive bias": ("F14a", "route", _positive_bias),
    "F14e under a positive bias": ("F14e", "route", _positive_bias),
    "F16a at one token": ("F16a", "mla_decode", _one_token),
    "F17a at position 0": ("F17a", "rope", _start),
    "F16d where both are equal": ("F16d", "rope", _equal_mscales),
}


@pytest.mark.parametrize("name", BLIND)
def test_a_fault_does_not_show_on_data_that_lacks_what_it_needs(name):
    identifier, operation_name, make = BLIND[name]
    operation = OPERATIONS[operation_name]
    convention = "modelopt" if operation.has_convention else None
    taken = make()
    right = operation.call(operation.reference(convention), taken)

    for form in fault(identifier).forms_of(operation_name):
        wrong = operation.call(form.apply(convention), taken)
        for found, expected in zip(wrong, right, strict=True):
            assert torch.equal(found.double(), expected.double())
