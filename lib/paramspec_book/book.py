"""Run the chapters of the book, and build its site.

    from paramspec_book import book
    book.run_chapter("3-masking", profile="default")     # -> book/_executed/3-masking.ipynb
    book.run_chapter("3", {"seed": 7})                   # -> results/runs/, the book stays as it is
    book.build(profile="default")                        # every chapter, then _build/html

A chapter is a MyST notebook `book/X.md` (jupytext) whose cell tagged `parameters` holds annotated,
commented assignments. Papermill executes it, with the repository's root as working directory. Its
executed copy carries a record under the notebook metadata key `paramspec`: when, how long, commit,
profile, parameters, digests, versions and machine, and what computed the stored results that it
rests on, which may be older, and of other machines. A copy is used again only while its key, a
digest of everything that the result depends on, is unchanged. What a chapter reads beside the
library and its parameters, its front matter names: `paramspec: {inputs: ["tests/bench/*.py"]}`.

Module imports are light: the Sphinx extension imports this module on every build.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tokenize
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramspec.errors import InputError
from paramspec.execution.ends import out_of_the_main_thread
from paramspec.execution.files import atomic, remove_leftovers, require_writable
from paramspec.execution.provenance import (
    USED,
    hardware,
    machine,
    used_results,
    version_of,
    versions,
)
from paramspec.markup import printable
from paramspec.plain import read_value, read_yaml

# The key in a notebook's metadata that holds the record of its execution, and in a chapter's front
# matter what it reads.
RECORD = "paramspec"
READ_WHOLE = 10_000_000  # bytes of a file that is still read to find out whether it changed
PACKAGES = ("paramspec", "paramspec_book")
VERSIONS = ("torch", "transformers", "numpy", "pandas", "papermill")
# Run first in a process that this one starts: it, and what it started, ends if this one is killed.
_WATCH = "from paramspec.execution.ends import watch_parent as _watch; _watch({})"


class ChapterFailed(RuntimeError):
    """A chapter raised; the message is one line naming the chapter, the line and the error."""

    exit_status = 3  # of the command line


class SiteFailed(RuntimeError):
    """Jupyter Book did not build the site without warnings."""

    exit_status = 4


@dataclass(frozen=True)
class Chapter:
    """An executable page: its name (`3-masking`) and its source (`book/3-masking.md`)."""

    name: str
    source: Path


@dataclass(frozen=True)
class Parameter:
    """A parameter as its chapter declares it: `name: annotation = default  # help`."""

    name: str
    annotation: str
    default: Any
    help: str


# Where things are


def find_root(start: Path | None = None) -> Path:
    """Return the book's root: the nearest folder at or above `start` (default: here) with a table
    of contents, else the checkout this package runs from.

    Raises InputError when there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in [start, *start.parents, Path(__file__).resolve().parents[2]]:
        if (folder / "_toc.yml").is_file() and (folder / "_config.yml").is_file():
            return folder
    raise InputError(
        f"{start}: no _toc.yml and _config.yml here or above; run this inside the book's checkout"
    )


def is_chapter(text: str) -> bool:
    """Tell whether MyST text is an executable notebook, by the jupytext header in front."""
    try:
        header = _front_matter(text)["jupytext"]
        return header["text_representation"]["format_name"] == "myst"
    except (KeyError, TypeError):
        return False


def _front_matter(text: str) -> dict[str, Any]:
    """Return what stands between the two lines of dashes in front; nothing where it is no YAML."""
    if not text.startswith("---"):
        return {}
    try:
        matter = read_yaml(text.split("\n---", 1)[0].removeprefix("---"), "front matter")
    except InputError:
        return {}
    return matter if isinstance(matter, dict) else {}


