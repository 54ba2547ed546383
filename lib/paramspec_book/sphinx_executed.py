"""Sphinx extension: a chapter's page shows its executed copy, and says where it comes from.

    sphinx:                                   # in _config.yml
      config: {extensions: [..., paramspec_book.sphinx_executed]}

Sources stay `book/X.md` in the table of contents, so links, edit buttons and warnings name the file
that a person edits; their cells and outputs come from `book/_executed/X.ipynb` (or the folder that
the environment variable PARAMSPEC_EXECUTED names). A copy that is missing, failed or stale is a
warning, which `-W` makes an error. A directive `{executed-chapters}` lists all copies in a table.

Built on myst-nb's custom formats (`nb_custom_formats`), each keyed by the whole path of a chapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.core.read import read_myst_markdown_notebook, standard_nb_read
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from paramspec.execution.provenance import machine
from paramspec.markup import in_markdown
from paramspec_book import book

LOGGER = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the extension; Sphinx calls it."""
    app.connect("builder-inited", register_copies, priority=900)  # myst-nb's own comes before
    app.connect("doctree-read", add_note)
    app.add_directive("executed-chapters", ExecutedChapters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def register_copies(app: Sphinx) -> None:
    """Tell myst-nb to read each chapter by `read_copy`, and keep the copies' records."""
    root = Path(app.srcdir)
    formats = dict(app.env.mystnb_config.custom_formats)
    app.env.executed_records = {}
    for chapter in book.chapters(root):
        docname = app.env.path2doc(str(chapter.source))
        copy = book.executed_folder(root) / f"{chapter.name}.ipynb"
        arguments = {"docname": docname, "copy": str(copy), "root": str(root)}
        formats[str(chapter.source)] = (f"{__name__}.read_copy", arguments, False)
        app.env.executed_records[docname] = book.read_record(copy)
    app.env.mystnb_config = app.env.mystnb_config.copy(custom_formats=formats)


def read_copy(text: str, docname: str, copy: str, root: str) -> Any:
    """Return the executed copy of a chapter's `text`; warn when it is missing, failed or stale.

    Without a copy the page shows the chapter unexecuted.
    """
    remedy = f"run `paramspec run {Path(copy).stem}`"
    try:
        notebook = standard_nb_read(Path(copy).read_text("utf-8"))
    except (OSError, ValueError) as error:
        problem = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({error})"
        LOGGER.warning("the executed copy is %s; %s", problem, remedy, location=docname)
        return read_myst_markdown_notebook(text, add_source_map=True)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    record = book.read_record(Path(copy))
    if any(output.output_type == "error" for output in outputs):
        LOGGER.warning("the executed copy holds an error; %s", remedy, location=docname)
    elif record is None or record["key"] != book.execution_key(
        text, record["profile"], record["parameters"], Path(root)
    ):
        LOGGER.warning(
            "the executed copy is stale: the chapter, the library, the environment or the data "
            "changed since; %s",
            remedy,
            location=docname,
        )
    # Warnings then name lines of the source, and the record stays out of the page's front matter.
    notebook.metadata["source_map"] = book.cell_lines(text, notebook.cells)
    for key in (book.RECORD, "papermill"):
        notebook.metadata.pop(key, None)
    return notebook


def add_note(app: Sphinx, doctree: nodes.document) -> None:
    """Put a folded note under a chapter's title: when, where and from what it was executed."""
    docname = app.env.docname
    record = app.env.executed_records.get(docname)
    if record is None:
        return
    url = app.config.html_theme_options["repository_url"]
    branch = app.config.html_theme_options["repository_branch"]
    at = f" at {record['commit'][:7]}" if record["commit"] else ""
    title = f"Last executed {record['executed']}{at}, profile {record['profile']}"
    note = nodes.admonition(classes=["dropdown", "last-executed"])
    note += nodes.title("", title)
    fields = nodes.field_list()
    for name, value in [
        ("Source", _link(f"{docname}.md", f"{url}/blob/{branch}/{docname}.md")),
        ("Commit", _commit(record, url)),
        ("Parameters", _parameters(record)),
        ("Run time", nodes.Text(f"{record['seconds']} s")),
        ("Machine", nodes.Text(record["machine"])),
        ("Versions", nodes.Text(_pairs(record["versions"], " "))),
        *[("Results", nodes.Text(text)) for text in _results(record.get("results"))],
    ]:
        body = nodes.field_body("", nodes.paragraph("", "", value))
        fields += nodes.field("", nodes.field_name("", name), body)
    note += fields
    section = next(doctree.findall(nodes.section), doctree)
    section.insert(1 if isinstance(section, nodes.section) else 0, note)


class ExecutedChapters(SphinxDirective):
    """`{executed-chapters}`: a table of every chapter's execution."""

    def run(self) -> list[nodes.Node]:
        """Return the table; a chapter without a copy says so."""
        url = self.config.html_theme_options["repository_url"]
        rows = ["| Chapter | Executed | Profile | Commit | Seconds | Machine |", "|" + "---|" * 6]
        for docname, record in self.env.executed_records.items():
            link = f"[](/{docname}.md)"
            if record is None:
                rows.append(f"| {link} | not executed | | | | |")
                continue
            commit = _commit(record, url)
            shown = commit.astext()
            if isinstance(commit, nodes.reference):
                shown = f"[{shown}]({commit['refuri']})"
            cells = [in_markdown(record["executed"]), in_markdown(record["profile"]), shown]
            cells += [str(record["seconds"]), in_markdown(record["machine"])]
            rows.append(f"| {link} | " + " | ".join(cells) + " |")
        return self.parse_text_to_nodes("\n".join(rows))


def _commit(record: dict[str, Any], url: str) -> nodes.Node:
    """Return the commit as a link, and whether the files differed from it."""
    if record["commit"] is None:
        return nodes.Text("outside git")
    changed = ", with uncommitted changes" if record["dirty"] else ""
    return _link(record["commit"][:10] + changed, f"{url}/tree/{record['commit']}")


def _parameters(record: dict[str, Any]) -> nodes.Node:
    text = _pairs(record["parameters"], " = ")
    return nodes.literal("", text) if text else nodes.Text("none")


def _results(results: dict[str, Any] | None) -> list[str]:
    """Return a line for each way in which the results of a page were computed, and its models."""
    if not results:  # the copy is of another version of the library, and stale
        return []
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


def _pairs(values: dict[str, Any], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _link(text: str, url: str) -> nodes.Node:
    return nodes.reference("", text, refuri=url, internal=False)
