"""What tests of models share."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy_zoo import copy_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`mine.yaml`, a copy of the smallest zoo's recipe, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return copy_recipe(Path())