def toc_pages(root: Path) -> list[Path]:
    """Return the source of every page of `_toc.yml`, in order; InputError for one not there."""
    toc = read_yaml((root / "_toc.yml").read_text("utf-8"), "_toc.yml")

    def files(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (str(node[key]) for key in ("root", "file") if key in node)
            for key in ("parts", "chapters", "sections", "subtrees", "entries"):
                yield from files(node.get(key))
        elif isinstance(node, list):
            for child in node:
                yield from files(child)

    pages = [root / (name if name.endswith(".md") else f"{name}.md") for name in files(toc)]
    for page in pages:
        if not page.is_file():
            raise InputError(
                f"_toc.yml: page {page.relative_to(root)} does not exist; add or drop it"
            )
    return pages


def chapters(root: Path) -> list[Chapter]:
    """Return the executable pages of `_toc.yml`, in order."""
    return [Chapter(p.stem, p) for p in toc_pages(root) if is_chapter(p.read_text("utf-8"))]


def find_chapter(name: str, root: Path) -> Chapter:
    """Return the chapter called `3-masking`, `3`, or by its path `book/3-masking.md`.

    Raises InputError, with the closest names, for one that is not there or is not a notebook.
    """
    path = Path(name)
    if path.suffix == ".md":
        for candidate in (path, root / path, root / "book" / path):
            if candidate.is_file():
                if not is_chapter(candidate.read_text("utf-8")):
                    raise InputError(f"{name}: not a notebook; name a page with a jupytext header")
                return Chapter(candidate.stem, candidate.resolve())
    sources = sorted(p for p in (root / "book").glob("*.md") if is_chapter(p.read_text("utf-8")))
    known = {p.stem: p for p in sources}
    matches = [stem for stem in known if name in (stem, stem.split("-", 1)[0])]
    if len(matches) == 1:
        return Chapter(matches[0], known[matches[0]])
    raise InputError(f"unknown chapter {name!r}; {_choices(name, list(known))}")


def executed_folder(root: Path) -> Path:
    """Return the folder of executed copies: `book/_executed`, or what PARAMSPEC_EXECUTED names."""
    return Path(os.environ.get("PARAMSPEC_EXECUTED") or root / "book" / "_executed")


# Parameters


def load_profile(profile: str, root: Path) -> dict[str, dict[str, Any]]:
    """Return a profile, chapter name -> parameter -> value, by its name or the path of a YAML file.

    Raises InputError for an unknown profile and for one of another form.
    """
    path = Path(profile)
    if path.suffix not in (".yaml", ".yml"):
        folder = root / "book" / "profiles"
        path = folder / f"{profile}.yaml"
        if not path.is_file():
            names = sorted(p.stem for p in folder.glob("*.yaml"))
            raise InputError(f"unknown profile {profile!r}; {_choices(profile, names)}")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile {profile}: cannot be read ({_one_line(error)})") from error
    table = read_yaml(text, f"profile {profile}") or {}
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise InputError(f"profile {profile}: must map chapters to their parameters and values")
    for name in table:
        if find_chapter(str(name), root).name != name:
            raise InputError(f"profile {profile}: write the chapter's full name, not {name!r}")
    return table


def declared_parameters(chapter: Chapter) -> dict[str, Parameter]:
    """Return the parameters that a chapter declares in its cell tagged `parameters`.

    Papermill's own inspection reads annotations by a pattern that knows no `int | None`; this
    reads the cell's syntax, and demands an annotation and a literal default of each parameter.
    Raises InputError for a chapter that declares one without.
    """
    cells = _notebook(chapter).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    source = tagged[0].source if tagged else ""
    where = f"{chapter.source.name}: parameters cell"
    found = {}
    try:
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign):
                names = ", ".join(ast.unparse(target) for target in node.targets)
                raise InputError(f"{where}: {names} has no type; write `{names}: int = ...`")
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                name = ast.unparse(node.target)
                text = ast.unparse(node.annotation).strip("'\"")
                default = ast.literal_eval(node.value)
                found[name] = Parameter(name, text, default, comments.get(node.end_lineno, ""))
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise InputError(f"{where}: not plain assignments ({_one_line(error)})") from error
    return found


