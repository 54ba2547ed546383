"""Run the chapters of the book, and build its site.

Papermill executes a chapter, with the repository's root as working directory. Its executed copy
carries a record under the notebook metadata key `paramspec`, also of the stored results that it
read, which may be older, and of other machines. A copy is used again only while its key is
unchanged (see `keys`).

`build` runs two chapters at a time, each on half of the cores, since much of a chapter keeps one
core busy. A chapter's front matter says what it needs: `paramspec: {long: true}` starts it before
the others, `paramspec: {alone: true}` after them, with nothing beside it.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from paramspec.errors import InputError, printable
from paramspec.execution.files import atomic, require_writable, writing_to
from paramspec.execution.limits import cores
from paramspec.execution.provenance import USED, computed, machine, used_results
from paramspec_book.kept import DATA
from paramspec_book.keys import RECORD, execution_key, front_matter, read_record
from paramspec_book.parameters import (
    chapter_values,
    chapters,
    declared_parameters,
    find_chapter,
    find_root,
    load_profile,
    read_notebook,
)
from paramspec_book.stand_ins import stand_ins

# Run first in a process that this one starts: it, and what it started, ends if this one is killed.
_WATCH = (
    "from paramspec.execution import ends as _ends; _ends.watch_parent({}); _ends.collect_seldom()"
)


class ChapterFailed(RuntimeError):
    """A chapter raised; the message is one line naming the chapter, the line and the error."""

    exit_status = 3  # of the command line


class SiteFailed(RuntimeError):
    """Jupyter Book did not build the site without warnings."""

    exit_status = 4


def executed_folder(root: Path) -> Path:
    """Return the folder of executed copies: `book/_executed`, or what PARAMSPEC_EXECUTED names."""
    return Path(os.environ.get("PARAMSPEC_EXECUTED") or root / "book" / "_executed")


def run_chapter(
    name: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    profile: str = "default",
    target: Path | None = None,
    force: bool = False,
    root: Path | None = None,
) -> Path:
    """Execute a chapter, and return its executed copy.

    `parameters` take precedence over the profile's. The copy is `target`; else, with parameters,
    in `results/runs/`, so that an experiment never replaces the book's copy; else the book's copy.
    A copy whose key is unchanged is kept, unless `force`. A failed or killed run replaces nothing,
    and stays in `results/unfinished/`.
    """
    import nbformat

    root = root or find_root()
    chapter = find_chapter(name, root)
    values = chapter_values(chapter, profile, parameters or {}, root)
    rehearsed = load_profile(profile, root).stand_ins
    key = execution_key(chapter, profile, values, root, stand_ins=rehearsed)
    scratch = root / "results" / "unfinished" / f"{chapter.stem}-{key[:12]}.ipynb"
    if target is None and parameters:
        target = root / "results" / "runs" / scratch.name
    target = target or executed_folder(root) / f"{chapter.stem}.ipynb"
    if target.suffix != ".ipynb" or target.is_dir():
        raise InputError(f"{target}: not a notebook's name, or a folder; name a file in .ipynb")
    record = read_record(target)
    if record and record["key"] == key and not force:
        print(f"{chapter.stem}: unchanged since {record['executed']}, kept", flush=True)
        return target
    require_writable(target.parent)
    require_writable(scratch.parent)
    print(f"{chapter.stem}: running, profile {profile}", flush=True)
    start, executed = time.monotonic(), datetime.datetime.now(datetime.UTC)
    used, data = (scratch.with_suffix(end).absolute() for end in (".used", ".data"))
    used.unlink(missing_ok=True)
    shutil.rmtree(data, ignore_errors=True)
    with writing_to(scratch.parent):
        environment = _environment(profile, root, used, data)
        notebook = _execute(chapter, values, scratch, root, environment)
    seconds = round(time.monotonic() - start, 1)
    notebook.metadata[RECORD] = {
        "key": key,
        "executed": executed.strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": seconds,
        **{"profile": profile, "stand_ins": rehearsed, "parameters": values},
        "results": used_results(used),
        **_circumstances(root),
    }
    shutil.rmtree(kept := target.with_suffix(".data"), ignore_errors=True)
    if data.exists():
        shutil.move(data, kept)
    with atomic(target) as whole:
        whole.write_text(nbformat.writes(notebook), "utf-8")
    scratch.unlink(missing_ok=True)
    used.unlink(missing_ok=True)
    print(f"{chapter.stem}: {seconds} s -> {os.path.relpath(target, root)}", flush=True)
    return target


def _environment(profile: str, root: Path, used: Path, data: Path) -> dict[str, str]:
    return stand_ins(profile, root) | {
        "PARAMSPEC_PROFILE": profile,  # a chapter shows it next to a verdict
        DATA: str(data),  # gets the tables that a verdict rests on
        USED: str(used),  # gets a line for each stored result that the chapter reads
        "TQDM_DISABLE": "1",  # every refresh of a bar would be a box on the page
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # whatever a user has set
    }


def _execute(
    chapter: Path,
    values: Mapping[str, Any],
    scratch: Path,
    root: Path,
    environment: Mapping[str, str],
) -> Any:
    """Execute a chapter into `scratch` and return the notebook; ChapterFailed when it raises.

    The kernel alone gets the `environment`: this process may run another chapter beside it.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # papermill warns of a parameter typed `int | None`, which its pattern does not see; names and
    # types were checked before.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    declared = declared_parameters(chapter).model_fields
    place = f"the unfinished notebook is {os.path.relpath(scratch, root)}"
    given = {name: value for name, value in values.items() if value != declared[name].default}
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # `python3` is this environment's, not the user's
    # Here, not by papermill, which would move this process, and with it a chapter beside this one.
    moved = f"_os.chdir({str(root.absolute())!a}); _os.environ.update({environment!a})"
    first = f"import os as _os; {moved}; {_WATCH.format(os.getpid())}"
    try:
        with ThreadPoolExecutor(1) as thread:  # in the main one, nbclient takes the signals over
            result = thread.submit(
                papermill.execute_notebook,
                read_notebook(chapter),
                str(scratch).replace("{", "{{").replace("}", "}}"),  # it is a template
                given,
                kernel_name="python3",
                start_timeout=300,
                autosave_cell_every=30,
                progress_bar=sys.stderr.isatty(),
                extra_arguments=[
                    "--log-level=CRITICAL",  # the kernel's own log, not the chapter's
                    "--IPKernelApp.parent_handle=0",  # its own watch ends it, and not its workers
                    f"--IPKernelApp.exec_lines={first}",
                ],
            ).result()
    except (PapermillExecutionError, RuntimeError) as error:
        reason = f"failed: {error}"  # nbclient's: the kernel died, or did not start
        if isinstance(error, PapermillExecutionError):
            line = chapter.read_text("utf-8").partition(error.source)[0].count("\n") + 1
            reason = f"failed ({chapter.name}:{line}): {error.ename}: {error.evalue}"
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", reason).split())
        raise ChapterFailed(f"chapter {chapter.stem} {reason}; {place}") from error
    if result.metadata.papermill.exception:  # as after `sys.exit()`
        raise ChapterFailed(f"chapter {chapter.stem} did not finish; {place}")
    for name in ("input_path", "output_path"):  # papermill notes the whole source, and this machine
        result.metadata.papermill.pop(name, None)
    return result


