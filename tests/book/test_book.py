"""Chapters run as promised: typed, skipped while nothing changed, replaced only by a good run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbclient
import nbformat
import papermill
import pytest
from myst_nb.core.read import read_myst_markdown_notebook

from checkout import HEADER, REPOSITORY, make_checkout

from paramspec.execution import provenance
from paramspec_book import book, sphinx_executed
from paramspec.errors import InputError
from paramspec.execution.store import Store


CHAPTER = (
    HEADER
    + """
# A small chapter

It counts its own runs.

```{code-cell} ipython3
:tags: [parameters]

seed: int = 0  # the seed
ratios: list[float] = [0.0, 0.5]  # shares of the vectors
limit: int | None = None  # how many
model: str = "none"  # a name or a folder
exact: bool = True  # yes or no
```

+++

A second block of prose, with $x^2$.

```{code-cell} ipython3
from pathlib import Path

with Path("runs.txt").open("a") as log:
    log.write("run\\n")
```

```{code-cell} ipython3
if seed == 13:
    raise ValueError("an unlucky\\nseed")
print(seed, ratios, limit, model, exact)
```
"""
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one chapter, `a-small`."""
    return make_checkout(tmp_path / "checkout", a_small=CHAPTER)


def printed(copy: Path) -> str:
    """Return what the last cell of an executed copy printed."""
    return nbformat.read(copy, 4).cells[-1].outputs[0].text.strip()


def runs(root: Path) -> int:
    """Return how often the chapter's cells ran in this checkout."""
    log = root / "runs.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `paramspec` as a user would, from a checkout."""
    line = [sys.executable, "-c", "from paramspec.cli import main; main()", *arguments]
    return subprocess.run(line, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_run_executes_once_and_records_where_it_came_from(root: Path) -> None:
    (root / "book" / "profiles" / "tiny.yaml").write_text("a-small:\n  ratios: [1]\n")
    copy = book.run_chapter("a-small", profile="tiny", root=root)
    assert copy == root / "book" / "_executed" / "a-small.ipynb"
    assert printed(copy) == "0 [1.0] None none True"
    record = json.loads(copy.read_text())["metadata"]["paramspec"]
    expected = {"seed": 0, "ratios": [1.0], "limit": None, "model": "none", "exact": True}
    assert record["parameters"] == expected
    assert record["profile"] == "tiny"
    assert record["seconds"] > 0
    assert record["commit"] is None  # a temporary folder is outside git
    assert record["versions"]["python"] == sys.version.split()[0]
    assert str(root) not in copy.read_text()  # the site publishes copies: no machine's paths

    before = copy.stat().st_mtime_ns
    book.run_chapter("a-small", profile="tiny", root=root)
    assert runs(root) == 1
    assert copy.stat().st_mtime_ns == before
    book.run_chapter("a-small", profile="tiny", root=root, force=True)
    assert runs(root) == 2


MEASURES = (
    HEADER
    + """
# Two results

```{code-cell} ipython3
:tags: [parameters]

seed: int = 0  # none
```

```{code-cell} ipython3
from paramspec.execution.store import Store

store = Store("results/store")
for unit in ("pss", "answers"):
    if store.get({"unit": unit}) is None:
        store.put({"unit": unit}, lambda folder: None, {"device": "cpu"})
```
"""
)


def test_a_page_says_what_computed_its_results_and_not_what_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two results was there, of another machine and from a hub's model."""
    root = make_checkout(tmp_path / "checkout", a_small=MEASURES)
    token = {"id": 1, "token": "<s>"}
    facts = {"model": "org/toy", "commit": "c" * 40, "tokenizer": {"kept": [token]}}
    gone = {"cpu": "Another CPU", "cores": 64, "memory": 2**40, "threads": 8, "gpus": ["A100"]}
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "hardware", lambda: gone)
        store = Store(root / "results" / "store")
        store.put({"unit": "pss"}, lambda folder: None, facts | {"device": "cuda:0"})
        store.put({"unit": "never read"}, lambda folder: None, {"device": "cuda:0"})
    copy = book.run_chapter("a-small", root=root)
    results = json.loads(copy.read_text())["metadata"]["paramspec"]["results"]
    first, second = results["computed"]
    assert (first["units"], first["hardware"], first["device"]) == ({"pss": 1}, gone, "cuda:0")
    assert (second["units"], second["device"]) == ({"answers": 1}, "cpu")
    assert second["hardware"]["cpu"] == provenance.hardware()["cpu"]
    assert results["models"] == {"org/toy": {"commit": "c" * 40, "before": ["<s>"]}}
    told = sphinx_executed._results(results)
    assert "1 pss: " in told[0]
    assert "Another CPU, 64 cores, 1024 GiB, 1 x A100, 8 threads, device cuda:0" in told[0]
    assert f"torch {version('torch')}" in told[0]
    assert told[2] == f"org/toy, commit {'c' * 40}: <s> added before each text"
    assert not list((root / "results" / "unfinished").glob("*.used"))


