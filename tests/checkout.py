"""A checkout of a small book, for tests that run its chapters."""

from __future__ import annotations

import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Words for git, where nobody has told it who commits
COMMIT = ["-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "all"]
HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""


def make_checkout(folder: Path, **chapters: str) -> Path:
    """Write a book of the given chapters, with the repository's settings; return its root."""
    (folder / "book" / "profiles").mkdir(parents=True)
    for name in ("_config.yml", "CITATION.cff", "requirements.lock", "requirements-weights.lock"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "book" / "_assets", folder / "book" / "_assets")
    pages = {
        "index": "# A book\n\nIts chapters.\n\n```{tableofcontents}\n```\n",
        "status": "# Status\n\n```{executed-chapters}\n```\n",
        **{name.replace("_", "-"): text for name, text in chapters.items()},
    }
    (folder / "book" / "references.bib").write_text("")
    for name, text in pages.items():
        (folder / "book" / f"{name}.md").write_text(text)
    names = [name for name in pages if name != "index"]
    toc = "format: jb-book\nroot: book/index\nchapters:\n"
    (folder / "_toc.yml").write_text(toc + "".join(f"  - file: book/{n}\n" for n in names))
    (folder / "book" / "profiles" / "default.yaml").write_text("{}\n")
    return folder
