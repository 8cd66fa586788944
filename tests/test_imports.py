"""What may not be imported before it is used, proved in fresh processes."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Slow to import, and none of them needed to print help or to load a plugin.
HEAVY = ("torch", "triton", "numpy", "safetensors", "hypothesis", "jinja2", "matplotlib")

NAME_THE_HEAVY = (
    f"import sys; print(' '.join(sorted(set(sys.modules) & set({HEAVY!r}))), file=sys.stderr)"
)

#: Lines of Python that must bring none of them in.
LIGHT = {
    "the package": "import nvfp4check",
    "the findings": "import nvfp4check.findings",
    "the command line": "import nvfp4check.cli.main",
    "help": "from nvfp4check.cli.main import main; main(['--help'])",
    "the version": "from nvfp4check.cli.main import main; main(['--version'])",
    "a command's help": "from nvfp4check.cli.main import main; main(['rules', '--help'])",
    "a bad command": "from nvfp4check.cli.main import main; main(['no-such-command'])",
}


def heavy_modules_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the heavy modules that it left imported."""
    finished = subprocess.run(
        [sys.executable, "-c", f"{code}\n{NAME_THE_HEAVY}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(finished.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT)
def test_nothing_heavy_is_imported_for(code: str) -> None:
    assert heavy_modules_after(code) == set()


@pytest.mark.parametrize("module", ["torch", "numpy", "jinja2"])
def test_the_proof_sees_a_heavy_import(module: str) -> None:
    assert module in heavy_modules_after(f"import nvfp4check, {module}")


def collect_with_plugin(project: Path, code: str) -> set[str]:
    """Collect a project's tests with the plugin, and return the heavy modules imported then."""
    (project / "test_empty.py").write_text("def test_nothing():\n    pass\n")
    (project / "conftest.py").write_text(
        f"{code}\ndef pytest_sessionfinish():\n    {NAME_THE_HEAVY}\n"
    )
    options = ["-p", "nvfp4check.pytest_plugin", "-p", "no:cacheprovider", "--co", "-q"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(project)],
        capture_output=True,
        text=True,
        cwd=project,
        check=True,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    return set(finished.stderr.splitlines()[-1].split())


def test_the_pytest_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    assert collect_with_plugin(tmp_path, "") == set()


def test_the_proof_about_the_plugin_sees_a_heavy_import(tmp_path: Path) -> None:
    assert "torch" in collect_with_plugin(tmp_path, "import torch")


def test_every_module_has_its_place_in_the_direction_of_imports() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    placed = {name.strip(" ()") for layer in layers for name in layer.split(":")}
    present = {
        f"nvfp4check.{path.stem}"
        for path in (ROOT / "nvfp4check").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert present - placed == {"nvfp4check.__init__", "nvfp4check.__main__"}