def test_parameters_of_ones_own_leave_the_books_copy_alone(root: Path) -> None:
    copy = book.run_chapter("a-small", root=root)
    before = copy.read_bytes()
    other = book.run_chapter("a-small", {"seed": -4, "limit": 2}, root=root)
    assert other.parent == root / "results" / "runs"
    assert printed(other) == "-4 [0.0, 0.5] 2 none True"
    chosen = root / "mine" / "out.ipynb"
    assert book.run_chapter("a-small", {"seed": 5}, target=chosen, root=root) == chosen
    assert printed(chosen).startswith("5 ")
    assert copy.read_bytes() == before
    assert list((root / "results" / "unfinished").iterdir()) == []


def test_the_key_changes_with_everything_a_result_depends_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")

    def key(text: str = CHAPTER, profile: str = "default", **parameters: object) -> str:
        return book.execution_key(text, profile, {"model": "weights", **parameters}, root)

    seen = [key(), key(CHAPTER + " "), key(profile="paper"), key(seed=1)]
    (folder / "model.safetensors").write_bytes(b"other")
    seen.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(book, "library_digest", lambda: "another library")
        seen.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(book, "version_of", lambda name: "0")
        seen.append(key())
    assert len(set(seen)) == len(seen)
    assert key() == key()
    assert key(CHAPTER.replace("\n", "\r\n")) == key()  # a checkout on Windows is the same chapter


RECIPES = ["mine.yaml", "mine.yaml:llama-4", "mine.yaml:llama-5@50", "./mine.yaml:llama-4"]
FOLDERS = ["weights/", "weights", "weights/../weights"]


@pytest.mark.parametrize(
    ("value", "file"),
    [(value, "mine.yaml") for value in RECIPES]
    + [(["zoo", [value]], "mine.yaml") for value in RECIPES]
    + [({"a": ["mine.yaml:b"]}, "mine.yaml"), ("@names.txt", "names.txt")]
    + [(value, "weights/deep/config.json") for value in FOLDERS]
    + [("model.gguf", "model.gguf"), ("with space:and colon.yaml:b", "with space:and colon.yaml")]
    + [("~/mine.yaml:llama-4", "home/mine.yaml"), ("../aside.yaml:b", "../aside.yaml")],
)
def test_what_a_parameter_names_is_in_the_key_by_its_content(
    root: Path, monkeypatch: pytest.MonkeyPatch, value: object, file: str
) -> None:
    monkeypatch.setenv("HOME", str(root / "home"))
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)

    def key() -> str:
        return book.execution_key(CHAPTER, "default", {"model": value}, root)

    without = key()
    path.write_text("one")
    first = key()
    path.write_text("two")
    os.utime(path, ns=(0, 0))
    second = key()
    path.write_text("one")  # the content counts, not when it was written
    assert len({without, first, second}) == 3
    assert key() == first


def test_a_large_file_is_told_by_size_and_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "READ_WHOLE", 2)
    seen = set()
    for text, time_of_change in (("one", 1), ("four", 1), ("one", 2)):
        (root / "model.gguf").write_text(text)
        os.utime(root / "model.gguf", ns=(time_of_change, time_of_change))
        seen.add(book.execution_key(CHAPTER, "default", {"model": "model.gguf"}, root))
    assert len(seen) == 3


