"""Sphinx extension: a chapter's page shows its executed copy, and says where it comes from.

Sources stay `book/X.md` in the table of contents, so links, edit buttons and warnings name the file
that a person edits; their cells and outputs come from the executed copies, by myst-nb's custom
formats, each keyed by the whole path of a chapter. A copy that is missing or stale is a warning,
which `-W` makes an error. A directive `{executed-chapters}` lists all copies in a table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.core.read import read_myst_markdown_notebook, standard_nb_read
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from paramspec.execution.provenance import machine
from paramspec_book.book import executed_folder
from paramspec_book.keys import RECORD, execution_key, read_record
from paramspec_book.parameters import chapters

LOGGER = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", register_copies, priority=900)  # myst-nb's own comes before
    app.connect("doctree-read", add_note)
    app.add_directive("executed-chapters", ExecutedChapters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def register_copies(app: Sphinx) -> None:
    """Let myst-nb read each chapter by `read_copy`, and keep the copies' records."""
    root = Path(app.srcdir)
    env: Any = app.env  # on which extensions keep what they know
    formats = dict(env.mystnb_config.custom_formats)
    env.executed_records = {}
    for chapter in chapters(root):
        docname = env.path2doc(str(chapter))
        copy = executed_folder(root) / f"{chapter.stem}.ipynb"
        arguments = {"docname": docname, "copy": str(copy), "root": str(root)}
        formats[str(chapter)] = (f"{__name__}.read_copy", arguments, False)
        env.executed_records[docname] = read_record(copy)
    env.mystnb_config = env.mystnb_config.copy(custom_formats=formats)


def read_copy(text: str, docname: str, copy: str, root: str) -> Any:
    """Return the executed copy of a chapter, whose source is `text`.

    One that is missing or stale is a warning, and the page shows the chapter unexecuted.
    """
    chapter, record = Path(root) / f"{docname}.md", read_record(Path(copy))
    unexecuted = read_myst_markdown_notebook(text, add_source_map=True)
    key = record and execution_key(
        chapter,
        record["profile"],
        record["parameters"],
        Path(root),
        stand_ins=record.get("stand_ins", False),
    )
    if record is None or record["key"] != key:
        problem = "missing" if record is None else "stale: something it depends on has changed"
        remedy = f"the executed copy is {problem}; run `paramspec run {chapter.stem}`"
        LOGGER.warning(remedy, location=docname)
        return unexecuted
    notebook = standard_nb_read(Path(copy).read_text("utf-8"))
    lines = unexecuted.metadata["source_map"]  # warnings then name lines of the source
    for place, cell in enumerate(notebook.cells):
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines.insert(place, lines[place - 1])
            cell.metadata["tags"].append("remove-input")  # the note below the title has them
    notebook.metadata["source_map"] = lines
    for name in (RECORD, "papermill"):  # else they are the page's front matter
        notebook.metadata.pop(name, None)
    return notebook


def add_note(app: Sphinx, doctree: nodes.document) -> None:
    """Put a folded note under a chapter's title: the record of its execution."""
    env: Any = app.env
    record = env.executed_records.get(env.docname)
    if record is None:
        return
    commit: nodes.Node = nodes.Text(_commit(record))
    address = app.config.html_theme_options["repository_url"]
    if record["commit"] and address:
        url = f"{address}/tree/{record['commit']}"
        commit = nodes.reference("", _commit(record), refuri=url, internal=False)
    title = f"Last executed {record['executed']}, profile {record['profile']} ({_commit(record)})"
    note = nodes.admonition("", nodes.title("", title), classes=["dropdown", "last-executed"])
    fields = nodes.field_list()
    for name, shown in [
        ("Commit", commit),
        ("Parameters", nodes.literal("", _pairs(record["parameters"], " = ") or "none")),
        ("Run time", nodes.Text(f"{record['seconds']} s")),
        ("Machine", nodes.Text(record["machine"])),
        ("Versions", nodes.Text(_pairs(record["versions"], " "))),
        *[("Results", nodes.Text(line)) for line in describe_results(record["results"])],
    ]:
        body = nodes.field_body("", nodes.paragraph("", "", shown))
        fields += nodes.field("", nodes.field_name("", name), body)
    note += fields
    place = next(doctree.findall(nodes.section), doctree)
    place.insert(1, _notebook(app, env.docname))  # below the title
    place.insert(1, note)


def _notebook(app: Sphinx, docname: str) -> nodes.paragraph:
    """Links to the chapter as a notebook: itself, and where it can be run."""
    file = f"{docname}.ipynb"
    links = {"Download this notebook": f"{docname.rpartition('/')[2]}.ipynb"}
    found = re.fullmatch(
        r"https://github\.com/(.+)", app.config.html_theme_options["repository_url"]
    )
    if found:  # the branch that `.github/workflows/site.yml` pushes
        at = f"{found[1]}/blob/notebooks/{file}"
        links["Open in Colab"] = f"https://colab.research.google.com/github/{at}"
        links["Open in Binder"] = f"https://mybinder.org/v2/gh/{found[1]}/notebooks?filepath={file}"
    line = nodes.paragraph(classes=["notebook-links"])
    for title, address in links.items():
        line += [nodes.reference("", title, refuri=address, internal=False), nodes.Text(" · ")]
    line.pop()
    return line


class ExecutedChapters(SphinxDirective):
    """`{executed-chapters}`: a table of every chapter's execution."""

    def run(self) -> list[nodes.Node]:
        rows = ["| Chapter | Executed | Profile | Commit | Seconds | Machine |", "|" + "---|" * 6]
        env: Any = self.env
        for docname, record in env.executed_records.items():
            cells = ["not executed", *[""] * 4]
            if record is not None:
                shown = record | {"commit": _commit(record)}
                names = ("executed", "profile", "commit", "seconds", "machine")
                cells = [in_markdown(shown[name]) for name in names]
            rows.append(f"| [](/{docname}.md) | " + " | ".join(cells) + " |")
        return self.parse_text_to_nodes("\n".join(rows))


def in_markdown(text: object) -> str:
    """Return the text in one line, in which Markdown and MyST find no markup: `a_b` as `a\\_b`."""
    return re.sub(r"([!-/:-@[-`{-~])", r"\\\1", " ".join(str(text).split()))


def describe_results(results: dict[str, Any]) -> list[str]:
    """Return a line for each way in which the results of a page were computed, and its models."""
    lines = []
    for group in results["computed"]:
        counts = ", ".join(f"{count} {unit}" for unit, count in group["units"].items())
        days = " to ".join(dict.fromkeys(str(group[end])[:10] for end in ("first", "last")))
        threads = group["hardware"].get("threads")
        lines.append(
            f"{counts}: {days}, {machine(group['hardware'])}, {threads} threads, "
            f"device {group.get('device')}, {_pairs(group['versions'], ' ')}"
        )
    alike: dict[tuple[str | None, str], list[str]] = {}
    for name, facts in results["models"].items():
        alike.setdefault((facts["commit"], " ".join(facts["before"])), []).append(name)
    for (commit, before), names in alike.items():
        at = f", commit {commit}" if commit else ""
        lines.append(f"{', '.join(names)}{at}: {before or 'nothing'} added before each text")
    return lines


def _commit(record: dict[str, Any]) -> str:
    """Return the beginning of the commit, and whether the files differed from it."""
    if record["commit"] is None:
        return "outside git"
    return record["commit"][:10] + (", with uncommitted changes" if record["dirty"] else "")


def _pairs(values: dict[str, Any], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())
