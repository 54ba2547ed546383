"""A run of `paramspec pss` or `finetune`, or two of them, as one HTML file that needs no other.

    write_report(Path("results/pss"), Path("report.html"))
    write_comparison(Path("before"), Path("after"), Path("comparison.html"))

Tables and figures are made here; the words are in `run_report.html.j2`.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from paramspec.errors import InputError
from paramspec.execution.files import atomic, writing_to
from paramspec.specwiki import Question
from paramspec.stats.compare import compare
from paramspec.stats.estimates import with_interval
from paramspec.stats.summary import peak_pss, summarize
from paramspec.stats.trends import measure_models, model_table
from paramspec_book import figures
from paramspec_book.tables import shown, to_html, with_minus

POINTS = Path("book/_executed/4-twenty-models.data/points.parquet")  # of the book's own models
EXAMPLES, EXTREMES = 8, 5  # questions that are shown; concepts, at either end
TITLES = {
    "concept_accuracy": "C(k)",
    "general_accuracy": "G(k)",
    "did": "diff. in diff.",
    "pss_pooled": "PSS pooled",
}


def write_report(folder: Path, out: Path) -> None:
    """Write the report of the run in a folder, of `pss` or `finetune`.

    Raises InputError if the folder holds no such run, or if the file cannot be written.
    """
    if (folder / "finetune.json").is_file():
        content: dict[str, Any] = {"tuned": _tuned(_json(folder / "finetune.json"))}
    else:
        run, details, questions = read_run(folder)
        content = {
            "models": [
                _measured(one, run, details[details["model"] == one["name"]], questions)
                for one in run["models"]
            ]
        }
    _write(out, f"paramspec report {folder}", content)


def write_comparison(
    first: Path, second: Path, out: Path | None = None
) -> dict[tuple[str, str], pd.DataFrame]:
    """Compare two runs of `pss`: their models of one name, or their only ones; a table of each pair
    of names.

    Raises InputError if a folder holds no run, or if the runs have no model or question in common.
    """
    (_, one, texts), (_, other, other_texts) = read_run(first), read_run(second)
    put = [
        {q.id: (q.question, q.options, q.answer) for q in of.values()}
        for of in (texts, other_texts)
    ]
    same = [name for name, text in put[0].items() if put[1].get(name) == text]
    names, others = one["model"].unique().tolist(), other["model"].unique().tolist()
    pairs = [(name, name) for name in names if name in others]
    if len(names) == len(others) == 1:
        pairs = [(names[0], others[0])]
    if not pairs:
        raise InputError(f"{first}, {second}: no model in common; compare runs of one model each")
    found: dict[tuple[str, str], pd.DataFrame] = {}
    pages = []
    for name, against in pairs:
        table = compare(one[one["model"] == name], other[other["model"] == against], same)
        both = shown(table, {"first": "first", "second": "second"}, ".3f")
        difference = shown(table, {"difference": "difference"}, "+.3f")
        frame = pd.concat([table[["measure"]], both, difference], axis=1)
        decided = table[table["measure"].isin(["accuracy", "diff. in diff."])].to_dict("records")
        found[name, against] = table
        sides = (f"{name} ({first})", f"{against} ({second})")
        pages.append({"sides": sides, "rows": decided, "table": to_html(frame)})
    if out is not None:
        _write(out, f"paramspec compare {first} {second}", {"pairs": pages})
    return found


def read_run(folder: Path) -> tuple[dict[str, Any], pd.DataFrame, dict[str, Question]]:
    """`run, details, questions = read_run(Path("results/pss"))`, as `pss` has written them."""
    needed = [folder / name for name in ("run.json", "details.parquet", "questions.jsonl")]
    if missing := [path for path in needed if not path.is_file()]:
        raise InputError(f"{folder}: no run of pss or finetune, {missing[0].name} is missing")
    lines = needed[2].read_text(encoding="utf-8").splitlines()
    asked = [Question.model_validate_json(line) for line in lines]
    return _json(needed[0]), pd.read_parquet(needed[1]), {one.id: one for one in asked}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); run the command again") from error


def _measured(
    about: dict[str, Any],
    run: dict[str, Any],
    details: pd.DataFrame,
    questions: dict[str, Question],
) -> dict[str, Any]:
    """What the template says of a model of `pss`."""
    summary = summarize(details)
    peaks = peak_pss(details).set_index("mask").to_dict("index")
    asked = {f"questions: {name}": value for name, value in run["questions"].items()}
    alone = model_table(measure_models(details)).assign(family="this model", shown=about["name"])
    book = None
    if POINTS.is_file() and "random" in peaks:
        table = pd.concat([pd.read_parquet(POINTS).assign(shown=""), alone], ignore_index=True)
        book = _picture(figures.against_accuracy(table))
    return {
        "name": about["name"],
        "bare": summary[summary["mask"] == "none"].iloc[0].to_dict(),
        "ratios": sorted(set(summary["ratio"]) - {0}),
        "own": peaks.get("concept"),
        "random": peaks.get("random"),
        "curves": _picture(figures.curves(summary)),
        "book": book,
        "pss": to_html(
            pd.concat([summary[["mask", "ratio"]], shown(summary, TITLES, ".3f")], axis=1)
        ),
        "concepts": to_html(_by_concept(details)),
        "lost": _lost(details, questions),
        "facts": to_html(_facts(asked | about | run["choices"])),
    }


def _by_concept(details: pd.DataFrame) -> pd.DataFrame:
    """Which concepts' own questions lose most beyond unrelated ones, in the mean over ratios."""
    part = details[details["mask"].isin(["none", "concept"])]
    keys = ["mask_concept", "role", "mask"]
    each = part.groupby(keys)["correct_norm"].mean().unstack(["role", "mask"])
    columns = {
        "own questions": ("concept", "none"),
        "under its mask": ("concept", "concept"),
        "unrelated": ("general", "none"),
        "these, under its mask": ("general", "concept"),
    }
    table = pd.DataFrame({name: each[column] for name, column in columns.items()})
    (own, masked), (other, other_masked) = (
        table[[*columns][:2]].T.values,
        table[[*columns][2:]].T.values,
    )
    table["lost beyond unrelated"] = (own - masked) - (other - other_masked)
    table = table.sort_values("lost beyond unrelated", ascending=False).rename_axis("concept")
    if len(table) > 2 * EXTREMES:
        table = pd.concat([table.head(EXTREMES), table.tail(EXTREMES)])
    return table.map("{:.2f}".format).reset_index()


