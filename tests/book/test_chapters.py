"""The chapters are thin: short cells, computing apart from plotting, everything said once."""

from __future__ import annotations

import ast
import re

import jupytext
import nbclient
import nbformat
import pandas as pd
import pytest

from checkout import REPOSITORY
from paramspec.studies.chapters import CHAPTERS, training_of
from paramspec_book import figures, notebook
from paramspec_book.parameters import chapter_values, chapters, find_chapter

PAGES = {page.stem: page.read_text("utf-8") for page in chapters(REPOSITORY)}
CLAIMS = notebook.claims()
DECIMALS = re.compile(r"\d\.\d\d+")
LONGEST = 15  # lines of a code cell
DRAWN = {name for name in dir(figures) if not name.startswith("_")} - {"use_book_style"}
FIGURE = re.compile(
    r":  figure:\n:    name: (fig-[\w-]+)\n:    caption: \"[^\"]{40,}\"\n:  image:\n:    alt: "
)


def code_cells(text: str) -> list[str]:
    """The cells of Python of a chapter, but for its parameters."""
    cells = jupytext.reads(text, fmt="md:myst").cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source[:2] != "%%"]
    return [cell.source for cell in code if "parameters" not in cell.metadata.get("tags", [])]


def computing(source: str) -> set[str]:
    """What a cell that draws a figure does beside; nothing, in a cell that draws none."""
    nodes = list(ast.walk(ast.parse(source)))
    called = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    if not any(name.startswith("figures.") and name[8:] in DRAWN for name in called):
        return set()
    work = (ast.For, ast.While, ast.comprehension, ast.FunctionDef, ast.Lambda, ast.BinOp)
    done = {type(node).__name__ for node in nodes if isinstance(node, work)}
    return done | {
        name for name in called if not re.fullmatch(r"(figures|interactive)\.\w+|len|print", name)
    }


@pytest.mark.parametrize("name", PAGES)
def test_cells_are_short_and_do_one_thing(name):
    for source in code_cells(PAGES[name]):
        assert len(source.strip().splitlines()) <= LONGEST, source
        assert not computing(source), source
        assert "Markdown(" not in source, source  # prose is in Markdown, with glued numbers


def test_every_figure_of_a_chapter_is_shown():
    """The second one too: matplotlib's settings must not be put back by the first."""
    start = "import pandas as pd\nfrom paramspec_book import figures\nfigures.use_book_style()"
    columns = ["r", "r_low", "r_high", "pearson", "reading"]
    sources = [start, *[f"figures.forest(pd.DataFrame(columns={columns}));"] * 2]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    done = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name="python3")
    _, *drawn = done.execute().cells
    assert all("image/svg+xml" in cell.outputs[0].data for cell in drawn)


def test_every_figure_has_a_number_a_caption_and_an_alternative_text():
    names = []
    for text in PAGES.values():
        names += (found := FIGURE.findall(text))
        assert len(found) == text.count(":mystnb:") - text.count("code_prompt_show: Parameters")
    assert len(set(names)) == len(names) > 20


@pytest.mark.parametrize("name", CHAPTERS)
def test_what_a_chapter_measures_is_said_in_the_library(name):
    assert f'notebook.begin("{name}", globals())' in PAGES[name]
    assert "notebook.measure(" in PAGES[name]
    assert not re.search(r"measure_pss\(|measure_runs\(|Training\.|Choices\.", PAGES[name])


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_is_said_once_and_shown_where_it_is_tested(claim):
    one, key = CLAIMS[claim], claim.lower()
    parts = {"chapter", "source", "claim", "numbers", "published", "primary", "rule"}
    assert set(one) - {"effects"} == parts
    page, index = PAGES[one["chapter"]], (REPOSITORY / "book" / "index.md").read_text("utf-8")
    for part in ("claim", "paper"):
        assert f"{one['chapter']}.md::{key}-{part}:s" in index
    assert f"{{verdict}}`{claim}`" in index
    for part in ("primary", "rule"):
        assert f"{{glue:text}}`{key}-{part}`" in page
    numbers = set(DECIMALS.findall(one["published"].format(**one["numbers"])))
    assert numbers >= {"C1": {"0.92", "0.93"}, "C9": {"0.67", "7.89"}}.get(claim, set())
    prose = re.sub(r"```\{code-cell\}.*?```", "", page + index, flags=re.DOTALL)
    assert not numbers & set(DECIMALS.findall(prose))


@pytest.mark.parametrize("profile", ["smoke", "default", "paper"])
def test_chapter_9_trains_what_chapter_8_trains(profile):
    """So that its trained vectors are found."""
    eight, nine = (
        chapter_values(find_chapter(name, REPOSITORY), profile, {}, REPOSITORY) for name in "89"
    )
    for name in ("models", "concepts", "training", "micro_training", "seed"):
        assert eight[name] == nine[name]


def test_a_micro_model_has_a_training_of_its_own():
    given = {
        "training": {"epochs": 7, "learning_rates": [0.1, 0.2]},
        "micro_training": {"epochs": 2, "share": 0.5, "learning_rate": 0.3},
    }
    for name, epochs, share, tried in (
        ("smollm2-135m", 7, 0.125, [0.1, 0.2]),
        ("zoo-llama-3", 2, 0.5, [0.3]),
    ):
        questions, training, rates = training_of(name, {"concepts": 3, "seed": 5, **given})
        assert (training.epochs, training.share, training.seed) == (epochs, share, 5)
        assert rates == tried
        assert set(training.concepts) <= {question.concept for question in questions}


def test_rows_of_methods_keep_their_order():
    def table(*rows):
        columns = ["method", "measure", "value", "low", "high"]
        return pd.DataFrame([(name, "z", x, x, x) for name, x in rows], columns=columns)

    each = {"b": table(("FT-PV", 3.0), ("FT-FV", 1.0)), "a": table(("FT-PV", 3.0))}
    rows = notebook.method_rows(each)
    assert list(zip(rows["model"], rows["method"], rows["value"], strict=True)) == [
        ("b", "FT-PV", 3.0), ("b", "FT-FV", 1.0), ("a", "FT-PV", 3.0)]  # fmt: skip
    words = notebook.in_words(rows, ["model"], "method", ".0f")
    assert (list(words.index), list(words.columns)) == (["b", "a"], ["FT-PV", "FT-FV"])
    assert words.loc["a", "FT-FV"] == ""
