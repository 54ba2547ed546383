"""Rows from where people keep questions: JSON lines, CSV, parquet, and what `datasets` reads.

    rows = read_rows("mine.csv", {"concept": "subject"})
    rows = read_rows("cais/mmlu/all:test", columns_of("mmlu"))

A value is what the file says: nothing here guesses a date, a number or a separator in a text.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paramspec.errors import InputError
from paramspec.plain import read_yaml
from paramspec.seeds import by_hash
from paramspec.specwiki.schema import Question
from paramspec.tables import TIERS

Columns = Mapping[str, str | Sequence[str]]
PRESETS: dict[str, Columns] = {
    "mmlu": {"concept": "subject", "options": "choices"},
    "popqa": {"concept": "subj", "relation": "prop", "aliases": "possible_answers"},
}
FILES = (".csv", ".json", ".jsonl", ".parquet")
NO_COLUMNS: Columns = {}
LISTS = ("options", "aliases", "statements")


class Rows(NamedTuple):
    """Numbers of rows with their values by column, and with what is wrong; `place` is for messages
    after the name of the source: `:{}` of lines, `, row {}` of others.
    """

    place: str
    values: list[tuple[int, dict[str, Any]]]
    problems: list[tuple[int, str]]


def columns_of(text: str) -> Columns:
    """`columns_of("concept=subject,options=A+B+C")`: where each field is, or the name of a preset.

    Names that hold one of these signs are written as YAML: `{concept: "subject, in short"}`.
    """
    if text in PRESETS:
        return PRESETS[text]
    if text.lstrip().startswith("{"):
        found = read_yaml(text, "columns")
    else:
        pairs = [part.partition("=")[::2] for part in text.split(",")]
        found = {field.strip(): column.strip() for field, column in pairs}
        found = {f: column.split("+") if "+" in column else column for f, column in found.items()}
    for field, column in found.items():
        names = column if isinstance(column, list) else [column]
        if field not in Question.model_fields:
            known = ", ".join(Question.model_fields)
            raise InputError(f"columns {text!r}: no field {field!r}; use {known}")
        if not (names and all(isinstance(name, str) and name for name in names)):
            raise InputError(
                f"columns {text!r}: write FIELD=COLUMN, as concept=subject,options=choices, or a "
                f"preset: {', '.join(PRESETS)}"
            )
    return found


def read_rows(source: str | Path, columns: Columns = NO_COLUMNS) -> Rows:
    """The rows of a file or a data set, under the names of fields.

    `source` is a file of JSON lines, of CSV (`.csv`) or of parquet (`.parquet`), a directory, or a
    data set of the hub: `org/name:split`, `org/name/config:split`.

    Raises:
        InputError: if there is no such file or data set, if it is not fetched, or if it has no
            column of a name in `columns`.
    """
    path = Path(source)
    if path.is_file() or path.suffix in FILES:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{source}: cannot be read ({error.strerror}); give a file of questions"
            ) from error
        read = {".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _json_lines)
        rows = read(data)
    else:
        rows = _data_set(str(source), "all" if columns is PRESETS["mmlu"] else None)
    if columns is PRESETS["popqa"]:
        rows = rows._replace(values=_with_distractors(rows.values))
    known = {name for _, values in rows.values for name in values}
    for field, column in columns.items():
        for name in [column] if isinstance(column, str) else column:
            if known and name not in known and name.partition(".")[0] not in known:
                named = ", ".join(sorted(known))
                raise InputError(f"{source}: no column {name!r} for {field}; it has {named}")
    moved = [(number, _renamed(values, columns)) for number, values in rows.values]
    return rows._replace(values=moved)


def _renamed(values: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The values under the names of fields; several columns make a list; `a.b` is within `a`."""

    def of(name: str) -> Any:
        outer, _, inner = name.partition(".")
        if name in values or not inner:
            return values.get(name)
        return (values.get(outer) or {}).get(inner)

    moved: dict[str, Any] = {}
    rest = dict(values)
    for field, column in columns.items():
        names = [column] if isinstance(column, str) else column
        found = [value for value in map(of, names) if value is not None]
        moved[field] = (found or [None])[0] if isinstance(column, str) else found
        for name in names:
            rest.pop(name if name in values else name.partition(".")[0], None)
    letters = [letter for letter in string.ascii_uppercase if letter in rest]
    if letters and "options" not in rest | moved:  # a column for each option
        moved["options"] = [v for v in map(rest.pop, letters) if v is not None]
    return {name: value for name, value in (rest | moved).items() if value is not None}