def _lost(details: pd.DataFrame, questions: dict[str, Question]) -> dict[str, Any]:
    """Questions that a concept's own mask makes wrong, those lost at the smallest ratios first."""
    own = details[details["role"] == "concept"]
    known = set(own.loc[(own["mask"] == "none") & (own["correct_norm"] == 1), "question_id"])
    wrong = own[(own["mask"] == "concept") & (own["correct_norm"] == 0)]
    lost = wrong[wrong["question_id"].isin(known)].sort_values(["ratio", "question_id"])
    lost = lost.drop_duplicates("question_id")
    examples = [
        {
            "question": (asked := questions[row.question_id]).question,
            "right": asked.options[asked.answer],
            "instead": asked.options[row.predicted_norm],
            "concept": row.mask_concept,
            "ratio": row.ratio,
        }
        for row in lost.head(EXAMPLES).itertuples()
    ]
    return {"count": len(lost), "known": len(known), "examples": examples}


def _tuned(record: dict[str, Any]) -> dict[str, Any]:
    """What the template says of a directory of `finetune`."""
    run, losses = record["run"], record["losses"]
    table = pd.DataFrame({"step": range(1, len(losses) + 1), "loss": losses})
    table = table.assign(method=run["method"], model=run["model"])
    curve = figures.over_training(table, "step", "step", {"loss": "loss, nats per token"})
    facts = to_html(_facts(run | {"computed": record["computed"]}))
    return {"record": record, "curve": _picture(curve), "facts": facts}


def _facts(values: dict[str, Any]) -> pd.DataFrame:
    rows = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
        if value not in (None, "")
    }
    return pd.DataFrame({"what": rows.keys(), "value": rows.values()})


def _picture(figure: Figure) -> str:
    """An SVG as the address of an image: in it, no name can meet one of another figure."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = base64.b64encode(stream.getvalue().encode()).decode()
    return f"data:image/svg+xml;base64,{text}"


def _interval(row: dict[str, Any], name: str, form: str = ".3f") -> str:
    return with_minus(with_interval(row, name, form))


def _write(out: Path, command: str, content: dict[str, Any]) -> None:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **options)
    environment.filters["interval"] = _interval
    text = environment.get_template("run_report.html.j2").render(command=command, **content)
    with writing_to(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic(out) as scratch:
            scratch.write_text(text, encoding="utf-8")


def use_report_style() -> None:
    """The book's look, without a screen."""
    matplotlib.use("svg")
    figures.use_book_style()
