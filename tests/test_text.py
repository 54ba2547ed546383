"""Names and texts are data: on a terminal, in a figure, on a page, in a file no part is markup."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from matplotlib import pyplot as plt
from matplotlib.text import Text

from paramspec.errors import InputError, printable
from paramspec.execution.files import require_writable
from paramspec.method.masks import load_masks
from paramspec.method.pss import mask_name
from paramspec.models import registry
from paramspec.models.checkpoints import find_checkpoint
from paramspec.models.registry import expand_models, find_spec
from paramspec.specwiki import load_questions
from paramspec.specwiki.questions import choose, describe
from paramspec_book import figures
from paramspec_book.sphinx_executed import in_markdown
from paramspec_book.tables import to_html
from toy_study import CONCEPTS, save_questions, save_toy, toy_questions

# Each is special to something that shows it: rich, matplotlib, Markdown, HTML, a legend.
NAMES = [
    "[bold]a[/bold]",
    "$x_1$ $\\frac$",
    "_b_",
    "*c* :cat: `d`",
    "e|f <b>g</b>",
    "{h} {i}`j` #k",
]


def printed_by(*words, encoding, status=0):
    """What the command prints in a process of its own: on standard error, if it fails."""
    line = [sys.executable, "-m", "paramspec", *words]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(line, env=environment, capture_output=True, timeout=300)
    assert done.returncode == status
    shown, nothing = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
    assert nothing == b""
    return shown


@pytest.mark.parametrize("encoding", ["ascii:strict", "cp1252"])
def test_what_a_terminal_cannot_print_is_replaced(encoding):
    (question,) = choose(load_questions(), "id", "london/landmark", "")
    shown = describe(question) + "\n"
    assert "Gröna Lund" in shown  # which ASCII lacks
    printed = printed_by("questions", "--show", question.id, encoding=encoding)
    assert printed == shown.encode(encoding.partition(":")[0], "replace")
    assert b"zoo-llama" in printed_by("models", "--set", "zoo", encoding=encoding)  # a table


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_an_error_is_one_line_whatever_the_path(encoding):
    name = os.fsdecode(b"caf\xe9 \xe6\x9d\xb1\n\x1b[31m[bold].jsonl")
    told = printed_by("questions", "--questions", name, encoding=encoding, status=2)
    assert told.startswith(b"paramspec: error: caf")
    assert told.count(b"\n") == 1
    assert b"[bold].jsonl: cannot be read (No such file" in told
    assert b"\x1b" not in told
    assert printable("a\nb\x1bc\udce9 é 東") == r"a\nb\x1bc\udce9 é 東"


# Names that pandas, Parquet, the names of masks or an option may take for something else.
TRICKY = ["nan", "None", "Paris, Texas", "Paris", "a/0.3", "a%2F0.3", "@y", "東 京", "Texas"]
ODD = "".join(NAMES).replace("/", "")


@pytest.mark.parametrize(
    ("model", "names", "out"),
    [(ODD, NAMES, f"out {ODD}"), ("org=1/toy@main", TRICKY[:6], "seed=3/out")],
    ids=["markup", "separators"],
)
def test_any_name_goes_through_the_command(tmp_path, monkeypatch, command, model, names, out):
    monkeypatch.chdir(tmp_path)
    save_toy(Path(model))
    new = dict(zip(CONCEPTS, names, strict=False))
    renamed = [q.model_copy(update={"concept": new[q.concept]}) for q in toy_questions(6)]
    save_questions(Path("own.jsonl"), renamed)
    options = "--questions own.jsonl --ratios 0.3,0.1 --general 5 --store a=1/kept"
    for _ in range(2):  # measured, then read from the store
        status, shown, error = command("pss", f"./{model}", *options.split(), "--out", out)
        assert status == 0, error
        assert f"{model}: 6 concepts" in shown
        assert f"{model}, mask concept: difference in differences" in shown
        assert "[0." in shown  # an interval
        pss = pd.read_parquet(f"{out}/pss.parquet")
        assert list(dict.fromkeys(pss["concept"])) == names
        masked = pss[pss["mask"] != "none"]
        masks, _ = load_masks(Path(f"{out}/masks.safetensors"))
        columns = ["model", "concept", "ratio", "mask", "seed"]
        rows = masked[columns].itertuples(index=False, name=None)
        assert {mask_name(*row) for row in rows} == masks.keys()
        assert len(masked) == len(masks)


def test_the_registry_s_table_is_of_texts(monkeypatch, command):
    spec = registry.load_registry()["smollm2-135m"].model_copy(update={"id": "[red]x[/red] :cat:"})
    monkeypatch.setattr(registry, "models_in", lambda chosen: [spec])
    assert "[red]x[/red] :cat:" in command("models")[1]


def test_no_two_masks_have_one_name():
    parts = ["a", "a/b", "b", "b/c", "a/b/c", "%", "%2F", "%252F", "/", "a%2Fb", "0.1/other/0"]
    ratios, kinds = (0.1, 0.1 + 1e-16, 0.1 + 1e-13, 1.0, 1e-5), ("concept", "other")
    keys = set(itertools.product(parts, parts, ratios, kinds, (0, 1)))
    assert mask_name("org/toy", "alpha", 0.05, "concept", 0) == "org/toy/alpha/0.05/concept/0"
    assert len({mask_name(*key) for key in keys}) == len(keys)


def test_a_concept_of_an_option_is_the_whole_text(tmp_path, refused):
    """Whatever stands in it: no comma and no @ of it means anything."""
    for name in {"@names.txt", *TRICKY} - {"Paris", "Texas"}:
        words = ("finetune", "toy", "--method", "FT-PV", "--concept", name, "--out", tmp_path)
        assert f"concept {name!r}: no " in refused(*words)


def test_a_directory_is_found_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a.yaml", "b.yaml:llama-1", "org/name@main", "zoo-llama-1", "c=d", "e:f", "[g]*?"]
    for name in names:
        Path(name).mkdir(parents=True)
        found = find_checkpoint(f"./{name}")
        assert found.path == Path(name)
        assert expand_models([f"./{name}"]) == [f"./{name}"]
        assert find_spec(f"./{name}") is None
    # Results are told apart by the name: this one is the registry's.
    assert find_checkpoint("./zoo-llama-1").name == "./zoo-llama-1"
    assert find_checkpoint("a.yaml/").name == find_checkpoint("./a.yaml").name == "a.yaml"


def test_a_path_that_no_file_can_name_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    os.mkdir(name)
    for use in (find_checkpoint, lambda path: require_writable(Path(path))):
        with pytest.raises(InputError, match="not UTF-8; rename it") as error:
            use(name)
        assert printable(error.value).startswith("caf\\udce9: ")


def drawn_figures():
    """Figures that show names, and the names that each has to show."""
    table = pd.DataFrame(dict.fromkeys(("model", "run", "family", "shown", "group"), NAMES))
    table = table.assign(x=np.arange(1.0, len(NAMES) + 1), chance=0.25)
    for name in ("accuracy", "peak_pss", "did"):
        table = table.assign(**{name: 0.3, f"{name}_low": 0.2, f"{name}_high": 0.4})
    one = table.assign(by="domain", n=4, low=0.2, high=0.4, method="FT-PV", measure="m", value=0.3)
    square = pd.DataFrame(np.eye(len(NAMES)), index=NAMES, columns=NAMES)
    return {
        "accuracy_by": (figures.accuracy_by(one), [f"{name}  (n = 4)" for name in NAMES]),
        "overlap": (figures.overlap(square, NAMES, 0.1), NAMES),
        "along": (figures.along(table, "x", "x"), NAMES),
        "against_accuracy": (figures.against_accuracy(table), NAMES),
        "by_method": (figures.by_method(one, {"m": "m"}), NAMES),
    }


def test_figures_show_names_as_they_stand(recwarn):
    figures.use_book_style()
    for title, (figure, names) in drawn_figures().items():
        figure.canvas.draw()  # mathematics that is none would raise
        texts = [text for text in figure.findobj(Text) if text.get_visible()]
        named = [text for text in texts if "$" in text.get_text()]
        assert named, title
        assert not any(text.get_parse_math() for text in named), title
        shown = {text.get_text().strip("\u200a") for text in texts}
        assert set(names) <= shown, title
        for legend in figure.legends:
            listed = [text.get_text().strip("\u200a") for text in legend.get_texts()]
            assert title == "by_method" or set(names) & set(listed) in (set(), set(names))
        plt.close(figure)
    assert not [one for one in recwarn if "lyph" in str(one.message)]


@pytest.mark.parametrize(
    "name", [*NAMES, "a--b ... \"c\" 'd'", "1. x", "- y", "% z", "a\n\nb", "&amp;"]
)
def test_markdown_shows_a_name_as_it_stands(name):
    reader = MarkdownIt("commonmark").enable("table")
    said = f"In {in_markdown(name)}, it rises."
    [paragraph, inline, _] = reader.parse(said)
    assert paragraph.type == "paragraph_open"
    assert {child.type for child in inline.children} == {"text"}
    shown = "".join(child.content for child in inline.children)
    assert shown == f"In {' '.join(name.split())}, it rises."
    cell = reader.render(f"| a | b |\n|---|---|\n| {in_markdown(name)} | c |")
    assert len(re.findall("<td>", cell)) == 2


def test_a_table_on_a_page_is_of_texts():
    shown = to_html(pd.DataFrame({"model": ["$a$ <b>"]}))
    assert "&lt;b&gt;" in shown
    assert "tex2jax_ignore" in shown
