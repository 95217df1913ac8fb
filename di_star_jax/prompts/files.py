# SPDX-License-Identifier: Apache-2.0
"""A prompt file as numbered prompts: .txt, .tsv, .csv, .json, .jsonl or .parquet."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from di_star_jax.errors import UserError

COLUMNS = ("prompt", "Prompt", "caption", "text")  # looked for where the user names none
MAX_LENGTH = 10_000  # characters; longer lines are no prompts


class Prompt(NamedTuple):
    """One prompt: its row in the file, its text, and columns beside it by name.

    Rows count from 0 and leave out a header.
    """

    row: int
    text: str
    categories: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a table, or a list of JSON objects, holds prompts and what belongs to them.

    Args:
      columns: of the prompt; the first that is there.
      keep: further columns, which must be there; None keeps every other column that holds text.
      records: field of a JSON object that holds the list; "" for a file that is a list.
      advice: what to do about missing columns, for the error.
    """

    columns: tuple[str, ...] = COLUMNS
    keep: tuple[str, ...] | None = ()
    records: str = ""
    advice: str = "set data.column to one of them"


# What a reader yields for each row: what should be the prompt, and the columns kept.
Entry = tuple[Any, dict[str, str]]


def read(path: Path, layout: Layout) -> Iterator[Prompt]:
    """Prompts of a file in its order; blank ones left out, outer blanks stripped.

    Args:
      path: .txt (one a line), .tsv (not quoted), .csv (quoted), .json (a list), .jsonl or .parquet.
      layout: of all but .txt.
    Raises: UserError for a column, byte or length that cannot be used.
    """
    for row, (text, kept) in enumerate(READERS[path.suffix](path, layout)):
        _check(path, row, text)
        if text.strip():
            yield Prompt(row, text.strip(), kept)


def _check(
    path: Path,
    row: int,
    text: Any,
) -> None:
    where = f"{path}: row {row}"
    if not isinstance(text, str):
        raise UserError(f"{where} holds {text!r}, expected text; give another column")
    if "\0" in text:
        raise UserError(f"{where} holds a NUL character; save the file as plain UTF-8 text")
    if len(text) > MAX_LENGTH:
        raise UserError(
            f"{where} has {len(text)} characters, expected at most {MAX_LENGTH}; "
            "is it one prompt a line?"
        )


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        byte = raw[error.start]
        raise UserError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n")


def _columns(
    path: Path,
    names: Sequence[str],
    layout: Layout,
) -> tuple[str, tuple[str, ...]]:
    """The prompt's column, and the columns kept."""
    needed = layout.keep or ()
    prompt = next((name for name in layout.columns if name in names), None)
    if prompt is None or not set(needed) <= set(names):
        there = ", ".join(map(str, names))[:200]
        wanted = ", ".join([" or ".join(layout.columns), *needed])
        raise UserError(f"{path} has the columns {there}, expected {wanted}; {layout.advice}")
    if layout.keep is None:
        return prompt, tuple(name for name in names if name != prompt)
    return prompt, layout.keep


def _entry(
    cells: dict[str, Any],
    prompt: str,
    keep: Sequence[str],
) -> Entry:
    values = {name: cells[name] for name in keep}
    return cells[prompt], {
        name: "" if value is None else str(value) for name, value in values.items()
    }


# The standard library's csv and json, since pyarrow's readers refuse short rows, guess types, leave
# out blank lines (and so count other rows) and read no list of strings.


def _lines(path: Path, layout: Layout) -> Iterator[Entry]:
    del layout
    for line in _decode(path).split("\n"):
        yield line, {}


def _tsv(path: Path, layout: Layout) -> Iterator[Entry]:
    # Unquoted, as published lists are: a '"' is part of the prompt.
    rows = (line.split("\t") for line in _decode(path).split("\n") if line)
    return _table(path, rows, layout)


def _csv(path: Path, layout: Layout) -> Iterator[Entry]:
    csv.field_size_limit(2**30)
    return _table(path, csv.reader(io.StringIO(_decode(path), newline="")), layout)


def _table(
    path: Path,
    rows: Iterator[list[str]],
    layout: Layout,
) -> Iterator[Entry]:
    header = next(rows, [])
    prompt, keep = _columns(path, header, layout)
    for row in rows:
        cells = itertools.zip_longest(header, row[: len(header)], fillvalue="")
        yield _entry(dict(cells), prompt, keep)


def _json(path: Path, layout: Layout) -> Iterator[Entry]:
    entries = _parse_json(path)
    if layout.records and isinstance(entries, dict):
        entries = entries.get(layout.records)
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise UserError(f"{path} holds a {kind}, expected a list of prompts or of objects")
    for entry in entries:
        yield _json_entry(path, entry, layout)


def _parse_json(path: Path) -> Any:
    text = _decode(path)
    try:
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        kind = path.suffix[1:].upper()
        raise UserError(f"{path} is not {kind} ({error}); mend the file") from None


def _json_entry(
    path: Path,
    entry: Any,
    layout: Layout,
) -> Entry:
    if isinstance(entry, dict):
        prompt, keep = _columns(path, list(entry), layout)
        if layout.keep is None:
            keep = [name for name in keep if isinstance(entry[name], str)]
        return _entry(entry, prompt, keep)
    if layout.keep:
        raise UserError(
            f"{path} holds {str(entry)[:40]!r}, expected objects with {', '.join(layout.keep)}; "
            f"{layout.advice}"
        )
    return entry, {}


def _parquet(path: Path, layout: Layout) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            prompt, keep = _columns(path, schema.names, layout)
            if layout.keep is None:
                keep = [name for name in keep if _holds_text(schema.field(name).type)]
            # A batch at a time, for files of millions.
            for batch in file.iter_batches(columns=[prompt, *keep]):
                for cells in batch.to_pylist():
                    text, kept = _entry(cells, prompt, keep)
                    yield "" if text is None else text, kept
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not readable as parquet ({reason}); mend the file") from None


def _holds_text(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


READERS = {
    ".txt": _lines,
    ".tsv": _tsv,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
}