def check_parameters(chapter: Chapter, given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the given values, checked against the chapter's declared names and types.

    Types are strict: `3` is a float and an int, `3.0` and `"3"` are no int, `1` is no bool. Of a
    `Typed` value, the type decides: what a parameter of texts is given stays as it was typed.
    `place` says where the values come from, for the message. Raises InputError.
    """
    declared = declared_parameters(chapter)
    checked = {}
    for name, value in given.items():
        if name not in declared:
            raise InputError(
                f"{place}: chapter {chapter.name} has no parameter {name!r}; "
                + _choices(str(name), list(declared))
            )
        where = f"{place}: chapter {chapter.name}"
        if isinstance(value, Typed):
            checked[name] = _check_typed(declared[name], value, where)
        else:
            checked[name] = _check_type(declared[name], value, where)
    return checked


def _check_typed(parameter: Parameter, text: Typed, place: str) -> Any:
    """Return the value that `text` means to a parameter, or raise InputError."""
    try:
        value = read_value(text, f"{place}: parameter {parameter.name}")
        return _check_type(parameter, value, place)
    except InputError:
        with contextlib.suppress(InputError):  # a model called 2024, or [x]
            return _check_type(parameter, str(text), place)
        raise


def _check_type(parameter: Parameter, value: Any, place: str) -> Any:
    """Return `value`, or raise InputError when it is not of the annotated type."""
    import typing

    from pydantic import TypeAdapter, ValidationError

    try:
        names = {name: getattr(typing, name) for name in ("Optional", "Literal", "Union")}
        annotation = eval(parameter.annotation, names)  # the chapter is code that is to be run
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        hint = "; quote a text" if first["type"] == "string_type" else ""
        at = "".join(f"[{step}]" for step in first["loc"] if isinstance(step, int))
        raise InputError(
            f"{place}: parameter {parameter.name}{at} must be {parameter.annotation}, "
            f"not {value!r} ({first['msg'].lower()}{hint})"
        ) from error
    except (NameError, SyntaxError, TypeError) as error:
        raise InputError(
            f"{place}: parameter {parameter.name} has type {parameter.annotation!r}, which is not "
            "made of int, float, bool, str, list, Literal and None"
        ) from error


class Typed(str):
    """A parameter's value as it was typed: what it means is its parameter's to say."""


def parse_assignments(pairs: list[str]) -> dict[str, Typed]:
    """Return `["seed=3", "ratios=[0, 0.1]"]` as names and values, for `check_parameters` to read.

    Raises InputError for what is not `NAME=VALUE`, and for a name that is given twice.
    """
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"-p {pair}: no value; write -p {pair} VALUE")
        if name in values:
            raise InputError(f"-p {name}: given twice, {values[name]!r} and {text!r}; give one")
        values[name] = Typed(text)
    return values


def chapter_values(
    profile: str,
    names: Sequence[str],
    given: Mapping[str, Any],
    among: Collection[str],
    root: Path | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`values, others = chapter_values("paper", [], {}, CHAPTERS)`: a profile's, with all defaults.

    Args:
        names: of chapters; all of the book's if none is given.
        given: go before the profile's, in each chapter that declares them.
        among: the chapters to return values of; the others are listed.

    Raises:
        InputError: if none is left, or if no chapter declares a given parameter.
    """
    root = root or find_root()
    table = load_profile(profile, root)
    found = [find_chapter(name, root) for name in names] or chapters(root)
    wanted = [chapter for chapter in found if chapter.name in among]
    if not wanted:
        raise InputError(
            f"profile {profile}: {', '.join(names) or 'the book'} has no chapter that measures "
            f"models; name one of {', '.join(among)}"
        )
    values, used = {}, set()
    for chapter in wanted:
        declared = declared_parameters(chapter)
        own = {name: value for name, value in given.items() if name in declared}
        used |= own.keys()
        values[chapter.name] = {p.name: p.default for p in declared.values()}
        profiled = table.get(chapter.name, {})
        values[chapter.name] |= check_parameters(chapter, profiled, f"profile {profile}")
        values[chapter.name] |= check_parameters(chapter, own, "-p")
    if unused := [name for name in given if name not in used]:
        raise InputError(
            f"-p {unused[0]}: no chapter planned here has such a parameter; correct it"
        )
    return values, [chapter.name for chapter in found if chapter not in wanted]


# What an executed copy depends on


def source_digest(text: str) -> str:
    """Return the digest of a chapter's text, whatever its line ends."""
    return _digest(text.replace("\r\n", "\n"))


def library_digest() -> str:
    """Return the digest of the library: its code, and the data that it carries."""
    lib = Path(__file__).parents[1]
    found = (path for package in PACKAGES for path in (lib / package).rglob("*"))
    files = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return _digest(*(_file_lines(lib, sorted(files))))


def environment_digest(root: Path) -> str:
    """Return the digest of the installed versions of everything that the two locks name.

    The embedded model is one of these packages, so another release of it changes this digest.
    """
    locks = _read(root / "requirements.lock") + _read(root / "requirements-weights.lock")
    names = re.findall(r"^([\w.-]+)==", locks, re.M)
    return _digest(platform.python_version(), *(f"{name}=={version_of(name)}" for name in names))


def execution_key(text: str, profile: str, parameters: Mapping[str, Any], root: Path) -> str:
    """Return the digest of all that an executed copy of the chapter `text` depends on.

    A parameter that names a file or a folder (a model, a recipe as `FILE.yaml:NAME`, a list as
    `@FILE`) stands for its content, and so do the files that the chapter declares (see
    `declared_inputs`). Raises InputError for an ill-formed declaration.
    """
    inputs = [source_digest(text), library_digest(), environment_digest(root), profile]
    inputs.append(json.dumps(dict(parameters), sort_keys=True))
    for value in _strings(parameters):
        for path in _named_paths(value, root):
            inputs += [f"{value} {line}" for line in _content_lines(path)]
    for pattern in declared_inputs(text):
        for path in sorted(path for path in root.glob(pattern) if path.is_file()):
            inputs += [f"{path.relative_to(root)} {line}" for line in _content_lines(path)]
    return _digest(*inputs)


def declared_inputs(text: str) -> list[str]:
    """Return the files that a chapter reads or executes beside the library and its parameters.

    Its front matter names them by patterns from the root, of which none needs to match:
    `paramspec: {inputs: ["tests/benchmarks/*.py"]}`. Raises InputError for anything else.
    """
    declared = _front_matter(text).get(RECORD, {})
    patterns = declared.get("inputs", []) if isinstance(declared, dict) else None
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise InputError(
            f"front matter: paramspec: {declared!r}: expected {{inputs: [PATTERN, ...]}}"
        )
    for pattern in patterns:
        parts = Path(pattern).parts
        if not parts or Path(pattern).is_absolute() or ".." in parts:
            raise InputError(
                f"front matter: inputs: {pattern!r}: give a pattern from the book's root, as "
                "tests/benchmarks/*.py"
            )
    return patterns


def _named_paths(value: str, root: Path) -> list[Path]:
    """Return the files and folders that a parameter's text names, as a chapter would find them.

    The text may be a path, one behind an `@`, or one before a colon, as in `FILE.yaml:NAME@STEP`.
    A folder that holds the book itself is not meant.
    """
    found = []
    for name in dict.fromkeys((value, value.removeprefix("@"), value.rpartition(":")[0])):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a path after all
            path = (root / Path(name).expanduser()).resolve()
            if name and path.exists() and not root.resolve().is_relative_to(path):
                found.append(path)
    return found


def _content_lines(path: Path) -> list[str]:
    """Return a line for each file of a folder, or for the file: its place in it and its content.

    Of a large file, such as a model's weights, the content is told by size and time of change.
    """
    lines = []
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if not file.is_file():
            continue
        stat = file.stat()
        content = f"{stat.st_size} {stat.st_mtime_ns}"
        if stat.st_size <= READ_WHOLE:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        lines.append(f"{os.path.relpath(file, path)} {content}")
    return lines


def read_record(copy: Path) -> dict[str, Any] | None:
    """Return the record of an executed copy, or None when there is no sound copy."""
    try:
        record = json.loads(copy.read_text("utf-8"))["metadata"][RECORD]
        return record if isinstance(record, dict) and "key" in record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# Running


def run_chapter(
    chapter: str | Chapter,
    parameters: Mapping[str, Any] | None = None,
    *,
    profile: str = "default",
    target: Path | None = None,
    force: bool = False,
    root: Path | None = None,
) -> Path:
    """Execute a chapter, and return its executed copy.

    `parameters` go before the profile's. The copy is `target`; else `results/runs/...` when
    parameters are given, so that an experiment never replaces the book's copy; else the book's
    copy. A copy whose key is unchanged is kept, unless `force`. The target is replaced only by a
    run that succeeded; a failed or killed run stays in `results/unfinished/`.

    Raises InputError before any work for an unknown chapter, profile, parameter, or an ill-typed
    value, and for a target that cannot be written; ChapterFailed when the chapter raises.
    """
    root = root or find_root()
    if isinstance(chapter, str):
        chapter = find_chapter(chapter, root)
    table = load_profile(profile, root)
    values = check_parameters(chapter, table.get(chapter.name, {}), f"profile {profile}")
    values |= check_parameters(chapter, parameters or {}, "-p")
    text = chapter.source.read_text("utf-8")
    defaults = {p.name: p.default for p in declared_parameters(chapter).values()}
    key = execution_key(text, profile, defaults | values, root)
    if target is None:
        custom = root / "results" / "runs" / f"{chapter.name}-{key[:12]}.ipynb"
        target = custom if parameters else executed_folder(root) / f"{chapter.name}.ipynb"
    _check_target(target)
    record = read_record(target)
    if record and record.get("key") == key and not force:
        print(f"{chapter.name}: unchanged since {record['executed']}, kept", flush=True)
        return target
    print(f"{chapter.name}: running, profile {profile}", flush=True)
    start, executed = time.monotonic(), _now()
    scratch = root / "results" / "unfinished" / f"{chapter.name}-{key[:12]}.ipynb"
    used = scratch.with_suffix(".used").absolute()
    used.unlink(missing_ok=True)
    notebook = _execute(chapter, values, scratch, root, profile)
    for name in ("input_path", "output_path"):  # papermill notes the whole source, and this machine
        notebook.metadata.papermill.pop(name, None)
    notebook.metadata[RECORD] = {
        "key": key,
        "chapter": chapter.name,
        "executed": executed,
        "seconds": round(time.monotonic() - start, 1),
        "profile": profile,
        "parameters": defaults | values,
        **_commit(root),
        "source_digest": source_digest(text),
        "library_digest": library_digest(),
        "environment_digest": environment_digest(root),
        "versions": {"python": platform.python_version()} | versions(*VERSIONS),
        "machine": machine(hardware()),
        "results": used_results(used),
    }
    _write(notebook, target)
    scratch.unlink(missing_ok=True)
    used.unlink(missing_ok=True)
    seconds = notebook.metadata[RECORD]["seconds"]
    print(f"{chapter.name}: {seconds} s -> {_shown(target, root)}", flush=True)
    return target


def _execute(
    chapter: Chapter, values: dict[str, Any], scratch: Path, root: Path, profile: str
) -> Any:
    """Execute a chapter into `scratch` and return the notebook; ChapterFailed when it raises."""
    import logging

    import papermill
    from papermill.exceptions import PapermillExecutionError

    # papermill warns of a parameter typed `int | None`, which its pattern does not see; names and
    # types were checked before.
    logging.getLogger("papermill").setLevel(logging.ERROR)

    notebook = _notebook(chapter)
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        raise InputError(f"{chapter.source.name}: kernelspec must name the kernel python3")
    require_writable(scratch.parent)
    place = f"the unfinished notebook is {_shown(scratch, root)}"
    try:
        with _kernel_environment(profile, scratch.with_suffix(".used").absolute()):
            result = out_of_the_main_thread(
                papermill.execute_notebook,
                notebook,
                str(scratch).replace("{", "{{").replace("}", "}}"),  # it is a template
                values,
                cwd=str(root),
                start_timeout=300,
                autosave_cell_every=30,
                progress_bar=sys.stderr.isatty(),
                extra_arguments=[
                    "--log-level=CRITICAL",  # the kernel's own log, not the chapter's
                    "--IPKernelApp.parent_handle=0",  # its own watch ends it, and not its workers
                    f"--IPKernelApp.exec_lines={_WATCH.format(os.getpid())}",
                ],
            )
    except PapermillExecutionError as error:
        raise ChapterFailed(f"chapter {_failure(chapter, scratch, error)}; {place}") from error
    except OSError as error:
        raise InputError(f"{scratch.parent}: cannot be written ({_one_line(error)})") from error
    except RuntimeError as error:  # nbclient: the kernel died, or did not start
        raise ChapterFailed(
            f"chapter {chapter.name} failed: {_one_line(error)}; {place}"
        ) from error
    if result.metadata.papermill.end_time is None or result.metadata.papermill.exception:
        raise ChapterFailed(f"chapter {chapter.name} did not finish; {place}")
    return result


def build(
    *,
    profile: str = "default",
    out: Path | None = None,
    force: bool = False,
    root: Path | None = None,
) -> Path:
    """Run every chapter of `_toc.yml`, build the site, and return the folder of its pages.

    Executed copies go to `book/_executed` and the site to `_build/html`; with `out`, to
    `out/_executed` and `out/_build/html`. Every chapter is tried before a failing one stops the
    build. Raises InputError for bad input, ChapterFailed naming each chapter that failed, and
    SiteFailed; the site that was there before then stays.
    """
    root = root or find_root()
    out = out.resolve() if out else root
    executed = out / "_executed" if out != root else executed_folder(root)
    found = chapters(root)
    table = load_profile(profile, root)
    for chapter in found:  # a misspelt parameter of the last chapter stops the first
        check_parameters(chapter, table.get(chapter.name, {}), f"profile {profile}")
    failures = {}
    for chapter in found:
        target = executed / f"{chapter.name}.ipynb"
        try:
            run_chapter(chapter, profile=profile, target=target, force=force, root=root)
        except ChapterFailed as error:
            print(printable(error), file=sys.stderr, flush=True)
            failures[chapter.name] = error
    if failures:
        raise ChapterFailed(
            f"the site was not built: {', '.join(failures)} failed, see above"
        ) from ExceptionGroup("chapters that failed", list(failures.values()))
    return build_site(root, executed, out / "_build", force=force)


def build_site(root: Path, executed: Path, folder: Path, *, force: bool = False) -> Path:
    """Build the site from executed copies into `folder/html`, warnings being errors; return it.

    Nothing is done when neither pages, copies nor settings changed. The site is built aside and
    takes the old one's place only when it is whole. Raises SiteFailed.
    """
    html, stamp, aside = folder / "html", folder / "site.key", folder / "aside"
    inputs = [p for p in sorted((root / "book").rglob("*")) if p.is_file()]
    inputs = [p for p in inputs if p.suffix != ".ipynb" and "__pycache__" not in p.parts]
    inputs += [root / "_config.yml", root / "_toc.yml", *sorted(executed.glob("*.ipynb"))]
    lines = _file_lines(Path("/"), inputs)
    key = _digest(library_digest(), environment_digest(root), *lines)
    if not force and _read(stamp) == key and (html / "index.html").is_file():
        print("site: unchanged, kept", flush=True)
        return html
    start = time.monotonic()
    shutil.rmtree(aside, ignore_errors=True)
    require_writable(aside)
    # --all: after a failed build, an incremental one forgets the warnings and succeeds
    code = f"{_WATCH.format(os.getpid())}; from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", str(root)]
    command += ["--path-output", str(aside), "-W", "--keep-going", "-n", "--all", "-q"]
    result = subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PARAMSPEC_EXECUTED": str(executed), "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode or not (aside / "_build" / "html" / "index.html").is_file():
        print(result.stdout, file=sys.stderr, flush=True)
        raise SiteFailed("the site was not built: Jupyter Book's warnings and errors are above")
    new = aside / "_build" / "html"
    (new / ".nojekyll").touch()  # else GitHub Pages drops every folder whose name starts with _
    stamp.unlink(missing_ok=True)
    if html.exists():
        os.replace(html, aside / "old")
    os.replace(new, html)
    shutil.rmtree(aside)
    stamp.write_text(key)
    print(f"site: {time.monotonic() - start:.1f} s -> {_shown(html, root)}", flush=True)
    return html


