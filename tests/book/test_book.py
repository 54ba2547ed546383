"""Chapters run as promised: typed, skipped while nothing changed, replaced only by a good run."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from myst_nb.core.read import read_myst_markdown_notebook

from checkout import HEADER, REPOSITORY, make_checkout
from paramspec.errors import InputError
from paramspec.execution import provenance
from paramspec.execution.store import Store
from paramspec_book import book, keys, parameters, sphinx_executed
from paramspec_book.keys import execution_key, read_record

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
def root(tmp_path):
    """A checkout with one chapter, `a-small`."""
    return make_checkout(tmp_path / "checkout", a_small=CHAPTER)


@pytest.fixture
def chapter(root):
    return root / "book" / "a-small.md"


def printed(copy):
    """What the last cell of an executed copy printed."""
    return nbformat.read(copy, 4).cells[-1].outputs[0].text.strip()


def test_a_run_executes_once_and_records_where_it_came_from(root):
    (root / "book" / "profiles" / "tiny.yaml").write_text("a-small:\n  ratios: [1]\n")
    copy = book.run_chapter("a-small", profile="tiny", root=root)
    assert copy == root / "book" / "_executed" / "a-small.ipynb"
    assert printed(copy) == "0 [1.0] None none True"
    record = read_record(copy)
    expected = {"seed": 0, "ratios": [1.0], "limit": None, "model": "none", "exact": True}
    assert (record["parameters"], record["profile"]) == (expected, "tiny")
    assert record["commit"] is None  # a temporary folder is outside git
    assert record["versions"]["python"] == sys.version.split()[0]
    assert str(root) not in copy.read_text()  # the site publishes copies: no machine's paths
    before = copy.stat().st_mtime_ns
    book.run_chapter("a-small", profile="tiny", root=root)
    assert ((root / "runs.txt").read_text(), copy.stat().st_mtime_ns) == ("run\n", before)
    book.run_chapter("a-small", profile="tiny", root=root, force=True)
    assert (root / "runs.txt").read_text() == "run\n" * 2


MEASURES = """
# Two results

```{code-cell} ipython3
from paramspec.execution.store import Store

store = Store("results/store")
for unit in ("pss", "answers"):
    if store.get({"unit": unit}) is None:
        store.put({"unit": unit}, lambda folder: None, {"device": "cpu"})
```
"""


def test_a_page_says_what_computed_its_results_and_not_what_read_them(tmp_path, monkeypatch):
    """One of two results was there, of another machine and from a hub's model."""
    root = make_checkout(tmp_path / "checkout", a_small=HEADER + MEASURES)
    facts = {"model": "org/toy", "commit": "c" * 40, "tokenizer": {"kept": [{"token": "<s>"}]}}
    gone = {"cpu": "Another CPU", "cores": 64, "memory": 2**40, "threads": 8, "gpus": ["A100"]}
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "hardware", lambda: gone)
        store = Store(root / "results" / "store")
        store.put({"unit": "pss"}, lambda folder: None, facts | {"device": "cuda:0"})
        store.put({"unit": "never read"}, lambda folder: None, {"device": "cuda:0"})
    results = read_record(book.run_chapter("a-small", root=root))["results"]
    first, second = results["computed"]
    assert (first["units"], first["hardware"], first["device"]) == ({"pss": 1}, gone, "cuda:0")
    assert (second["units"], second["device"]) == ({"answers": 1}, "cpu")
    assert second["hardware"]["cpu"] == provenance.hardware()["cpu"]
    assert results["models"] == {"org/toy": {"commit": "c" * 40, "before": ["<s>"]}}
    told = sphinx_executed.describe_results(results)
    for part in ("1 pss: ", "Another CPU, 64 cores", f"torch {version('torch')}"):
        assert part in told[0]
    assert f"org/toy, commit {'c' * 40}: <s> " in told[2]
    assert not list((root / "results" / "unfinished").glob("*.used"))


def test_parameters_of_ones_own_leave_the_books_copy_alone(root):
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