def _json_lines(data: bytes) -> Rows:
    rows = Rows(":{}", [], [])
    if not data.strip():
        return rows
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        if line.startswith(b"#"):
            continue
        try:
            # Decoded here: given bytes, `json.loads` guesses the encoding.
            values = json.loads(line.decode("utf-8"), object_pairs_hook=_distinct)
            if not isinstance(values, dict):
                raise ValueError("no object")
            rows.values.append((number, values))
        except (ValueError, RecursionError) as error:
            problem = f"not plain JSON ({error}); write one object per line, in UTF-8"
            rows.problems.append((number, problem))
    return rows


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that gives a key twice, of which a reader would take the last."""
    names = [key for key, _ in pairs]
    for key in names:
        if names.count(key) > 1:
            raise ValueError(f"key {key!r} is given twice")
    return dict(pairs)


def _csv(data: bytes) -> Rows:
    """An empty cell is no value; a list is written as JSON writes it."""
    rows = Rows(":{}", [], [])
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = next(lines, [])
        if twice := [name for name in header if header.count(name) > 1]:
            rows.problems.append((1, f"column {twice[0]!r} is given twice"))
            return rows
        for cells in lines:
            if len(cells) > len(header):
                problem = (
                    f"{len(cells)} cells under {len(header)} names; put texts with commas in quotes"
                )
                rows.problems.append((lines.line_num, problem))
            elif any(cells):
                given = zip(header, cells, strict=False)
                values = {name: _cell(name, text) for name, text in given if text != ""}
                rows.values.append((lines.line_num, values))
    except (UnicodeDecodeError, csv.Error) as error:
        rows.problems.append(
            (1, f"not CSV ({error}); write it in UTF-8, texts with commas in quotes")
        )
    return rows


def _cell(name: str, text: str) -> Any:
    """Only a fold and a list are anything but text."""
    if name in LISTS and text.startswith("["):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return int(text) if name == "fold" and text in ("0", "1") else text


def _parquet(data: bytes) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        values = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return Rows(", row {}", [], [(1, f"not parquet ({' '.join(str(error).split())[:160]})")])
    return Rows(", row {}", list(enumerate(values, start=1)), [])


def _data_set(source: str, config: str | None) -> Rows:
    """A directory or a data set of the hub, whose configuration is `config` if none is named."""
    import datasets

    name, _, split = (source, "", "") if Path(source).exists() else source.rpartition(":")
    name, split = (name, split) if name else (split, "")
    if Path(name).exists():
        place: list[str | None] = [name, None]
    else:
        organisation, _, rest = name.partition("/")
        short, _, named = rest.partition("/")
        if not (organisation and short) or organisation in (".", "..", "~"):
            raise InputError(
                f"{source}: no such file or directory, and no data set of the hub, as org/name:test"
            )
        place = [f"{organisation}/{short}", named or config]
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(*place)
    except Exception as error:  # of the network, the hub, the disk, or a reader of files
        line = " ".join(str(error).split())[:240]
        raise InputError(
            f"{source}: not read as a data set ({type(error).__name__}: {line}); correct its name, "
            "connect to the network, or get access to it and run `hf auth login`"
        ) from error
    if split not in found and (split or len(found) > 1):
        named = f"no split {split!r}" if split else "several splits"
        raise InputError(f"{source}: {named}; write {name}:SPLIT, of {', '.join(found)}")
    table = found[split or next(iter(found))]
    of_labels = {
        name: feature
        for name, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel) and name != "answer"  # there, of an option
    }
    rows = Rows(", row {}", [], [])
    for number, values in enumerate(table, start=1):
        for name, feature in of_labels.items():
            if values[name] is not None:
                values[name] = feature.int2str(values[name])
        rows.values.append((number, values))
    return rows


def _with_distractors(
    rows: Sequence[tuple[int, dict[str, Any]]],
) -> list[tuple[int, dict[str, Any]]]:
    """Rows as PopQA's, which have an object and no options, with three other objects of the same
    property, in an order that the row's own id decides; tiers are thirds of the subjects' `s_pop`.
    """
    needed = {"id", "subj", "prop", "obj", "question", "possible_answers", "s_pop"}
    objects: dict[str, set[str]] = {}
    seen: dict[str, float] = {}
    for number, values in rows:
        if lacking := sorted(needed - values.keys()):
            raise InputError(f"row {number}: not a row of PopQA, which has {', '.join(lacking)}")
        objects.setdefault(values["prop"], set()).add(values["obj"])
        seen[values["subj"]] = max(values["s_pop"], seen.get(values["subj"], 0))
    order = sorted(seen, key=lambda name: (-seen[name], name))
    tier = {name: TIERS[3 * place // len(order)] for place, name in enumerate(order)}
    made = []
    for number, values in rows:
        draw = random.Random(by_hash("popqa", values["id"]))
        aliases = json.loads(values["possible_answers"])
        others = sorted(objects[values["prop"]] - {values["obj"], *aliases})
        options = [values["obj"], *draw.sample(others, min(3, len(others)))]
        draw.shuffle(options)
        kept = {name: values[name] for name in ("subj", "prop", "question")}
        kept |= {"id": str(values["id"]), "options": options, "possible_answers": aliases}
        kept |= {"answer": options.index(values["obj"]), "tier": tier[values["subj"]]}
        made.append((number, kept))
    return made