@pytest.mark.parametrize("value", ["", ".", "./", "..", "/", "~", "no:file", "tcp://host:8786"])
def test_what_names_no_input_does_not_depend_on_the_checkout(
    root: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    before = book.execution_key(CHAPTER, "default", {"model": value}, root)
    (root / "something").write_text("new")
    assert book.execution_key(CHAPTER, "default", {"model": value}, root) == before


def with_inputs(declared: str, text: str = CHAPTER) -> str:
    return text.replace("kernelspec:", f"paramspec: {declared}\nkernelspec:", 1)


def test_declared_inputs_are_in_the_key_and_in_the_sites_check(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramspec_book import sphinx_executed

    source, bench = root / "book" / "a-small.md", root / "bench"
    source.write_text(with_inputs("{inputs: ['bench/*.py', 'results/bench/**/*', gone.txt]}"))
    bench.mkdir()
    (bench / "speed.py").write_text("one")
    copy = book.run_chapter("a-small", root=root)
    told: list[str] = []
    monkeypatch.setattr(sphinx_executed.LOGGER, "warning", lambda line, *_, **__: told.append(line))

    def is_stale() -> bool:
        told.clear()
        page = sphinx_executed.read_copy(source.read_text(), "a-small", str(copy), str(root))
        assert book.RECORD not in page.metadata
        return any("is stale" in line for line in told)

    def rerun() -> bool:
        before = runs(root)
        book.run_chapter("a-small", root=root)
        return runs(root) > before

    assert not is_stale()
    assert not rerun()
    (bench / "notes.txt").write_text("matches no pattern")
    assert not is_stale()
    for name in ("bench/speed.py", "bench/more.py", "results/bench/a/speed.json", "gone.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("two")
        assert is_stale()
        assert rerun()
        assert not is_stale()
    (bench / "more.py").unlink()
    assert is_stale()


@pytest.mark.parametrize(
    "declared",
    [
        "{inputs: bench.py}",
        "{inputs: [3]}",
        "{inputs: ['/etc/*']}",
        "{inputs: ['../*']}",
        "[a]",
        "{inputs: ['']}",
    ],
)
def test_ill_formed_inputs_are_one_line(root: Path, declared: str) -> None:
    (root / "book" / "a-small.md").write_text(with_inputs(declared))
    with pytest.raises(InputError, match="front matter"):
        book.run_chapter("a-small", root=root)
    assert runs(root) == 0


def test_the_speed_page_depends_on_the_benchmark_that_it_runs() -> None:
    chapter = book.find_chapter("speed", REPOSITORY)
    read = {
        path.relative_to(REPOSITORY).as_posix()
        for pattern in book.declared_inputs(chapter.source.read_text())
        for path in REPOSITORY.glob(pattern)
    }
    assert {"tests/benchmarks/scoring.py", "tests/benchmarks/peers.py"} <= read
    assert "results/benchmarks/speed.json" in book.declared_inputs(chapter.source.read_text())


def test_the_library_digest_sees_code_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, other = tmp_path / "paramspec", tmp_path / "paramspec_book"
    (package / "specwiki" / "__pycache__").mkdir(parents=True)
    other.mkdir()
    (other / "book.py").write_text("x = 1")
    monkeypatch.setattr(book, "__file__", str(other / "book.py"))
    seen = [book.library_digest()]
    for name in ("specwiki/questions.jsonl", "pss.py", "../paramspec_book/figures.py"):
        (package / name).write_text("new")
        seen.append(book.library_digest())
    (package / "pss.py").rename(package / "moved.py")
    seen.append(book.library_digest())
    assert len(set(seen)) == len(seen)
    (package / "specwiki" / "__pycache__" / "x.pyc").write_text("compiled")
    assert book.library_digest() == seen[-1]


def test_a_failing_chapter_keeps_its_last_good_copy(root: Path) -> None:
    source = root / "book" / "a-small.md"
    copy = book.run_chapter("a-small", root=root)
    before = copy.read_bytes()
    source.write_text(CHAPTER.replace("seed == 13", "seed == 0"))
    done = command(root, "build")
    assert copy.read_bytes() == before
    assert done.returncode == 3
    lines = done.stderr.strip().splitlines()
    # the first line of the failing cell, counted here from the text itself
    line = source.read_text().split("if seed ==")[0].count("\n") + 1
    (told,) = [x for x in lines if x.startswith("chapter a-small")]
    assert told.startswith(
        f"chapter a-small failed (a-small.md:{line}): ValueError: an unlucky seed"
    )
    assert lines[-1] == "paramspec: error: the site was not built: a-small failed, see above"
    unfinished = root / told.rsplit(" ", 1)[1]
    outputs = [o for c in nbformat.read(unfinished, 4).cells for o in c.get("outputs", [])]
    assert "ValueError" in {o.get("ename") for o in outputs}
    assert not (root / "_build" / "html").exists()


def test_a_killed_run_leaves_the_last_good_copy(root: Path) -> None:
    copy = book.run_chapter("a-small", root=root)
    before = copy.read_bytes()
    text = CHAPTER + "\n```{code-cell} ipython3\nimport time; time.sleep(600)\n```\n"
    (root / "book" / "a-small.md").write_text(text)
    line = [sys.executable, "-c", "from paramspec.cli import main; main()", "run", "a-small"]
    with subprocess.Popen(line, cwd=root, start_new_session=True) as process:
        deadline = time.monotonic() + 600
        while runs(root) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)  # the run alone: its kernel is in its session too
    assert runs(root) == 2
    assert copy.read_bytes() == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


BAD = [
    (["run", "4-twenty"], "4-twenty", "a-small"),
    (["run", "a-smal"], "a-smal", "a-small"),
    (["run", "book/index.md"], "book/index.md", "jupytext"),
    (["run", "a-small", "--profile", "defualt"], "defualt", "default"),
    (["run", "a-small", "--profile", "list.yaml"], "list.yaml", "map chapters"),
    (["run", "a-small", "--profile", "broken.yaml"], "broken.yaml", "not YAML"),
    (["run", "a-small", "--profile", "absent.yaml"], "absent.yaml", "read"),
    (["run", "a-small", "--profile", "stranger.yaml"], "9-none", "a-small"),
    (["run", "a-small", "--profile", "typo.yaml"], "sede", "seed"),
    (["build", "--profile", "typo.yaml"], "sede", "seed"),
    (["build", "--profile", "none"], "none", "default"),
    (["run", "a-small", "-p", "sede", "1"], "sede", "seed"),
    (["run", "a-small", "-p", "seed", "x"], "'x'", "seed must be int"),
    (["run", "a-small", "-p", "seed", "1.5"], "1.5", "seed must be int"),
    (["run", "a-small", "-p", "seed", "true"], "True", "seed must be int"),
    (["run", "a-small", "-p", "exact", "1"], "1", "exact must be bool"),
    (["run", "a-small", "-p", "ratios", "0.5"], "0.5", "ratios must be list[float]"),
    (["run", "a-small", "-p", "ratios", "[0.5, high]"], "high", "ratios[1]"),
    (["run", "a-small", "-p", "limit", "many"], "many", "int | None"),
    (["run", "a-small", "-p", "seed"], "seed", "no value"),
    (["run", "a-small", "-p", "seed", "["], "'['", "YAML"),
    (["run", "a-small", "--out", "result.txt"], "result.txt", ".ipynb"),
    (["run", "a-small", "--out", "runs.txt/x.ipynb"], "runs.txt", "cannot write"),
    (["build", "--out", "runs.txt/x"], "runs.txt", "cannot write"),
    (["run", "a-small", "--out", "folder.ipynb"], "folder.ipynb", "a folder; choose another place"),
]


@pytest.mark.parametrize(("arguments", "value", "remedy"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_one_line_before_any_work(
    root: Path,
    arguments: list[str],
    value: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from paramspec import cli

    (root / "list.yaml").write_text("[1, 2]")
    (root / "broken.yaml").write_text("a: [")
    (root / "stranger.yaml").write_text("9-none: {}")
    (root / "typo.yaml").write_text("a-small: {sede: 1}")
    (root / "runs.txt").write_text("")
    (root / "folder.ipynb").mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["paramspec", *arguments])
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(SystemExit) as exit:
        cli.main()
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert len(error.splitlines()) == 1
    assert value in error
    assert remedy in error


def test_a_chapter_is_found_by_name_number_and_path(tmp_path: Path) -> None:
    names = {"3_masking": CHAPTER, "4_twenty": CHAPTER, "31_other": CHAPTER}
    root = make_checkout(tmp_path / "checkout", **names)
    for name in ("3-masking", "3", "book/3-masking.md", "3-masking.md"):
        assert book.find_chapter(name, root).name == "3-masking"
    assert [c.name for c in book.chapters(root)] == ["3-masking", "4-twenty", "31-other"]
    (root / "book" / "4-twenty.md").unlink()
    with pytest.raises(InputError, match=r"_toc.yml: page book/4-twenty.md does not exist"):
        book.chapters(root)


def test_papermill_itself_runs_a_chapter(root: Path) -> None:
    tools = Path(sys.executable).parent
    pipe = f"{tools}/jupytext --to ipynb -o - book/a-small.md | {tools}/papermill - out.ipynb"
    line = f"{pipe} -p seed 3 -y 'ratios: [0.1]'"
    done = subprocess.run(line, shell=True, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = book.run_chapter("a-small", {"seed": 3, "ratios": [0.1]}, root=root)
    assert printed(root / "out.ipynb") == printed(ours) == "3 [0.1] None none True"


def test_declared_parameters_agree_with_papermill_where_it_can_read(root: Path) -> None:
    chapter = book.find_chapter("a-small", root)
    ours = book.declared_parameters(chapter)
    notebook = root / "a.ipynb"
    jupytext.write(jupytext.read(chapter.source), notebook)
    theirs = papermill.inspect_notebook(notebook)
    assert set(ours) - set(theirs) == {"limit"}  # papermill's pattern knows no `|`
    for name, their in theirs.items():
        assert ours[name].annotation == their["inferred_type_name"]
        assert ours[name].help == their["help"].strip()
        assert ours[name].default == eval(their["default"])


@pytest.mark.parametrize("line", ["seed = 0", "seed: int = len('a')", "seed: int = = 1"])
def test_a_parameter_must_be_typed_and_literal(root: Path, line: str) -> None:
    source = root / "book" / "a-small.md"
    source.write_text(CHAPTER.replace("seed: int = 0", line))
    with pytest.raises(InputError, match=r"a-small.md: parameters cell"):
        book.declared_parameters(book.Chapter("a-small", source))


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [0, -3], [1.0, True, "1", None]),
        ("float", [0, 1.5], ["1", True, None]),
        ("bool", [True, False], [0, "yes"]),
        ("str", ["", "a"], [1, None, ["a"]]),
        ("list[str]", [[], ["a"]], ["a", [1]]),
        ("list[list[float]]", [[[0.1, 1]]], [[0.1]]),
        ("int | None", [None, 2], ["none", 2.5]),
        ("Optional[str]", [None, "a"], [2]),
        ('Literal["mean", "last"]', ["mean"], ["max", None]),
    ],
)
def test_types_are_strict(annotation: str, good: list[object], bad: list[object]) -> None:
    parameter = book.Parameter("x", annotation, None, "")
    for value in good:
        assert book._check_type(parameter, value, "here") == value
    for value in bad:
        with pytest.raises(InputError, match="parameter x"):
            book._check_type(parameter, value, "here")


def _typed(annotation: str, text: str) -> object:
    """What `-p x TEXT` gives a parameter of this type."""
    [(name, value)] = book.parse_assignments([f"x={text}"]).items()
    return book._check_typed(book.Parameter(name, annotation, None, ""), value, "-p")


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("int", "3", 3),
        ("int", "-2", -2),
        ("float", "1e3", 1000.0),
        ("float", "1e-3", 0.001),
        ("float", ".5", 0.5),
        ("list[float]", "[0, 1e-3]", [0, 0.001]),
        ("int | None", "null", None),
        ("bool", "true", True),
        ("str", "k=v", "k=v"),
        ("str", '"quoted: #text"', "quoted: #text"),
        ("list[str]", "[no, 010, 12:30, 2020-01-01]", ["no", "010", "12:30", "2020-01-01"]),
    ],
)
def test_a_typed_value_is_read_by_the_parameter_s_type(annotation, text, value) -> None:
    read = _typed(annotation, text)
    assert (type(read), read) == (type(value), value)