def test_the_key_changes_with_everything_a_result_depends_on(root, chapter, monkeypatch):
    library = root / "lib"
    caches = library / "paramspec" / "__pycache__"
    caches.mkdir(parents=True)
    (library / "paramspec_book").mkdir()
    monkeypatch.setattr(keys, "LIBRARY", library)

    def key(profile="default", **values):
        return execution_key(chapter, profile, values, root)

    seen = [key(), key(profile="paper"), key(seed=1)]
    for name in ("paramspec/questions.jsonl", "paramspec/pss.py", "paramspec_book/book.py"):
        (library / name).write_text("new")
        seen.append(key())
    (library / "paramspec" / "pss.py").rename(library / "paramspec" / "moved.py")
    seen.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(keys, "version_of", lambda name: "0")
        seen.append(key())
    chapter.write_text(CHAPTER + " ")
    seen.append(key())
    assert len(set(seen)) == len(seen)
    chapter.write_bytes((CHAPTER + " ").replace("\n", "\r\n").encode())  # as git does on Windows
    (caches / "x.pyc").write_text("compiled")
    assert key() == seen[-1]


@pytest.mark.parametrize(
    ("value", "file"),
    [
        ("mine.yaml", "mine.yaml"),
        ("./mine.yaml:llama-5@50", "mine.yaml"),
        ({"a": ["zoo", ["mine.yaml:b"]]}, "mine.yaml"),
        ("@names.txt", "names.txt"),
        ("weights/../weights/", "weights/deep/config.json"),
        ("with space:and colon.yaml:b", "with space:and colon.yaml"),
        ("~/mine.yaml:llama-4", "home/mine.yaml"),
        ("../aside.yaml:b", "../aside.yaml"),
    ],
)
def test_what_a_parameter_names_is_in_the_key_by_its_content(
    root, chapter, monkeypatch, value, file
):
    monkeypatch.setenv("HOME", str(root / "home"))
    (root / file).parent.mkdir(parents=True, exist_ok=True)

    def key(text, time):
        (root / file).write_text(text)
        os.utime(root / file, ns=(time, time))
        return execution_key(chapter, "", {"model": value}, root)

    seen = {execution_key(chapter, "", {"model": value}, root), key("one", 1), key("two", 2)}
    assert len(seen) == 3
    assert key("one", 3) in seen  # the content counts, not when it was written
    monkeypatch.setattr(keys, "READ_WHOLE", 2)
    assert len(seen | {key("one", 1), key("one", 2)}) == 5  # of a large file, size and time


@pytest.mark.parametrize("value", ["", ".", "..", "/", "~", "no:file", "tcp://host:8786"])
def test_what_names_no_input_does_not_depend_on_the_checkout(root, chapter, monkeypatch, value):
    monkeypatch.setenv("HOME", str(root.parent))
    before = execution_key(chapter, "default", {"model": value}, root)
    (root / "something").write_text("new")
    assert execution_key(chapter, "default", {"model": value}, root) == before


