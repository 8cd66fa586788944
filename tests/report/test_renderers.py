import importlib
import re
from pathlib import Path

import pytest

from nvfp4check.report import render

PATHS = sorted(set(re.findall(r'"(\w+:\w+)"', Path(render.__file__).read_text(encoding="utf-8"))))


def test_the_table_names_renderers() -> None:
    assert len(PATHS) > 20


@pytest.mark.parametrize("path", PATHS)
def test_every_renderer_that_the_table_names_is_there(path: str) -> None:
    module, name = path.split(":")

    assert callable(getattr(importlib.import_module(f"nvfp4check.report.{module}"), name))
