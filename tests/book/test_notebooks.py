"""A published notebook, outside the checkout, in an environment that has not seen this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig

import nbformat
import pytest

from checkout import COMMIT, REPOSITORY
from paramspec_book.parameters import find_chapter, read_notebook
from paramspec_book.sphinx_site import installing

pytestmark = pytest.mark.slow
ADDRESS = "https://github.com/example/book"
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
notebook.cells.append(nbformat.v4.new_code_cell("import paramspec; print(paramspec.__file__)"))
try:
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=None).execute()
finally:
    print(notebook.cells[0].outputs)
print(notebook.cells[-1].outputs[0].text)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A repository at ADDRESS, as git is told, and the commit."""
    source = tmp_path_factory.mktemp("published") / "book"
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY / "lib", source / "lib", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)

    def git(*line):
        done = subprocess.run(
            ["git", *line], cwd=source, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git(*COMMIT)
    told = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{source.as_uri()}.insteadOf"}
    return told | {"GIT_CONFIG_VALUE_0": ADDRESS}, git("rev-parse", "HEAD")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A new environment, which sees the packages of this one but for the one that is edited."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("name", "smaller"), [("1-value-vectors", ""), ("how-sure", "studies, resamples = 4, 20")]
)
def test_a_notebook_runs_in_a_fresh_environment(
    name, smaller, published, python, tmp_path, unpacked
):
    told, commit = published
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gguf").symlink_to(unpacked)
    notebook = read_notebook(find_chapter(name, REPOSITORY))
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    place = next(place for place, named in enumerate(tags) if "parameters" in named)
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(smaller))
    text = installing(nbformat.writes(notebook), ADDRESS, commit, REPOSITORY)
    (tmp_path / f"{name}.ipynb").write_text(text, "utf-8")
    # The index need not be reached: what builds the package is there.
    environment = os.environ | told | {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    environment.pop("PYTHONPATH", None)
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    line = [python, "-c", RUN, f"{name}.ipynb"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert str(python.parents[1]) in done.stdout