TRAPS = ["010", "1:30", "1_0", "0x10", "no", "yes", "on", "12:30", "2020-01-01", "~", "0b1", "+1"]


@pytest.mark.parametrize(
    "text", [*TRAPS, "1e3", "3", "true", "null", "", " a", "a #b", "a: b", "*a", "[a]", "[a", "a|b"]
)
def test_a_text_is_kept_as_it_was_typed(text: str) -> None:
    assert _typed("str", text) == text


@pytest.mark.parametrize("annotation", ["int", "bool", "float"])
@pytest.mark.parametrize("text", [*TRAPS, "", "nan", ".inf", "1e999", "1 #2", "\u0661"])
def test_what_only_looks_like_a_number_is_one_line(annotation: str, text: str) -> None:
    with pytest.raises(InputError, match=r"^-p: parameter x") as error:
        _typed(annotation, text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="-p seed: given twice, '1' and '2'"):
        book.parse_assignments(["seed=1", "seed=2"])


def test_the_commit_and_changes_to_it_are_recorded(root: Path) -> None:
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert book._commit(root) == {"commit": head.strip(), "dirty": False}
    (root / "book" / "index.md").write_text("changed")
    assert book._commit(root)["dirty"] is True


def test_lines_of_cells_point_into_the_source() -> None:
    notebook = jupytext.reads(CHAPTER, fmt="md:myst")
    tagged = next(
        i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])
    )
    injected = nbformat.v4.new_code_cell("seed = 3", metadata={"tags": ["injected-parameters"]})
    cells = [*notebook.cells[: tagged + 1], injected, *notebook.cells[tagged + 1 :]]
    text = CHAPTER.splitlines()
    lines = book.cell_lines(CHAPTER, cells)
    assert len(lines) == len(cells)
    for cell, line in zip(cells, lines, strict=True):
        if cell is not injected:
            first = cell.source.splitlines()[0]
            assert first in text[line : line + 5]