def git(root: Path, *arguments: str) -> str:
    """Return what git says of the checkout, or "" outside of one."""
    line = ["git", "-C", str(root), *arguments]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def _circumstances(root: Path) -> dict[str, Any]:
    here, commit = computed(), git(root, "rev-parse", "HEAD") or None
    dirty = bool(git(root, "status", "--porcelain")) if commit else None
    about = {"versions": here["versions"], "machine": machine(here["hardware"])}
    return about | {"commit": commit, "dirty": dirty}


def build(
    *,
    profile: str = "default",
    out: Path | None = None,
    force: bool = False,
    root: Path | None = None,
) -> Path:
    """Run every chapter of `_toc.yml`, build the site, and return the folder of its pages.

    Executed copies go to `book/_executed` and the site to `_build/html`; with `out`, to folders of
    these names there. Every chapter is tried before a failing one stops the build; the old site
    then stays. Chapters run side by side, see above.
    """
    root = root or find_root()
    executed = out.resolve() / "_executed" if out else executed_folder(root)
    found = chapters(root)
    for chapter in found:  # a misspelt parameter of the last chapter stops the first
        chapter_values(chapter, profile, {}, root)
    failed: dict[str, ChapterFailed] = {}

    def run(chapter: Path) -> None:
        target = executed / f"{chapter.stem}.ipynb"
        try:
            run_chapter(chapter.stem, profile=profile, target=target, force=force, root=root)
        except ChapterFailed as error:
            print(printable(error), file=sys.stderr, flush=True)
            failed[chapter.stem] = error

    wishes = {chapter: front_matter(chapter.read_text("utf-8")) for chapter in found}
    beside = [chapter for chapter in found if not wishes[chapter].get("alone")]
    beside.sort(key=lambda chapter: not wishes[chapter].get("long"))
    shares = shares_of_cores()
    with ThreadPoolExecutor(len(shares), initializer=lambda: _keep_to(shares.pop())) as pool:
        for _ in pool.map(run, beside):
            pass
    for chapter in found:
        if chapter not in beside:
            run(chapter)
    if failed:
        line = f"the site was not built: {', '.join(failed)} failed, see above"
        raise ChapterFailed(line) from ExceptionGroup("chapters", [*failed.values()])
    return build_site(root, executed, (out.resolve() if out else root) / "_build")


