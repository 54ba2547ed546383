"""The chapters of the book, and the values of their parameters.

A chapter is a MyST notebook `book/X.md` (jupytext). Its cell tagged `parameters` declares them,
`name: type = default`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, create_model

from paramspec.checked import Checked
from paramspec.errors import InputError, naming
from paramspec.plain import read_value, read_yaml


class Parameters(Checked):
    """A chapter's parameters: `3` is a float and an int, `3.0` and `"3"` no int, `1` no bool."""

    model_config = ConfigDict(strict=True)


class Profile(NamedTuple):
    """Chapter name -> parameter -> value. With `stand_ins`, see there, no result is one."""

    chapters: dict[str, dict[str, Any]]
    stand_ins: bool


class Typed(str):
    """A parameter's value as it was typed: the type of the parameter decides what it means."""


def find_root() -> Path:
    """Return the nearest folder at or above this one with a `_toc.yml`, else this checkout."""
    here = Path.cwd()
    for folder in [here, *here.parents, Path(__file__).resolve().parents[2]]:
        if (folder / "_toc.yml").is_file():
            return folder
    raise InputError(f"{here}: no _toc.yml here or above; run this inside the book's checkout")


def toc_pages(root: Path) -> list[Path]:
    """Return the source of every page of `_toc.yml`, in order; InputError for one not there."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    pages = [root / f"{name}.md" for name in parse_toc_yaml(root / "_toc.yml")]
    for page in pages:
        if not page.is_file():
            name = page.relative_to(root)
            raise InputError(f"_toc.yml: page {name} does not exist; add or drop it")
    return pages


def is_chapter(page: Path) -> bool:
    """Return whether a page is an executable notebook, by the jupytext header in front."""
    return "format_name: myst" in page.read_text("utf-8").partition("\n---")[0]


def chapters(root: Path) -> list[Path]:
    """Return the sources of the executable pages of `_toc.yml`, in order."""
    return [page for page in toc_pages(root) if is_chapter(page)]


def find_chapter(name: str, root: Path) -> Path:
    """Return the source of the chapter called `3-masking`, `3` or `book/3-masking.md`."""
    known = {page.stem: page for page in sorted((root / "book").glob("*.md")) if is_chapter(page)}
    asked = Path(name).stem if name.endswith(".md") else name
    matches = [stem for stem in known if asked in (stem, stem.split("-")[0])]
    if len(matches) != 1:
        raise InputError(f"unknown chapter {name!r}; {_choices(name, known)}")
    return known[matches[0]]


def load_profile(profile: str, root: Path) -> Profile:
    """Return a profile by its name or file. One that `extends` another changes what it names."""
    folder = root / "book" / "profiles"
    is_file = profile.endswith((".yaml", ".yml"))
    try:
        text = (Path(profile) if is_file else folder / f"{profile}.yaml").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = _choices(profile, sorted(path.stem for path in folder.glob("*.yaml")))
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"unknown profile {profile!r} ({reason}); {known}") from error
    table = read_yaml(text, f"profile {profile}") or {}
    with naming(f"profile {profile}"):
        if not isinstance(table, dict):
            raise InputError("must map chapters to their parameters and values")
        extended, stand_ins = table.pop("extends", None), table.pop("stand_ins", False)
        if not all(isinstance(values, dict) for values in table.values()):
            raise InputError("must map chapters to their parameters and values")
        for name in table:
            if find_chapter(str(name), root).stem != name:
                raise InputError(f"write the chapter's full name, not {name!r}")
    base = Profile({}, False) if extended is None else load_profile(str(extended), root)
    names = {**base.chapters, **table}
    both = {name: base.chapters.get(name, {}) | table.get(name, {}) for name in names}
    return Profile(both, base.stand_ins or stand_ins is True)


def read_notebook(chapter: Path) -> Any:
    import jupytext

    return jupytext.read(chapter, fmt="md:myst")


def declared_parameters(chapter: Path) -> type[Parameters]:
    """Return the parameters that a chapter declares in its cell tagged `parameters`.

    Papermill's own inspection reads annotations by a pattern that knows no `int | None`.
    """
    cells = read_notebook(chapter).cells
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", [])), "")
    fields: dict[str, Any] = {}
    try:
        for node in ast.parse(source).body:
            if not isinstance(node, ast.AnnAssign) or node.value is None:
                raise ValueError(f"`{ast.unparse(node)}` is not `name: type = value`")
            # The chapter is code that is to be run.
            annotation = eval(ast.unparse(node.annotation), {"Literal": Literal})
            fields[ast.unparse(node.target)] = (annotation, ast.literal_eval(node.value))
    except (SyntaxError, ValueError, NameError, TypeError) as error:
        raise InputError(f"{chapter.name}: parameters cell: {error}") from error
    return create_model("Parameters", __base__=Parameters, **fields)


def check_value(declared: type[Parameters], name: str, value: Any) -> Any:
    """Return a parameter's value as its type has it; a `Typed` one may be YAML or a plain text."""
    if not isinstance(value, Typed):
        return getattr(declared.parse(**{name: value}), name)
    try:
        return check_value(declared, name, read_value(str(value), name))
    except InputError:
        with contextlib.suppress(InputError):  # a model called 2024, or [x]
            return check_value(declared, name, str(value))
        raise


def chapter_values(
    chapter: Path, profile: str, given: Mapping[str, Any], root: Path
) -> dict[str, Any]:
    """Return the value of every parameter of a chapter: given, else the profile's, else its own."""
    declared = declared_parameters(chapter)
    profiled = load_profile(profile, root).chapters.get(chapter.stem, {})
    values = {}
    for place, table in ((f"profile {profile}", profiled), ("-p", given)):
        with naming(f"{place}: chapter {chapter.stem}"):
            for name, value in table.items():
                if name not in declared.model_fields:
                    known = _choices(str(name), declared.model_fields)
                    raise InputError(f"no parameter {name!r}; {known}")
                values[name] = check_value(declared, name, value)
    return declared(**values).model_dump()


def planned_values(
    profile: str, names: Sequence[str], given: Mapping[str, Any], among: Collection[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the values of each named chapter (or of all) that is `among` some, and the others.

    A chapter takes those of the given values that it declares.
    """
    root = find_root()
    pages = [find_chapter(name, root) for name in names] or chapters(root)
    fields = {page: declared_parameters(page).model_fields for page in pages if page.stem in among}
    if not fields:
        known = f"has no chapter that measures models; name one of {', '.join(among)}"
        raise InputError(f"{', '.join(names) or 'the book'} {known}")
    for name in given:
        if not any(name in own for own in fields.values()):
            raise InputError(f"-p {name}: no chapter planned here has such a parameter; correct it")
    values = {}
    for page, own in fields.items():
        declared = {name: value for name, value in given.items() if name in own}
        values[page.stem] = chapter_values(page, profile, declared, root)
    return values, [page.stem for page in pages if page not in fields]


def parse_assignments(pairs: Sequence[str]) -> dict[str, Typed]:
    """Return `["seed=3", "ratios=[0, 0.1]"]` as names and values, for `chapter_values` to read."""
    values: dict[str, Typed] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"-p {pair}: no value; write -p {pair} VALUE")
        if name in values:
            raise InputError(f"-p {name}: given twice, {values[name]!r} and {text!r}; give one")
        values[name] = Typed(text)
    return values


def _choices(name: str, known: Collection[str]) -> str:
    """Return a hint for an unknown name: close matches, else all that are known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of {', '.join(known)}" if known else "there is none to choose from"
