"""The chapters of the book, and the values of their parameters.

    chapter = find_chapter("3", root)                       # book/3-masking.md
    chapter_values(chapter, "paper", {"seed": 7}, root)     # of every parameter, checked
    parse_assignments(["seed=7"])                           # as typed behind -p

A chapter is a MyST notebook `book/X.md` (jupytext). Its cell tagged `parameters` declares them,
`name: type = default`. Imports are light: the Sphinx extension imports this module on every build.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

from paramspec.errors import InputError
from paramspec.plain import read_value, read_yaml


class Parameter(NamedTuple):
    """A parameter as its chapter declares it: `name: annotation = default`."""

    annotation: str
    default: Any


class Typed(str):
    """A parameter's value as it was typed: the type of the parameter decides what it means."""


def find_root() -> Path:
    """Return the nearest folder at or above this one with a table of contents, `_toc.yml`, else
    the checkout that this package runs from; InputError when there is none.
    """
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
            raise InputError(
                f"_toc.yml: page {page.relative_to(root)} does not exist; add or drop it"
            )
    return pages


def is_chapter(page: Path) -> bool:
    """Tell whether a page is an executable notebook, by the jupytext header in front."""
    return "format_name: myst" in page.read_text("utf-8").partition("\n---")[0]


def chapters(root: Path) -> list[Path]:
    """Return the sources of the executable pages of `_toc.yml`, in order."""
    return [page for page in toc_pages(root) if is_chapter(page)]


def find_chapter(name: str, root: Path) -> Path:
    """Return the source of the chapter called `3-masking`, `3` or `book/3-masking.md`.

    Raises InputError, with the closest names, for one that is not there.
    """
    known = {page.stem: page for page in sorted((root / "book").glob("*.md")) if is_chapter(page)}
    asked = Path(name).stem if name.endswith(".md") else name
    matches = [stem for stem in known if asked in (stem, stem.split("-")[0])]
    if len(matches) != 1:
        raise InputError(f"unknown chapter {name!r}; {_choices(name, known)}")
    return known[matches[0]]


def load_profile(profile: str, root: Path) -> dict[str, dict[str, Any]]:
    """Return a profile, chapter name -> parameter -> value, by its name or the path of a YAML file.

    Raises InputError for an unknown profile and for one of another form.
    """
    folder = root / "book" / "profiles"
    is_file = profile.endswith((".yaml", ".yml"))
    try:
        text = (Path(profile) if is_file else folder / f"{profile}.yaml").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        raise InputError(
            f"unknown profile {profile!r} ({reason}); {_choices(profile, names)}"
        ) from error
    table = read_yaml(text, f"profile {profile}") or {}
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise InputError(f"profile {profile}: must map chapters to their parameters and values")
    for name in table:
        if find_chapter(str(name), root).stem != name:
            raise InputError(f"profile {profile}: write the chapter's full name, not {name!r}")
    return table


def read_notebook(chapter: Path) -> Any:
    """Return a chapter's source as a notebook."""
    import jupytext

    return jupytext.read(chapter, fmt="md:myst")


def declared_parameters(chapter: Path) -> dict[str, Parameter]:
    """Return the parameters that a chapter declares in its cell tagged `parameters`.

    Papermill's own inspection reads annotations by a pattern that knows no `int | None`. Raises
    InputError for a parameter without a type, or with a default that is no literal.
    """
    cells = read_notebook(chapter).cells
    source = next((c.source for c in cells if "parameters" in c.metadata.get("tags", [])), "")
    found = {}
    try:
        for node in ast.parse(source).body:
            if not isinstance(node, ast.AnnAssign) or node.value is None:
                raise ValueError(f"`{ast.unparse(node)}` is not `name: type = value`")
            annotation = ast.unparse(node.annotation).strip("'\"")
            default = ast.literal_eval(node.value)
            found[ast.unparse(node.target)] = Parameter(annotation, default)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{chapter.name}: parameters cell: {error}") from error
    return found


def check_value(name: str, parameter: Parameter, value: Any, place: str) -> Any:
    """Return a value of the parameter's type, or raise InputError, which names the place.

    Types are strict: `3` is a float and an int, `3.0` and `"3"` are no int, `1` is no bool. What a
    parameter of texts is given as `Typed` stays as it was typed.
    """
    if not isinstance(value, Typed):
        return _validated(name, parameter, value, place)
    try:
        read = read_value(value, f"{place}: parameter {name}")
        return _validated(name, parameter, read, place)
    except InputError:
        with contextlib.suppress(InputError):  # a model called 2024, or [x]
            return _validated(name, parameter, str(value), place)
        raise


def _validated(name: str, parameter: Parameter, value: Any, place: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    names = {"Literal": Literal, "Optional": Optional, "Union": Union}
    annotation = eval(parameter.annotation, names)  # the chapter is code that is to be run
    try:
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        hint = "; quote a text" if first["type"] == "string_type" else ""
        at = "".join(f"[{step}]" for step in first["loc"] if isinstance(step, int))
        raise InputError(
            f"{place}: parameter {name}{at} must be {parameter.annotation}, "
            f"not {value!r} ({first['msg'].lower()}{hint})"
        ) from error


def chapter_values(
    chapter: Path, profile: str, given: Mapping[str, Any], root: Path
) -> dict[str, Any]:
    """Return the value of every parameter of a chapter: given, else the profile's, else its own.

    Raises InputError for an unknown profile or parameter, and for a value of another type.
    """
    declared = declared_parameters(chapter)
    values = {name: parameter.default for name, parameter in declared.items()}
    profiled = load_profile(profile, root).get(chapter.stem, {})
    for place, table in ((f"profile {profile}", profiled), ("-p", given)):
        place = f"{place}: chapter {chapter.stem}"
        for name, value in table.items():
            if name not in declared:
                raise InputError(
                    f"{place} has no parameter {name!r}; {_choices(str(name), declared)}"
                )
            values[name] = check_value(name, declared[name], value, place)
    return values


def planned_values(
    profile: str, names: Sequence[str], given: Mapping[str, Any], among: Collection[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`values, others = planned_values("paper", [], {}, CHAPTERS)`: of several chapters.

    Args:
        names: of chapters; all of the book's if none is given.
        given: values that go before the profile's, in each chapter that declares them.
        among: the chapters to return values of; the others are listed.

    Raises:
        InputError: if none is left, or if no chapter declares a given parameter.
    """
    root = find_root()
    found = [find_chapter(name, root) for name in names] or chapters(root)
    declared = {page: declared_parameters(page) for page in found if page.stem in among}
    if not declared:
        raise InputError(
            f"profile {profile}: {', '.join(names) or 'the book'} has no chapter that measures "
            f"models; name one of {', '.join(among)}"
        )
    for name in given:
        if not any(name in parameters for parameters in declared.values()):
            raise InputError(f"-p {name}: no chapter planned here has such a parameter; correct it")
    values = {}
    for page, parameters in declared.items():
        own = {name: value for name, value in given.items() if name in parameters}
        values[page.stem] = chapter_values(page, profile, own, root)
    return values, [page.stem for page in found if page not in declared]


def parse_assignments(pairs: Sequence[str]) -> dict[str, Typed]:
    """Return `["seed=3", "ratios=[0, 0.1]"]` as names and values, for `chapter_values` to read.

    Raises InputError for what is not `NAME=VALUE`, and for a name that is given twice.
    """
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
    """Return what to write in place of the unknown `name`: close matches, else everything known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of {', '.join(known)}" if known else "there is none to choose from"