# Helpers


def _failure(chapter: Chapter, scratch: Path, error: Any) -> str:
    """Return `3-masking failed (3-masking.md:120): ValueError: ...` for papermill's error."""
    import nbformat

    cells = [
        cell
        for cell in nbformat.read(scratch, as_version=4).cells
        if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    line = cell_lines(chapter.source.read_text("utf-8"), cells)[error.cell_index] + 1
    message = _one_line(f"{error.ename}: {error.evalue}")
    return f"{chapter.name} failed ({chapter.source.name}:{line}): {message}"


def _notebook(chapter: Chapter) -> Any:
    """Read a chapter's source as a notebook."""
    import jupytext

    return jupytext.reads(chapter.source.read_text("utf-8"), fmt="md:myst")


def cell_lines(text: str, cells: list[Any]) -> list[int]:
    """Return the line of a chapter's text, from 0, on which each cell of its notebook starts.

    `cells` may hold the one that papermill injects after the parameters: it has their line.
    """
    from myst_nb.core.read import read_myst_markdown_notebook

    starts = list(read_myst_markdown_notebook(text, add_source_map=True).metadata["source_map"])
    lines: list[int] = []
    for cell in cells:
        injected = "injected-parameters" in cell.metadata.get("tags", [])
        lines.append(lines[-1] if injected or not starts else starts.pop(0))
    return lines


@contextlib.contextmanager
def _kernel_environment(profile: str, used: Path) -> Iterator[None]:
    """Set what a kernel inherits, and undo it.

    PARAMSPEC_PROFILE: a chapter says beside a verdict which profile it was reached with.
    PARAMSPEC_USED: the file `used` gets a line for each stored result that the chapter reads.
    TQDM_DISABLE: every refresh of a bar would be a box on the page. JUPYTER_PREFER_ENV_PATH: the
    kernel `python3` is the one of this environment, not one that the user has at home.
    MPLBACKEND: set by a user, it would keep figures off the page.
    """
    import tqdm  # noqa: F401  papermill's own progress bar reads the environment at its import

    changed = {
        "PARAMSPEC_PROFILE": profile,
        USED: str(used),
        "TQDM_DISABLE": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": None,
    }
    before = {name: os.environ.get(name) for name in changed}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(changed)
    try:
        yield
    finally:
        put(before)


def _check_target(target: Path) -> None:
    """Raise InputError when `target` cannot be written: before the work, not after it."""
    if target.suffix != ".ipynb":
        raise InputError(f"{target}: not a notebook's name; end it in .ipynb")
    if target.is_dir():
        raise InputError(f"{target}: a folder; choose another place")
    require_writable(target.parent)


def _write(notebook: Any, target: Path) -> None:
    """Write a notebook in one step: a reader sees the old one or the new one."""
    import nbformat

    remove_leftovers(target.parent)
    with atomic(target) as scratch:
        scratch.write_text(nbformat.writes(notebook), "utf-8")


def _commit(root: Path) -> dict[str, Any]:
    """Return the checked-out commit, and whether files differ from it; None outside git."""

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
            return done.stdout.decode().strip() if done.returncode == 0 else None
        return None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _read(path: Path) -> str:
    """Return a file's text, or nothing when there is none."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _digest(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_lines(folder: Path, files: list[Path]) -> list[str]:
    """Return a line for each file, of its place in `folder` and the digest of its content."""
    digests = ((p, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files)
    return [f"{os.path.relpath(p, folder)} {digest}" for p, digest in digests]


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested parameters."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, child in value.items():
            yield from _strings(name)
            yield from _strings(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _strings(child)


def _choices(name: str, known: list[str]) -> str:
    """Return what to write in place of the unknown `name`: close matches, else everything known."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of {', '.join(known)}" if known else "there is none to choose from"


def _one_line(error: object) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())


def _shown(path: Path, root: Path) -> str:
    """Return a path as the user sees it: from the root, where it is inside."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