SMALL = HEADER + "\n# Page {name}\n\n```{{code-cell}} ipython3\nprint('{name}')\n```\n"


def test_texts_on_a_page_are_as_they_stand_in_a_folder_of_any_name(tmp_path: Path) -> None:
    import html

    root = make_checkout(tmp_path / "a{b} [c] $d", a_small=CHAPTER)
    model = "$x$ | `y` <b>_z_</b> a--b {w}"
    profile = "_tiny_|*a*`b`.yaml"
    (root / profile).write_text(json.dumps({"a-small": {"model": model}}))
    built = book.build(profile=str(root / profile), root=root)
    assert json.dumps(model)[1:-1] in printed(root / "book" / "_executed" / "a-small.ipynb")
    status = html.unescape((built / "book" / "status.html").read_text())
    assert profile in re.sub("<[^>]+>", "", status)
    page = html.unescape((built / "book" / "a-small.html").read_text())
    assert f"model = {model}" in page.replace('<span class="pre">', "").replace("</span>", "")


def test_a_site_refuses_missing_failed_and_stale_copies(tmp_path: Path) -> None:
    names = ("good", "gone", "failed", "stale")
    root = make_checkout(tmp_path / "checkout", **{n: SMALL.format(name=n) for n in names})
    for folder in (".venv/lib", "results"):  # no page of the book: not to be read at all
        (root / folder).mkdir(parents=True)
        (root / folder / "card.md").write_text("---\n{{ card }}\n---\n# A template\n")
    out = root / "elsewhere"
    html = book.build(root=root, out=out)
    assert html == out / "_build" / "html"
    assert not (root / "_build").exists()
    assert not (root / "book" / "_executed").exists()
    pages = {name: (html / "book" / f"{name}.html").read_text() for name in names}
    assert all("Last executed" in page and f"{n}\n" in page for n, page in pages.items())
    status = (html / "book" / "status.html").read_text()
    assert all(f'href="{name}.html"' in status for name in names)

    before = (html / "index.html").stat().st_mtime_ns
    book.build(root=root, out=out)
    assert (html / "index.html").stat().st_mtime_ns == before  # nothing changed, nothing was done

    copies = out / "_executed"
    (copies / "gone.ipynb").unlink()
    broken = nbformat.read(copies / "failed.ipynb", 4)
    error = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
    broken.cells[-1].outputs = [error]
    nbformat.write(broken, copies / "failed.ipynb")
    source = root / "book" / "stale.md"
    source.write_text(source.read_text() + "\nMore, and [a dead link](nowhere.md).\n")
    done = site(root, out)
    assert "SiteFailed" in done.stderr
    warnings = {
        name: [line for line in done.stderr.splitlines() if f"{name}.md" in line] for name in names
    }
    assert not warnings["good"]
    assert "the executed copy is missing" in warnings["gone"][0]
    assert "the executed copy holds an error" in warnings["failed"][0]
    assert "the executed copy is stale" in warnings["stale"][0]
    assert (html / "index.html").stat().st_mtime_ns == before  # the whole site stays


