"""What tests share: the order of files, the command in this process, an address of nobody."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paramspec.execution.ends import collect_seldom

collect_seldom()  # as the command does

# The longest, longest first: workers that take a file at a time then end together.
LONGEST = (
    "test_site",
    "test_ends",
    "test_smollm2",
    "test_workers",
    "test_cost",
    "test_finetune",
    "test_zoo_training",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`--no-loadscope-reorder` keeps this order; without it, files of many tests go first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def unpacked(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Path]:
    """GGUF files are unpacked once for all tests, and not into the checkout."""
    from paramspec.models import unpack

    base = tmp_path_factory.getbasetemp()
    place = (base if worker_id == "master" else base.parent) / "gguf"
    place.mkdir(exist_ok=True)  # tests link to it, also before it is filled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpack, "UNPACKED", place)
        yield place


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`status, out, err = command("pss", "toy")`: the command, without a process of its own."""

    def run(*words: object) -> tuple[int, str, str]:
        from paramspec.cli import main

        capfd.readouterr()
        argv, sys.argv = sys.argv, ["paramspec", *map(str, words)]
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            sys.argv = argv
        return caught.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """`error = refused("pss", "toy", "--seed", "-1")`: the one line of a command's bad input."""

    def refuse(*words: object) -> str:
        status, out, error = command(*words)
        assert (status, out, error.count("\n")) == (2, "", 1), error
        assert error.startswith("paramspec: error: ")
        return error.rstrip("\n")

    return refuse


@pytest.fixture
def pretend_versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`pretend_versions(torch="9")`: as a process has them that starts with other libraries."""

    def pretend(**changed: str) -> None:
        from paramspec.execution import provenance

        real = provenance.version_of
        monkeypatch.setattr(provenance, "version_of", lambda name: changed.get(name) or real(name))

    return pretend


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`mine.yaml`, a copy of the smallest zoo's recipe, in the working directory."""
    from toy_zoo import copy_recipe

    monkeypatch.chdir(tmp_path)
    return copy_recipe(Path())


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine where nobody answers, and nobody else can begin to."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and never listens
        yield bound.getsockname()[1]