def test_declared_inputs_are_in_the_key(root, chapter):
    declared = "paramspec: {inputs: ['bench/*.py', 'results/bench/**/*', gone.txt]}"
    chapter.write_text(CHAPTER.replace("kernelspec:", f"{declared}\nkernelspec:", 1))
    seen = [execution_key(chapter, "default", {}, root)]
    names = ["bench/speed.py", "bench/more.py", "results/bench/a/speed.json", "gone.txt"]
    for number, name in enumerate([*names, "bench/speed.py", "bench/not-declared.txt"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(number))
        seen.append(execution_key(chapter, "default", {}, root))
    assert len(set(seen)) == len(seen) - 1
    assert seen[-1] == seen[-2]


def test_a_failing_chapter_keeps_its_last_good_copy(root, chapter, monkeypatch, command):
    copy = book.run_chapter("a-small", root=root)
    before = copy.read_bytes()
    chapter.write_text(CHAPTER.replace("seed == 13", "seed == 0"))
    monkeypatch.chdir(root)
    status, _, error = command("build")
    assert (status, copy.read_bytes()) == (3, before)
    # the first line of the failing cell, counted here from the text itself
    line = chapter.read_text().split("if seed ==")[0].count("\n") + 1
    (told,) = [x for x in error.splitlines() if x.startswith("chapter a-small")]
    assert f"(a-small.md:{line}): ValueError: an unlucky seed" in told
    assert "ValueError" in (root / told.rsplit(" ", 1)[1]).read_text()  # the unfinished notebook
    assert not (root / "_build" / "html").exists()


BAD = [
    (["run", "4-twenty"], "4-twenty", "a-small"),
    (["run", "a-smal"], "a-smal", "a-small"),
    (["run", "book/index.md"], "book/index.md", "a-small"),
    (["run", "a-small", "--profile", "defualt"], "defualt", "default"),
    (["run", "a-small", "--profile", "list.yaml"], "list.yaml", "map chapters"),
    (["run", "a-small", "--profile", "broken.yaml"], "broken.yaml", "not YAML"),
    (["run", "a-small", "--profile", "absent.yaml"], "absent.yaml", "No such file"),
    (["run", "a-small", "--profile", "stranger.yaml"], "9-none", "a-small"),
    (["build", "--profile", "typo.yaml"], "sede", "seed"),
    (["run", "a-small", "-p", "sede", "1"], "sede", "seed"),
    (["run", "a-small", "-p", "seed", "x"], "seed 'x'", "integer"),
    (["run", "a-small", "-p", "exact", "1"], "exact 1", "boolean"),
    (["run", "a-small", "-p", "ratios", "[0.5, high]"], "ratios[1] 'high'", "number"),
    (["run", "a-small", "-p", "seed"], "seed", "no value"),
    (["run", "a-small", "-p", "seed", "1", "-p", "seed", "2"], "'2'", "given twice"),
    (["run", "a-small", "-p", "seed", "["], "'['", "YAML"),
    (["run", "a-small", "--out", "result.txt"], "result.txt", ".ipynb"),
    (["run", "a-small", "--out", "runs.txt/x.ipynb"], "runs.txt", "cannot write"),
    (["build", "--out", "runs.txt/x"], "runs.txt", "cannot write"),
    (["run", "a-small", "--out", "folder.ipynb"], "folder.ipynb", "a folder"),
]


@pytest.mark.parametrize(("arguments", "value", "remedy"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_refused_before_any_work(root, arguments, value, remedy, monkeypatch, refused):
    files = {"list.yaml": "[1, 2]", "broken.yaml": "a: [", "stranger.yaml": "9-none: {}"}
    for name, text in {**files, "typo.yaml": "a-small: {sede: 1}", "runs.txt": ""}.items():
        (root / name).write_text(text)
    (root / "folder.ipynb").mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setattr(papermill, "execute_notebook", None)
    error = refused(*arguments)
    assert value in error
    assert remedy in error


def test_a_chapter_is_found_by_name_number_and_path(tmp_path):
    names = {"3_masking": CHAPTER, "4_twenty": CHAPTER, "31_other": CHAPTER}
    root = make_checkout(tmp_path / "checkout", **names)
    for name in ("3-masking", "3", "book/3-masking.md", "3-masking.md"):
        assert parameters.find_chapter(name, root).stem == "3-masking"
    assert [c.stem for c in parameters.chapters(root)] == ["3-masking", "4-twenty", "31-other"]
    (root / "book" / "4-twenty.md").unlink()
    with pytest.raises(InputError, match=r"_toc.yml: page book/4-twenty.md does not exist"):
        parameters.chapters(root)


def test_papermill_itself_runs_a_chapter(root):
    tools = Path(sys.executable).parent
    pipe = f"{tools}/jupytext --to ipynb -o - book/a-small.md | {tools}/papermill - out.ipynb"
    line = f"{pipe} -p seed 3 -y 'ratios: [0.1]'"
    done = subprocess.run(line, shell=True, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = book.run_chapter("a-small", {"seed": 3, "ratios": [0.1]}, root=root)
    assert printed(root / "out.ipynb") == printed(ours) == "3 [0.1] None none True"


LINES = ["seed = 0", "seed: int = len('a')", "seed: int = = 1", "seed: integer = 0"]


@pytest.mark.parametrize("line", LINES)
def test_a_parameter_must_be_typed_and_literal(chapter, line):
    chapter.write_text(CHAPTER.replace("seed: int = 0", line))
    with pytest.raises(InputError, match=r"a-small.md: parameters cell"):
        parameters.declared_parameters(chapter)


def checked(chapter, annotation, value):
    """A value as a parameter `x` of this type has it."""
    chapter.write_text(CHAPTER.replace("seed: int = 0", f"x: {annotation} = None"))
    return parameters.check_value(parameters.declared_parameters(chapter), "x", value)


BAD_VALUES = [("int", 1.0), ("int", True), ("int", "1"), ("float", "1"), ("float", True)]
BAD_VALUES += [("bool", 0), ("list[str]", [1]), ("int | None", "none"), ('Literal["a"]', "b")]


@pytest.mark.parametrize(("annotation", "value"), BAD_VALUES)
def test_types_are_strict(chapter, annotation, value):
    """What is good for them is in the profiles, and below."""
    with pytest.raises(InputError, match=r"^x"):
        checked(chapter, annotation, value)


TYPED = [("int", "-2", -2), ("float", "1e-3", 0.001), ("list[float]", "[0, 1e-3]", [0, 0.001])]
TYPED += [("int | None", "null", None), ("bool", "true", True), ("str", '"a: #b"', "a: #b")]
TYPED += [("list[str]", "[no, 010, 2020-01-01]", ["no", "010", "2020-01-01"])]
KEPT = ["010", "1:30", "no", "~", "1e3", "3", "true", "null", "", " a", "a #b", "*a", "[a]", "[a"]
TYPED += [("str", text, text) for text in [*KEPT, "k=v"]]
NO_NUMBERS = ["010", "1_0", "no", "", "nan", "1e999", "1 #2"]
TYPED += [(kind, text, InputError) for kind in ("int", "bool", "float") for text in NO_NUMBERS]


@pytest.mark.parametrize(("annotation", "text", "value"), TYPED)
def test_a_typed_value_is_read_by_the_parameter_s_type(chapter, annotation, text, value):
    """What `-p x TEXT` gives a parameter of this type; or one line."""
    given = parameters.parse_assignments([f"x={text}"])["x"]
    if value is InputError:
        with pytest.raises(InputError, match=f"^x {re.escape(repr(text))}: .*$"):
            checked(chapter, annotation, given)
    else:
        read = checked(chapter, annotation, given)
        assert (type(read), read) == (type(value), value)


def test_the_commit_and_changes_to_it_are_recorded(root):
    def git(*words):
        line = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    for words in (("init",), ("add", "."), ("commit", "-m", "x")):
        git(*words)
    found = book._circumstances(root)
    assert (found["commit"], found["dirty"]) == (git("rev-parse", "HEAD"), False)
    (root / "book" / "index.md").write_text("changed")
    assert book._circumstances(root)["dirty"] is True


SMALL = HEADER + "\n# Page {name}\n\n```{{code-cell}} ipython3\nprint('{name}')\n```\n"


MEETS = """
# A page

```{{code-cell}} ipython3
import os, pathlib, time

def log(*words):
    with open("log.txt", "a") as file:
        print("{name}", *words, file=file)

log("begins")
pathlib.Path("{name}.here").touch()
until = time.monotonic() + 120
while not pathlib.Path("{other}.here").exists() and time.monotonic() < until:
    time.sleep(0.1)
used = pathlib.Path(os.environ["PARAMSPEC_USED"]).name
log("ends", *sorted(os.sched_getaffinity(0)), used.rpartition("-")[0])
```
"""


@pytest.mark.skipif(sys.platform != "linux", reason="cores are divided on Linux alone")
@pytest.mark.parametrize("shares", [1, 2])
def test_chapters_run_on_shares_of_the_cores_the_long_ones_first_and_one_alone(
    tmp_path, monkeypatch, shares
):
    """With two shares, two chapters meet; each has a file of its own for what it reads."""
    pages = {}
    for name, wish in {"single": "{alone: true}", "short": "{}", "tall": "{long: true}"}.items():
        header = HEADER.replace("kernelspec:", f"paramspec: {wish}\nkernelspec:")
        other = {"short": "tall", "tall": "short"}.get(name, name) if shares == 2 else name
        pages[name] = header + MEETS.format(name=name, other=other)
    root = make_checkout(tmp_path / "checkout", **pages)
    mine = sorted(os.sched_getaffinity(0))
    divided = [{mine[0]}, {mine[-1]}][:shares]
    monkeypatch.setattr(book, "shares_of_cores", lambda: list(divided))
    monkeypatch.setattr(book, "build_site", lambda *_: None)
    where = os.getcwd()
    book.build(root=root)
    assert os.getcwd() == where
    log = [line.split() for line in (root / "log.txt").read_text().splitlines()]
    begun = [name for name, word, *_ in log if word == "begins"]
    ends = {name: words for name, word, *words in log if word == "ends"}
    order = [(name, word) for name, word, *_ in log]
    if shares == 1:
        assert begun == ["tall", "short", "single"]
    else:
        assert {word for _, word in order[:2]} == {"begins"}  # before either ends: they met
        assert order[4:] == [("single", "begins"), ("single", "ends")]
    assert ends["single"] == [*map(str, mine), "single"]
    assert {ends[name][0] for name in ("tall", "short")} == {str(*share) for share in divided}
    assert all(ends[name][1:] == [name] for name in ("tall", "short"))


def test_two_chapters_share_the_cores_unless_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(book, "cores", lambda: 3)  # of a container's eight
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 10)))
    assert book.shares_of_cores() == [{2, 4}, {3}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert book.shares_of_cores() == [{5}]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert book.shares_of_cores() == [set()]


@pytest.mark.slow
def test_texts_on_a_page_are_as_they_stand_in_a_folder_of_any_name(tmp_path):
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


@pytest.mark.slow
def test_a_site_refuses_missing_and_stale_copies(tmp_path, capfd):
    names = ("good", "gone", "stale")
    root = make_checkout(tmp_path / "checkout", **{n: SMALL.format(name=n) for n in names})
    (root / "results").mkdir()  # no page of the book: not to be read at all
    (root / "results" / "card.md").write_text("---\n{{ card }}\n---\n# A template\n")
    out = root / "elsewhere"
    built = book.build(root=root, out=out)
    assert built == out / "_build" / "html"
    assert not [*root.glob("_build"), *root.glob("book/_executed")]
    status = (built / "book" / "status.html").read_text()
    for name in names:
        page = (built / "book" / f"{name}.html").read_text()
        assert "Last executed" in page
        assert f"{name}\n" in page
        assert f'href="{name}.html"' in status
    before = (built / "index.html").stat().st_mtime_ns
    (out / "_executed" / "gone.ipynb").unlink()
    (root / "book" / "stale.md").write_text(SMALL.format(name="stale") + "\nMore.\n")
    capfd.readouterr()
    with pytest.raises(book.SiteFailed):
        book.build_site(root, out / "_executed", out / "_build")
    error = capfd.readouterr().err
    assert "good.md" not in error
    assert re.search("gone.md.* missing", error)
    assert re.search("stale.md.* stale", error)
    assert (built / "index.html").stat().st_mtime_ns == before  # the whole site stays


@pytest.mark.slow
def test_a_warning_names_the_line_of_the_source(root, chapter, capfd):
    """Also behind a cell that papermill put in."""
    (root / "book" / "profiles" / "default.yaml").write_text("a-small: {seed: 4}")
    text = CHAPTER + "\nProse.\n\nAnd [a dead link](nowhere.md).\n"
    chapter.write_text(text)
    with pytest.raises(book.SiteFailed):
        book.build(root=root)
    line = text.split("And [a dead")[0].count("\n") + 1
    assert f"a-small.md:{line}: WARNING" in capfd.readouterr().err


REAL = {chapter.stem: chapter for chapter in parameters.chapters(REPOSITORY)}


@pytest.mark.parametrize("name", REAL)
def test_real_chapters_declare_kernel_and_typed_parameters(name):
    notebook = parameters.read_notebook(REAL[name])
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    declared = parameters.declared_parameters(REAL[name])
    for profile in ("smoke", "default", "paper", "rehearsal"):
        values = parameters.chapter_values(REAL[name], profile, {}, REPOSITORY)
        assert declared.parse(**values).model_dump() == values
    myst = read_myst_markdown_notebook(REAL[name].read_text(), add_source_map=True)
    assert len(myst.cells) == len(notebook.cells)  # so that warnings name the right lines