def test_a_warning_names_the_line_of_the_source(tmp_path: Path) -> None:
    text = SMALL.format(name="page") + "\nProse.\n\nAnd [a dead link](nowhere.md).\n"
    root = make_checkout(tmp_path / "checkout", page=text)
    done = command(root, "build")
    assert done.returncode == 4
    line = text.split("And [a dead")[0].count("\n") + 1
    assert f"page.md:{line}: WARNING" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("paramspec: error: the site was not")


def site(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site alone, from the copies that are there, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from paramspec import book;"
        "root, out = map(Path, sys.argv[1:]);"
        "book.build_site(root, out / '_executed', out / '_build')"
    )
    line = [sys.executable, "-c", code, str(root), str(out)]
    return subprocess.run(line, cwd=root, capture_output=True, text=True)


# The real book


REAL = {c.name: c for c in book.chapters(REPOSITORY)}


@pytest.mark.parametrize("name", REAL)
def test_real_chapters_declare_kernel_and_typed_parameters(name: str) -> None:
    chapter = REAL[name]
    text = chapter.source.read_text()
    notebook = jupytext.reads(text, fmt="md:myst")
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    declared = book.declared_parameters(chapter)
    defaults = {p.name: p.default for p in declared.values()}
    assert book.check_parameters(chapter, defaults, "default") == defaults
    assert all(p.help for p in declared.values())  # each says what it is
    myst = read_myst_markdown_notebook(text, add_source_map=True)
    assert len(myst.cells) == len(notebook.cells)  # so that warnings name the right lines


@pytest.mark.parametrize("profile", ["smoke", "default", "paper"])
def test_real_profiles_fit_their_chapters(profile: str) -> None:
    table = book.load_profile(profile, REPOSITORY)
    for name, values in table.items():
        book.check_parameters(book.find_chapter(name, REPOSITORY), values, profile)


def test_every_figure_of_a_chapter_is_on_its_page():
    """The second one, too: drawing the first puts back no setting that a kernel has of its own."""
    rows = "pd.DataFrame({'vectors': [1, 2], 'layer': [0, 0], 'error': [0.5, 0.2]})"
    start = "import pandas as pd\nfrom paramspec import figures\nfigures.use_book_style()\n"
    sources = [f"{start}rows = {rows}", *["figures.promoted_share(rows);"] * 2]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    _, *drawn = nbclient.NotebookClient(notebook, kernel_name="python3").execute().cells
    assert [["image/png" in output.data for output in cell.outputs] for cell in drawn] == [
        [True]
    ] * 2
