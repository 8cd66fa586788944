"""Adapters: found where their library is, and said to be missing where it is not."""

import importlib.util
import warnings

import pytest

from nvfp4check.adapters import LIBRARIES, Implementation, Library, implementations
from nvfp4check.ops import OPERATIONS
from nvfp4check.properties import properties_of
from nvfp4check.properties.law import Property, Setting, Verdict
from nvfp4check.tolerance import Facts
from nvfp4ref.conventions import Convention

INSTALLED = [one for one in implementations() if not one.unavailable]


def test_every_adapter_names_known_operations_and_a_known_convention() -> None:
    names = {library.name for library in LIBRARIES}

    assert names == {
        "torchao",
        "compressed-tensors",
        "modelopt",
        "flashinfer",
        "vllm",
        "vllm-emulation",
        "transformer-engine",
    }
    for library in LIBRARIES:
        assert set(library.operations) <= set(OPERATIONS)
        assert library.convention in set(Convention)
        assert Facts(**library.facts) == Facts()


def test_every_path_leads_to_a_module_of_an_adapter() -> None:
    for one in implementations():
        assert importlib.util.find_spec(one.path.partition(":")[0]) is not None


def test_a_missing_library_says_how_to_install_it() -> None:
    library = Library(
        name="none",
        module="no_such_library_here",
        install="pip install none",
        operations={"quantize": "nvfp4check.adapters.none:quantize"},
        convention="engine",
        device="cpu",
    )

    (one,) = library.implementations()

    assert one.unavailable == "no_such_library_here is not installed: pip install none"


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    library = Library(
        name="gpu",
        module="nvfp4check",
        install="",
        operations={},
        convention="engine",
        device="cuda",
        capability=(10, 0),
    )

    assert library.unavailable() == "needs a GPU of compute capability 10.0, torch finds none"


def test_an_older_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    library = Library(
        name="gpu",
        module="nvfp4check",
        install="",
        operations={},
        convention="engine",
        device="cuda",
        capability=(10, 0),
    )

    assert library.unavailable() is not None
    assert "this one has 9.0" in library.unavailable()  # type: ignore[operator]


#: What real libraries are known to do against a law: each is described in the README.
KNOWN = {
    ("torchao", "quantize", "no-rows"): "reshape",
    ("vllm-emulation", "dequantize", "no-rows"): "reshape",
    ("modelopt", "quantize", "no-rows"): "reshape",
    ("modelopt", "dequantize", "no-rows"): "reshape",
    ("torchao", "dequantize", "strides-do-not-matter"): "invalid for input",
}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import every library that is there, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in INSTALLED:
            if one.device == "cpu":
                one.kernel()


# ModelOpt's quantiser searches strided values, of which torch says once that it is slow.
@pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning")
@pytest.mark.parametrize(
    ("name", "operation", "law"),
    [
        pytest.param(one, law.operation, law, id=f"{one.name}-{one.operation}-{law.name}")
        for one in INSTALLED
        if one.device == "cpu"
        for law in properties_of(one.operation)
    ],
)
def test_an_installed_library_keeps_the_laws_of_its_convention(
    name: Implementation, operation: str, law: Property
) -> None:
    setting = Setting(convention=name.convention, max_examples=10)

    outcome = law.run(name.kernel(), setting)

    known = KNOWN.get((name.name, operation, law.name))
    if known is not None:
        assert outcome.verdict is Verdict.FAIL
        assert known in outcome.message
    else:
        assert outcome.verdict is not Verdict.FAIL, outcome.message