def shares_of_cores() -> list[set[int]]:
    """The cores of each of the chapters that run at once: two halves; or one share of all, where
    there is one core or a GPU, or where the system cannot divide them.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return [set()]
    mine = sorted(os.sched_getaffinity(0))[: cores()]
    return [set(part) for part in (mine[::2], mine[1::2]) if part]


def _keep_to(share: set[int]) -> None:
    """Let this thread, and all that it starts, use these cores alone; none stands for all."""
    if share:
        os.sched_setaffinity(0, share)


def build_site(root: Path, executed: Path, folder: Path) -> Path:
    """Build the site from executed copies, warnings being errors, and return `folder/html`, which
    is replaced only by a whole site.
    """
    start = time.monotonic()
    html, aside = folder / "html", folder / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    require_writable(aside)
    code = f"{_WATCH.format(os.getpid())}; from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", str(root), "--path-output", str(aside)]
    # --all: after a failed build, an incremental one forgets the warnings and succeeds
    command += ["-W", "--keep-going", "-n", "--all", "-q"]
    ours = {"PARAMSPEC_EXECUTED": str(executed), "PYTHONIOENCODING": "utf-8"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    streams |= {"stdin": subprocess.DEVNULL, "encoding": "utf-8", "errors": "replace"}
    result = subprocess.run(command, cwd=root, env=os.environ | ours, **streams)
    new = aside / "_build" / "html"
    if result.returncode or not (new / "index.html").is_file():
        print(result.stdout, file=sys.stderr, flush=True)
        raise SiteFailed("the site was not built: Jupyter Book's warnings and errors are above")
    (new / ".nojekyll").touch()  # else GitHub Pages drops every folder whose name starts with _
    if html.exists():
        html.rename(aside / "old")
    new.rename(html)
    shutil.rmtree(aside)
    print(f"site: {time.monotonic() - start:.1f} s -> {os.path.relpath(html, root)}", flush=True)
    return html
